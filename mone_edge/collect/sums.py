"""Sums over one batch of one MoE layer, in NumPy.

In: what the experts of a layer read and wrote for T tokens with K experts each. Out: LayerStats.
Summed in float32 around the batch's own mean, as `collect.accumulate` does in torch; LayerStats
merge in float64, so that long runs lose no digits. Knows nothing about models.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mone_edge.stats import Float, LayerStats

Values = NDArray[Any]


class RoutedSums:
    """One batch: sums taken expert by expert, over a copy of its rows only (they fit a cache)."""

    def __init__(self, num_experts: int, ids: Values, inputs: Values) -> None:
        """
        Args:
            ids: [T, K] the experts of each token.
            inputs: [T, H] what all its experts read.
        """
        self.num_experts = num_experts
        self.tokens, self.top_k = ids.shape
        flat = ids.reshape(-1).astype(np.int64)
        self.ids = ids.astype(np.int64)
        self.order = np.argsort(flat, kind="stable")
        self.count = np.bincount(flat, minlength=num_experts)
        routed = np.zeros((self.tokens, num_experts), np.float32)
        np.put_along_axis(routed, self.ids, 1.0, axis=1)
        self.input_sq_sum = (routed.T @ np.square(inputs)).astype(np.float64)  # [E, H]
        self.inner_sq_sum: Float | None = None

    def add_inner(self, inner: Values) -> None:
        """[T, K, I]: what the down projection reads."""
        self.inner_sq_sum = np.zeros((self.num_experts, inner.shape[-1]))
        for expert, slots in self._experts():
            self.inner_sq_sum[expert] = squared_columns(_rows(inner, slots))

    def finish(self, outputs: Values, weights: Values) -> LayerStats:
        """The statistics.

        Args:
            outputs: [T, K, D] raw outputs.
            weights: [T, K, 1] what they are multiplied by.
        """
        assert self.inner_sq_sum is not None
        width, gates = outputs.shape[-1], weights.reshape(-1).astype(np.float32)
        mean, m2, gate_sq_mean = (np.zeros((self.num_experts, width)) for _ in range(3))
        scalars = np.zeros((7, self.num_experts))
        residuals = np.zeros((self.tokens * self.top_k, width), np.float32)
        for expert, slots in self._experts():
            rows, gate = _rows(outputs, slots), gates[slots]
            norm_sq = np.einsum("nd,nd->n", rows, rows)
            largest = max(rows.max(), -rows.min())
            centre = rows.mean(0)
            rows -= centre
            mean[expert], m2[expert] = centre, squared_columns(rows)
            gate_sq = np.square(gate)
            total = gate_sq.sum(dtype=np.float64)
            if total > 0:  # around the mean, so that near-constant outputs keep their digits
                gate_sq_mean[expert] = centre + (gate_sq @ rows) / total
            scalars[:, expert] = [*_scalar_sums(gate, gate_sq, norm_sq), largest]
            rows *= gate[:, None]
            residuals[slots] = rows
        gate_sum, gate_sq_sum, norm_sum, norm_sq_sum, gate_norm_sum, gate_sq_norm_sq_sum = scalars[
            :6
        ]
        dense = np.zeros((self.tokens, self.num_experts))
        np.put_along_axis(dense, self.ids, gates.reshape(self.ids.shape), axis=1)
        return LayerStats(
            tokens=self.tokens,
            top_k=self.top_k,
            count=self.count,
            gate_sum=gate_sum,
            gate_sq_sum=gate_sq_sum,
            output_mean=mean,
            output_m2=m2,
            gate_sq_mean=gate_sq_mean,
            norm_sum=norm_sum,
            norm_sq_sum=norm_sq_sum,
            gate_norm_sum=gate_norm_sum,
            gate_sq_norm_sq_sum=gate_sq_norm_sq_sum,
            input_sq_sum=self.input_sq_sum,
            inner_sq_sum=self.inner_sq_sum,
            output_max=scalars[6],
            pair_gate=dense.T @ dense,
            pair_error=self._pair_error(residuals.reshape(self.tokens, self.top_k, width)),
            stream_inverse=np.zeros(1),
        )

    def _pair_error(self, residuals: Values) -> Float:
        """[T, K, D] g (f - mean) -> [E, E]: products within a token, by pairs of experts."""
        products = residuals @ residuals.transpose(0, 2, 1)  # [T, K, K]
        pairs = self.ids[:, :, None] * self.num_experts + self.ids[:, None]
        sums = np.bincount(pairs.reshape(-1), products.reshape(-1), self.num_experts**2)
        return np.asarray(sums, np.float64).reshape(self.num_experts, self.num_experts)

    def _experts(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each expert that got tokens, and its slots: token * K + rank."""
        ends = np.cumsum(self.count)
        for expert in np.flatnonzero(self.count).tolist():
            yield expert, self.order[ends[expert] - self.count[expert] : ends[expert]]


def _rows(values: Values, slots: NDArray[np.int64]) -> Values:
    """[T, K, n], slots -> [len(slots), n]; a copy."""
    return np.take(values.reshape(-1, values.shape[-1]), slots, axis=0)


def _scalar_sums(gate: Values, gate_sq: Values, norm_sq: Values) -> list[np.float64]:
    norm = np.sqrt(norm_sq)
    terms = (gate, gate_sq, norm, norm_sq, gate * norm, gate_sq * norm_sq)
    return [np.sum(term, dtype=np.float64) for term in terms]


def squared_columns(rows: Values) -> Float:
    """[n, columns] -> [columns]: sum of squares."""
    sums: Float = np.einsum("nc,nc->c", rows, rows).astype(np.float64)
    return sums
