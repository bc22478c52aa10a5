"""Groups of experts: against every partition, and planted structure."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from mone_edge import grouping
from mone_edge.errors import UsageError
from mone_edge.stats import LayerStats
from tests.test_stats import make_stats


def partitions(items: int, count: int) -> Iterator[np.ndarray]:
    """Labels of every partition into `count` groups."""
    for labels in itertools.product(range(count), repeat=items):
        first_seen = list(dict.fromkeys(labels))
        if first_seen == list(range(count)):
            yield np.array(labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_partitions_are_the_best_there_are(count: int, seed: int) -> None:
    """Of 7 items, by trying all of them."""
    points = np.random.default_rng(seed).normal(size=(7, 2))
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    found = grouping.partition(distance, count)
    assert len(set(found)) == count
    best = min(grouping.within(distance, labels) for labels in partitions(7, count))
    assert grouping.within(distance, found) == pytest.approx(best)


def test_within_counts_each_pair_once() -> None:
    distance = np.array([[0, 1, 2], [1, 0, 4], [2, 4, 0.0]])
    assert grouping.within(distance, np.array([0, 0, 1])) == 1
    assert grouping.within(distance, np.array([0, 0, 0])) == 7


def test_no_move_and_no_exchange_is_better() -> None:
    rng = np.random.default_rng(3)
    points = rng.normal(size=(40, 3))
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    labels = grouping.partition(distance, 12)
    cost = grouping.within(distance, labels)
    for item, target in itertools.product(range(40), range(12)):
        moved = labels.copy()
        moved[item] = target
        if len(set(moved)) == 12:
            assert grouping.within(distance, moved) >= cost - 1e-9
    for one, two in itertools.combinations(range(40), 2):
        swapped = labels.copy()
        swapped[[one, two]] = swapped[[two, one]]
        assert grouping.within(distance, swapped) >= cost - 1e-9


def planted() -> LayerStats:
    """Experts 0 to 7, where 2k and 2k+1 do nearly the same and are asked alike."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4, 50, 6))
    outputs = np.repeat(base, 2, axis=0) + 0.05 * rng.normal(size=(8, 50, 6))
    logits = np.repeat(rng.normal(size=(50, 4)), 2, axis=1) + 0.05 * rng.normal(size=(50, 8))
    centred = outputs - outputs.mean(1, keepdims=True)
    cross = np.einsum("itd,jte->ijde", centred, centred)
    return dataclasses.replace(
        make_stats().layers[0],
        count=np.array([9, 3, 8, 2, 1, 7, 6, 1]),
        sampled=50,
        sample_sum=outputs.sum(1),
        sample_kernel=np.square(cross).sum((2, 3)) / 50,
        sample_logits=logits.T @ logits,
    )


@pytest.mark.parametrize("method", grouping.GROUPERS)
def test_pairs_are_found_and_begin_with_the_busier(method: str) -> None:
    groups = grouping.group(planted(), method, 4)
    assert groups == ((0, 1), (2, 3), (5, 4), (6, 7))
    alone = grouping.group(planted(), method, 5, alone=(3,))
    assert alone == ((0, 1), (2,), (3,), (5, 4), (6, 7))


def test_similarity_is_cka() -> None:
    """1 for a rotated and scaled copy, 0 for an expert whose output does not vary."""
    rng = np.random.default_rng(1)
    one = rng.normal(size=(30, 5))
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    experts = [one, 3 * one @ rotation + 7, np.ones((30, 5)), rng.normal(size=(30, 5))]
    centred = [f - f.mean(0) for f in experts]
    kernel = np.array([[np.linalg.norm(a.T @ b) ** 2 for b in centred] for a in centred]) / 30
    layer = dataclasses.replace(planted(), sample_kernel=kernel)
    similarity = grouping.similarity(layer)
    assert similarity[0, 1] == pytest.approx(1) and similarity[0, 0] == pytest.approx(1)
    assert similarity[0, 2] == similarity[2, 2] == 0
    assert 0 < similarity[0, 3] < 0.6


def test_what_was_not_measured_is_told() -> None:
    layer = dataclasses.replace(planted(), sample_logits=None)
    with pytest.raises(UsageError, match="router is not one matrix .* use --method hc-smoe or dek"):
        grouping.group(layer, "m-smoe", 4)
    assert grouping.group(layer, "dek", 4) == grouping.group(planted(), "dek", 4)
