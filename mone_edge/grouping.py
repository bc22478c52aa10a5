"""Which experts of a layer share knowledge: groups that become one expert each.

In: the statistics of one layer and a number of groups. Out: a partition of the ids, and what each
member weighs. Pure; knows nothing about ratios, other layers or weights of models.

Each group begins with its representative, the member that most tokens were routed to; groups are
in the order of their representatives' ids.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import pdist, squareform

from mone_edge.errors import UsageError
from mone_edge.recipe import DEK, HC_SMOE, M_SMOE
from mone_edge.stats import Float, LayerStats

Groups = tuple[tuple[int, ...], ...]
Weights = tuple[tuple[float, ...], ...]
Labels = NDArray[np.int64]  # [E] group of each expert

STARTS = 4  # of the search for a partition
CLOSE = 1e-12  # of the sum of dissimilarities: less is no improvement


def group(
    layer: LayerStats, method: str, count: int, alone: Collection[int] = (), seed: int = 0
) -> Groups:
    """Partition a layer's experts into `count` groups.

    Args:
        layer: its statistics, with what is `SAMPLED`.
        method: one of `recipe.MERGING`.
        count: at least one more than `alone`, or as many as there are experts.
        alone: experts that are merged with no other.
        seed: of the starts of "dek".

    Raises:
        UsageError: the statistics lack what the method looks at.
    """
    others = [i for i in range(layer.num_experts) if i not in set(alone)]
    labels = GROUPERS[method](layer, others, count - len(alone), seed) if others else np.array([])
    members = [[others[i] for i in np.flatnonzero(labels == label)] for label in np.unique(labels)]
    ordered = [_representative_first(layer, ids) for ids in members]
    return tuple(sorted((*ordered, *((i,) for i in alone))))


def weights(layer: LayerStats, method: str, groups: Groups) -> Weights:
    """What the members of each group weigh in the merged expert; they add up to 1.

    The same for "dek" (arXiv 2407.09590), else the share of the group's routed tokens that a member
    got (M-SMoE, arXiv 2310.01334; HC-SMoE, arXiv 2410.08589), or the same where none got any.
    """
    found = []
    for ids in groups:
        counts = np.ones(len(ids)) if method == DEK else layer.count[list(ids)].astype(np.float64)
        counts = counts if counts.sum() else np.ones(len(ids))
        found.append(tuple(float(share) for share in counts / counts.sum()))
    return tuple(found)


def similarity(layer: LayerStats) -> Float:
    """Linear CKA of the experts' outputs on the sampled tokens,
    `||Y_i^T Y_j||_F^2 / (||Y_i^T Y_i||_F ||Y_j^T Y_j||_F)` of centred outputs. [E, E]

    Of merged statistics, sums over the parts take the places of the three (as minibatch CKA, arXiv
    2010.15327, does). 0 with an expert whose output does not vary.
    """
    return _normalised(_sampled(layer, "sample_kernel"))


def dek(layer: LayerStats, ids: Sequence[int], count: int, seed: int) -> Labels:
    """The partition whose groups' pairwise dissimilarities `1 - CKA` add up to least (DEK, arXiv
    2407.09590), as `partition` finds it."""
    dissimilarity = 1 - similarity(layer)[np.ix_(ids, ids)]
    np.fill_diagonal(dissimilarity, 0)
    return partition(np.maximum(dissimilarity, 0), count, seed)


def hc_smoe(layer: LayerStats, ids: Sequence[int], count: int, _: int) -> Labels:
    """Average linkage of the mean outputs over the sampled tokens, by their Euclidean distances
    (HC-SMoE, arXiv 2410.08589)."""
    means = _sampled(layer, "sample_sum")[list(ids)] / max(layer.sampled, 1)
    return _average_linkage(pdist(means), count)


def m_smoe(layer: LayerStats, ids: Sequence[int], count: int, _: int) -> Labels:
    """The experts that most tokens are routed to, and with each the others whose router logits are
    the most like its own, by the cosine over the sampled tokens (M-SMoE, arXiv 2310.01334)."""
    cosine = _normalised(_sampled(layer, "sample_logits"))[np.ix_(ids, ids)]
    dominant = np.sort(np.argsort(-layer.count[list(ids)], kind="stable")[:count])
    labels = np.argmax(cosine[:, dominant], axis=1)
    labels[dominant] = np.arange(len(dominant))
    return np.asarray(labels, dtype=np.int64)


GROUPERS: dict[str, Callable[[LayerStats, Sequence[int], int, int], Labels]] = {
    DEK: dek,
    M_SMOE: m_smoe,
    HC_SMOE: hc_smoe,
}


def partition(distance: Float, count: int, seed: int = 0) -> Labels:
    """Divide items into `count` groups such that the distances within them add up to little.

    The best of `STARTS` local optima, of which no move of one item to another group and no exchange
    of two is any better. The first start is average linkage, the others are random.

    Args:
        distance: [n, n], symmetric, zero diagonal.
    """
    items = len(distance)
    rng = np.random.default_rng([seed, items, count])
    starts = [_average_linkage(squareform(distance, checks=False), count)]
    starts += [rng.permutation(np.arange(items) % count) for _ in range(STARTS - 1)]
    found = [_descend(distance, labels.copy(), count) for labels in starts]
    return min(found, key=lambda labels: round(within(distance, labels), 12))


def within(distance: Float, labels: Labels) -> float:
    """Sum of the distances of all pairs that share a group."""
    return float(distance[labels[:, None] == labels].sum()) / 2


def _descend(distance: Float, labels: Labels, count: int) -> Labels:
    """The best move or exchange, again and again, until none lowers the sum."""
    items, least = np.arange(len(distance)), -CLOSE * max(float(distance.sum()), 1)
    while True:
        to = distance @ np.eye(count)[labels]  # [n, groups] distances to the members of each
        gain = to - to[items, labels][:, None]  # of moving there
        gain[np.bincount(labels, minlength=count)[labels] == 1] = 0  # no group may be left empty
        item, target = np.unravel_index(int(gain.argmin()), gain.shape)
        there = to[:, labels]  # [n, n] of item i to the group of j
        away = there - np.diag(there)[:, None]
        swap = away + away.T - 2 * distance
        swap[labels[:, None] == labels] = 0
        one, two = np.unravel_index(int(swap.argmin()), swap.shape)
        if min(gain[item, target], swap[one, two]) >= least:
            return labels
        if gain[item, target] <= swap[one, two]:
            labels[item] = target
        else:
            labels[[one, two]] = labels[[two, one]]


def _average_linkage(condensed: Float, count: int) -> Labels:
    if not len(condensed):  # one item
        return np.zeros(1, dtype=np.int64)
    tree = linkage(condensed, method="average")
    return np.asarray(cut_tree(tree, n_clusters=count)[:, 0], dtype=np.int64)


def _normalised(products: Float) -> Float:
    """Products by those of each with itself; 0 where that is 0."""
    own = np.sqrt(np.outer(np.diag(products), np.diag(products)))
    return np.divide(products, own, out=np.zeros_like(products), where=own > 0)


def _sampled(layer: LayerStats, name: str) -> Float:
    """Statistics of sampled tokens.

    Raises:
        UsageError: there are none.
    """
    found: Float | None = getattr(layer, name)
    if found is not None:
        return found
    if layer.sample_sum is None:
        raise UsageError(
            "these statistics hold nothing about all experts on the same tokens (an older "
            "mone-edge measured them, or llama.cpp, which runs routed experts only); measure the "
            "checkpoint again: mone-edge stats CHECKPOINT"
        )
    raise UsageError(
        f"--method {M_SMOE} groups by router logits, and this architecture's router is not one "
        f"matrix that reads what the experts read; use --method {HC_SMOE} or {DEK}"
    )


def _representative_first(layer: LayerStats, ids: list[int]) -> tuple[int, ...]:
    """The member with most tokens (of equal ones the lowest id), then the others, ascending."""
    first = max(ids, key=lambda i: (int(layer.count[i]), -i))
    return (first, *(i for i in ids if i != first))
