"""From the patched tree to tools and shared libraries.

In: `source/` of a build's folder. Out: `bin/`, `lib/` and the log. cmake resumes what an
interrupted build left; nothing but complete files gets into `bin/` and `lib/`.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mone_edge.errors import MoneEdgeError
from mone_edge.runtime.layout import TOOLS, Layout, cmake_options
from mone_edge.runtime.toolchain import Toolchain, require_space

Progress = Callable[[str], None]

LOG_LINES_SHOWN = 12
# Where there is a ccache: what another build compiled counts, though its folder has another name.
CCACHE = {"CCACHE_BASEDIR": os.sep, "CCACHE_NOHASHDIR": "1"}
STEP = re.compile(r"^\[\s*(\d+%|\d+/\d+)\]")


def compile_tree(
    layout: Layout, toolchain: Toolchain, *, jobs: int | None, progress: Progress
) -> None:
    """Configure, compile and collect. The caller holds the lock.

    Raises:
        MoneEdgeError: no space, or a failed step, with the end of its log.
    """
    require_space(layout.root)
    with layout.log.open("w", encoding="utf-8") as log:
        progress("configuring llama.cpp")
        run_step(configure_command(layout, toolchain), layout, log.write, progress)
        progress("compiling llama.cpp")
        run_step(build_command(layout, toolchain, jobs), layout, log.write, progress)
    collect(layout)
    shutil.rmtree(layout.build, ignore_errors=True)


def configure_command(layout: Layout, toolchain: Toolchain) -> list[str]:
    """The cmake command that configures `build/`; Ninja where there is one, as it is quicker."""
    named = {**cmake_options(layout.variant), **toolchain.options()}
    options = [f"-D{name}={value}" for name, value in named.items()]
    options.append(f"-DLLAMA_BUILD_COMMIT={layout.build_key}")
    command = [toolchain.cmake, "-S", str(layout.source), "-B", str(layout.build), *options]
    if toolchain.ninja and "CMAKE_GENERATOR" not in os.environ:
        command += ["-G", "Ninja"]
    return command


def build_command(layout: Layout, toolchain: Toolchain, jobs: int | None) -> list[str]:
    """The cmake command that compiles the libraries and tools, and nothing else."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        toolchain.cmake, "--build", str(layout.build), "--config", "Release",
        "--parallel", str(jobs or cores or 1), "--target", "llama", "mtmd", *TOOLS,
    ]  # fmt: skip


def run_step(
    command: list[str], layout: Layout, write: Callable[[str], object], progress: Progress
) -> None:
    """Run one command, its output to the log and its step counter to `progress`.

    Raises:
        MoneEdgeError: it failed; names the log and quotes its last lines.
    """
    write(f"$ {' '.join(command)}\n")
    last_lines: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", cwd=layout.root, env={**CCACHE, **os.environ},
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                write(line)
                last_lines = [*last_lines[1 - LOG_LINES_SHOWN :], line.rstrip()]
                step = STEP.match(line)
                if step:
                    progress(f"compiling llama.cpp {step[1]}")
        except BaseException:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGTERM)  # cmake, and the compilers that it started
            process.wait()
            raise
    if process.returncode != 0:
        tail = "\n".join(f"  {line}" for line in last_lines)
        raise MoneEdgeError(
            f"building llama.cpp failed (exit code {process.returncode}); the whole log is "
            f"{layout.log}, its last lines are:\n{tail}"
        )


def collect(layout: Layout) -> None:
    """Move tools and libraries out of `build/` into `bin/` and `lib/`.

    Raises:
        MoneEdgeError: the build did not make one of them.
    """
    made = layout.build / "bin"
    libraries = sorted(made.glob(layout.library_name("*")))
    tools = [made / name for name in TOOLS]
    wanted = ["ggml", "ggml-base", "ggml-cpu", "llama", "mtmd", *layout.variant.libraries()]
    for name in map(layout.library_name, wanted):
        if made / name not in libraries:
            raise MoneEdgeError(f"the build made no {name}; see {layout.log}")
    for files, target in ((libraries, layout.lib), (tools, layout.bin)):
        place(files, target)


def place(files: list[Path], target: Path) -> None:
    """Copy `files` into a new folder `target`, which appears whole."""
    temporary = target.with_name(f".{target.name}.tmp")
    for folder in (temporary, target):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in files:
        shutil.copy2(file, temporary / file.name)
    temporary.rename(target)
