"""Which experts to remove together: the set `p` of a given size that minimises `p^T F p`.

In: `F` [experts, experts], what the layer's output loses for each pair that goes
(`criteria.error_matrix`). Out: a set, its error, and a bound that no set can be below. Exact where
there are few sets; else from several starts (greedy from both ends, the diagonal, seeded ones) the
best exchange of one expert for another until none is better. Knows nothing about layers.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mone_edge.stats import Float

EXACT_SETS = 5_000  # enumerated up to here
BOUND_STEPS = 400
RANDOM_STARTS = 8


def error(matrix: Float, chosen: Iterable[int]) -> float:
    """`p^T F p` of a set."""
    ids = list(chosen)
    return float(matrix[np.ix_(ids, ids)].sum())


def solve(matrix: Float, count: int, candidates: Sequence[int] | None = None) -> tuple[int, ...]:
    """The `count` experts that are cheapest to remove together, ascending.

    Args:
        matrix: F, symmetric.
        candidates: which experts may go; default all.
    """
    ids = np.arange(len(matrix)) if candidates is None else np.asarray(candidates, dtype=np.int64)
    inner = matrix[np.ix_(ids, ids)]
    if count in (0, len(ids)):
        best: Sequence[int] = range(count)
    elif math.comb(len(ids), count) <= EXACT_SETS:
        best = min(itertools.combinations(range(len(ids)), count), key=lambda p: error(inner, p))
    else:
        starts = [_forward(inner, count), _backward(inner, count), _by_diagonal(inner, count)]
        rng = np.random.default_rng(0)
        starts += [rng.permutation(len(ids))[:count].tolist() for _ in range(RANDOM_STARTS)]
        best = min((_exchanged(inner, start) for start in starts), key=lambda p: error(inner, p))
    return tuple(sorted(int(ids[i]) for i in best))


def lower_bound(matrix: Float, count: int) -> float:
    """What no set of this size can be below.

    With `m` the smallest eigenvalue, `p^T F p = p^T (F - m I) p + m count` for every set, and the
    first term is convex: its minimum over `0 <= p <= 1, sum p = count`, found by Frank-Wolfe steps
    that bound it from below, is a bound for the sets.
    """
    least = float(np.linalg.eigvalsh(matrix)[0])
    convex = matrix - least * np.eye(len(matrix))
    point = np.full(len(matrix), count / len(matrix))
    bound = -math.inf
    for _ in range(BOUND_STEPS):
        gradient = 2 * convex @ point
        corner = np.zeros(len(matrix))
        corner[np.argsort(gradient, kind="stable")[:count]] = 1
        step = corner - point
        slope, curve = gradient @ step, step @ convex @ step
        bound = max(bound, point @ convex @ point + slope)
        if slope > -1e-12 * abs(bound):
            break
        point = point + step * (1.0 if curve <= 0 else min(1.0, -slope / (2 * curve)))
    return float(bound + least * count)


def _forward(matrix: Float, count: int) -> list[int]:
    """Add, one at a time, the expert that costs least beside those that go already."""
    chosen: list[int] = []
    cost = matrix.diagonal().copy()
    for _ in range(count):
        cheapest = int(np.argmin(cost))
        chosen.append(cheapest)
        cost += 2 * matrix[cheapest]
        cost[chosen] = math.inf
    return chosen


def _backward(matrix: Float, count: int) -> list[int]:
    """From all, put back one at a time the expert that is dearest among those that go."""
    chosen = list(range(len(matrix)))
    gain = 2 * matrix.sum(axis=1) - matrix.diagonal()
    while len(chosen) > count:
        dearest = max(chosen, key=lambda i: float(gain[i]))
        chosen.remove(dearest)
        gain -= 2 * matrix[dearest]
    return chosen


def _by_diagonal(matrix: Float, count: int) -> list[int]:
    order: NDArray[np.int64] = np.argsort(matrix.diagonal(), kind="stable")
    return [int(i) for i in order[:count]]


def _exchanged(matrix: Float, start: list[int]) -> list[int]:
    """Exchange the best pair until no exchange makes the error smaller."""
    going = np.zeros(len(matrix), dtype=bool)
    going[start] = True
    noise = 1e-12 * float(np.abs(matrix).sum())  # below that, two sets could take turns for ever
    while True:
        inside, outside = np.flatnonzero(going), np.flatnonzero(~going)
        pull = 2 * matrix[:, inside].sum(axis=1)  # 2 F p
        diagonal = matrix.diagonal()
        out = (diagonal - pull)[inside]  # change by putting one back
        into = (diagonal + pull)[outside]  # change by removing one more
        change = out[:, None] + into[None] - 2 * matrix[np.ix_(inside, outside)]
        place = int(np.argmin(change))
        i, j = divmod(place, len(outside))
        if change[i, j] >= -noise:
            return [int(n) for n in inside]
        going[inside[i]], going[outside[j]] = False, True
