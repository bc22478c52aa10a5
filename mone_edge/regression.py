"""Weighted reduced-rank ridge regression, from moments that are added batch by batch.

In: pairs (x, y) with weights, some of them held out. Out: the best `y ~ bias + up down x` of every
rank up to a limit, the ridge strength chosen and each rank judged by the pairs held out. Knows
nothing about models.

With `X`, `Y` the weighted, centred pairs and `s` the norms of the columns of `X`, the ridge
solution is `B = argmin ||Y - X B||^2 + ridge * ||diag(s) B||^2`. Its best form of rank r under the
same norm is `B V_r V_r^T`, with `V` the leading eigenvectors of `B^T X^T Y` (Mukherjee and Zhu,
Statistical Analysis and Data Mining 2011).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lu_factor, lu_solve

Float = NDArray[np.float64]
Values = NDArray[np.floating]
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
PAIRS_PER_RANK = 4  # at least, to fit; and as many held out
SPARE = 16  # of the subspace iteration: directions beyond those asked for
COLD, WARM = 8, 3  # its steps from random directions, and from those of a ridge nearby


@dataclass
class Moments:
    """Sums over weighted pairs about a point near their means, so that they keep their digits."""

    x: Float  # [H] the point
    y: Float  # [D]
    pairs: int = 0
    weight: float = 0.0  # sum w
    sum_x: Float = field(init=False)  # [H] sum w x
    sum_y: Float = field(init=False)  # [D]
    squares: Float = field(init=False)  # [H, H] sum w x x^T
    products: Float = field(init=False)  # [H, D] sum w x y^T
    total: float = 0.0  # sum w ||y||^2

    def __post_init__(self) -> None:
        inputs, outputs = len(self.x), len(self.y)
        self.sum_x, self.sum_y = np.zeros(inputs), np.zeros(outputs)
        self.squares, self.products = np.zeros((inputs, inputs)), np.zeros((inputs, outputs))

    @classmethod
    def near(cls, x: Values, y: Values) -> "Moments":
        """Of nothing yet, about the means of these pairs [n, H], [n, D]."""
        return cls(x.mean(0, dtype=np.float64), y.mean(0, dtype=np.float64))

    def add(self, x: Values, y: Values, weights: Values) -> None:
        """Add pairs: [n, H], [n, D], weights [n] that are not negative."""
        root = np.sqrt(weights, dtype=np.float32)[:, None]
        rows_x = (x - self.x.astype(np.float32)) * root
        rows_y = (y - self.y.astype(np.float32)) * root
        self.pairs += len(x)
        self.weight += float(weights.sum(dtype=np.float64))
        self.sum_x += rows_x.T @ root[:, 0]
        self.sum_y += rows_y.T @ root[:, 0]
        self.squares += rows_x.T @ rows_x
        self.products += rows_x.T @ rows_y
        self.total += float(np.einsum("nd,nd->", rows_y, rows_y, dtype=np.float64))

    def about(self, x: Float, y: Float) -> "Moments":
        """The same sums about another point."""
        moved = Moments(x, y, self.pairs, self.weight)
        shift_x, shift_y = x - self.x, y - self.y
        rows_x, rows_y = self.weight * shift_x, self.weight * shift_y
        moved.sum_x, moved.sum_y = self.sum_x - rows_x, self.sum_y - rows_y
        cross = np.outer(shift_x, self.sum_x)
        moved.squares = self.squares - cross - cross.T + np.outer(shift_x, rows_x)
        moved.products = (
            self.products
            - np.outer(shift_x, self.sum_y)
            - np.outer(self.sum_x, shift_y)
            + np.outer(shift_x, rows_y)
        )
        moved.total = float(self.total - 2 * shift_y @ self.sum_y + shift_y @ rows_y)
        return moved

    def centred(self) -> "Moments":
        """About the means."""
        weight = self.weight or 1.0
        return self.about(self.x + self.sum_x / weight, self.y + self.sum_y / weight)

    def __add__(self, other: "Moments") -> "Moments":
        """Of both sets of pairs."""
        moved = other.about(self.x, self.y)
        both = Moments(self.x, self.y, self.pairs + other.pairs, self.weight + other.weight)
        both.sum_x, both.sum_y = self.sum_x + moved.sum_x, self.sum_y + moved.sum_y
        both.squares, both.products = (
            self.squares + moved.squares,
            self.products + moved.products,
        )
        both.total = self.total + moved.total
        return both


@dataclass(frozen=True)
class LowRank:
    """`bias + up down x`, its components in the order of what they explain."""

    constant: Float  # [D] the weighted mean of y: the bias without any component
    input_mean: Float  # [H]
    down: Float  # [r, H]
    up: Float  # [D, r]
    errors: Float  # [r + 1] held-out `sum w ||y - prediction||^2` of the first 0..r components
    ridge: float
    total: float  # sum w ||y - constant||^2 of all pairs

    def left(self, rank: int | None = None) -> float:
        """What the best rank (up to `rank`) leaves of `total`, by the share that it leaves of the
        held-out part: the pairs held out are too few to tell how much an expert matters."""
        errors = self.errors if rank is None else self.errors[: rank + 1]
        share = errors.min() / errors[0] if errors[0] > 0 else 1.0
        return self.total * float(share)

    def bias(self, rank: int) -> Float:
        """[D] what is added to the first `rank` components."""
        shifted: Float = self.constant - self.up[:, :rank] @ (self.down[:rank] @ self.input_mean)
        return shifted


def fit(train: Moments, held_out: Moments, max_rank: int) -> LowRank:
    """Fit all ranks up to `max_rank`.

    Ridge and errors come from fitting `train` and predicting `held_out`; the result is then fitted
    on both with that ridge. Few pairs give fewer ranks, very few the constant.
    """
    whole = (train + held_out).centred()
    max_rank = min(max_rank, train.pairs // PAIRS_PER_RANK)
    weighty = train.weight > 0 and held_out.weight > 0
    if not max_rank or not weighty or held_out.pairs < PAIRS_PER_RANK:
        none = np.zeros((0, len(whole.x))), np.zeros((len(whole.y), 0))
        error = held_out.about(whole.x, whole.y).total
        return LowRank(whole.y, whole.x, *none, np.array([error]), 0.0, whole.total)
    part = _Ridge(train.centred(), max_rank)
    judge = held_out.about(part.centre.x, part.centre.y)
    tried = [_errors(*part.components(ridge), judge) for ridge in RIDGES]
    best = int(np.argmin([errors.min() for errors in tried]))
    down, up = _Ridge(whole, max_rank, part.basis).components(RIDGES[best])
    return LowRank(whole.y, whole.x, down, up, tried[best], RIDGES[best], whole.total)


def _errors(down: Float, up: Float, judge: Moments) -> Float:
    """Held-out errors of the first 0..r components; the columns of `up` are orthonormal."""
    explained = 2 * np.einsum("rd,dr->r", down @ judge.products, up)
    size = np.einsum("rh,rh->r", down @ judge.squares, down)
    return judge.total + np.concatenate([[0.0], np.cumsum(size - explained)])


class _Ridge:
    """Solutions of centred moments, of one rank and one ridge after the other.

    Args:
        basis: [D, rank + SPARE] where to look for the leading directions first, or nowhere; after
            `components` those that were found, from which the next ridge starts.
    """

    def __init__(self, centre: Moments, rank: int, basis: Float | None = None) -> None:
        self.centre, self.rank, self.basis = centre, rank, basis
        norms = np.sqrt(np.diag(centre.squares))
        self._scale = np.where(norms > 0, norms, 1.0)[:, None]  # [H, 1]
        self._squares = centre.squares / self._scale / self._scale.T
        self._products = centre.products / self._scale

    def components(self, ridge: float) -> tuple[Float, Float]:
        """`down` [r, H] and orthonormal `up` [D, r] of the best solution.

        The ridge solution B [H, D] itself is never made, only its products with few columns.
        """
        factors = lu_factor(self._squares + ridge * np.eye(len(self._squares)))

        def solution(columns: Float) -> Float:
            found: Float = lu_solve(factors, self._products @ columns)
            return found

        up, self.basis = _leading(
            lambda basis: self._products.T @ solution(basis), len(self.centre.y), self.rank,
            self.basis,
        )  # fmt: skip
        down: Float = (solution(up) / self._scale).T
        return down, up


def _leading(
    times: Callable[[Float], Float], size: int, rank: int, basis: Float | None
) -> tuple[Float, Float]:
    """Leading eigenvectors [size, rank] of a positive matrix, by subspace iteration from `basis`
    (or random directions), and the basis it ends with.

    Exact up to rounding where `rank + SPARE` reaches `size`.
    """
    steps = WARM
    if basis is None:
        start = np.random.default_rng(0).standard_normal((size, min(size, rank + SPARE)))
        basis, steps = np.linalg.qr(start)[0], COLD
    for _ in range(steps):
        basis = np.linalg.qr(times(basis))[0]
    small = basis.T @ times(basis)
    _, turned = np.linalg.eigh((small + small.T) / 2)
    found: Float = basis @ turned[:, ::-1][:, :rank]
    return found, basis
