"""`mone-edge runtime`: build the patched llama.cpp, or tell what is built."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mone_edge.console import Console, common_options, force_option, offline_option

if TYPE_CHECKING:
    from mone_edge.runtime import RuntimeInfo

SECONDS_BETWEEN_STEPS = 15

target_option = click.option(
    "--target",
    default="native",
    show_default=True,
    help="native, aarch64-linux[-i8mm] or android-arm64[-i8mm].",
)


@click.group("runtime")
def command() -> None:
    """The patched llama.cpp and llama-cpp-python that run pruned models."""


@command.command("build")
@click.option("--backend", default="cpu", show_default=True, help="cpu, vulkan, cuda or metal.")
@target_option
@click.option(
    "--ndk", type=click.Path(path_type=Path), help="Android's NDK [default: $ANDROID_NDK]"
)
@click.option(
    "--jobs", "-j", type=click.IntRange(1), help="Compilers at a time [default: all cores]"
)
@force_option
@offline_option
@common_options
def build(
    console: Console,
    backend: str,
    target: str,
    ndk: Path | None,
    jobs: int | None,
    force: bool,
    offline: bool,
) -> None:
    """Fetch the pinned source, patch it, compile it and install the Python package.

    About 7 minutes on two cores, once: the result is kept in the cache. For another target than
    this machine, the result is a folder of tools and libraries to copy there.

    \b
    mone-edge runtime build
    mone-edge runtime build --backend vulkan
    mone-edge runtime build --target aarch64-linux
    mone-edge runtime build --target android-arm64 --ndk ~/android-ndk-r27c
    """
    from mone_edge import runtime

    done = runtime.build(
        jobs=jobs,
        backend=backend,
        target=target,
        ndk=ndk,
        force=force,
        offline=offline,
        progress=_sparsely(console.info),
    )
    _tell(console, done)


@command.command("info")
@click.option("--backend", help="cpu, vulkan, cuda or metal [default: the one in use]")
@target_option
@common_options
def info(console: Console, backend: str | None, target: str) -> None:
    """Tell what is built, where, and whether this environment uses it."""
    from mone_edge import runtime

    _tell(console, runtime.info(backend=backend, target=target))


@command.command("source")
@click.argument("out", type=click.Path(path_type=Path))
@force_option
@offline_option
@common_options
def source(console: Console, out: Path, force: bool, offline: bool) -> None:
    """Write the patched source of llama.cpp, to compile it elsewhere.

    OUT is a new folder, or a new file whose name ends in .tar.gz.

    \b
    mone-edge runtime source llama.cpp-mone.tar.gz
    """
    from mone_edge import runtime

    path = runtime.export_source(out, force=force, offline=offline, progress=console.info)
    console.result({"outfile": str(path)}, str(path))


def _sparsely(say: Callable[[str], None]) -> Callable[[str], None]:
    """Say what is new at once, and the next step of the same only after a while."""
    last, said = "", 0.0

    def progress(message: str) -> None:
        nonlocal last, said
        what, now = message.rstrip("0123456789/% "), time.monotonic()
        if what != last or now - said >= SECONDS_BETWEEN_STEPS:
            last, said = what, now
            say(message)

    return progress


def _tell(console: Console, found: "RuntimeInfo") -> None:
    document: dict[str, Any] = {k: _plain(v) for k, v in dataclasses.asdict(found).items()}
    lines = [f"{key}: {value}" for key, value in document.items() if key != "tools"]
    lines += [f"{name}: {path}" for name, path in document["tools"].items()]
    console.result(document, "\n".join(lines))


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {k: str(v) for k, v in value.items()}
    return value if isinstance(value, (bool, int, type(None))) else str(value)
