"""Where things are kept, and how files come to be: whole, or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mone_edge.errors import MoneEdgeError


def cache_dir() -> Path:
    """The user's cache folder of this project (`$MONE_EDGE_CACHE`, else the XDG cache folder)."""
    override = os.environ.get("MONE_EDGE_CACHE")
    if override:
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mone-edge"


def require_writable(target: Path, *, force: bool) -> None:
    """Refuse now what would otherwise fail after hours of work.

    Raises:
        MoneEdgeError: `target` exists and `force` is not given, or its folder cannot be written.
    """
    if target.is_dir():
        raise MoneEdgeError(f"{target} is a folder; name a file")
    if target.exists() and not force:
        raise MoneEdgeError(
            f"{target} exists; add --force to replace it, or name another --outfile"
        )
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MoneEdgeError(f"cannot write in {folder}: {error.strerror}") from error


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; it becomes `target` only if the block succeeds.

    Raises:
        MoneEdgeError: the system refused the write (full disk, missing rights); nothing is left.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise MoneEdgeError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
