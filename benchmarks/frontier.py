"""What a model is worth at each file size: harder quantising, fewer experts, and both.

    python -m benchmarks.frontier MODEL FOLDER --text heldout.txt --data calibration.txt ...

Writes MODEL whole and pruned, with constants and with low-rank novices, in several file types,
measures each file's KL divergence from the whole model at F16, and leaves frontier.json,
frontier.md and frontier.svg in FOLDER. A file is on the frontier if none as small is nearer to the
whole model. Started again, it goes on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BASE = "F16"
OUTTYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
WHOLE = "0:none"
VARIANTS = (
    WHOLE,
    "0.25:joint:gate2-mean",
    "0.25:novice-error:rank-32",
    "0.5:joint:gate2-mean",
    "0.5:novice-error:rank-32",
)


@dataclass(frozen=True)
class Point:
    """One file.

    Args:
        variant: "RATIO:METHOD:REPLACEMENT", or `WHOLE`.
        kld, kld_stderr: nats a token from the whole model at F16.
    """

    variant: str
    outtype: str
    file_bytes: int
    ppl: float
    kld: float
    kld_stderr: float


def mone(*arguments: object) -> Any:
    """Run a command of mone-edge; its JSON."""
    command = [sys.executable, "-m", "mone_edge", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def convert(variant: str, types: Iterable[str], arguments: argparse.Namespace) -> None:
    """Files of one variant, all types from one read of the weights."""
    ratio, *how = variant.split(":")
    options = ["--prune-ratio", ratio]
    if variant != WHOLE:
        options += ["--method", how[0], "--replacement", how[1]]
    options += [part for data in arguments.data for part in ("--data", data)]
    options += [part for kind in types for part in ("--outtype", kind)]
    options += ["--samples", arguments.samples, "--seq-len", arguments.seq_len, "--force"]
    if arguments.tokenizer_pre:
        options += ["--tokenizer-pre", arguments.tokenizer_pre]
    mone("convert", arguments.model, *options, "-o", arguments.folder / file_name(variant))


def file_name(variant: str, outtype: str = "{ftype}") -> str:
    return f"{variant.replace(':', '-')}-{outtype}.gguf"


def label(variant: str) -> str:
    """A variant, for people."""
    ratio, *how = variant.split(":")
    return "whole" if variant == WHOLE else f"{float(ratio):.0%} removed, {' '.join(how)}"


def measure(arguments: argparse.Namespace) -> list[Point]:
    """Every file that is not in frontier.json yet."""
    folder, results = arguments.folder, arguments.folder / "frontier.json"
    folder.mkdir(parents=True, exist_ok=True)
    points = [Point(**p) for p in json.loads(results.read_text())] if results.is_file() else []
    base = folder / file_name(WHOLE, BASE)
    if not base.is_file():
        convert(WHOLE, [BASE], arguments)
    for variant in arguments.variant:
        done = {point.outtype for point in points if point.variant == variant}
        if not (wanted := [kind for kind in arguments.outtype if kind not in done]):
            continue
        convert(variant, wanted, arguments)
        for kind in wanted:
            file = folder / file_name(variant, kind)
            text = ("--ppl", arguments.text, "--chunks", arguments.chunks)
            size = ("--ctx-size", arguments.ctx_size)
            score = mone("eval", file, *text, *size, "--kld-base", base)
            numbers = (score["ppl"], score["kld_mean"], score["kld_stderr"])
            points.append(Point(variant, kind, file.stat().st_size, *numbers))
            results.write_text(json.dumps([asdict(p) for p in points], indent=1) + "\n")
            sys.stderr.write(f"{points[-1]}\n")
    return points


def frontier(points: list[Point]) -> set[Point]:
    """Those that no other file, at most as large, is nearer than."""
    return {
        p for p in points if not any(q.kld < p.kld and q.file_bytes <= p.file_bytes for q in points)
    }


def markdown(points: list[Point]) -> str:
    best = frontier(points)
    lines = ["| file | experts | type | KL divergence | perplexity | on the frontier |"]
    lines.append("|--:|---|---|--:|--:|---|")
    for p in sorted(points, key=lambda p: p.file_bytes):
        lines.append(
            f"| {p.file_bytes / 2**20:.1f} MiB | {label(p.variant)} | {p.outtype} "
            f"| {p.kld:.4f} ± {p.kld_stderr:.4f} | {p.ppl:.2f} | {'yes' if p in best else ''} |"
        )
    return "\n".join(lines) + "\n"


def plot(points: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for variant in dict.fromkeys(point.variant for point in points):
        line = sorted((p for p in points if p.variant == variant), key=lambda p: p.file_bytes)
        sizes = [p.file_bytes / 2**20 for p in line]
        axes.plot(sizes, [p.kld for p in line], marker="o", label=label(variant))
    axes.set(xlabel="file, MiB", ylabel="KL divergence from F16, nats", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to score")
    parser.add_argument("--data", action="append", default=[], help="to calibrate on")
    parser.add_argument("--variant", action="append", metavar="RATIO:METHOD:REPLACEMENT")
    parser.add_argument("--outtype", action="append")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--tokenizer-pre", default="")
    arguments = parser.parse_args()
    arguments.variant = arguments.variant or list(VARIANTS)
    arguments.outtype = arguments.outtype or list(OUTTYPES)
    points = measure(arguments)
    (arguments.folder / "frontier.md").write_text(markdown(points))
    plot(points, arguments.folder / "frontier.svg")
    sys.stdout.write(markdown(points))


if __name__ == "__main__":
    main()
