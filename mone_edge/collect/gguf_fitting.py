"""Low-rank novices of a GGUF's pruned experts, through llama.cpp: no PyTorch.

In: a GGUF, a plan, packed calibration tokens, a work folder. Out: `LowRankNovices`. llama.cpp runs
whole graphs, so the moments of every pruned expert of a layer are gathered at once, of as many
layers in one pass over the text as `MOMENT_BYTES` have room for (one at least); a pass stops at its
last layer. The inputs are those of the whole model, unlike in `fitting`: for others a half-pruned
file would have to be written for every layer. What is finished after each pass: its layers.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mone_edge import fit, low_rank, novices
from mone_edge.calibration import Batches
from mone_edge.collect.gguf import ExpertObserver, observe, provenance
from mone_edge.collect.work import Work, WorkFolder, open_work, run_key
from mone_edge.console import human_bytes
from mone_edge.errors import MoneEdgeError
from mone_edge.gguf_file import GgufSource
from mone_edge.graph import Node
from mone_edge.low_rank import LowRankNovices
from mone_edge.machine import memory_bytes
from mone_edge.plan import PrunePlan
from mone_edge.regression import Moments
from mone_edge.stats import Provenance

MOMENT_BYTES = 4 << 30
BLOCK_ROWS = 1024  # added to the moments of an expert at once: each time costs a pass over them
WAITING_BYTES = 1 << 30  # of rows that wait for that
STACK = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")

Progress = Callable[[int, int], None]
Values = NDArray[Any]
Pair = tuple[Moments, Moments]  # to fit, held out
Rows = tuple[Values, Values, Values]  # inputs [n, H], outputs [n, D], weights [n]


def fit_gguf(
    source: GgufSource,
    plan: PrunePlan,
    calibration: Batches,
    work: Work,
    *,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> LowRankNovices:
    """Fit the novices that a plan asks for.

    Args:
        source: the file, unpruned.
        plan: of the same file, with replacement "rank" or "rank-R".
        calibration: packed sequences of this model's token ids.
        work: folder for what is finished; stays until the caller has saved the result.
        threads: None uses every core.
        on_progress: called with (layers done, layers in all).

    Raises:
        MoneEdgeError: the plan is of another model, llama.cpp refuses the file, or its experts
            cannot be observed.
    """
    shapes = _shapes(source, plan.replacement)
    novices.require_shape(plan, {i: s.experts for i, s in shapes.items()}, "the model has")
    made = provenance(source.name, source.fingerprint, source.architecture, calibration)
    wanted = [layer for layer in sorted(plan.kept) if plan.pruned(layer)]
    with open_work(work, run_key(made, "fit", 0) | {"plan": plan.sha256()}) as folder:
        done = list(folder.state.get("layers", []))
        _require_memory(wanted, plan, shapes)
        for group in _groups([x for x in wanted if x not in done], plan, shapes):
            observer = _observe(source.path, plan, group, calibration, threads)
            for layer in group:
                _fit(folder, layer, plan, observer, shapes[layer], made)
            done += group
            folder.save(layers=done)
            if on_progress is not None:
                on_progress(len(done), len(wanted))
        return low_rank.joined(made, plan, [LowRankNovices.load(_file(folder, x)) for x in wanted])


@dataclass(frozen=True)
class _Shape:
    """The experts of a layer."""

    experts: int
    limits: fit.Limits

    def moment_bytes(self, fitted: int) -> int:
        """Memory for the moments of some of them, held-out ones too, in float64."""
        limits = self.limits
        return 2 * 8 * fitted * limits.inputs * (limits.inputs + limits.outputs)


def _shapes(source: GgufSource, replacement: str) -> dict[int, _Shape]:
    stacks: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, ref in source.tensors.items():
        if match := STACK.fullmatch(name):
            stacks.setdefault(int(match[1]), {})[match[2]] = ref.shape
    found: dict[int, _Shape] = {}
    for layer, shapes in stacks.items():
        experts, outputs, _ = shapes["down"]  # [experts, D, I]
        inputs = next(shape[2] for part, shape in shapes.items() if part != "down")
        weights = sum(int(np.prod(shape[1:])) for shape in shapes.values())
        found[layer] = _Shape(experts, fit.Limits(replacement, inputs, outputs, weights))
    return found


def _require_memory(layers: Sequence[int], plan: PrunePlan, shapes: dict[int, _Shape]) -> None:
    for layer in layers:
        ids = fit.candidates(plan, layer)
        if (needed := shapes[layer].moment_bytes(len(ids))) > memory_bytes():
            raise MoneEdgeError(
                f"block {layer}: fitting {len(ids)} experts at once takes {human_bytes(needed)} of "
                f"memory, this machine has {human_bytes(memory_bytes())}; fit to the checkpoint "
                "instead (an expert at a time), or choose constants (--replacement mean)"
            )


def _groups(
    layers: Sequence[int], plan: PrunePlan, shapes: dict[int, _Shape]
) -> Iterator[list[int]]:
    """Layers that are gathered in one pass."""
    group: list[int] = []
    room = MOMENT_BYTES
    for layer in layers:
        needed = shapes[layer].moment_bytes(len(fit.candidates(plan, layer)))
        if group and needed > room:
            yield group
            group, room = [], MOMENT_BYTES
        group.append(layer)
        room -= needed
    if group:
        yield group


def _observe(
    path: Path, plan: PrunePlan, group: list[int], calibration: Batches, threads: int | None
) -> "_PairObserver":
    tokens = calibration.tokens
    observer = _PairObserver({i: fit.candidates(plan, i) for i in group}, tokens.size)
    observe(path, observer, tokens, threads)
    observer.add_waiting()
    for layer in group:
        if observer.tokens[layer] != tokens.size:
            raise MoneEdgeError(
                f"{path}, block {layer}: its experts saw {observer.tokens[layer]} of {tokens.size} "
                "tokens; this architecture cannot be fitted"
            )
    return observer


def _fit(
    folder: WorkFolder,
    layer: int,
    plan: PrunePlan,
    observer: "_PairObserver",
    shape: _Shape,
    made: Provenance,
) -> None:
    """Fit a layer and save it; its moments are dropped."""
    limits, moments = shape.limits, observer.moments.pop(layer)
    nothing = Moments(np.zeros(limits.inputs), np.zeros(limits.outputs))
    pairs = (moments.pop(e, (nothing, nothing)) for e in fit.candidates(plan, layer))
    pruned, found = fit.plan_novices(plan, layer, pairs, limits)
    alone = LowRankNovices(made, plan.replacement, {layer: pruned}, {layer: found})
    alone.save(_file(folder, layer))


def _file(folder: WorkFolder, layer: int) -> Path:
    return folder.path / f"novices.{layer}.safetensors"


class _PairObserver(ExpertObserver):
    """Adds what some experts of some layers read and wrote to their moments."""

    def __init__(self, fitted: dict[int, tuple[int, ...]], tokens: int) -> None:
        super().__init__()
        self.moments: dict[int, dict[int, Pair]] = {layer: {} for layer in fitted}
        self.tokens = dict.fromkeys(fitted, 0)
        self._fitted, self._last = fitted, max(fitted)
        self._held_out = fit.held_out(tokens)
        self._batch: dict[int, tuple[Values, NDArray[np.int64]]] = {}  # inputs [T, H], ids [T, K]
        self._waiting: dict[tuple[int, int, bool], list[Rows]] = {}  # layer, expert, held out
        self._waiting_bytes = 0
        self._finished = False

    def start(self) -> None:
        super().start()
        self._batch.clear()
        self._finished = False

    def wants(self, node: Node) -> bool:
        return self._finished or super().wants(node)

    def see(self, node: Node) -> bool:
        return not self._finished and super().see(node)

    def watches(self, layer: int) -> bool:
        return layer in self._fitted

    def _wants_linear(self, node: Node) -> bool:
        return False

    def _begin(self, layer: int, experts: int, ids: Values, inputs: Values) -> None:
        self._batch[layer] = inputs.copy(), ids.astype(np.int64)

    def _add_inner(self, layer: int, inner: Values) -> None:
        pass

    def _end(self, layer: int, outputs: Values, weights: Values) -> None:
        inputs, ids = self._batch.pop(layer)
        start = self.tokens[layer]
        judges = self._held_out[start : start + len(ids)]
        self.tokens[layer] += len(ids)
        for expert in self._fitted[layer]:
            token, slot = np.nonzero(ids == expert)
            if len(token):
                gates = weights[token, slot].reshape(-1).astype(np.float64)
                self._add(layer, expert, inputs[token], outputs[token, slot], gates, judges[token])
        self._finished = layer == self._last

    def _add(
        self, layer: int, expert: int, x: Values, y: Values, gates: Values, judges: Values
    ) -> None:
        if expert not in self.moments[layer]:
            self.moments[layer][expert] = Moments.near(x, y), Moments.near(x, y)
        for held_out, chosen in ((False, ~judges), (True, judges)):
            if not chosen.any():
                continue
            key, rows = (layer, expert, held_out), (x[chosen], y[chosen], gates[chosen] ** 2)
            waiting = self._waiting.setdefault(key, [])
            waiting.append(rows)
            self._waiting_bytes += sum(part.nbytes for part in rows)
            if _count(waiting) >= BLOCK_ROWS:
                self._add_rows(key)
        while self._waiting_bytes > WAITING_BYTES:
            self._add_rows(max(self._waiting, key=lambda key: _count(self._waiting[key])))

    def _add_rows(self, key: tuple[int, int, bool]) -> None:
        layer, expert, held_out = key
        x, y, weights = map(np.concatenate, zip(*self._waiting.pop(key), strict=True))
        self._waiting_bytes -= x.nbytes + y.nbytes + weights.nbytes
        self.moments[layer][expert][held_out].add(x, y, weights)

    def add_waiting(self) -> None:
        """Add what still waits to be more."""
        for key in list(self._waiting):
            self._add_rows(key)


def _count(waiting: Sequence[Rows]) -> int:
    return sum(len(x) for x, _, _ in waiting)
