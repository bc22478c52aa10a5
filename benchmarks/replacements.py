"""Constants against low-rank novices, on whole models and at equal bytes.

    python -m benchmarks.replacements MODEL RESULTS.json --work DIR [--ratio 0.5 --method mone ...]

MODEL is a checkpoint folder or `demo`. Each variant is pruned in memory (torch, float32) and reads
the same chunks of text as the unpruned model, the second half of each scored: increase of the
log-perplexity, and KL divergence from the unpruned model. After each low-rank variant comes `mean`
on a plan that keeps as many more experts as the novices' matrices take room for: equal bytes.
RESULTS.json is written after each variant; started again, the run goes on. The tables it holds:

    python -m benchmarks.replacements --table RESULTS.json

What the regression of one expert costs, on random numbers: `--cost WIDTH`.
"""

import argparse
import json
import math
import resource
import sys
import time
from dataclasses import dataclass
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
from mone_edge.recipe import low_rank
from mone_edge.regression import Moments
from mone_edge.scoring import chunk_ids, kl_divergence, log_softmax
from mone_edge.source import Checkpoint, resolve
from mone_edge.stats import ExpertStats

REPLACEMENTS = ("mean", "gate2-mean", "rank-4", "rank-16", "rank-32", "rank-64", "rank")


@dataclass(frozen=True)
class Scorer:
    """The chunks of a text, and what the unpruned model makes of them."""

    chunks: list[list[int]]
    base: np.ndarray  # [chunks, n_ctx / 2 - 1, vocabulary] log-probabilities, in a file

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


class Run:
    """A model in memory, its statistics, and a folder for what is finished."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        source = resolve(arguments.model)
        assert isinstance(source, Checkpoint)
        self.source, self.work, self.results = source, arguments.work, arguments.results
        self.work.mkdir(parents=True, exist_ok=True)
        self.batches = calibration.load(
            arguments.data, source.tokenizer(), samples=arguments.samples, seq_len=512
        )
        network = load_model(source.path, device="cpu", dtype="float32")
        self.model = TorchModel(network, calibration.transformers_tokenizer(source.path))
        self.network = network
        self.stats = self._stats()
        self.scorer = self._scorer(arguments.text or demo.evaluation_text(), arguments.chunks)
        self.document: dict[str, Any] = {"rows": {}}
        if self.results.is_file():
            self.document = json.loads(self.results.read_text(encoding="utf-8"))
        self.document["about"] = {
            "model": arguments.model,
            "calibration_tokens": int(self.batches.tokens.size),
            "scored_tokens": len(self.scorer.chunks) * self.scorer.base.shape[1],
        }

    def _stats(self) -> ExpertStats:
        path = self.work / "stats.safetensors"
        if not path.is_file():
            stats = self.source.collect(self.batches, device="cpu")
            assert stats is not None
            stats.save(path)
        return ExpertStats.load(path)

    def _scorer(self, text: Path, count: int) -> Scorer:
        chunks = chunk_ids(self.model, text.read_text(encoding="utf-8"), 512, None)
        chunks = chunks[:: max(1, len(chunks) // count)][:count]
        path = self.work / "base.npy"
        if not path.is_file():
            base = np.stack([second_half(self.model, chunk) for chunk in chunks])
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, base)
        return Scorer(chunks, np.load(path, mmap_mode="r"))

    def variant(self, method: str, ratio: float, replacement: str, count: int = 0) -> float:
        """Measure one, unless it is there; returns the share of expert weights that it stores.

        Args:
            count: a number of experts to remove from each layer, instead of the ratio.
        """
        name = f"{method} {ratio:g} {replacement}" + (f" {count}" if count else "")
        if name not in self.document["rows"]:
            experts = max(layer.num_experts for layer in self.stats.layers.values())
            plan = make_plan(
                self.stats,
                prune_ratio=count / experts if count else ratio,
                method=method,
                replacement=replacement,
            )
            fitted = self.fitted(plan, name) if low_rank(replacement) else None
            novices.apply(self.network, plan, self.stats, fitted)
            row: dict[str, Any] = {"stored": stored(self.network, plan, fitted)}
            self.document["rows"][name] = row | self.scorer.score(self.model)
            if fitted:
                self.document["rows"][name] |= fitted.summary()
            with atomic_write(self.results) as temporary:
                temporary.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
            print(name, json.dumps(self.document["rows"][name]), file=sys.stderr, flush=True)
        return float(self.document["rows"][name]["stored"])

    def fitted(self, plan: PrunePlan, name: str) -> LowRankNovices:
        path = self.work / f"{name.replace(' ', '_')}.safetensors"
        if not path.is_file():
            work = Work(path.with_suffix(".work"), resume=True)
            fit_checkpoint(self.source, plan, self.batches, work, device="cpu").save(path)
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
    experts = max(layer.num_experts for layer in measured.stats.layers.values())
    for ratio in arguments.ratio:
        for method in arguments.method:
            for replacement in arguments.replacement:
                share = measured.variant(method, ratio, replacement)
                if low_rank(replacement) and share < 1:
                    count = math.floor(experts * (1 - share) + 1e-9)
                    if count:
                        measured.variant(method, ratio, "mean", count)


def table(path: Path) -> None:
    """Markdown, from the file alone."""
    document = json.loads(path.read_text(encoding="utf-8"))
    print(json.dumps(document["about"]))
    groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for name, row in document["rows"].items():
        method, ratio, *label = name.split(" ")
        label = f"{label[0]}, {label[1]} removed a layer" if len(label) > 1 else label[0]
        groups.setdefault((ratio, method), []).append((label, row))
    for (ratio, method), rows in groups.items():
        print(f"\n### {float(ratio):.0%} removed by `{method}`\n")
        print("| replacement | stored | held-out error | log-ppl increase | KL divergence |")
        print("|---|--:|--:|--:|--:|")
        for label, row in sorted(rows, key=lambda item: (item[1]["stored"], item[1]["kld"])):
            error = f"{row['held_out_error']:.2f}" if "held_out_error" in row else ""
            print(
                f"| {label} | {row['stored']:.1%} | {error} "
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
    parser.add_argument("--work", type=Path, default=Path("replacements-run"))
    parser.add_argument("--data", action="append", default=[], help="calibration text")
    parser.add_argument("--text", type=Path, help="to score; default: the package's")
    parser.add_argument("--samples", type=int, default=48, help="of 512 tokens, to calibrate")
    parser.add_argument("--chunks", type=int, default=16, help="of 512 tokens, to score")
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
    arguments.method = arguments.method or ["mone", "replacement-error"]
    arguments.replacement = arguments.replacement or list(REPLACEMENTS)
    run(arguments)


if __name__ == "__main__":
    main()
