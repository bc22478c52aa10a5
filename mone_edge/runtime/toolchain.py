"""The programs that a build needs, found before anything is compiled."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from mone_edge.errors import MoneEdgeError

DEBIAN_PACKAGES = {"cmake": "cmake", "C compiler": "gcc", "C++ compiler": "g++", "make": "make"}
FREE_BYTES_NEEDED = 2 << 30


@dataclass(frozen=True)
class Toolchain:
    """The programs of a build; the compilers are those that cmake will find by itself."""

    cmake: str
    ninja: bool


def find_toolchain() -> Toolchain:
    """Find cmake, compilers and make or ninja.

    Raises:
        MoneEdgeError: some are missing; all of them are named, with the packages that have them.
    """
    found = {
        "cmake": find_cmake(),
        "C compiler": first_of(os.environ.get("CC"), "cc", "gcc", "clang"),
        "C++ compiler": first_of(os.environ.get("CXX"), "c++", "g++", "clang++"),
        "make": first_of("ninja", "make", "gmake"),
    }
    missing = [name for name, path in found.items() if path is None]
    if missing:
        packages = " ".join(DEBIAN_PACKAGES[name] for name in missing)
        raise MoneEdgeError(
            f"cannot build llama.cpp: {', '.join(missing)} not found; "
            f"on Debian or Ubuntu type: sudo apt install {packages}"
            + (" (or: pip install cmake)" if "cmake" in missing else "")
        )
    return Toolchain(str(found["cmake"]), ninja=shutil.which("ninja") is not None)


def find_cmake() -> str | None:
    """cmake on the path, or the one that pip put beside this Python."""
    return shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))


def first_of(*names: str | None) -> str | None:
    """The path of the first of `names` (a variable such as CXX may hold options too)."""
    for name in names:
        words = name.split() if name else []
        path = shutil.which(words[0]) if words else None
        if path:
            return path
    return None


def require_space(folder: Path) -> None:
    """Refuse a build that would fill the disk.

    Raises:
        MoneEdgeError: less than 2 GiB are free.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < FREE_BYTES_NEEDED:
        raise MoneEdgeError(
            f"{folder} has {free_bytes / 2**30:.1f} GiB free, a build needs 2; set MONE_EDGE_CACHE "
            "to a folder on another disk"
        )
