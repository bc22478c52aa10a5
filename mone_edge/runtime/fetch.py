"""The pinned source distribution, from PyPI through pip, into the cache.

Out: a verified file. Knows nothing of what is in it.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mone_edge.errors import MoneEdgeError
from mone_edge.runtime.layout import runtime_dir
from mone_edge.runtime.upstream import Upstream

BLOCK_BYTES = 1 << 20


def fetch_sdist(upstream: Upstream, *, offline: bool) -> Path:
    """The source distribution in the cache, downloaded if it is not there.

    Raises:
        MoneEdgeError: it is not in the cache and `offline` is set, pip failed, or the digest of
            what came is another one.
    """
    target = runtime_dir() / upstream.sdist_name
    if target.is_file() and sha256_of(target) == upstream.sha256:
        return target
    if offline:
        raise MoneEdgeError(
            f"offline, and {upstream.sdist_name} (sha256 {upstream.sha256[:12]}...) is not in the "
            f"cache; go online once, or put the file at {target}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        downloaded = pip_download(upstream, Path(folder))
        digest = sha256_of(downloaded)
        if digest != upstream.sha256:
            raise MoneEdgeError(
                f"{downloaded.name} has sha256 {digest}, expected {upstream.sha256}: not used"
            )
        downloaded.replace(target)
    return target


def pip_download(upstream: Upstream, folder: Path) -> Path:
    """Let pip download the source distribution into `folder`; pip checks the digest as well."""
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{upstream.name}=={upstream.version} --hash=sha256:{upstream.sha256}\n", encoding="utf-8"
    )
    run_pip(
        ["download", "--no-deps", "--no-binary", upstream.name, "--require-hashes",
         "--requirement", str(requirements), "--dest", str(folder)],
        f"cannot download {upstream.name} {upstream.version}",
    )  # fmt: skip
    return folder / upstream.sdist_name


def run_pip(arguments: list[str], failure: str) -> None:
    """Run this environment's pip.

    Raises:
        MoneEdgeError: pip is missing or failed; `failure` and pip's last error line.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    environment = {**os.environ, "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, errors="replace"
    )
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise MoneEdgeError(
            f"{failure}: this environment has no pip; type: {sys.executable} -m ensurepip"
        )
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {result.returncode}"
    raise MoneEdgeError(f"{failure}: {reason}")


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
