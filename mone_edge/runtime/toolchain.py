"""The programs that a build needs, found before anything is compiled."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mone_edge.errors import MoneEdgeError
from mone_edge.runtime.targets import NATIVE, NDK_TOOLCHAIN, Variant

DEBIAN_PACKAGES = {"cmake": "cmake", "C compiler": "gcc", "C++ compiler": "g++", "make": "make"}
FREE_BYTES_NEEDED = 2 << 30


NDK_VARIABLES = ("ANDROID_NDK", "ANDROID_NDK_HOME", "ANDROID_NDK_ROOT")


@dataclass(frozen=True)
class Toolchain:
    """The programs of a build; native compilers are those that cmake will find by itself."""

    cmake: str
    ninja: bool
    ndk: Path | None = None

    def options(self) -> dict[str, str]:
        """The cmake options that name places on this machine; the build key leaves them out."""
        return {"CMAKE_TOOLCHAIN_FILE": str(self.ndk / NDK_TOOLCHAIN)} if self.ndk else {}


def find_toolchain(variant: Variant = NATIVE, *, ndk: Path | None = None) -> Toolchain:
    """Find cmake, make or ninja, and the compilers and headers that `variant` needs.

    Args:
        variant: what is to be built.
        ndk: folder of Android's NDK, where one is needed; else the environment tells.

    Raises:
        MoneEdgeError: some are missing; all of them are named, with the packages that have them.
    """
    cmake, ninja = find_cmake(), shutil.which("ninja") is not None
    missing = missing_programs(variant, cmake)
    if missing:
        packages = " ".join(dict.fromkeys(missing.values()))
        raise MoneEdgeError(
            f"cannot build llama.cpp: {', '.join(missing)} not found; "
            f"on Debian or Ubuntu type: sudo apt install {packages}"
            + (" (or: pip install cmake)" if "cmake" in missing else "")
        )
    return Toolchain(str(cmake), ninja, find_ndk(ndk) if variant.needs_ndk else None)


def missing_programs(variant: Variant, cmake: str | None) -> dict[str, str]:
    """The programs and headers that `variant` needs and this machine lacks, with their packages."""
    found = {"cmake": cmake, "make": first_of("ninja", "make", "gmake")}
    if variant.is_native:
        found["C compiler"] = first_of(os.environ.get("CC"), "cc", "gcc", "clang")
        found["C++ compiler"] = first_of(os.environ.get("CXX"), "c++", "g++", "clang++")
    missing = {name: DEBIAN_PACKAGES[name] for name in DEBIAN_PACKAGES if not found.get(name, "-")}
    for part in variant.parts:
        missing |= {name: deb for name, deb in part.programs.items() if not shutil.which(name)}
        missing |= {name: deb for name, deb in part.headers.items() if not has_header(name)}
    return missing


def has_header(name: str) -> bool:
    """Whether the C++ compiler finds a header (true without a compiler: that is another lack)."""
    compiler = first_of(os.environ.get("CXX"), "c++", "g++", "clang++")
    if compiler is None:
        return True
    command = [compiler, "-E", "-x", "c++", "-include", name, os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_ndk(given: Path | None) -> Path:
    """The folder of Android's NDK: the one given, else the one that the environment names.

    Raises:
        MoneEdgeError: there is none, or the folder is no NDK.
    """
    named = [os.environ[name] for name in NDK_VARIABLES if os.environ.get(name)]
    folder = given or (Path(named[0]) if named else None)
    if folder is None:
        raise MoneEdgeError(
            "an Android build needs Android's NDK: get it from "
            "https://developer.android.com/ndk/downloads, unpack it, and name its folder with "
            "--ndk or ANDROID_NDK"
        )
    if not (folder / NDK_TOOLCHAIN).is_file():
        raise MoneEdgeError(
            f"{folder} is not an Android NDK: it has no {NDK_TOOLCHAIN}; name another folder with "
            "--ndk or ANDROID_NDK"
        )
    return folder.resolve()


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
