"""Running sums of one MoE layer and of ordinary linear layers, batch after batch.

In: the routed inputs and outputs of experts, in the model's precision. Out: LayerStats and
LinearStats in float64. A batch is summed in float32 (float64 if the model runs in float64) around
its own mean, and merged into float64 sums by Chan's formula, so that long runs lose no digits.
Knows nothing about models.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mone_edge.collect.sampling import Sample
from mone_edge.stats import Float, LayerStats, LinearStats

PAIR_TOKENS = 256  # whose residuals are in the cache at once


class LayerAccumulator:
    """The sums behind one LayerStats, and a sample of what its experts read, if it is wanted."""

    def __init__(self, num_experts: int, sample: Sample | None = None) -> None:
        self.num_experts = num_experts
        self.sample = sample
        self.total: LayerStats | None = None

    def add(self, batch: "BatchSums", hidden: Tensor) -> None:
        """Merge a finished batch, of inputs [T, H], into the total."""
        if self.sample is not None:
            self.sample.take(hidden, self.total.tokens if self.total else 0)
        stats = batch.finish()
        self.total = stats if self.total is None else self.total.merge(stats)

    def add_stream(self, hidden: Tensor) -> None:
        """Record what the layer made of the last batch: [B, S, ...], the residual stream."""
        if self.total is None:  # its experts were not seen, which `checked` tells in the end
            return
        assert self.total.stream_inverse is not None
        rows = hidden.reshape(hidden.shape[0] * hidden.shape[1], -1)
        rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        norms = torch.linalg.vecdot(rows, rows)
        inverse = _float64(1 / norms[norms > 0]).sum()
        self.total = replace(self.total, stream_inverse=self.total.stream_inverse + inverse)


class BatchSums:
    """One forward call of one MoE layer: T tokens, top-k experts each.

    Where weights multiply the inputs (`weighs_inputs`), outputs are contributions and weigh 1.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        *,
        weighs_inputs: bool = False,
    ) -> None:
        self.num_experts = num_experts
        self.precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.tokens, self.top_k = index.shape
        self.gates = torch.zeros(
            self.tokens, num_experts, dtype=self.precision, device=hidden.device
        )
        self.gates.scatter_(1, index, weights.to(self.precision))  # [T, E]
        routed = torch.zeros_like(self.gates).scatter_(1, index, 1.0)  # [T, E]
        self.count = routed.sum(0)
        scale_sq = self.gates.square() if weighs_inputs else routed
        self.input_sq_sum = scale_sq.T @ hidden.to(self.precision).square()  # [E, H]
        if weighs_inputs:
            self.gates = routed
        self.columns: dict[str, Tensor] = {}
        self.scalars = torch.zeros(5, num_experts, dtype=self.precision, device=hidden.device)
        self.index = index
        self.residuals = hidden.new_zeros(0)  # [T, K, D] g (f - mean), in the model's precision

    def add_expert(
        self,
        expert: int,
        tokens: Tensor,
        slots: Tensor,
        gate: Tensor,
        inner: Tensor,
        output: Tensor,
    ) -> None:
        """Record what one expert did.

        Args:
            expert: its id.
            tokens: [n] which tokens were routed to it.
            slots: [n] as which of their K experts.
            gate: [n] gate weights of the tokens routed to it.
            inner: [n, I] inputs of its down projection.
            output: [n, D] its raw outputs, before the gate weight.
        """
        if not len(self.residuals):
            shape = (self.tokens, self.top_k, output.shape[1])
            self.residuals = output.new_empty(shape)  # every token fills all of its slots
        gate, inner, output = (t.to(self.precision) for t in (gate, inner, output))
        gate_sq = gate.square()
        mean = output.mean(0)
        centred = output - mean
        self._column("output_mean", expert, mean)
        self._column("output_m2", expert, _column_sq_sum(centred))
        # Around the mean, so that near-constant outputs keep their digits.
        offset = gate_sq @ centred / gate_sq.sum().clamp_min(torch.finfo(self.precision).tiny)
        self._column("gate_sq_mean", expert, mean + offset)
        self._column("inner_sq_sum", expert, _column_sq_sum(inner))
        norm_sq = torch.linalg.vecdot(output, output)  # [n]; several times faster than vector_norm
        norm = norm_sq.sqrt()
        largest = torch.stack(torch.aminmax(output)).abs().max()
        sums = (norm.sum(), norm_sq.sum(), gate @ norm, gate_sq @ norm_sq, largest)
        self.scalars[:, expert] = torch.stack(sums)
        self.residuals[tokens, slots] = (centred * gate[:, None]).to(self.residuals.dtype)

    def finish(self) -> LayerStats:
        """The batch as statistics."""
        norm_sum, norm_sq_sum, gate_norm_sum, gate_sq_norm_sq_sum, output_max = _float64(
            self.scalars
        )
        gates = _float64(self.gates)
        gate_sq_sum = np.square(gates).sum(0)
        columns: dict[str, Any] = {name: _float64(v) for name, v in self.columns.items()}
        columns["gate_sq_mean"][gate_sq_sum == 0] = 0
        return LayerStats(
            tokens=self.tokens,
            top_k=self.top_k,
            count=_float64(self.count).astype(np.int64),
            gate_sum=gates.sum(0),
            gate_sq_sum=gate_sq_sum,
            norm_sum=norm_sum,
            norm_sq_sum=norm_sq_sum,
            gate_norm_sum=gate_norm_sum,
            gate_sq_norm_sq_sum=gate_sq_norm_sq_sum,
            input_sq_sum=_float64(self.input_sq_sum),
            output_max=output_max,
            pair_gate=gates.T @ gates,
            pair_error=self._pair_error(),
            stream_inverse=np.zeros(1),
            **columns,
        )

    def _pair_error(self) -> Float:
        """[E, E]: of each token the products of its K residuals, added up by pairs of experts."""
        sums = self.gates.new_zeros(self.num_experts**2)
        for start in range(0, self.tokens, PAIR_TOKENS):
            ids = self.index[start : start + PAIR_TOKENS]
            rows = self.residuals[start : start + PAIR_TOKENS].to(self.precision)  # [t, K, D]
            products = rows @ rows.mT  # [t, K, K]
            pairs = ids[:, :, None] * self.num_experts + ids[:, None]
            sums.index_add_(0, pairs.reshape(-1), products.reshape(-1))
        return _float64(sums).reshape(self.num_experts, self.num_experts)

    def _column(self, name: str, expert: int, values: Tensor) -> None:
        if name not in self.columns:
            self.columns[name] = values.new_zeros(self.num_experts, len(values))
        self.columns[name][expert] = values


class LinearAccumulator:
    """The sums behind one LinearStats."""

    def __init__(self) -> None:
        self.total: LinearStats | None = None

    def add(self, inputs: Tensor) -> None:
        """Record inputs [..., in_features]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        precision = torch.float64 if rows.dtype == torch.float64 else torch.float32
        stats = LinearStats(len(rows), _float64(_column_sq_sum(rows.to(precision))))
        self.total = stats if self.total is None else self.total.merge(stats)


def _column_sq_sum(rows: Tensor) -> Tensor:
    return rows.square().sum(0)


def _float64(values: Tensor) -> Float:
    """On the CPU first: not every accelerator has float64."""
    return values.cpu().double().numpy()
