"""Where a build is kept, under which key, and who may write there.

One folder per content key, `<cache>/runtime/<version>-<key>/`:

    source/        the patched llama.cpp tree           (complete once it has this name)
    python/        the Python package of llama-cpp-python, unpatched
    build/ build.log                                    (build/ goes when the build is done)
    bin/ lib/      tools and shared libraries
    *.whl          llama-cpp-python with these libraries
    built.json     written last: the build is complete

An interrupted build leaves everything but `built.json`, and the next one goes on from there. A
build for another machine ends with `bin/` and `lib/` alone: the folder is there to be copied.
"""

import fcntl
import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mone_edge.paths import cache_dir
from mone_edge.runtime.targets import NATIVE, Variant
from mone_edge.runtime.upstream import read_upstream, source_digest

TOOLS = (
    "llama-bench",
    "llama-perplexity",
    "llama-cli",
    "llama-completion",
    "llama-server",
    "llama-quantize",
    "llama-imatrix",
    "llama-gguf-split",
)

# Static linking, tests, examples and the web page would lengthen the build; an unversioned
# library name makes each library one file, which can be copied without its symbolic links.
CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN;$ORIGIN/../lib",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_NUMBER": "0",
}

# A Mac's loader has another word for the folder of a library, and there llama.cpp would compute on
# the graphics processor and with Apple's BLAS unasked.
MAC_OPTIONS = {
    "CMAKE_INSTALL_RPATH": "@loader_path;@loader_path/../lib",
    "GGML_METAL": "OFF",
    "GGML_BLAS": "OFF",
}

# the instruction sets that a native build may use; other CPU flags change with the kernel
ISA_PREFIXES = (
    "sse", "ssse", "avx", "amx", "fma", "f16c", "bmi",
    "asimd", "sve", "sme", "i8mm", "bf16", "fphp",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The paths of one build."""

    version: str
    build_key: str
    root: Path
    variant: Variant = NATIVE

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def python(self) -> Path:
        return self.root / "python"

    @property
    def build(self) -> Path:
        return self.root / "build"

    @property
    def log(self) -> Path:
        return self.root / "build.log"

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    @property
    def lib(self) -> Path:
        return self.root / "lib"

    @property
    def marker(self) -> Path:
        return self.root / "built.json"

    def library(self, name: str) -> Path:
        """Path of a shared library, `name` without prefix and suffix ("ggml-base")."""
        return self.lib / self.library_name(name)

    def library_name(self, name: str) -> str:
        """File name of the shared library `name` where the build runs."""
        return library_name(name) if self.variant.is_native else f"lib{name}.so"

    def is_built(self) -> bool:
        """Whether the build is complete: its marker and all that the marker names are there."""
        try:
            names = json.loads(self.marker.read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError):
            return False
        return all((self.root / name).is_file() for name in names)


def library_name(name: str) -> str:
    """File name of the shared library `name` on this system."""
    suffix = "dylib" if platform.system() == "Darwin" else "so"
    return f"lib{name}.{suffix}"


def runtime_dir() -> Path:
    """The folder of all builds and of the downloaded source."""
    return cache_dir() / "runtime"


def layout_of(variant: Variant) -> Layout:
    """The layout of `variant` for the present pin, patches, options and (if native) machine."""
    upstream = read_upstream()
    traits = machine_traits() if variant.is_native else [variant.target]
    options = json.dumps([cmake_options(variant), TOOLS, traits], sort_keys=True)
    key = hashlib.sha256((source_digest() + options).encode()).hexdigest()[:12]
    root = runtime_dir() / f"{upstream.version}-{key}"
    return Layout(upstream.version, key, root, variant)


def cmake_options(variant: Variant) -> dict[str, str]:
    """The cmake options of `variant`, without those that name places on this machine."""
    mac = MAC_OPTIONS if variant.is_native and platform.system() == "Darwin" else {}
    return {**CMAKE_OPTIONS, **mac, **variant.options()}


def machine_traits() -> list[str]:
    """What a native build depends on: system, processor family, instruction sets."""
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags = {flag for flag in value.split() if flag.startswith(ISA_PREFIXES)}
                break
    return [platform.system(), platform.machine(), *sorted(flags)]


@contextmanager
def locked(name: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold an inter-process lock; `on_wait` is called once if another process holds it."""
    folder = runtime_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
