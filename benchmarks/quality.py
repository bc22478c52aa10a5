"""How much worse a model gets: criteria and replacements side by side, on whole models.

    python -m benchmarks.quality MODEL RESULTS.json --variant 0.5:mone:mean --variant ...

MODEL is a checkpoint folder or `demo`. Each variant is pruned in memory (torch, float32) and reads
the same chunks of text as the unpruned model; all but the first eighth of each is scored: increase
of the log-perplexity, KL divergence from the unpruned model, share of positions with the same most
likely token. A variant is RATIO:METHOD:REPLACEMENT (`merge` where experts are merged); the shell
spells out many, `--variant=0.5:{mone,reap}:{drop,mean}`. Each seed draws other calibration text.
With `--equal-bytes`, after each low-rank variant come constants on plans that keep as many more
experts as the novices' matrices take room for in a Q4_K_M file. RESULTS.json is written after each
variant; started again, the run goes on. The tables it holds:

    python -m benchmarks.quality --table RESULTS.json     # several files: side by side

What the regression of one expert costs, on random numbers: `--cost WIDTH`.
"""

import argparse
import copy
import itertools
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mone_edge import calibration, demo, novices, regression
from mone_edge.collect.experts import experts_modules
from mone_edge.collect.fitting import fit_checkpoint
from mone_edge.collect.loading import load_model
from mone_edge.collect.work import Work, discard
from mone_edge.evaluate import TorchModel
from mone_edge.low_rank import EXPERT_BITS, LowRankNovices, stored_bits
from mone_edge.paths import atomic_write
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import low_rank
from mone_edge.regression import Moments
from mone_edge.routers import norm_changes
from mone_edge.scoring import chunk_ids
from mone_edge.selection import ROUTER_NORM
from mone_edge.source import Checkpoint, resolve
from mone_edge.stats import ExpertStats, Float

if TYPE_CHECKING:
    from torch import Tensor

UNSCORED = 8  # the first eighth of each chunk is context only
BATCH_TOKENS, ROWS = 2048, 128  # of a forward pass, and of logits at a time
RIVALS = (("mone", "mean"), ("joint", "gate2-mean"))
COLUMNS = ("drop", "zero", "mean", "gate2", "rank", "merge")
MEASURES = {"log_ppl": "Increase of the log-perplexity", "kld": "KL divergence"}


class Predictions(NamedTuple):
    """What the unpruned model makes of the scored tokens; a divergence from it needs no more."""

    log_p: "Tensor"  # [tokens] of the tokens that come
    negentropy: "Tensor"  # [tokens] sum of p log p over the vocabulary
    mean: "Tensor"  # [tokens, width] rows of the head, weighed by p
    top: "Tensor"  # [tokens] the most likely tokens


class Scorer:
    """Chunks of a text, and what the unpruned model makes of them.

    With hidden states h, head W and q = softmax(W h), the divergence from the unpruned model is
    `sum p log p - sum p log q`, the second sum `h (p W) - logsumexp(W h)`. What is kept
    has its place before the first pass: small results among large logits break up the heap.

    Args:
        chunks: [chunks, n_ctx] token ids; all but the first `n_ctx / UNSCORED` of each are scored.
    """

    def __init__(self, network: Any, chunks: "Tensor") -> None:
        import torch

        self.chunks, self.first = chunks, chunks.shape[1] // UNSCORED
        self.head = network.get_output_embeddings().weight.detach()
        self._check_head(network)
        self.tokens = len(chunks) * (chunks.shape[1] - self.first - 1)
        negentropy, log_p = torch.empty(2, self.tokens, dtype=torch.float64)
        mean = torch.empty(self.tokens, self.head.shape[1])
        top = torch.empty(self.tokens, dtype=torch.int64)
        self.base = base = Predictions(log_p, negentropy, mean, top)
        for rows, hidden, logits, total, found in self._scored(network):
            base.log_p[rows], base.top[rows] = found, logits.argmax(-1)
            base.mean[rows] = logits.sub_(total[:, None]).exp_() @ self.head
            base.negentropy[rows] = (hidden.double() * base.mean[rows]).sum(-1) - total
        self.log_ppl = -float(base.log_p.mean())

    def _check_head(self, network: Any) -> None:
        """Some models scale, cap or shift their logits: they are not `W h`."""
        import torch

        ids = self.chunks[:1, :2]
        with torch.inference_mode():
            ours = network.base_model(input_ids=ids, use_cache=False)[0] @ self.head.T
            theirs = network(input_ids=ids, use_cache=False).logits
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise SystemExit("quality: the model's logits are more than its head's matrix")

    def _scored(self, network: Any) -> "Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]":
        """Some tokens at a time.

        Yields:
            which tokens, hidden states [rows, width], logits [rows, vocabulary] (until the next),
            their logsumexp [rows], and log-probabilities [rows] of the tokens that come.
        """
        import torch

        done, buffer = 0, torch.empty(ROWS, len(self.head))
        with torch.inference_mode():
            for ids in self.chunks.split(max(1, BATCH_TOKENS // self.chunks.shape[1])):
                hidden = network.base_model(input_ids=ids, use_cache=False)[0]
                hidden = hidden[:, self.first : -1].flatten(0, 1)
                targets = ids[:, self.first + 1 :].reshape(-1, 1)
                for part, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
                    logits = torch.mm(part, self.head.T, out=buffer[: len(part)])
                    total = logits.logsumexp(-1)
                    log_p = logits.gather(1, wanted)[:, 0] - total
                    yield slice(done, done + len(part)), part, logits, total, log_p
                    done += len(part)

    def score(self, network: Any) -> dict[str, float]:
        """Of a pruned model, against the unpruned one."""
        base = self.base
        measured = {name: np.empty(self.tokens) for name in ("log_ppl", "kld", "same_top")}
        for rows, hidden, logits, total, log_q in self._scored(network):
            cross = (hidden.double() * base.mean[rows]).sum(-1) - total
            measured["log_ppl"][rows] = base.log_p[rows] - log_q
            measured["kld"][rows] = base.negentropy[rows] - cross
            measured["same_top"][rows] = base.top[rows] == logits.argmax(-1)
        means = {name: float(values.mean()) for name, values in measured.items()}
        errors = {
            f"{name}_stderr": float(values.std() / math.sqrt(len(values)))
            for name, values in measured.items()
        }
        return means | errors | {"tokens": self.tokens}


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
        self.change: dict[int, Float] | None = None
        if arguments.pretrained:
            self.change = norm_changes(source, resolve(arguments.pretrained, offline=True))
        self.measured: dict[int, ExpertStats] = {}
        self.document: dict[str, Any] = {"rows": {}}
        if arguments.results.is_file():
            self.document = json.loads(arguments.results.read_text(encoding="utf-8"))
        self.document["about"] = {
            "model": source.architecture,
            "calibration_tokens": arguments.samples * arguments.seq_len,
            "log_ppl": self.scorer.log_ppl,
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
        import torch

        model, n_ctx = TorchModel(self.network, self.tokenizer), self.arguments.ctx_size
        chunks = chunk_ids(model, text.read_text(encoding="utf-8"), n_ctx, None)
        chunks = chunks[:: max(1, len(chunks) // count)][:count]
        if model.bos_id is not None:
            chunks = [[model.bos_id, *chunk[1:]] for chunk in chunks]
        return Scorer(self.network, torch.tensor(chunks))

    def measure(self, variant: Variant) -> float:
        """Measure one, unless it is there; returns the share of expert weights that it stores."""
        rows = self.document["rows"]
        if variant.name not in rows:
            experts = max(layer.num_experts for layer in self.stats(variant.seed).layers.values())
            share = variant.removed / experts or variant.ratio
            same = rows.get(replace(variant, ratio=share, removed=0).name)
            rows[variant.name] = same | asdict(variant) if same else self._row(variant, share)
            with atomic_write(self.arguments.results) as temporary:
                temporary.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(rows[variant.name]), file=sys.stderr, flush=True)
        return float(rows[variant.name]["stored"])

    def _row(self, variant: Variant, share: float) -> dict[str, Any]:
        """What becomes of the text with this share of each layer's experts removed."""
        stats, by_router = self.stats(variant.seed), variant.method == ROUTER_NORM
        plan = make_plan(
            stats,
            prune_ratio=share,
            method=variant.method,
            scope=self.arguments.scope,
            replacement=variant.replacement,
            seed=variant.seed,
            pretrained=self.arguments.pretrained if by_router else "",
            router_change=self.change if by_router else None,
        )
        fitted = self.fitted(plan, variant) if low_rank(variant.replacement) else None
        plan = fitted.decide(plan) if fitted else plan
        network = self.network
        if plan.cuts:  # the model, which the others need whole
            network = copy.deepcopy(network)
        novices.apply(network, plan, stats, fitted)
        row = asdict(variant) | {"stored": stored(self.network, plan, fitted)}
        return row | self.scorer.score(network) | (fitted.summary() if fitted else {})

    def fitted(self, plan: PrunePlan, variant: Variant) -> LowRankNovices:
        path = self.work / f"{variant.name}.safetensors"
        if not path.is_file():
            work = Work(path.with_suffix(".work"), resume=True)
            batches = self.batches(variant.seed)
            fit_checkpoint(self.source, plan, batches, work, device="cpu").save(path)
            discard(work.path)
        return LowRankNovices.load(path)


def stored(network: Any, plan: PrunePlan, fitted: LowRankNovices | None) -> float:
    """What experts and novices' matrices take in a file, as a share of all experts."""
    whole = kept = 0.0
    for layer, (_, module) in experts_modules(network).items():
        size = sum(p.numel() for p in module.parameters(recurse=False))
        whole += size
        kept += size // plan.num_experts[layer] * len(plan.kept[layer])
        if fitted and layer in fitted.layers:
            count, rank, inputs = fitted.layers[layer].down.shape
            outputs = fitted.layers[layer].up.shape[1]
            kept += count * stored_bits(rank, inputs, outputs) / EXPERT_BITS
    return kept / whole


def variants(arguments: argparse.Namespace) -> Iterator[Variant]:
    for seed, name in itertools.product(arguments.seed or [1], arguments.variant):
        ratio, method, replacement = name.split(":")
        yield Variant(method, float(ratio), replacement, seed)


def run(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(arguments.threads)
    measured = Run(arguments)
    for variant in variants(arguments):
        share = measured.measure(variant)
        if arguments.equal_bytes and low_rank(variant.replacement) and share < 1:
            layers = measured.stats(variant.seed).layers.values()
            experts = max(layer.num_experts for layer in layers)
            if count := math.floor(experts * (1 - share) + 1e-9):
                for method, constant in RIVALS:
                    measured.measure(Variant(method, variant.ratio, constant, variant.seed, count))


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
    found = {row["replacement"] for row in rows}
    replacements = sorted(
        found, key=lambda name: (COLUMNS.index(name.split("-")[0]), len(name), name)
    )
    print(f"| | {' | '.join(replacements)} |\n|---|{'--:|' * len(replacements)}")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for replacement in replacements:
            chosen = (method, replacement)
            values = [r[measure] for r in rows if (r["method"], r["replacement"]) == chosen]
            cells.append(_with_spread(values))
        print(f"| `{method}` | {' | '.join(cells)} |")


def _with_spread(values: Sequence[float]) -> str:
    """The mean over the seeds, and how far the seeds are from it at most."""
    if not values:
        return ""
    mean = statistics.mean(values)
    spread = max(abs(value - mean) for value in values)
    return f"{mean:.4f} ± {spread:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _equal_bytes(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds; low-rank novices also as a share of MoNE with as many bytes or more."""
    print("\n**Equal bytes: low-rank novices, and constants with more experts kept**\n")
    print("| removed | novices | stored | log-ppl increase | of MoNE | KL divergence | of MoNE |")
    print("|---|---|--:|--:|--:|--:|--:|")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("ratio", "method", "replacement", "removed"))
        groups.setdefault(key, []).append(row)
    for (ratio, method, replacement, removed), found in sorted(groups.items()):
        if not (removed or low_rank(replacement)):
            continue
        label = f"{replacement}, {removed} removed a layer" if removed else replacement
        size = _mean(found, "stored")
        cells = [f"{ratio:.0%}", f"`{method}` {label}", f"{size:.1%}"]
        larger = [
            group
            for key, group in groups.items()
            if key[:3] == (ratio, *RIVALS[0]) and _mean(group, "stored") >= size
        ]
        rival = min(larger, key=lambda group: _mean(group, "stored"), default=None)
        for name in MEASURES:
            share = ""
            if rival and not removed:
                share = f"{_mean(found, name) / _mean(rival, name):.2f}"
            cells += [_with_spread([row[name] for row in found]), share]
        print(f"| {' | '.join(cells)} |")


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def compare(paths: Sequence[Path]) -> None:
    """Markdown: the same variants in several files, such as those of other calibration text."""
    documents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for measure, title in MEASURES.items():
        print(f"\n**{title}**\n")
        print(f"| | | {' | '.join(documents)} |\n|---|---|{'--:|' * len(documents)}")
        keys = [
            tuple(row[k] for k in ("ratio", "method", "replacement"))
            for document in documents.values()
            for row in document["rows"].values()
            if not row["removed"]
        ]
        for ratio, method, replacement in dict.fromkeys(keys):
            cells = [
                _with_spread(
                    [
                        row[measure]
                        for row in document["rows"].values()
                        if (row["ratio"], row["method"], row["replacement"], row["removed"])
                        == (ratio, method, replacement, 0)
                    ]
                )
                for document in documents.values()
            ]
            print(f"| {ratio:.0%} | `{method}` {replacement} | {' | '.join(cells)} |")


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
    parser.add_argument("--table", type=Path, nargs="+", help="print what results files hold")
    parser.add_argument("--cost", type=int, metavar="WIDTH", help="of fitting one expert")
    parser.add_argument("--work", type=Path, default=Path("quality-run"))
    parser.add_argument("--data", action="append", default=[], help="calibration text")
    parser.add_argument("--text", type=Path, help="to score; default: the package's")
    parser.add_argument("--samples", type=int, default=48, help="to calibrate")
    parser.add_argument("--seq-len", type=int, default=512, help="of samples")
    parser.add_argument("--chunks", type=int, default=16, help="to score")
    parser.add_argument("--ctx-size", type=int, default=512, help="of chunks")
    parser.add_argument("--equal-bytes", action="store_true")
    parser.add_argument("--variant", action="append", metavar="RATIO:METHOD:REPLACEMENT")
    parser.add_argument("--scope", default="layer", help="of the plans")
    parser.add_argument(
        "--pretrained", default="", metavar="MODEL", help=f"what {ROUTER_NORM} compares with"
    )
    parser.add_argument("--seed", type=int, action="append", help="of the variants; default: 1")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.table:
        compare(arguments.table) if len(arguments.table) > 1 else table(*arguments.table)
        return
    if arguments.cost:
        cost(arguments.cost)
        return
    if not (arguments.model and arguments.results and arguments.variant):
        parser.error("MODEL, RESULTS and --variant are needed")
    if not arguments.pretrained and any(ROUTER_NORM in v for v in arguments.variant):
        parser.error(f"{ROUTER_NORM} needs --pretrained")
    run(arguments)


if __name__ == "__main__":
    main()
