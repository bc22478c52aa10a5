"""Experts of a group made one: weighted sums of what belongs to them, after alignment if asked for.

In: a plan with groups, and arrays of single experts as a caller reads them. Out: the arrays of the
merged ones. Reads an expert at a time and holds two. Knows nothing about files or quantising.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mone_edge.model_file import Array
from mone_edge.plan import Groups, PrunePlan, Weights
from mone_edge.recipe import M_SMOE
from mone_edge.stats import Int

Order = NDArray[np.intp]
ReadNeurons = Callable[[int], Sequence[Array]]  # expert -> its matrices, a row a neuron [I, ...]
ALIGNED = (M_SMOE,)  # methods whose members' neurons are put in the representative's order


def weighted_sum(parts: Iterable[Array], weights: Sequence[float]) -> Array:
    """`sum a_i x_i` of weights that add up to 1, in float32.

    Computed as `x_0 + sum a_i (x_i - x_0)`, so that equal parts give themselves to the last bit.
    """
    remaining = iter(parts)
    first = np.asarray(next(remaining), dtype=np.float32)
    result = first.copy()
    for part, weight in zip(remaining, weights[1:], strict=True):
        difference = np.subtract(part, first, dtype=np.float32)
        difference *= np.float32(weight)
        result += difference
    return result


def match(reference: Sequence[Array], member: Sequence[Array]) -> Order:
    """The order of a member's neurons in which they are the most like the reference's.

    Maximises the sum over neurons of the inner products of what belongs to them: rows of the gate
    and up projections, columns of the down projection (weight matching, Git Re-Basin, arXiv
    2209.04836, which M-SMoE, arXiv 2310.01334, aligns experts by).

    Args:
        reference, member: the same matrices of both, [I, ...] each.

    Returns:
        [I]: neuron `order[i]` of the member takes place `i`.
    """
    from scipy.optimize import linear_sum_assignment

    likeness = sum(a @ b.T for a, b in zip(reference, member, strict=True))
    return np.asarray(linear_sum_assignment(likeness, maximize=True)[1])


def neurons(down: Array, inputs: Iterable[Array]) -> list[Array]:
    """Matrices with a row a neuron.

    Args:
        down: [D, I], the down projection.
        inputs: [n * I, H] each: gate and up projections, apart or one below the other.
    """
    width = down.shape[1]
    rows = [part for matrix in inputs for part in matrix.reshape(-1, width, matrix.shape[1])]
    return [*rows, down.T]


@dataclass
class LayerMerger:
    """How the experts of one layer become one a group."""

    groups: Groups
    weights: Weights
    read: ReadNeurons | None = None  # where members are aligned
    _orders: dict[int, Order] = field(default_factory=dict)  # of members, once they are known

    def expert(self, number: int, part: Callable[[int], Array], axis: int | None = None) -> Array:
        """An array of the merged expert of a group.

        Args:
            number: of the group.
            part: reads the array of an expert.
            axis: the dimension of its neurons, or None if it has none. It may be a multiple of
                their number: gate and up projections one below the other.
        """
        ids = self.groups[number]
        aligned = (self._aligned(ids[0], member, part(member), axis) for member in ids)
        return weighted_sum(aligned, self.weights[number])

    def rows(self, values: Array) -> Array:
        """One row a group of values that have a row an expert: [E, ...] -> [groups, ...]."""
        merged = (self.expert(number, values.__getitem__) for number in range(len(self.groups)))
        return np.stack(list(merged))

    def _aligned(self, first: int, member: int, values: Array, axis: int | None) -> Array:
        if self.read is None or axis is None or member == first:
            return values
        if member not in self._orders:
            self._orders[member] = match(self.read(first), self.read(member))
        order = self._orders[member]
        blocks = np.arange(values.shape[axis] // len(order))[:, None] * len(order)
        return np.take(values, (blocks + order).reshape(-1), axis)


def layer_merger(plan: PrunePlan, layer: int, read: ReadNeurons) -> LayerMerger:
    """The merger of a layer of a plan with replacement "merge".

    Args:
        read: for methods that align; called when the first merged array is asked for.
    """
    groups, weights = plan.groups[layer], plan.merge_weights[layer]
    return LayerMerger(groups, weights, read if plan.method in ALIGNED else None)


def importance(rows: Array, plan: PrunePlan, layer: int, counts: Int | None, inner: bool) -> Array:
    """Mean squared inputs [E, columns] of a layer's experts, for the merged ones [groups, columns].

    That of all tokens of a group's members: means weighted by their numbers of tokens (without
    those, by what the members weigh). Inner columns of aligned experts are the representative's,
    whose order they have.

    Args:
        counts: [E] routed tokens, None if they are not known.
        inner: whether the columns are neurons.
    """
    groups = plan.groups[layer]
    if inner and plan.method in ALIGNED:
        return rows[[ids[0] for ids in groups]]
    merged = []
    for ids, weights in zip(groups, plan.merge_weights[layer], strict=True):
        shares = np.array(weights) if counts is None else counts[list(ids)].astype(np.float64)
        shares = shares if shares.sum() else np.ones(len(ids))
        merged.append(np.average(rows[list(ids)], axis=0, weights=shares))
    return np.stack(merged).astype(np.float32)
