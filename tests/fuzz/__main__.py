"""Fuzz the loading of pruned models, or run them under the thread sanitizer: one command.

    python -m tests.fuzz --minutes 30              # address and undefined behaviour sanitizers
    python -m tests.fuzz --sanitizer thread        # every seed as it is, skipping and not

Builds the patched llama.cpp with the sanitizer (minutes; kept in --build) and `fuzz_load.cpp`. The
exit code is 0 if nothing was found; an input that crashes is kept in the build folder.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mone_edge import runtime
from mone_edge.paths import cache_dir
from tests.fuzz import seeds

SANITIZERS = {"address": ["address", "undefined"], "thread": ["thread"]}
OPTIONS = {
    "CMAKE_BUILD_TYPE": "RelWithDebInfo",
    "CMAKE_C_FLAGS_RELWITHDEBINFO": "-O1 -g1",
    "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g1",
    "CMAKE_UNITY_BUILD": "ON",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_OPENMP": "OFF",  # its barriers are opaque to the thread sanitizer
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
ENVIRONMENT = {
    # a header may ask for any size: refusing it is part of the test
    "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=2048:detect_leaks=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:suppressions="
    + str(Path(__file__).with_name("ubsan.supp")),
    "TSAN_OPTIONS": "halt_on_error=1",
}


def build(source: Path, folder: Path, sanitizer: str, jobs: int) -> Path:
    """Compile library and fuzzer; what is up to date is not compiled again."""
    kinds = SANITIZERS[sanitizer]
    # llama.cpp's own switch leaves ggml out; only ggml computes with threads
    names = ("GGML",) if sanitizer == "thread" else ("LLAMA", "GGML")
    parts = [f"{name}_SANITIZE_{kind.upper()}" for name in names for kind in kinds]
    options = OPTIONS | dict.fromkeys(parts, "ON")
    options["CMAKE_PROJECT_ggml_INCLUDE"] = str(Path(__file__).with_name("ndebug.cmake"))
    flags = [f"-D{name}={value}" for name, value in options.items()]
    run(["cmake", "-S", source, "-B", folder, *flags])
    run(["cmake", "--build", folder, "--target", "llama", "--parallel", jobs])
    program = folder / "fuzz_load"
    libraries = folder / "bin"
    run(
        ["c++", "-std=c++17", "-O1", "-g", f"-fsanitize={','.join(kinds)}",
         "-I", source / "include", "-I", source / "ggml" / "include",
         Path(__file__).with_name("fuzz_load.cpp"), "-o", program,
         "-L", libraries, "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    )  # fmt: skip
    return program


def run(command: list[object]) -> None:
    """Run a step of the build; its output is shown."""
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def fuzz(program: Path, files: list[Path], arguments: argparse.Namespace) -> int:
    """Run the fuzzer; keep the input that crashed it."""
    with tempfile.NamedTemporaryFile(suffix=".gguf", dir=memory_folder()) as work:
        begin = time.monotonic()
        command = [program, arguments.minutes * 60, arguments.seed, arguments.threads, work.name]
        done = subprocess.run(
            [str(part) for part in [*command, *files]], env=os.environ | ENVIRONMENT, check=False
        )
        if done.returncode == 0:
            return 0
        kept = program.with_name(f"crash-{arguments.seed}.gguf")
        shutil.copyfile(work.name, kept)
    spent = time.monotonic() - begin
    sys.stderr.write(f"exit code {done.returncode} after {spent:.0f} s: see {kept}\n")
    return 1


def memory_folder() -> str | None:
    """A folder in memory, as a file is written hundreds of times a second."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def once(program: Path, files: list[Path], arguments: argparse.Namespace) -> int:
    """Every seed as it is, with the graph that skips and with the other one."""
    command = [program, 0, 0, arguments.threads, "-", *files]
    for disable in ("0", "1"):
        environment = os.environ | ENVIRONMENT | {"LLAMA_MOE_SKIP_DISABLE": disable}
        done = subprocess.run([str(part) for part in command], env=environment, check=False)
        if done.returncode:
            return 1
    return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sanitizer", choices=SANITIZERS, default="address")
    parser.add_argument("--minutes", type=float, default=30, help="of processor time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--source", type=Path, help="a patched tree; default: the runtime's own")
    parser.add_argument("--build", type=Path, help="default: in the cache")
    arguments = parser.parse_args()
    source = arguments.source or runtime.prepare_source()
    folder = arguments.build or cache_dir() / "fuzz" / f"{source.parent.name}-{arguments.sanitizer}"
    program = build(source, folder, arguments.sanitizer, arguments.jobs)
    with tempfile.TemporaryDirectory() as temporary:
        files = seeds.write(Path(temporary))
        if once(program, files, arguments):
            return 1
        return fuzz(program, files, arguments) if arguments.sanitizer == "address" else 0


if __name__ == "__main__":
    sys.exit(main())
