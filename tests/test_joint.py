"""Sets of experts: the solver against enumeration, and its bound."""

import itertools
import math

import numpy as np
import pytest

from mone_edge import joint


def matrix(experts: int, seed: int, rank: int = 0) -> np.ndarray:
    """A Gram matrix, as errors have; of low rank, so that experts cancel."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(experts, rank or experts)) * rng.uniform(0.2, 3, (experts, 1))
    return rows @ rows.T


def enumerated(of: np.ndarray, count: int) -> float:
    sets = itertools.combinations(range(len(of)), count)
    return min(float(of[np.ix_(p, p)].sum()) for p in sets)


@pytest.mark.parametrize("count", [0, 1, 3, 6, 11, 12])
def test_few_sets_are_enumerated(count: int) -> None:
    of = matrix(12, seed=count, rank=4)
    found = joint.solve(of, count)
    assert list(found) == sorted(set(found)) and len(found) == count
    assert joint.error(of, found) == pytest.approx(enumerated(of, count), abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_exchanges_come_near_the_optimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "EXACT_SETS", 0)
    of = matrix(14, seed, rank=5)
    best, found = enumerated(of, 7), joint.error(of, joint.solve(of, 7))
    assert best - 1e-9 <= found <= 1.1 * best


def test_the_diagonal_alone_is_not_enough() -> None:
    """Experts that cancel each other go together, though each alone is dear."""
    rows = np.array([[2.0, 0], [-2.0, 0], [0, 1.0], [0, 1.0]])
    of = rows @ rows.T
    assert joint.solve(of, 2) == (0, 1)
    assert set(np.argsort(of.diagonal())[:2]) == {2, 3}


@pytest.mark.parametrize(("experts", "count"), [(12, 5), (40, 20)])
def test_no_set_is_below_the_bound(experts: int, count: int) -> None:
    for seed in range(4):
        of = matrix(experts, seed)
        bound, found = joint.lower_bound(of, count), joint.error(of, joint.solve(of, count))
        least = enumerated(of, count) if math.comb(experts, count) < 1000 else found
        assert bound <= least + 1e-9
        assert bound > 0.2 * found, "a bound that says nothing"


def test_experts_that_cancel_do_not_take_turns_for_ever() -> None:
    """The error of such a set is rounding alone, and so is what an exchange seems to gain."""
    rng = np.random.default_rng(2643)  # for one seed in some thousands they did
    half = rng.standard_normal((int(rng.integers(10, 20)), 1)) * 10.0 ** rng.integers(-6, 6)
    vectors = np.concatenate([half, -half])
    assert len(joint.solve(vectors @ vectors.T, len(half))) == len(half)


def test_candidates_alone_may_go() -> None:
    of = matrix(40, seed=1)
    chosen = joint.solve(of, 10, candidates=range(5, 40, 2))
    assert len(chosen) == 10 and set(chosen) <= set(range(5, 40, 2))
