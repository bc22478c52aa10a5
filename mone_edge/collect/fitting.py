"""Low-rank novices of a checkpoint's pruned experts, layer by layer, through PyTorch.

In: a checkpoint, a plan, packed calibration tokens, a work folder. Out: `LowRankNovices`. One
layer's weights are in memory, and one expert's moments; what the experts of a layer read is in a
file until the layer is fitted.

Layer `l` reads what the layers before it leave once their experts are pruned, novices in their
place: what it will read in the pruned model. Its novices are fitted to what the pruned experts make
of just that. What is finished after each layer: its novices, its outputs, then the state.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mone_edge import fit, low_rank, novices
from mone_edge.calibration import Batches
from mone_edge.collect.experts import (
    expert_parameters,
    experts_modules,
    input_width,
    num_experts,
    output_width,
    register,
    routed_inputs,
    run_expert,
    set_implementation,
)
from mone_edge.collect.hidden import HiddenStates
from mone_edge.collect.layerwise import LayerCalls, open_streamed
from mone_edge.collect.streaming import OUTSIDE, StreamedModel
from mone_edge.collect.torch_model import BATCH_TOKENS, provenance
from mone_edge.collect.work import Work, WorkFolder, open_work, run_key
from mone_edge.errors import MoneEdgeError
from mone_edge.low_rank import LayerNovices, LowRankNovices
from mone_edge.plan import PrunePlan
from mone_edge.regression import Moments
from mone_edge.source import Checkpoint
from mone_edge.stats import Provenance

IMPLEMENTATION = "mone-edge-sample"
CHUNK_TOKENS = 8192  # of an expert, in memory at once
_SAMPLE = "_mone_edge_sample"

Progress = Callable[[int, int], None]


def fit_checkpoint(
    source: Checkpoint,
    plan: PrunePlan,
    calibration: Batches,
    work: Work,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Progress | None = None,
) -> LowRankNovices:
    """Fit the novices that a plan asks for.

    Args:
        source: the checkpoint, unpruned.
        plan: of the same weights, with replacement "rank" or "rank-R".
        calibration: packed sequences from `mone_edge.calibration.load`.
        work: folder for what is finished; stays until the caller has saved the result.
        device, dtype, batch_tokens: as in `torch_model.collect`.
        on_progress: called with (layers done, layers in all).

    Raises:
        MoneEdgeError: the plan is of another model, the checkpoint or the architecture cannot be
            streamed, the disk is too small, or the work folder is another run's.
    """
    streamed = open_streamed(source, device, dtype)
    found = {i: num_experts(m) for i, (_, m) in experts_modules(streamed.model).items()}
    novices.require_shape(plan, found, "the model has")
    made = provenance(streamed.model, calibration, source.name, source.fingerprint)
    key = run_key(made, "fit", batch_tokens) | {"plan": plan.sha256()}
    with open_work(work, key) as folder, torch.inference_mode():
        calls = LayerCalls(streamed, calibration, batch_tokens)
        run = _Run(streamed, made, plan, calls, folder, on_progress or (lambda done, total: None))
        return run.all_layers()


@dataclass
class _Sample:
    """What the experts of one layer read: every token's input, its experts and their weights."""

    path: Path
    inputs: HiddenStates | None = None
    experts: list[NDArray[np.int64]] = field(default_factory=list)  # [T, K] each
    gates: list[NDArray[np.float32]] = field(default_factory=list)  # [T, K] each

    def add(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Record a call: [T, H], [T, K], [T, K]."""
        assert self.inputs is not None
        self.inputs.write(hidden)
        self.experts.append(index.cpu().numpy())
        self.gates.append(weights.float().cpu().numpy())

    @contextmanager
    def of(self, module: Any, tokens: int, dtype: torch.dtype) -> Iterator[None]:
        """While open, calls of the experts module are recorded."""
        setattr(module, _SAMPLE, self)
        try:
            self.inputs = HiddenStates(self.path, (input_width(module),), dtype)
            self.inputs.require_space(tokens)
            with self.inputs.writing():
                yield
        finally:
            vars(module).pop(_SAMPLE, None)

    def routed(self, expert: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The tokens [n] that an expert got, ascending, and their weights [n]."""
        token, slot = np.nonzero(np.concatenate(self.experts) == expert)
        return token, np.concatenate(self.gates)[token, slot].astype(np.float64)


def _recording_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Records what experts get; what they would make of it is of no use yet."""
    sample: _Sample = getattr(module, _SAMPLE)
    sample.add(hidden, index, weights)
    return torch.zeros_like(hidden)


register(IMPLEMENTATION, _recording_experts)


@dataclass
class _Run:
    """One run over all layers, from the first that is not finished."""

    streamed: StreamedModel
    made: Provenance
    plan: PrunePlan
    calls: LayerCalls
    folder: WorkFolder
    report: Progress

    def all_layers(self) -> LowRankNovices:
        names = list(self.streamed.layers)
        block_of = {name: block for block, name in self.streamed.blocks.items()}
        pruned = [name for name in names if name in block_of and self.plan.pruned(block_of[name])]
        needed = names[: names.index(pruned[-1]) + 1] if pruned else []
        self.streamed.load(OUTSIDE)
        shape = self.folder.state.get("shape")
        for number in range(int(self.folder.state.get("layers", 0)), len(needed)):
            shape = self._layer(number, needed[number], block_of.get(needed[number]), shape)
            self.folder.save(layers=number + 1, shape=shape)
            self._hidden_file(number).unlink(missing_ok=True)
            self.report(number + 1, len(needed))
        parts = [LowRankNovices.load(self._file(block_of[name])) for name in pruned]
        return low_rank.joined(self.made, self.plan, parts)

    def _layer(
        self, number: int, name: str, block: int | None, shape: list[int] | None
    ) -> list[int]:
        """Fit one layer and run it on, pruned; returns the shape of a sequence's hidden states."""
        self.streamed.load(name)
        if block is not None:
            module = experts_modules(self.streamed.model)[block][1]
            pruned, found = self._fit(number, name, block, module, shape)
            biases = found.bias if found else np.zeros((0, 1), np.float32)
            novices.install(module, pruned, biases, found, dtype=self.streamed.dtype)
        set_implementation(self.streamed.model, novices.implementation())
        shape = self._run_on(number, name, shape)
        self.streamed.release(name)
        return shape

    def _fit(
        self, number: int, name: str, block: int, module: Any, shape: list[int] | None
    ) -> tuple[tuple[int, ...], LayerNovices | None]:
        """Record what the layer's experts read, and fit them: the ids that go, their novices."""
        if not self.plan.pruned(block):
            return (), None
        sample = _Sample(self.folder.path / "inputs.bin")
        tokens = self.calls.calibration.tokens.size
        set_implementation(self.streamed.model, IMPLEMENTATION)
        with sample.of(module, tokens, self.streamed.dtype):
            for start, batch in self.calls.batches():
                self.calls.layer(name, batch, self._read_hidden(number, shape, start, len(batch)))
        seen = sum(len(part) for part in sample.experts)
        if seen != tokens:
            raise MoneEdgeError(
                f"block {block}: its experts saw {seen} of {tokens} tokens; this architecture "
                "cannot be fitted"
            )
        limits = _limits(self.plan.replacement, module)
        fitted = fit.candidates(self.plan, block)
        pairs = (_moments(module, expert, sample, tokens) for expert in fitted)
        pruned, layer = fit.plan_novices(self.plan, block, pairs, limits)
        sample.path.unlink()
        made = LowRankNovices(self.made, self.plan.replacement, {block: pruned}, {block: layer})
        made.save(self._file(block))
        return pruned, layer

    def _run_on(self, number: int, name: str, shape: list[int] | None) -> list[int]:
        """Leave the layer's outputs in a file."""
        written: HiddenStates | None = None
        with ExitStack() as stack:
            for start, batch in self.calls.batches():
                before = self._read_hidden(number, shape, start, len(batch))
                after = self.calls.layer(name, batch, before)
                if written is None:
                    written = self._hidden(number + 1, list(after.shape[1:]))
                    written.require_space(len(self.calls.calibration.tokens))
                    stack.enter_context(written.writing())
                written.write(after)
        assert written is not None
        return list(written.shape)

    def _read_hidden(
        self, number: int, shape: list[int] | None, start: int, count: int
    ) -> Tensor | None:
        """What the layer reads; None where that is the embeddings."""
        return self._hidden(number, shape).read(start, count) if number else None

    def _hidden(self, number: int, shape: list[int] | None) -> HiddenStates:
        assert shape is not None
        return HiddenStates(self._hidden_file(number), tuple(shape), self.streamed.dtype)

    def _hidden_file(self, number: int) -> Path:
        return self.folder.path / f"hidden.{number}.bin"

    def _file(self, block: int) -> Path:
        return self.folder.path / f"novices.{block}.safetensors"


def _limits(replacement: str, module: Any) -> fit.Limits:
    experts = num_experts(module)
    stacks = (getattr(owner, name) for owner, name, _ in expert_parameters(module))
    weights = sum(stack.numel() for stack in stacks) // experts
    return fit.Limits(replacement, input_width(module), output_width(module), weights)


def _moments(module: Any, expert: int, sample: _Sample, tokens: int) -> tuple[Moments, Moments]:
    """Of one expert: (to fit, held out)."""
    assert sample.inputs is not None
    rows, gates = sample.routed(expert)
    judges = fit.held_out(tokens)[rows]
    nothing = np.zeros(input_width(module)), np.zeros(output_width(module))
    sums = (Moments(*nothing), Moments(*nothing))
    for start in range(0, len(rows), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        inputs = sample.inputs.take(rows[part]).to(module.down_proj.device)
        gate = torch.from_numpy(gates[part]).to(inputs.device)
        inputs, gate = routed_inputs(module, inputs, gate)
        outputs = run_expert(module, expert, inputs)[1]
        x, y = (t.float().cpu().numpy() for t in (inputs, outputs))
        weight = gate.cpu().numpy() ** 2
        if not start:
            sums = (Moments.near(x, y), Moments.near(x, y))
        for into, chosen in zip(sums, (~judges[part], judges[part]), strict=True):
            into.add(x[chosen], y[chosen], weight[chosen])
    if not all(np.isfinite(s.total) and np.isfinite(s.weight) for s in sums):
        raise MoneEdgeError(
            f"the outputs of expert {expert} are not finite; the weights are damaged, or overflow "
            "in this precision"
        )
    return sums
