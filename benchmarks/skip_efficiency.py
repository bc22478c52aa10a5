"""How much of the ideal saving skipped slots give: `python -m benchmarks.skip_efficiency FOLDER`.

The ideal at hit ratio h is the time of the unpruned file that routes to (1 - h) x top-k experts: it
does everything but the skipped slots. It is interpolated between that file at its top-k and at half
of it. Pruned and whole models stay loaded and are timed in turn; medians of the paired
repetitions. `--unpatched LIB` times the whole file on another build of llama.cpp as well. Out:
results.json and results.md in FOLDER. Not a test: hours at full size, gigabytes a file, and the
numbers are the machine's; leave it alone on an idle one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import skip_model
from benchmarks.skip_model import SMALL, Shape

TYPES = ("Q4_0", "Q4_K_M", "Q8_0")
RATIOS = (0.25, 0.5)
SHARES = (0.05, 0.15, 0.3, 0.5)
MODES = {"prefill": 128, "decode": 32}
SHARE_TOKENS = 128


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        ratio: pruned experts / experts.
        hits: measured share of slots that were skipped.
        whole, half, pruned: seconds a token: unpruned, unpruned at half the top-k, pruned.
        efficiency: ideal time / time; spread: its least and greatest value of the repetitions.
        rank_cost: what low-rank novices take of the time that skipping saves, if asked for.
    """

    outtype: str
    ratio: float
    mode: str
    hits: float
    whole: float
    half: float
    pruned: float
    efficiency: float
    spread: tuple[float, float]
    rank_cost: float | None = None


class Model:
    """A worker process with a model in it."""

    def __init__(self, path: Path, threads: int, top_k: int, library: Path | None = None) -> None:
        environment = dict(os.environ)
        if library:
            environment["LLAMA_CPP_LIB_PATH"] = str(library)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.skip_worker", str(path), str(threads), str(top_k)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, what: str, count: int) -> float:
        """Send one request, wait for its number."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{what} {count}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def times(models: list[Model], mode: str, repetitions: int) -> list[list[float]]:
    """Seconds a token of each repetition, the models in turn: [repetitions][models]."""
    count = MODES[mode]
    for model in models:
        model.ask(mode, count)
    return [[model.ask(mode, count) / count for model in models] for _ in range(repetitions)]


def measure(folder: Path, shape: Shape, outtype: str, arguments: argparse.Namespace) -> list[Row]:
    """All pruned variants of one type against the whole file."""

    def file(name: str, kept: int, share: float, rank: int = 0) -> Path:
        path = folder / f"{outtype}-{name}.gguf"
        if not path.exists():
            skip_model.write(path, shape, outtype, kept=kept, share=share, rank=rank)
        return path

    everything, rows = shape.experts, []
    whole, half = (
        Model(file("whole", everything, 0), arguments.threads, top_k)
        for top_k in (shape.top_k, shape.top_k // 2)
    )
    for ratio in RATIOS:
        for share in arguments.shares:
            if share > ratio + 0.05:
                continue  # no model routes to novices more often than to other experts
            ranks = [0, arguments.rank] if arguments.rank else [0]
            kept = round(everything * (1 - ratio))
            paths = [file(f"{ratio}-{share}-r{r}", kept, share, r) for r in ranks]
            pruned = [Model(path, arguments.threads, shape.top_k) for path in paths]
            hits = pruned[0].ask("share", SHARE_TOKENS)
            for mode in MODES:
                paired = times([whole, half, *pruned], mode, arguments.repetitions)
                rows.append(row(outtype, ratio, mode, hits, paired))
                sys.stderr.write(f"{rows[-1]}\n")
            for model in pruned:
                model.close()
            for path in paths if not arguments.keep else []:
                path.unlink()
    for model in (whole, half):
        model.close()
    return rows


def row(outtype: str, ratio: float, mode: str, hits: float, paired: list[list[float]]) -> Row:
    """Medians and the efficiency of each pair."""
    efficiencies = [(full - 2 * hits * (full - half)) / time for full, half, time, *_ in paired]
    medians = [statistics.median(column) for column in zip(*paired, strict=True)]
    whole, half, pruned, *ranked = medians
    spread = (min(efficiencies), max(efficiencies))
    middle = statistics.median(efficiencies)
    cost = (ranked[0] - pruned) / (whole - pruned) if ranked else None
    return Row(outtype, ratio, mode, hits, whole, half, pruned, middle, spread, cost)


def unpatched(
    folder: Path, shape: Shape, outtype: str, arguments: argparse.Namespace
) -> dict[str, float]:
    """Time of the whole file, patched / unpatched: median of the pairs, by mode."""
    path = folder / f"{outtype}-whole.gguf"
    models = [
        Model(path, arguments.threads, shape.top_k, library)
        for library in (None, arguments.unpatched)
    ]
    ratios = {
        mode: statistics.median(a / b for a, b in times(models, mode, arguments.repetitions))
        for mode in MODES
    }
    for model in models:
        model.close()
    return ratios


def markdown(rows: list[Row], patched: dict[str, dict[str, float]]) -> str:
    """The tables."""
    head = "| type | pruned | hits | | tokens/s, unpruned | tokens/s | of the ideal | spread |"
    lines = [f"{head} low-rank cost |", "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        spread = f"{r.spread[0]:.2f} to {r.spread[1]:.2f}"
        lines.append(
            f"| {r.outtype} | {r.ratio:.0%} | {r.hits:.0%} | {r.mode} | {1 / r.whole:.1f} "
            f"| {1 / r.pruned:.1f} | {r.efficiency:.2f} | {spread} "
            f"| {'' if r.rank_cost is None else format(r.rank_cost, '.1%')} |"
        )
    if patched:
        lines += ["", "| type, unpruned | prefill time, patched / unpatched | decode time |"]
        lines.append("|---|---|---|")
        lines += [f"| {k} | {v['prefill']:.3f} | {v['decode']:.3f} |" for k, v in patched.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="a shape for trying the script")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--rank", type=int, default=0, help="time low-rank novices as well")
    parser.add_argument("--unpatched", type=Path, help="folder of an unpatched libllama")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    arguments = parser.parse_args()
    folder, shape = arguments.folder, SMALL if arguments.small else Shape()
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    patched = {}
    for outtype in arguments.types:
        rows += measure(folder, shape, outtype, arguments)
        if arguments.unpatched:
            patched[outtype] = unpatched(folder, shape, outtype, arguments)
        record = {"shape": asdict(shape), "rows": [asdict(r) for r in rows], "patched": patched}
        (folder / "results.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        (folder / "results.md").write_text(markdown(rows, patched), encoding="utf-8")
        if not arguments.keep:
            (folder / f"{outtype}-whole.gguf").unlink()
    sys.stdout.write(markdown(rows, patched))


if __name__ == "__main__":
    main()
