"""Criteria against the formulas on raw outputs, and on experts with no or one token."""

import numpy as np
import pytest

from mone_edge.criteria import CRITERIA
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


def test_random_follows_the_seed(routing: tuple[np.ndarray, ...]) -> None:
    layer: LayerStats = layer_from_outputs(*routing, EXPERTS)
    first, again, other = (
        CRITERIA["random"](layer, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
