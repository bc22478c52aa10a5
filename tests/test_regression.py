"""Reduced-rank ridge regression against its definition, solved on the rows themselves."""

import numpy as np
import pytest

from mone_edge.regression import PAIRS_PER_RANK, RIDGES, Moments, fit

RNG = np.random.default_rng(7)
H, D, RANK = 12, 9, 3


def pairs(count: int, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs far off centre and of unlike scales, outputs of rank 3 and some noise."""
    x = RNG.standard_normal((count, H)) * np.geomspace(0.1, 30, H) + 50
    mixed = (x / np.geomspace(0.1, 30, H)) @ TRUE_DOWN @ TRUE_UP
    y = mixed + 5 + noise * RNG.standard_normal((count, D))
    return x.astype(np.float32), y.astype(np.float32), RNG.random(count).astype(np.float32)


TRUE_DOWN, TRUE_UP = RNG.standard_normal((H, RANK)), RNG.standard_normal((RANK, D))


def moments(*parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Moments:
    sums = Moments.near(*parts[0][:2])
    for part in parts:
        sums.add(*part)
    return sums


def cut(rows: tuple[np.ndarray, ...], *ends: int) -> list[tuple[np.ndarray, ...]]:
    return list(zip(*(np.split(column, ends) for column in rows), strict=True))


def test_parts_about_any_point_add_up_to_the_definition() -> None:
    rows = pairs(200)
    x, y, w = (column.astype(np.float64) for column in rows)
    first, second, third = cut(rows, 60, 61)
    both = (moments(first, second) + moments(third)).about(np.full(H, 49.0), np.full(D, 6.0))
    x, y = x - 49, y - 6
    assert both.pairs == 200
    np.testing.assert_allclose(both.weight, w.sum(), rtol=1e-6)
    np.testing.assert_allclose(both.sum_x, w @ x, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(both.squares, (w[:, None] * x).T @ x, rtol=1e-4, atol=2e-2)
    np.testing.assert_allclose(both.products, (w[:, None] * x).T @ y, rtol=1e-4, atol=2e-2)
    np.testing.assert_allclose(both.total, (w * (y**2).sum(1)).sum(), rtol=1e-5)


def ridge_by_rows(
    rows: tuple[np.ndarray, ...], ridge: float, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition: least squares on rows with the penalty as further rows, then an SVD of what
    they predict."""
    x, y, w = (column.astype(np.float64) for column in rows)
    mean_x, mean_y = w @ x / w.sum(), w @ y / w.sum()
    root = np.sqrt(w)[:, None]
    x, y = (x - mean_x) * root, (y - mean_y) * root
    penalty = np.diag(np.sqrt(ridge) * np.linalg.norm(x, axis=0))
    more_x, more_y = np.vstack([x, penalty]), np.vstack([y, np.zeros((x.shape[1], y.shape[1]))])
    solution = np.linalg.lstsq(more_x, more_y, rcond=None)[0]
    basis = np.linalg.svd(more_x @ solution)[2][:rank].T
    return mean_x, mean_y, solution @ basis @ basis.T


def predict(x: np.ndarray, fitted: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    mean_x, mean_y, solution = fitted
    return np.asarray(mean_y + (x.astype(np.float64) - mean_x) @ solution)


@pytest.mark.parametrize("count", [60, 400])
def test_the_fit_is_the_best_of_its_rank_and_is_judged_by_what_is_held_out(count: int) -> None:
    rows = pairs(count, noise=2.0)
    train, held_out = cut(rows, count * 3 // 4)
    found = fit(moments(train), moments(held_out), D)
    assert found.ridge in RIDGES
    x, y, w = held_out
    for rank in (0, 1, 2, 3, 6, D):
        judged = predict(x, ridge_by_rows(train, found.ridge, rank))
        error = (w * ((y - judged) ** 2).sum(1)).sum()
        np.testing.assert_allclose(found.errors[rank], error, rtol=1e-3)
        expected = predict(x, ridge_by_rows(rows, found.ridge, rank))
        ours = x @ found.down[:rank].T @ found.up[:, :rank].T + found.bias(rank)
        np.testing.assert_allclose(ours, expected, atol=2e-3 * np.abs(expected).max())
    others = [ridge_by_rows(train, ridge, r) for ridge in RIDGES for r in range(D + 1)]
    errors = [(w * ((y - predict(x, other)) ** 2).sum(1)).sum() for other in others]
    np.testing.assert_allclose(found.errors.min(), min(errors), rtol=1e-3)


def test_leading_components_of_wide_outputs_explain_as_much_as_the_exact_ones() -> None:
    wide = 60
    x, _, w = pairs(500)
    shape = np.geomspace(1, 0.01, H)[:, None] * RNG.standard_normal((H, wide))
    y = ((x - 50) / np.geomspace(0.1, 30, H)) @ shape + 0.1 * RNG.standard_normal((500, wide))
    rows = (x, y.astype(np.float32), w)
    train, held_out = cut(rows, 400)
    found = fit(moments(train), moments(held_out), 4)
    mean_x, mean_y, _ = ridge_by_rows(rows, found.ridge, 4)
    root = np.sqrt(w)[:, None]
    truth = (y - predict(x, ridge_by_rows(rows, found.ridge, 4))) * root
    ours = (y - mean_y - (x - mean_x) @ found.down.T @ found.up.T) * root
    assert (ours**2).sum() <= 1.001 * (truth**2).sum()
    np.testing.assert_allclose(found.up.T @ found.up, np.eye(4), atol=1e-9)


def test_a_relation_of_low_rank_is_found() -> None:
    train, held_out = cut(pairs(600, noise=0.01), 450)
    found = fit(moments(train), moments(held_out), D)
    assert found.errors[RANK] < 0.01 * found.errors[0]
    assert found.errors[RANK] < 0.2 * found.errors[RANK - 1]


def test_without_pairs_on_a_side_it_is_the_constant() -> None:
    rows = pairs(20)
    nothing = Moments(np.zeros(H), np.zeros(D))
    for train, held_out in ((moments(rows), nothing), (nothing, moments(rows))):
        found = fit(train, held_out, 4)
        assert found.down.shape == (0, H) and found.errors.shape == (1,)
        mean = np.average(rows[1], axis=0, weights=rows[2])
        np.testing.assert_allclose(found.bias(0), mean, rtol=1e-5)
    assert not fit(nothing, nothing, 4).bias(0).any()


def test_few_pairs_give_few_components() -> None:
    train, held_out = cut(pairs(20), 15)
    assert len(fit(moments(train), moments(held_out), 6).errors) == 1 + 15 // PAIRS_PER_RANK
    train, held_out = cut(pairs(20), 17)
    assert len(fit(moments(train), moments(held_out), 6).errors) == 1


def test_what_is_left_is_the_held_out_share_of_all_pairs() -> None:
    rows = pairs(400, noise=2.0)
    parts = [moments(part) for part in cut(rows, 300)]
    fitted = fit(*parts, RANK)
    _, y, w = (column.astype(np.float64) for column in rows)
    total = (w[:, None] * (y - w @ y / w.sum()) ** 2).sum()
    np.testing.assert_allclose(fitted.total, total, rtol=1e-4)
    assert fitted.left() == pytest.approx(total * fitted.errors.min() / fitted.errors[0], rel=1e-4)
    empty = Moments(np.zeros(3), np.zeros(3))
    assert fit(empty, empty, 1).left() == 0
