"""Logits from a small C program over a built runtime: for builds that this Python cannot load.

In: a build (`RuntimeInfo`) and its compiler, perhaps an emulator. Out: logits of a GGUF, and
llama.cpp's log, which tells on what it was computed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mone_edge import runtime
from tests.runtime import tiny_gguf as tiny

SOURCE = Path(__file__).with_name("logits.c")
TOKENS = np.random.default_rng(1).integers(0, tiny.N_VOCAB, 128).astype(np.int32)
EVERYTHING = 99


@dataclass(frozen=True)
class Program:
    """The compiled program, and how it is started."""

    path: Path
    emulator: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    gpu_layers: int = 0

    def run(self, model: Path, runs: Sequence[tuple[int, int]]) -> tuple[tiny.Array, str]:
        """Logits [sum of tokens, vocabulary] of `runs` (tokens, threads), and the log."""
        tokens, out = self.path.with_name("tokens.bin"), self.path.with_name("logits.bin")
        TOKENS.tofile(tokens)
        done = subprocess.run(
            [*self.emulator, str(self.path), str(model), str(tokens), str(out),
             str(self.gpu_layers), *(f"{n}:{threads}" for n, threads in runs)],
            capture_output=True, text=True, check=False, env={**os.environ, **self.environment},
        )  # fmt: skip
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
        return np.fromfile(out, np.float32).reshape(-1, tiny.N_VOCAB), done.stderr


def compile_program(folder: Path, build: runtime.RuntimeInfo, compiler: str = "cc") -> Path:
    """Compile the program against the headers of the source tree and the libraries of `build`."""
    source, lib = runtime.source_tree(), build.root / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "logits"
    subprocess.run(
        [compiler, "-O1", "-o", str(program), str(SOURCE), f"-I{source / 'include'}",
         f"-I{source / 'ggml' / 'include'}", f"-L{lib}", "-lllama", f"-Wl,-rpath,{lib}",
         "-Wl,--allow-shlib-undefined"],
        check=True,
    )  # fmt: skip
    return program


def relative_error(values: tiny.Array, reference: tiny.Array) -> float:
    """Largest difference, in units of the reference's range."""
    return float(np.abs(values - reference).max() / np.ptp(reference))


def typical_error(values: tiny.Array, reference: tiny.Array) -> float:
    """Median difference, in units of the reference's range."""
    return float(np.median(np.abs(values - reference)) / np.ptp(reference))
