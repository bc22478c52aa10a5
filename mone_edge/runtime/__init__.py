"""The patched llama.cpp: fetched by version and digest, patched, built once, found again.

In: the pin and the patches of this project. Out: tools, libraries, the patched source tree (with
llama.cpp's own converter) and an importable `llama_cpp`. Nothing here knows about models.
"""

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mone_edge.errors import MoneEdgeError, RuntimeMissing, UsageError
from mone_edge.runtime.compile import compile_tree
from mone_edge.runtime.install import (
    PATCH_SYMBOL,
    exports_patch,
    install_package,
    installed_key,
    make_wheel,
    package_lib_dir,
)
from mone_edge.runtime.layout import TOOLS, Layout, layout_of, library_name, locked
from mone_edge.runtime.source import export_tree, make_source
from mone_edge.runtime.targets import BACKENDS, NATIVE, Variant, variant_of
from mone_edge.runtime.toolchain import find_toolchain

__all__ = [
    "RuntimeInfo",
    "RuntimeMissing",
    "build",
    "export_source",
    "ggml_library",
    "info",
    "llama_library",
    "load",
    "prepare_source",
    "source_tree",
    "tool",
]

Progress = Callable[[str], None]

BUILD_HINT = "type: mone-edge runtime build"
WHEEL_PATTERN = "llama_cpp_python-*.whl"

# the library holds only a pointer to it
_log_callback: object = None


@dataclass(frozen=True)
class RuntimeInfo:
    """What there is of the runtime on this machine.

    Attributes:
        version: of llama-cpp-python, whose llama.cpp is patched.
        build_key: digest of pin, patches, options and machine.
        built: whether that very build is complete.
        patched: whether the library at hand (the built one, else the installed one) is patched.
        installed: whether `import llama_cpp` gives that very build.
        root: folder of the build.
        tools: programs by name, empty if not built.
        library: the llama library at hand, if any.
        backend: what the build computes on.
        target: the machine it is built for.
    """

    version: str
    build_key: str
    built: bool
    patched: bool
    installed: bool
    root: Path
    tools: dict[str, Path]
    library: Path | None
    backend: str
    target: str


def info(*, backend: str | None = None, target: str = "native") -> RuntimeInfo:
    """What is built and installed; reads a few files, starts and loads nothing.

    Args:
        backend: None is the one whose build this environment uses, "cpu" if it uses none.
        target: the machine that the build is for.

    Raises:
        UsageError: there is no such backend or target, or they do not go together.
    """
    if backend is None and target == "native":
        place = current_layout()
    else:
        place = layout_of(variant_of(target, backend or "cpu"))
    return info_of(place)


def info_of(place: Layout) -> RuntimeInfo:
    """What is built in `place`, and whether it is what this environment uses."""
    built = place.is_built()
    library = place.library("llama") if built else installed_library()
    return RuntimeInfo(
        version=place.version,
        build_key=place.build_key,
        built=built,
        patched=library is not None and exports_patch(library),
        installed=installed_key() == place.build_key,
        root=place.root,
        tools={name: place.bin / name for name in TOOLS} if built else {},
        library=library,
        backend=place.variant.backend,
        target=place.variant.target,
    )


def build(
    *,
    jobs: int | None = None,
    backend: str = "cpu",
    target: str = "native",
    ndk: Path | None = None,
    force: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> RuntimeInfo:
    """Fetch, patch, compile and install; what has been done before is not done again.

    A native build becomes the one that this environment uses. One for another target is left in
    its folder, `bin/` and `lib/`, to be copied.

    Args:
        jobs: compilers at a time, all cores by default.
        backend: what to compute on, a key of `targets.BACKENDS`.
        target: the machine to build for, a key of `targets.TARGETS`.
        ndk: folder of Android's NDK, for the android targets; ANDROID_NDK by default.
        force: build anew even if the build is complete.
        offline: do not download anything.
        progress: is told, in a few words, what is going on.

    Raises:
        UsageError: a backend or target that is not supported.
        MoneEdgeError: a step failed; the message says which, why, and where its log is.
    """
    place = layout_of(variant_of(target, backend))
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs is {jobs}, must be at least 1")
    report = progress or (lambda _: None)
    with held(place, report):
        _restore(place)
        if force or not place.is_built():
            toolchain = find_toolchain(place.variant, ndk=ndk)
            with _set_aside(place, force):
                report("preparing the source of llama.cpp")
                make_source(place, offline=offline)
                compile_tree(place, toolchain, jobs=jobs, progress=report)
                finish(place)
        if place.variant.is_native and installed_key() != place.build_key:
            report("installing llama-cpp-python")
            install_package(place, next(place.root.glob(WHEEL_PATTERN)), offline=offline)
    return info_of(place)


@contextlib.contextmanager
def _set_aside(place: Layout, anew: bool) -> Iterator[None]:
    """With `anew`, build in an empty folder; what was built before comes back if that fails."""
    if not anew or not place.is_built():
        yield
        return
    old = _aside(place)
    place.root.rename(old)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the error names it
            place.log.replace(old / place.log.name)
        _restore(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _aside(place: Layout) -> Path:
    return place.root.with_name(f".{place.root.name}.old")


def _restore(place: Layout) -> None:
    """Bring back what `_set_aside` put aside, unless there is a newer build."""
    old = _aside(place)
    if old.exists() and not place.is_built():
        shutil.rmtree(place.root, ignore_errors=True)
        old.rename(place.root)
    shutil.rmtree(old, ignore_errors=True)


def finish(place: Layout) -> None:
    """Make what goes with the tools, or clear away what does not, and mark the build complete."""
    if place.variant.is_native:
        make_wheel(place)
    write_marker(place)
    if not place.variant.is_native:
        shutil.rmtree(place.source, ignore_errors=True)
        shutil.rmtree(place.python, ignore_errors=True)


def prepare_source(*, offline: bool = False, progress: Progress | None = None) -> Path:
    """The patched llama.cpp tree, fetched and patched if need be; compiles nothing.

    Raises:
        MoneEdgeError: the source cannot be had, or a patch does not apply.
    """
    place = current_layout()
    if not place.source.is_dir():
        report = progress or (lambda _: None)
        with held(place, report):
            report("preparing the source of llama.cpp")
            make_source(place, offline=offline)
    return place.source


def export_source(
    out: Path, *, force: bool = False, offline: bool = False, progress: Progress | None = None
) -> Path:
    """Write the patched llama.cpp tree to `out`, to be compiled elsewhere.

    Args:
        out: a new folder, or a new file whose name ends in `.tar.gz`.
        force: replace `out` if it exists.
        offline: do not download anything.
        progress: is told, in a few words, what is going on.

    Raises:
        MoneEdgeError: `out` exists or cannot be written, or the source cannot be had.
    """
    tree = prepare_source(offline=offline, progress=progress)
    return export_tree(tree, out, force=force)


def source_tree() -> Path:
    """The patched llama.cpp tree, with its `conversion/` and `gguf-py/`.

    Raises:
        RuntimeMissing: it has not been prepared.
    """
    source = current_layout().source
    if not source.is_dir():
        raise RuntimeMissing(f"the patched llama.cpp is not here yet; {BUILD_HINT}")
    return source


def tool(name: str) -> Path:
    """Path of a llama.cpp program, such as "llama-bench".

    Raises:
        RuntimeMissing: the runtime is not built.
        MoneEdgeError: the runtime has no such program.
    """
    if name not in TOOLS:
        raise MoneEdgeError(f"no tool {name!r}; there are {', '.join(TOOLS)}")
    return built_layout().bin / name


def ggml_library() -> Path:
    """The library with ggml's quantisers (`ggml_quantize_chunk`), for ctypes.

    Raises:
        RuntimeMissing: the runtime is not built.
    """
    return built_layout().library("ggml-base")


def llama_library() -> Path:
    """The llama library, for ctypes.

    Raises:
        RuntimeMissing: the runtime is not built.
    """
    return built_layout().library("llama")


def load(*, verbose: bool = False) -> ModuleType:
    """Import `llama_cpp`, checked to be patched; llama.cpp is silent unless `verbose`.

    Raises:
        RuntimeMissing: it is not installed, or it is not a patched one.
    """
    library = installed_library()
    if library is None:
        raise RuntimeMissing(f"the patched llama-cpp-python is not installed; {BUILD_HINT}")
    if not exports_patch(library):
        raise RuntimeMissing(
            f"{library.parent.parent} is not a patched llama-cpp-python; {BUILD_HINT}"
        )
    module = importlib.import_module("llama_cpp")
    # LLAMA_CPP_LIB_PATH may have led it to another library
    if not hasattr(importlib.import_module("llama_cpp.llama_cpp")._lib, PATCH_SYMBOL):
        raise RuntimeMissing("LLAMA_CPP_LIB_PATH names an unpatched llama library; unset it")
    set_log(module, verbose=verbose)
    return module


def set_log(module: ModuleType, *, verbose: bool) -> None:
    """Send llama.cpp's log to stderr or nowhere.

    llama-cpp-python's own switch takes warnings for errors, and errors for debug output.
    """
    global _log_callback
    _log_callback = module.llama_log_callback(_show if verbose else _drop)
    module.llama_log_set(_log_callback, None)


def _show(_level: int, text: bytes, _user_data: object) -> None:
    sys.stderr.write(text.decode("utf-8", "replace"))


def _drop(_level: int, _text: bytes, _user_data: object) -> None:
    pass


def installed_library() -> Path | None:
    """The llama library of the installed llama_cpp, if there is one."""
    folder = package_lib_dir()
    library = folder / library_name("llama") if folder else None
    return library if library and library.is_file() else None


def current_layout() -> Layout:
    """The native layout that this environment uses: that of the installed package, else the CPU's.

    The tools and the libraries in use then always come from one build.
    """
    key = installed_key()
    for backend in BACKENDS:
        place = layout_of(Variant(backend=backend))
        if place.build_key == key:
            return place
    return layout_of(NATIVE)


def built_layout() -> Layout:
    """The layout of the complete build.

    Raises:
        RuntimeMissing: there is none.
    """
    place = current_layout()
    if not place.is_built():
        raise RuntimeMissing(f"the patched llama.cpp is not built; {BUILD_HINT}")
    return place


@contextlib.contextmanager
def held(place: Layout, report: Progress) -> Iterator[None]:
    """Hold the lock of a build; file system errors below it become one clear line."""
    try:
        with locked(place.build_key, lambda: report("waiting for another build to end")):
            yield
    except OSError as error:
        raise MoneEdgeError(
            f"cannot build in {place.root}: {error.strerror or error}; "
            "MONE_EDGE_CACHE names another folder"
        ) from error


def write_marker(place: Layout) -> None:
    """Record that the build is complete, and of which files it is made."""
    files = [*place.bin.iterdir(), *place.lib.iterdir(), *place.root.glob(WHEEL_PATTERN)]
    names = sorted(file.relative_to(place.root).as_posix() for file in files)
    temporary = place.marker.with_suffix(".tmp")
    temporary.write_text(json.dumps({"version": place.version, "files": names}), encoding="utf-8")
    temporary.replace(place.marker)
