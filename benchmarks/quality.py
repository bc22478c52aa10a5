"""How much worse a model gets: criteria and replacements side by side, on whole models.

    python -m benchmarks.quality MODEL RESULTS.json --work DIR [--ratio 0.5 --method mone ...]

MODEL is a checkpoint folder or `demo`. Each variant is pruned in memory (torch, float32) and reads
the same chunks of text as the unpruned model, the second half of each scored: increase of the
log-perplexity, and KL divergence from the unpruned model. `--seed`, which may be repeated, draws
other calibration text. With `--equal-bytes`, after each low-rank variant comes `mean` on a plan
that keeps as many more experts as the novices' matrices take room for. RESULTS.json is written
after each variant; started again, the run goes on. The tables it holds:

    python -m benchmarks.quality --table RESULTS.json

What the regression of one expert costs, on random numbers: `--cost WIDTH`.
"""

import argparse
import copy
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mone_edge import calibration, demo, novices, regression
from mone_edge.collect.experts import experts_modules
from mone_edge.collect.fitting import fit_checkpoint
from mone_edge.collect.loading import load_model
from mone_edge.collect.work import Work, discard
from mone_edge.evaluate import TorchModel
from mone_edge.low_rank import LowRankNovices
from mone_edge.paths import atomic_write
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import MERGING, low_rank
from mone_edge.regression import Moments
from mone_edge.scoring import chunk_ids, kl_divergence, log_softmax
from mone_edge.source import Checkpoint, resolve
from mone_edge.stats import ExpertStats

METHODS = ("mone", "routing-score", "reap", "replacement-error", "joint", "random", *MERGING)
REPLACEMENTS = ("drop", "zero", "mean", "gate2-mean", "rank-4", "rank-16")
MEASURES = {"log_ppl": "Increase of the log-perplexity", "kld": "KL divergence"}


@dataclass(frozen=True)
class Scorer:
    """The chunks of a text, and what the unpruned model makes of them."""

    chunks: list[list[int]]
    base: np.ndarray  # [chunks, n_ctx / 2 - 1, vocabulary] log-probabilities, in a file

    def log_ppl(self) -> float:
        """Of the unpruned model."""
        rows = np.arange(self.base.shape[1])
        chosen = [
            base[rows, np.array(chunk[-len(base) :])]
            for chunk, base in zip(self.chunks, self.base, strict=True)
        ]
        return -float(np.concatenate(chosen).mean(dtype=np.float64))

    def score(self, model: TorchModel) -> dict[str, float]:
        gaps, divergences = [], []
        for chunk, base in zip(self.chunks, self.base, strict=True):
            ours = second_half(model, chunk)
            targets = np.array(chunk[-len(ours) :])
            rows = np.arange(len(ours))
            gaps.append((base[rows, targets] - ours[rows, targets]).astype(np.float64))
            divergences.append(kl_divergence(base, ours))
        gap, divergence = np.concatenate(gaps), np.concatenate(divergences)
        return {
            "log_ppl": float(gap.mean()),
            "log_ppl_stderr": float(gap.std() / math.sqrt(len(gap))),
            "kld": float(divergence.mean()),
            "kld_stderr": float(divergence.std() / math.sqrt(len(divergence))),
            "tokens": len(gap),
        }


def second_half(model: TorchModel, chunk: list[int]) -> np.ndarray:
    """Log-probabilities that predict the tokens behind the middle of a chunk."""
    tokens = chunk if model.bos_id is None else [model.bos_id, *chunk[1:]]
    return log_softmax(model.logits(tokens, len(chunk) // 2)[:-1])


@dataclass(frozen=True)
class Variant:
    """One way to prune; `removed` experts of each layer if not 0, else the ratio."""

    method: str
    ratio: float
    replacement: str
    seed: int
    removed: int = 0

    @property
    def name(self) -> str:
        return "_".join(map(str, asdict(self).values()))


class Run:
    """A model in memory, its statistics, and a folder for what is finished."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        source = resolve(arguments.model)
        assert isinstance(source, Checkpoint)
        self.source, self.arguments, self.work = source, arguments, arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.network = load_model(source.path, device="cpu", dtype="float32")
        self.tokenizer = calibration.transformers_tokenizer(source.path)
        self.scorer = self._scorer(arguments.text or demo.evaluation_text(), arguments.chunks)
        self.measured: dict[int, ExpertStats] = {}
        self.document: dict[str, Any] = {"rows": {}}
        if arguments.results.is_file():
            self.document = json.loads(arguments.results.read_text(encoding="utf-8"))
        self.document["about"] = {
            "model": source.architecture,
            "calibration_tokens": arguments.samples * arguments.seq_len,
            "scored_tokens": len(self.scorer.chunks) * self.scorer.base.shape[1],
            "log_ppl": self.scorer.log_ppl(),
        }

    def batches(self, seed: int) -> calibration.Batches:
        return calibration.load(
            self.arguments.data,
            self.source.tokenizer(),
            samples=self.arguments.samples,
            seq_len=self.arguments.seq_len,
            seed=seed,
        )

    def stats(self, seed: int) -> ExpertStats:
        if seed not in self.measured:
            path = self.work / f"stats-{seed}.safetensors"
            if not path.is_file():
                stats = self.source.collect(self.batches(seed), device="cpu")
                assert stats is not None
                stats.save(path)
            self.measured[seed] = ExpertStats.load(path)
        return self.measured[seed]

    def _scorer(self, text: Path, count: int) -> Scorer:
        model, n_ctx = TorchModel(self.network, self.tokenizer), self.arguments.ctx_size
        chunks = chunk_ids(model, text.read_text(encoding="utf-8"), n_ctx, None)
        chunks = chunks[:: max(1, len(chunks) // count)][:count]
        path = self.work / "base.npy"
        if not path.is_file():
            base = np.stack([second_half(model, chunk) for chunk in chunks])
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, base)
        return Scorer(chunks, np.load(path, mmap_mode="r"))

    def measure(self, variant: Variant) -> float:
        """Measure one, unless it is there; returns the share of expert weights that it stores."""
        if variant.name not in self.document["rows"]:
            stats = self.stats(variant.seed)
            experts = max(layer.num_experts for layer in stats.layers.values())
            plan = make_plan(
                stats,
                prune_ratio=variant.removed / experts or variant.ratio,
                method=variant.method,
                replacement=variant.replacement,
                seed=variant.seed,
            )
            fitted = self.fitted(plan, variant) if low_rank(variant.replacement) else None
            network = self.network
            if plan.cuts:  # the model, which the others need whole
                network = copy.deepcopy(network)
            novices.apply(network, plan, stats, fitted)
            row = asdict(variant) | {"stored": stored(self.network, plan, fitted)}
            row |= self.scorer.score(TorchModel(network, self.tokenizer))
            row |= fitted.summary() if fitted else {}
            self.document["rows"][variant.name] = row
            with atomic_write(self.arguments.results) as temporary:
                temporary.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(row), file=sys.stderr, flush=True)
        return float(self.document["rows"][variant.name]["stored"])

    def fitted(self, plan: PrunePlan, variant: Variant) -> LowRankNovices:
        path = self.work / f"{variant.name}.safetensors"
        if not path.is_file():
            work = Work(path.with_suffix(".work"), resume=True)
            batches = self.batches(variant.seed)
            fit_checkpoint(self.source, plan, batches, work, device="cpu").save(path)
            discard(work.path)
        return LowRankNovices.load(path)


def stored(network: Any, plan: PrunePlan, fitted: LowRankNovices | None) -> float:
    """Weights of experts and of novices' matrices, as a share of all experts' weights."""
    whole = kept = 0
    for layer, (_, module) in experts_modules(network).items():
        size = sum(p.numel() for p in module.parameters(recurse=False))
        whole += size
        kept += size // plan.num_experts[layer] * len(plan.kept[layer])
        if fitted and layer in fitted.layers:
            kept += fitted.layers[layer].down.size + fitted.layers[layer].up.size
    return kept / whole


def run(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(arguments.threads)
    measured = Run(arguments)
    for seed in arguments.seed:
        for ratio in arguments.ratio:
            for method in arguments.method:
                for replacement in ("merge",) if method in MERGING else arguments.replacement:
                    variant = Variant(method, ratio, replacement, seed)
                    share = measured.measure(variant)
                    if arguments.equal_bytes and low_rank(replacement) and share < 1:
                        layers = measured.stats(seed).layers.values()
                        experts = max(layer.num_experts for layer in layers)
                        if count := math.floor(experts * (1 - share) + 1e-9):
                            measured.measure(Variant(method, ratio, "mean", seed, count))


def table(path: Path) -> None:
    """Markdown, from the file alone."""
    document = json.loads(path.read_text(encoding="utf-8"))
    print(json.dumps(document["about"]))
    rows = [row for row in document["rows"].values() if not row["removed"]]
    for ratio in sorted({row["ratio"] for row in rows}):
        for measure, title in MEASURES.items():
            print(f"\n**{title}, {ratio:.0%} of the experts removed**\n")
            _grid([row for row in rows if row["ratio"] == ratio], measure)
    if any(row["removed"] for row in document["rows"].values()):
        _equal_bytes(list(document["rows"].values()))


def _grid(rows: list[dict[str, Any]], measure: str) -> None:
    replacements = list(dict.fromkeys(row["replacement"] for row in rows))
    print(f"| | {' | '.join(replacements)} |\n|---|{'--:|' * len(replacements)}")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for replacement in replacements:
            chosen = (method, replacement)
            found = [r[measure] for r in rows if (r["method"], r["replacement"]) == chosen]
            cells.append(_with_spread(found))
        print(f"| `{method}` | {' | '.join(cells)} |")


def _with_spread(values: Sequence[float]) -> str:
    """The mean over the seeds, and how far the seeds are from it at most."""
    if not values:
        return ""
    mean = statistics.mean(values)
    spread = max(abs(value - mean) for value in values)
    return f"{mean:.4f} ± {spread:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _equal_bytes(rows: list[dict[str, Any]]) -> None:
    print("\n**Equal bytes: low-rank novices, and constants with more experts kept**\n")
    print("| removed | method | replacement | stored | log-ppl increase | KL divergence |")
    print("|---|---|---|--:|--:|--:|")
    for row in rows:
        if row["removed"] or low_rank(row["replacement"]):
            label = row["replacement"]
            label += f", {row['removed']} removed a layer" if row["removed"] else ""
            print(
                f"| {row['ratio']:.0%} | `{row['method']}` | {label} | {row['stored']:.1%} "
                f"| {row['log_ppl']:.4f} ± {row['log_ppl_stderr']:.4f} "
                f"| {row['kld']:.4f} ± {row['kld_stderr']:.4f} |"
            )


def cost(width: int, tokens: int = 8192, rank: int = 64) -> None:
    """CPU seconds and peak memory of one expert's moments and fit, whatever the threads."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, width), dtype=np.float32)
    y = x @ (rng.standard_normal((width, width), dtype=np.float32) / width**0.5)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [time.process_time()]
    pair = Moments.near(x, y), Moments.near(x, y)
    for into, part in zip(
        pair, (slice(0, tokens * 4 // 5), slice(tokens * 4 // 5, None)), strict=True
    ):
        into.add(x[part], y[part], np.ones(len(x[part])))
    times.append(time.process_time())
    regression.fit(*pair, rank)
    times.append(time.process_time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    gathering, fitting = np.diff(times)
    print(
        f"moments of {tokens} tokens {gathering:.1f} s, fit {fitting:.1f} s, {peak / 1024:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--table", type=Path, help="print what a results file holds")
    parser.add_argument("--cost", type=int, metavar="WIDTH", help="of fitting one expert")
    parser.add_argument("--work", type=Path, default=Path("quality-run"))
    parser.add_argument("--data", action="append", default=[], help="calibration text")
    parser.add_argument("--text", type=Path, help="to score; default: the package's")
    parser.add_argument("--samples", type=int, default=48, help="to calibrate")
    parser.add_argument("--seq-len", type=int, default=512, help="of samples")
    parser.add_argument("--chunks", type=int, default=16, help="to score")
    parser.add_argument("--ctx-size", type=int, default=512, help="of chunks")
    parser.add_argument("--equal-bytes", action="store_true")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--replacement", action="append")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
        return
    if arguments.cost:
        cost(arguments.cost)
        return
    if not (arguments.model and arguments.results):
        parser.error("MODEL and RESULTS are needed")
    arguments.ratio = arguments.ratio or [0.5, 0.25]
    arguments.method = arguments.method or list(METHODS)
    arguments.seed = arguments.seed or [42]
    arguments.replacement = arguments.replacement or list(REPLACEMENTS)
    run(arguments)


if __name__ == "__main__":
    main()
