"""Speed of quantising K types, against unpatched llama.cpp: `python -m benchmarks.quantisers`.

One thread, random weights; both in turn, the least of some runs; Markdown. Bytes are compared in
`tests/runtime/test_quantisers.py`.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np

from mone_edge import runtime
from mone_edge.quantize import quantize_rows
from tests.runtime.pristine import TYPES, compile_quantisers, quantise

SHAPE, RUNS = (256, 2048), 5


def least(*calls: Callable[[], object]) -> list[float]:
    """Seconds of the quickest run of each call."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(RUNS):
        for found, call in zip(times, calls, strict=True):
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
    return [min(found) for found in times]


@click.command(help=__doc__)
def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(SHAPE).astype(np.float32)
    importance = rng.random(SHAPE[1]).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        lib = runtime.ggml_library().parent
        unpatched = compile_quantisers(Path(folder), lib, "-O3")
        print("| | unpatched | patched | | with importance, unpatched | patched | |")
        print("|---|--:|--:|--:|--:|--:|--:|")
        for kind in TYPES:
            cells = [kind]
            for row in (None, importance):
                theirs, ours = least(
                    partial(quantise, unpatched, x, kind, row),
                    partial(quantize_rows, x, kind, row, 1),
                )
                cells += [f"{t / x.size * 1e9:.0f} ns" for t in (theirs, ours)]
                cells.append(f"{theirs / ours:.1f} x")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
