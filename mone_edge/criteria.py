"""Scores of experts: one small function per criterion, higher means keep.

In: the statistics of one layer. Out: [experts] float64, finite, 0 or lowest for an expert that no
token reached; and `error_matrix` for those that look at pairs. Knows nothing about ratios, scopes
or other layers.

Notation: `g` gate weight, `f` raw output, `n` tokens routed to the expert, `T` tokens seen; sums
run over the tokens routed to the expert.
"""

from collections.abc import Callable, Mapping

import numpy as np

from mone_edge.errors import UsageError
from mone_edge.stats import Float, LayerStats

Criterion = Callable[[LayerStats, np.random.Generator], Float]
SUPER_QUANTILE, SUPER_SHARE = 0.995, 0.1


def _per_token(sums: Float, layer: LayerStats) -> Float:
    """`sums / n`, 0 for an expert that no token reached."""
    return np.divide(sums, layer.count, out=np.zeros(layer.num_experts), where=layer.count > 0)


def output_std_norm(layer: LayerStats) -> Float:
    """`|| sqrt(sum (f - mean f)^2 / (n - 1)) ||_2` over channels; 0 where n < 2. [E]"""
    degrees = np.maximum(layer.count - 1, 1)
    norms = np.sqrt(layer.output_m2.sum(axis=1) / degrees)
    return np.where(layer.count > 1, norms, 0.0)


def access_frequency(layer: LayerStats) -> Float:
    """`sum g / T`: the mean gate weight over all tokens, routed here or not. [E]"""
    return layer.gate_sum / max(layer.tokens, 1)


def random(layer: LayerStats, rng: np.random.Generator) -> Float:
    """Uniform noise: the control."""
    return rng.random(layer.num_experts)


def frequency(layer: LayerStats, _: np.random.Generator) -> Float:
    """`n`, how often the router chooses the expert."""
    return layer.count.astype(np.float64)


def routing_score(layer: LayerStats, _: np.random.Generator) -> Float:
    """`sum g / T`, the baseline "RS" of MoNE (arXiv 2507.00390)."""
    return access_frequency(layer)


def variance(layer: LayerStats, _: np.random.Generator) -> Float:
    """Norm of the output's standard deviation, an ablation of MoNE (arXiv 2507.00390)."""
    return output_std_norm(layer)


def mone(layer: LayerStats, _: np.random.Generator) -> Float:
    """`variance * sum g / T`: MoNE (arXiv 2507.00390) as its reference code computes it."""
    return output_std_norm(layer) * access_frequency(layer)


def mone_conditional(layer: LayerStats, _: np.random.Generator) -> Float:
    """`variance * sum g / n`: MoNE (arXiv 2507.00390) as its text reads."""
    return output_std_norm(layer) * _per_token(layer.gate_sum, layer)


def reap(layer: LayerStats, _: np.random.Generator) -> Float:
    """`sum g ||f|| / n`: REAP (arXiv 2510.13999)."""
    return _per_token(layer.gate_norm_sum, layer)


def ean(layer: LayerStats, _: np.random.Generator) -> Float:
    """`sum ||f||`: expert activation norm, a baseline of REAP (arXiv 2510.13999)."""
    return layer.norm_sum.copy()


def man(layer: LayerStats, _: np.random.Generator) -> Float:
    """`sum ||f|| / n`: mean activation norm (arXiv 2606.15716)."""
    return _per_token(layer.norm_sum, layer)


def msan(layer: LayerStats, _: np.random.Generator) -> Float:
    """`sum ||f||^2 / n`: mean squared activation norm (arXiv 2606.15716)."""
    return _per_token(layer.norm_sq_sum, layer)


def replacement_error(layer: LayerStats, _: np.random.Generator) -> Float:
    """`sum g^2 ||f - mean f||^2`: what the layer's output loses when the mean replaces the expert.

    Expanded from sums, with `m` the mean and `w = sum g^2 f / sum g^2`:
    `sum g^2 ||f||^2 + sum g^2 (||m||^2 - 2 <w, m>)`; never below 0 by rounding.
    """
    mean = layer.output_mean
    offset: Float = np.square(mean).sum(axis=1) - 2 * (layer.gate_sq_mean * mean).sum(axis=1)
    error: Float = layer.gate_sq_norm_sq_sum + layer.gate_sq_sum * offset
    return np.clip(error, 0.0, None)


def error_matrix(layer: LayerStats, replacement: str) -> Float:
    """`F_ij = sum_t g_i g_j <f_i - c_i, f_j - c_j>`, the constants `c` those of the replacement.

    With the router whole and the experts of a set replaced, `p^T F p` is the squared error of the
    layer's output. The diagonal is exact; the rest is known around the means, and moved to other
    constants as a covariance moves (see `LayerStats.merge`). "drop", whose router chooses again, is
    taken for "zero". [E, E]

    Raises:
        UsageError: the statistics are of an older version, which did not look at pairs.
    """
    pair_error, pair_gate = layer.pair_error, layer.pair_gate
    if pair_error is None or pair_gate is None:
        raise UsageError(
            "these statistics hold nothing about pairs of experts (an older mone-edge measured "
            "them); measure again: mone-edge stats MODEL, or rank without pairs: --method mone"
        )
    constants = {"mean": layer.output_mean, "zero": 0 * layer.output_mean}.get(
        "zero" if replacement == "drop" else replacement, layer.gate_sq_mean
    )
    moved = layer.output_mean - constants
    matrix: Float = pair_error + pair_gate * (moved @ moved.T)
    offset = np.square(constants).sum(axis=1) - 2 * (layer.gate_sq_mean * constants).sum(axis=1)
    own = layer.gate_sq_norm_sq_sum + layer.gate_sq_sum * offset
    np.fill_diagonal(matrix, np.clip(own, 0.0, None))
    return matrix


def super_experts(layers: Mapping[int, LayerStats]) -> dict[int, tuple[int, ...]]:
    """Experts with extreme activations, which a model falls apart without (arXiv 2507.23279).

    Those whose largest output is above the 99.5th percentile of all experts of the model, and above
    a tenth of the largest. The paper looks at layers that form massive activations only; here all
    layers count.

    Raises:
        UsageError: the statistics are of an older version, which did not look for the largest.
    """
    largest = {index: layer.output_max for index, layer in layers.items()}
    known = [values for values in largest.values() if values is not None]
    if not known or len(known) < len(largest):
        raise UsageError(
            "these statistics hold no largest outputs (an older mone-edge measured them); measure "
            "again: mone-edge stats MODEL"
        )
    pooled = np.concatenate(known)
    limit = max(np.quantile(pooled, SUPER_QUANTILE), pooled.max() * SUPER_SHARE)
    found = {i: np.flatnonzero(v > limit) for i, v in largest.items() if v is not None}
    return {i: tuple(int(e) for e in ids) for i, ids in found.items() if len(ids)}


CRITERIA: dict[str, Criterion] = {
    "mone": mone,
    "mone-conditional": mone_conditional,
    "routing-score": routing_score,
    "reap": reap,
    "replacement-error": replacement_error,
    "frequency": frequency,
    "ean": ean,
    "man": man,
    "msan": msan,
    "variance": variance,
    "random": random,
}
