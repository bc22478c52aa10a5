"""Criteria against the formulas on raw outputs, and on experts with no or one token."""

import dataclasses

import numpy as np
import pytest

from mone_edge.criteria import CRITERIA, error_matrix, super_experts
from mone_edge.errors import UsageError
from mone_edge.stats import LayerStats
from tests.test_stats import layer_from_outputs, random_routing

TOKENS, EXPERTS, TOP_K, WIDTH = 200, 8, 2, 6


@pytest.fixture(scope="module")
def routing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return random_routing(TOKENS, EXPERTS, TOP_K, WIDTH, seed=1, rare={6: 1, 7: 0})


def direct(name: str, g: np.ndarray, f: np.ndarray) -> float:
    """The criterion from METHODS: g [n] gate weights, f [n, D] raw outputs of one expert."""
    n = len(g)
    if n == 0:
        return 0.0
    norm = np.linalg.norm(f, axis=1)
    std = np.linalg.norm(f.std(axis=0, ddof=1)) if n > 1 else 0.0
    return {
        "mone": std * g.sum() / TOKENS,
        "mone-conditional": std * g.mean(),
        "routing-score": g.sum() / TOKENS,
        "reap": (g * norm).mean(),
        "replacement-error": (g**2 * ((f - f.mean(0)) ** 2).sum(1)).sum(),
        "frequency": n,
        "ean": norm.sum(),
        "man": norm.mean(),
        "msan": (norm**2).mean(),
        "variance": std,
    }[name]


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_scores_equal_the_formula(name: str, routing: tuple[np.ndarray, ...]) -> None:
    ids, gates, outputs = routing
    layer = layer_from_outputs(ids, gates, outputs, EXPERTS)
    assert list(layer.count[-2:]) == [1, 0]
    scores = CRITERIA[name](layer, np.random.default_rng(0))
    expected = [direct(name, gates[ids == e], outputs[ids == e]) for e in range(EXPERTS)]
    np.testing.assert_allclose(scores, expected, rtol=1e-10, atol=1e-12)
    assert scores.dtype == np.float64
    assert scores.shape == (EXPERTS,)


@pytest.mark.parametrize("name", CRITERIA)
def test_nothing_seen_gives_finite_scores(name: str) -> None:
    layer = layer_from_outputs(
        np.zeros((0, TOP_K), dtype=np.int64), np.zeros((0, TOP_K)), np.zeros((0, TOP_K, WIDTH)), 4
    )
    scores = CRITERIA[name](layer, np.random.default_rng(0))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("replacement", ["mean", "gate2-mean", "zero", "drop"])
def test_error_matrix_is_what_the_layer_loses(replacement: str) -> None:
    """Of any set, against the layer's output recomputed token by token.

    Around the means the matrix is exact in one batch; elsewhere it is moved, to first order.
    """
    ids, gates, outputs = random_routing(TOKENS, EXPERTS, TOP_K, WIDTH, seed=2)
    layer = layer_from_outputs(ids, gates, outputs, EXPERTS)
    constants = {"mean": layer.output_mean, "gate2-mean": layer.gate_sq_mean}.get(
        replacement, np.zeros((EXPERTS, WIDTH))
    )
    matrix = error_matrix(layer, replacement)
    for going in ([3], [0, 1], [1, 2, 5], list(range(EXPERTS))):
        lost = np.isin(ids, going)[..., None] * gates[..., None] * (outputs - constants[ids])
        expected = float(np.square(lost.sum(1)).sum())
        exact = replacement == "mean" or len(going) == 1
        found = float(matrix[np.ix_(going, going)].sum())
        assert found == pytest.approx(expected, rel=1e-10 if exact else 0.1)


def test_error_matrix_needs_pairs() -> None:
    layer = layer_from_outputs(*random_routing(20, 4, 2, 3, seed=0), 4)
    with pytest.raises(UsageError, match="measure again"):
        error_matrix(dataclasses.replace(layer, pair_error=None), "mean")
    with pytest.raises(UsageError, match="measure again"):
        super_experts({0: layer, 1: dataclasses.replace(layer, output_max=None)})


def test_super_experts_are_the_extreme_ones() -> None:
    layers = {i: layer_from_outputs(*random_routing(100, 32, 2, 4, seed=i), 32) for i in range(8)}
    maxima = {i: np.array(layer.output_max) for i, layer in layers.items()}
    maxima[2][7], maxima[5][1] = 500.0, 30.0  # the second is below a tenth of the first
    layers = {i: dataclasses.replace(s, output_max=maxima[i]) for i, s in layers.items()}
    assert super_experts(layers) == {2: (7,)}
    even = {i: dataclasses.replace(s, output_max=np.ones(32)) for i, s in layers.items()}
    assert super_experts(even) == {}


def test_random_follows_the_seed(routing: tuple[np.ndarray, ...]) -> None:
    layer: LayerStats = layer_from_outputs(*routing, EXPERTS)
    first, again, other = (
        CRITERIA["random"](layer, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
