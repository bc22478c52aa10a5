"""What the patched llama.cpp is made from: the pinned source distribution and our patches.

In: `patches/` (UPSTREAM, SERIES, *.patch), from a checkout or from the installed package.
Knows nothing of downloading, compiling or caches.
"""

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from mone_edge.errors import MoneEdgeError

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Upstream:
    """The pinned source: a distribution on PyPI, its digest, and the folder in it that we patch."""

    name: str
    version: str
    sha256: str
    tree: str

    @property
    def sdist_name(self) -> str:
        """File name of the source distribution."""
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


def patches_dir() -> Path:
    """The folder of the patches: beside the package in a checkout, within it when installed.

    Raises:
        MoneEdgeError: neither is there.
    """
    for folder in (PACKAGE_ROOT / "_patches", PACKAGE_ROOT.parent / "patches"):
        if (folder / "UPSTREAM").is_file():
            return folder
    raise MoneEdgeError(
        f"the llama.cpp patches are missing beside {PACKAGE_ROOT}; install mone-edge again"
    )


def read_upstream() -> Upstream:
    """Read the pin (`patches/UPSTREAM`)."""
    pin = tomllib.loads((patches_dir() / "UPSTREAM").read_text(encoding="utf-8"))
    return Upstream(pin["name"], pin["version"], pin["sha256"], pin["tree"])


def patch_files() -> list[Path]:
    """The patches in the order in which they apply (`patches/SERIES`).

    Raises:
        MoneEdgeError: the series names a file that is not there.
    """
    folder = patches_dir()
    names = (folder / "SERIES").read_text(encoding="utf-8").split()
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise MoneEdgeError(f"{folder / 'SERIES'} names {file.name}, which is not there")
    return files


def source_digest() -> str:
    """SHA-256 (hex) of the patched source: of the pin and of every patch."""
    digest = hashlib.sha256(read_upstream().sha256.encode())
    for file in patch_files():
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
