"""Where things are kept, and how files come to be: whole, or not at all."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mone_edge.errors import MoneEdgeError


def cache_dir() -> Path:
    """The user's cache folder of this project (`$MONE_EDGE_CACHE`, else the XDG cache folder)."""
    override = os.environ.get("MONE_EDGE_CACHE")
    if override:
        return expand(override).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mone-edge"


def expand(name: str) -> Path:
    """A path as typed, with `~` resolved where there is such a user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def exists(path: Path) -> bool:
    """Whether something is there; False too for names that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether this is an ordinary file; False too for names that no file can have."""
    return exists(path) and path.is_file()


def require_file(path: Path, kind: str, command: str) -> None:
    """Refuse what is no file.

    Args:
        kind: what it should be, as "plan file".
        command: that makes one, without its `-o`.

    Raises:
        MoneEdgeError: it is a folder, or nothing.
    """
    if exists(path) and path.is_dir():
        raise MoneEdgeError(f"{path} is a folder, not a {kind}; name the file")
    if not is_file(path):
        raise MoneEdgeError(f"no {kind} {path}; make it with: mone-edge {command} -o {path}")


def real(path: Path) -> Path:
    """Where a path leads once its folders are made: `new/../file` is `file`, `new` or not."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return path


def existing_folder(target: Path) -> Path:
    """The folder that a file will be in, or the nearest one above that exists."""
    folder = target.parent
    while not exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def require_writable(target: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse now what would otherwise fail after hours of work; makes nothing.

    Args:
        inputs: files that the command reads, which stay as they are whatever `force` says.

    Raises:
        MoneEdgeError: `target` exists and `force` is not given, is an input, or its folder cannot
            be written.
    """
    if exists(real(target)):
        _require_replaceable(target, force, inputs)
    folder = existing_folder(target)
    try:
        if target.is_symlink() and not exists(target):
            raise MoneEdgeError(f"{target} is a link to {real(target)}; name that")
        _temporary(target).lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise MoneEdgeError(f"cannot write {str(target)[:80]!r}: {why}") from error
    require_writable_folder(folder)


def require_writable_folder(folder: Path) -> None:
    """Refuse a folder in which no file can be made.

    Raises:
        MoneEdgeError: with the system's reason.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MoneEdgeError(f"cannot write in {folder}: {error.strerror}") from error


def _require_replaceable(target: Path, force: bool, inputs: Iterable[Path]) -> None:
    there = real(target)
    if there.is_dir():
        raise MoneEdgeError(f"{target} is a folder; name a file")
    if not there.is_file():
        raise MoneEdgeError(f"{target} is not an ordinary file; name another file")
    if any(is_file(path) and path.samefile(there) for path in inputs):
        raise MoneEdgeError(f"{target} is an input of this command; name another file")
    if not force:
        raise MoneEdgeError(f"{target} exists; add --force to replace it, or name another file")


@contextmanager
def parent_folder(target: Path) -> Iterator[Path]:
    """The folder of `target`, made if it is missing and gone again if the block fails.

    Raises:
        OSError: it cannot be made.
    """
    folder = target.parent
    made = [path for path in (folder, *folder.parents) if not exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _umask() -> int:
    """Which rights new files do not have; the system tells it only to who sets it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; it becomes `target` only if the block succeeds.

    Raises:
        MoneEdgeError: the system refused the write (full disk, missing rights); nothing is left.
    """
    temporary = _temporary(target)
    try:
        with parent_folder(target):
            try:
                yield temporary
                with suppress(OSError):  # a file system without rights
                    temporary.chmod(0o666 & ~_umask())  # safetensors 0.8: for the owner alone
                temporary.replace(target)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MoneEdgeError(f"cannot write {target}: {error.strerror or error}") from error
