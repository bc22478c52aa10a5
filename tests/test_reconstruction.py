"""`--method reconstruction` against the layer's output, recomputed in float64 for every set."""

import itertools
import math

import numpy as np
import pytest

from mone_edge import joint
from mone_edge.plan import make_plan
from mone_edge.stats import ExpertStats, Provenance
from tests.test_stats import layer_from_outputs, random_routing

TOKENS, EXPERTS, TOP_K, WIDTH = 120, 8, 3, 10
Routing = tuple[np.ndarray, np.ndarray, np.ndarray]


def separated(seed: int) -> Routing:
    """Outputs that differ from token to token in other channels than means do.

    Then products of experts are known exactly from statistics, not around means only.
    """
    ids, gates, outputs = random_routing(TOKENS, EXPERTS, TOP_K, WIDTH, seed)
    rng = np.random.default_rng(seed)
    half = WIDTH // 2
    outputs[..., half:] = rng.normal(size=(EXPERTS, half))[ids]
    for expert in range(EXPERTS):
        outputs[..., :half][ids == expert] -= outputs[..., :half][ids == expert].mean(0)
    return ids, gates, outputs


def lost(routing: Routing, going: tuple[int, ...]) -> float:
    """`sum_t ||sum_{i in going} g_i f_i||^2`: what the layer's output loses without the experts."""
    ids, gates, outputs = routing
    total = 0.0
    for token in range(len(ids)):
        gone = np.zeros(outputs.shape[-1])
        for slot in range(ids.shape[1]):
            if ids[token, slot] in going:
                gone += gates[token, slot] * outputs[token, slot]
        total += float(gone @ gone)
    return total


def chosen(routing: Routing, ratio: float, **choices: str) -> tuple[int, ...]:
    stats = ExpertStats(
        Provenance("tiny", "f" * 64, "olmoe"), {0: layer_from_outputs(*routing, EXPERTS)}
    )
    return make_plan(stats, prune_ratio=ratio, **choices).pruned(0)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_no_set_of_that_size_loses_less(count: int) -> None:
    for seed in range(3):
        routing = separated(seed)
        found = chosen(routing, count / EXPERTS, method="reconstruction")
        best = min(lost(routing, p) for p in itertools.combinations(range(EXPERTS), count))
        assert lost(routing, found) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_outputs_of_any_kind_come_near_the_best(seed: int) -> None:
    """There, products of different experts are known to first order only."""
    routing = random_routing(TOKENS, EXPERTS, TOP_K, WIDTH, seed)
    found = lost(routing, chosen(routing, 0.5, method="reconstruction"))
    every = [lost(routing, p) for p in itertools.combinations(range(EXPERTS), 4)]
    assert len(every) == math.comb(8, 4)
    assert found <= min(every) + 0.05 * (np.median(every) - min(every))


def test_exchanges_where_sets_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "EXACT_SETS", 0)
    routing = separated(5)
    best = min(lost(routing, p) for p in itertools.combinations(range(EXPERTS), 4))
    assert lost(routing, chosen(routing, 0.5, method="reconstruction")) <= 1.05 * best


def test_it_does_not_look_at_the_replacement() -> None:
    """`joint` does: for zero it is the same, for means another set."""
    routing = separated(2)
    for replacement in ("mean", "gate2-mean", "drop", "zero"):
        same = chosen(routing, 0.5, method="reconstruction", replacement=replacement)
        assert same == chosen(routing, 0.5, method="joint", replacement="zero")
    assert same != chosen(routing, 0.5, method="joint", replacement="mean")
