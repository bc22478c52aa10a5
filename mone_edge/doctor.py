"""What this machine lacks for the whole road, and the command that mends each lack."""

import importlib.metadata
import shutil
import sys
from dataclasses import dataclass

from mone_edge import runtime
from mone_edge.errors import MoneEdgeError
from mone_edge.machine import memory_bytes
from mone_edge.paths import cache_dir
from mone_edge.runtime.targets import BACKENDS, TARGETS, Variant
from mone_edge.runtime.toolchain import find_cmake, find_toolchain, missing_programs

PACKAGES = {"torch": (2, 6), "transformers": (5, 20), "gguf": (0, 17), "safetensors": (0, 5)}
CACHE_BYTES = 3 << 30  # source tree, build and demo model, with room to work
MEMORY_BYTES = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that is needed; `optional` for what only some commands need."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    optional: bool = False


def examine() -> list[Finding]:
    """Look at everything that the commands rely on; changes nothing."""
    return [
        _python(),
        *(_package(name, least) for name, least in PACKAGES.items()),
        _compilers(),
        _patcher(),
        _runtime(),
        _disk(),
        _memory(),
        _extra("vulkan backend", Variant(backend="vulkan")),
        _extra("aarch64-linux target", Variant("aarch64-linux")),
        _qemu(),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def _package(name: str, least: tuple[int, int]) -> Finding:
    wanted = ".".join(map(str, least))
    fix = f"pip install '{name}>={wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", fix)
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return Finding(name, numbers >= least, version, fix)


def _compilers() -> Finding:
    try:
        found = find_toolchain()
    except MoneEdgeError as error:
        needed = not runtime.info().built
        detail = str(error) if needed else f"{error} (needed only to build again)"
        return Finding("compilers", not needed, detail, "then: mone-edge runtime build")
    return Finding("compilers", True, f"{found.cmake}, {'ninja' if found.ninja else 'make'}")


def _extra(name: str, variant: Variant) -> Finding:
    """What a build other than the native one for the CPU needs."""
    part = next(p for p in variant.parts if p not in (TARGETS["native"], BACKENDS["cpu"]))
    packages = {**part.programs, **part.headers}
    missing = {n: p for n, p in missing_programs(variant, find_cmake()).items() if n in packages}
    fix = f"sudo apt install {' '.join(dict.fromkeys(missing.values()))}"
    detail = f"{', '.join(missing or packages)}{' not found' if missing else ''}"
    return Finding(name, not missing, detail, fix, optional=True)


def _qemu() -> Finding:
    found = shutil.which("qemu-aarch64-static")
    detail = found or "qemu-aarch64-static not found (runs the tests of that target here)"
    fix = "sudo apt install qemu-user-static"
    return Finding("aarch64 emulator", bool(found), detail, fix, optional=True)


def _patcher() -> Finding:
    found = shutil.which("git") or shutil.which("patch")
    return Finding("git or patch", bool(found), found or "neither found", "apt install git")


def _runtime() -> Finding:
    found = runtime.info()
    if found.built and found.installed:
        return Finding("patched llama.cpp", True, f"{found.version} in {found.root}")
    detail = "built, but not in this environment" if found.built else "not built"
    return Finding("patched llama.cpp", False, detail, "mone-edge runtime build")


def _disk() -> Finding:
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return Finding(
        "cache disk",
        free > CACHE_BYTES or runtime.info().built,
        f"{free / 1e9:.1f} GB free at {folder}",
        "set MONE_EDGE_CACHE to a folder on a larger disk",
    )


def _memory() -> Finding:
    total = memory_bytes()
    return Finding("memory", total > MEMORY_BYTES, f"{total / 1e9:.1f} GB", "a larger machine")
