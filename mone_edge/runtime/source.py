"""From the source distribution to the patched tree.

In: the verified archive and the patches. Out: `source/` and `python/` of the build's folder, each
complete once it has that name. Compiles nothing.
"""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from mone_edge.errors import MoneEdgeError
from mone_edge.paths import exists, parent_folder, real
from mone_edge.runtime.fetch import fetch_sdist
from mone_edge.runtime.layout import Layout
from mone_edge.runtime.upstream import patch_files, read_upstream

ARCHIVE_SUFFIX = ".tar.gz"
PYTHON_PARTS = ("llama_cpp", "PKG-INFO", "LICENSE.md")


def make_source(layout: Layout, *, offline: bool) -> None:
    """Download, extract and patch what `layout` does not have yet. The caller holds the lock.

    Raises:
        MoneEdgeError: no archive, an unsafe or unreadable archive, or a patch that does not apply.
    """
    if layout.source.is_dir() and layout.python.is_dir():
        return
    upstream = read_upstream()
    archive = fetch_sdist(upstream, offline=offline)
    layout.root.mkdir(parents=True, exist_ok=True)
    for abandoned in layout.root.glob(".unpack-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=layout.root, prefix=".unpack-") as folder:
        unpacked = Path(folder)
        extract(archive, unpacked, (upstream.tree, *PYTHON_PARTS))
        tree = unpacked / upstream.tree
        # it points into a repository that is not there, and breaks every git command below it
        (tree / ".git").unlink(missing_ok=True)
        apply_patches(tree, patch_files())
        python = unpacked / "python"
        python.mkdir()
        for part in PYTHON_PARTS:
            (unpacked / part).rename(python / part)
        for made, target in ((python, layout.python), (tree, layout.source)):
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)


def extract(archive: Path, folder: Path, parts: Iterable[str]) -> None:
    """Extract `parts` of a source distribution into `folder`, without its top folder.

    Raises:
        MoneEdgeError: the archive cannot be read, would write outside `folder`, or lacks a part.
    """
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, members=members_of(tar, tuple(parts)), filter="data")
    except (tarfile.TarError, OSError) as error:
        raise MoneEdgeError(f"cannot extract {archive}: {error}") from error
    for part in parts:
        if not (folder / part).exists():
            raise MoneEdgeError(f"{archive} has no {part}; remove it to download it again")


def members_of(tar: tarfile.TarFile, parts: tuple[str, ...]) -> Iterator[tarfile.TarInfo]:
    """The members of `tar` below one of `parts`, renamed to be relative to the top folder."""
    for member in tar:
        path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
        if any(path.is_relative_to(part) for part in parts):
            yield member.replace(name=str(path), deep=False)


def apply_patches(tree: Path, patches: list[Path]) -> None:
    """Apply `patches` in order to `tree`.

    Raises:
        MoneEdgeError: there is no program to do it, or a patch does not apply cleanly.
    """
    command = patch_command()
    # no repository around the tree may change what "git apply" takes the paths relative to
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent), "LC_ALL": "C"}
    for patch in patches:
        result = subprocess.run(
            [*command, str(patch)], cwd=tree, env=environment, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if result.returncode != 0:
            output = " ".join(result.stdout.split())
            raise MoneEdgeError(f"{patch.name} does not apply: {output[-300:]}")


def patch_command() -> list[str]:
    """The program that applies a patch file, given as the last argument."""
    if shutil.which("git"):
        return ["git", "apply", "--whitespace=nowarn"]
    if shutil.which("patch"):
        return ["patch", "-p1", "--batch", "--forward", "--fuzz=0", "--no-backup-if-mismatch", "-i"]
    raise MoneEdgeError("neither git nor patch is installed; type: sudo apt install patch")


def export_tree(tree: Path, out: Path, *, force: bool) -> Path:
    """Copy `tree` to a folder, or pack it into a `.tar.gz` whose one top folder is named alike.

    Raises:
        MoneEdgeError: `out` exists and `force` is not set, it is something else than such a tree
            or archive, or it cannot be written.
    """
    if exists(real(out)):
        _require_replaceable(tree, out, force)
    try:
        with (
            parent_folder(out) as folder,
            tempfile.TemporaryDirectory(dir=folder, prefix=".mone-edge-") as scratch,
        ):
            made = Path(scratch) / out.name
            if out.name.endswith(ARCHIVE_SUFFIX):
                with tarfile.open(made, "w:gz", compresslevel=6) as tar:
                    tar.add(tree, arcname=out.name.removesuffix(ARCHIVE_SUFFIX))
            else:
                shutil.copytree(tree, made, symlinks=True)
            remove(out)
            made.rename(out)
    except OSError as error:
        raise MoneEdgeError(f"cannot write {out}: {error.strerror or error}") from error
    return out


def _require_replaceable(tree: Path, out: Path, force: bool) -> None:
    there = real(out)
    if out.name.endswith(ARCHIVE_SUFFIX) != there.is_file():
        raise MoneEdgeError(f"{out} is not what this command writes, and is left alone")
    for path in sorted(there.rglob("*")):
        if not os.path.lexists(tree / path.relative_to(there)):
            raise MoneEdgeError(
                f"{out} holds {path.relative_to(there)}, which the source tree does not, and is "
                "left alone; remove it yourself, or name another"
            )
    if not force:
        raise MoneEdgeError(f"{out} exists; name another, or replace it with --force")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
