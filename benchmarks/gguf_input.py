"""The numbers of docs/conversion.md: `python -m benchmarks.gguf_input drift|speed`.

`drift`: statistics of the demo model from its GGUFs, against torch's of the checkpoint. `speed`:
CPU time of measuring against that of reading the same tokens, one thread, and the rate of slicing,
on a random model shaped like four layers of OLMoE at half its width. Not a test: minutes, and the
numbers are the machine's.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from mone_edge import calibration, convert, pipeline
from mone_edge.calibration import Batches
from mone_edge.collect.gguf import collect
from mone_edge.llama import GgufModel
from mone_edge.plan import make_plan
from mone_edge.recipe import Recipe
from mone_edge.source import Source, resolve
from mone_edge.stats import ExpertStats
from tests import tiny

RATIO = 0.25


def convert_to(
    source: Source, folder: Path, types: Sequence[str], pre: str = ""
) -> dict[str, Path]:
    """Unpruned GGUFs of a checkpoint."""
    recipe = Recipe(source.name, prune_ratio=0, outtype=tuple(types), tokenizer_pre=pre)
    outfiles = {name: folder / f"model-{name}.gguf" for name in types}
    jobs = convert.prepare(source, recipe, outfiles)
    return {made.outtype: made.outfile for made in convert.write(jobs, recipe)}


def drift(folder: Path, samples: int = 8, length: int = 512) -> None:
    source = resolve("demo")
    batches = calibration.load([], source.tokenizer(), samples=samples, seq_len=length)
    oracle = source.collect(batches)
    assert oracle
    print(f"{'':8} {'counts':>9} {'means':>9} {'m2':>9} {'inputs':>9} same experts pruned")
    for name, path in convert_to(source, folder, ["F32", "Q8_0", "Q4_K_M"]).items():
        gguf = resolve(str(path))
        same_tokens = calibration.load([], gguf.tokenizer(), samples=samples, seq_len=length)
        assert same_tokens.sha256 == batches.sha256
        _print_drift(name, collect(path, batches), oracle)


def _print_drift(name: str, ours: ExpertStats, oracle: ExpertStats) -> None:
    cells = [
        _distance(ours, oracle, f) for f in ("count", "output_mean", "output_m2", "input_sq_sum")
    ]
    plans = [make_plan(stats, prune_ratio=RATIO) for stats in (ours, oracle)]
    pruned = [{(i, e) for i in plan.kept for e in plan.pruned(i)} for plan in plans]
    same = len(pruned[0] & pruned[1]), len(pruned[1])
    print(f"{name:8} " + " ".join(f"{cell:9.2g}" for cell in cells) + f" {same[0]} of {same[1]}")


def _distance(ours: ExpertStats, oracle: ExpertStats, name: str) -> float:
    """||ours - oracle|| / ||oracle|| over all layers."""
    a, b = (
        np.concatenate([getattr(s.layers[i], name).ravel() for i in s.layers])
        for s in (ours, oracle)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def speed(folder: Path, rounds: int = 3) -> None:
    shape = {"layers": 4, "hidden": 1024, "inner": 512, "experts": 64, "top_k": 8}
    made = tiny.make_checkpoint("olmoe", folder / "olmoe-like", dtype="bfloat16", **shape)
    for name, path in convert_to(resolve(str(made)), folder, ["Q4_0", "Q8_0"], "gpt-2").items():
        times = np.array([(_reading(path), _measuring(path)) for _ in range(rounds)])
        plain, measured = np.median(times, axis=0)
        ratio = np.median(times[:, 1] / times[:, 0])
        print(f"{name}: reading {plain:.2f} s, measuring {measured:.2f} s, ratio {ratio:.2f}")
        _slice(path, folder)


def _tokens(samples: int = 4, length: int = 512) -> np.ndarray:
    return np.random.default_rng(0).integers(2, tiny.VOCAB, (samples, length))


def _reading(path: Path) -> float:
    """CPU seconds of the same work unobserved: all positions through all blocks."""
    tokens = _tokens()
    with GgufModel(path, n_ctx=tokens.shape[1], threads=1) as model:
        model.read(tokens[0].tolist())
        start = time.process_time()
        for row in tokens[1:].tolist():
            model.read(row)
        return time.process_time() - start


def _measuring(path: Path) -> float:
    tokens, times = _tokens(), []
    samples, seq_len = tokens.shape
    batches = Batches(tokens, ("random",), "", 0, samples, seq_len, tokens.size)
    collect(path, batches, threads=1, on_progress=lambda *_: times.append(time.process_time()))
    return times[-1] - times[0]


def _slice(path: Path, folder: Path) -> None:
    source = resolve(str(path))
    stats = pipeline._shape_of_stats(source, source.open())
    recipe = Recipe(source.name, outtype=("keep",), imatrix="none")
    start = time.monotonic()
    plan = make_plan(stats, prune_ratio=RATIO, method="random")
    jobs = convert.prepare(source, recipe, {"keep": folder / "out.gguf"}, plan=plan, stats=stats)
    (made,) = convert.write(jobs, recipe)
    seconds = time.monotonic() - start
    print(f"  {source.size / 1e6:.0f} MB in, {made.bytes / 1e6:.0f} MB out: {seconds:.2f} s")


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["drift", "speed"]))
def main(what: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if what == "drift":
            drift(Path(scratch))
        else:
            speed(Path(scratch))


if __name__ == "__main__":
    main()
