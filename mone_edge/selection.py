"""Which experts of which layer go: criteria, scopes and floors.

In: statistics by layer and the choices of a plan. Out: the ids that go, by layer. Pure.

Scope `layer` removes the same fraction of every layer; `model` makes one ranking over all layers;
`error` takes the same number as `model`, divided among layers such that the errors that the
statistics predict add up to the least, each as a share of the residual stream that it is added to.
No layer loses more than `MOST_SHARE` times its share: the errors are those of one layer at a time.

`reconstruction` is the objective of NAEE (arXiv 2402.14800) as far as statistics tell it: the set
`p` whose removal changes the layer's output least, `sum_t ||sum_{i in p} g_i f_i||^2`, all sets
tried where they are few (`joint`). The paper runs the layer again for every set, so there a token
goes to the next best of the experts that stay, with weights that are normalised again; here it
keeps the rest of its experts with the weights that they had. That is what `--replacement zero`
computes, and `joint` for it; products of different experts are known around their means
(`criteria.error_matrix`).

`novice-error` has `fit` choose among all experts of a layer: here only how many go is decided, by
`replacement-error`.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mone_edge import joint
from mone_edge.criteria import CRITERIA, error_matrix
from mone_edge.errors import UsageError
from mone_edge.recipe import CUTTING, MERGING, NOVICE_ERROR
from mone_edge.stats import Float, LayerStats

if TYPE_CHECKING:
    from mone_edge.grouping import Groups, Weights

JOINT, RECONSTRUCTION = SETS = ("joint", "reconstruction")  # they choose sets, not one by one
MOST_SHARE = 1.5
ROUTER_NORM = "router-norm"  # its scores come from the weights, not from statistics
METHODS = (*CRITERIA, ROUTER_NORM, NOVICE_ERROR, *SETS, *MERGING)


@dataclass(frozen=True)
class Choice:
    """How a plan chooses experts, and which it must not touch."""

    method: str
    replacement: str
    seed: int
    floor: int  # experts that stay in every layer at least
    spared: Mapping[int, Collection[int]]  # experts that never go, by layer
    router_change: Mapping[int, Float] = field(default_factory=dict)  # see `routers`, by layer


class LayerChoice:
    """The experts of one layer, as the method would have them go."""

    def __init__(self, index: int, layer: LayerStats, choice: Choice) -> None:
        self.index, self.layer, self.choice = index, layer, choice
        spared = set(choice.spared.get(index, ()))
        self.candidates = [i for i in range(layer.num_experts) if i not in spared]
        self.most = min(len(self.candidates), layer.num_experts - choice.floor)
        if choice.method in MERGING:  # one of those that are merged stays
            self.most = max(0, min(self.most, len(self.candidates) - 1))
        elif choice.method not in SETS:
            self.scores = self._scores()

    def first(self, count: int) -> set[int]:
        """The `count` experts that go first; of equal scores the higher ids."""
        if self.choice.method in SETS:
            return set(joint.solve(self.matrix, count, self.candidates))
        order = sorted(self.candidates, key=lambda i: (self.scores[i], -i))
        return set(order[:count])

    def errors(self, most: int) -> Float:
        """Predicted error [0..most] of removing so many: `mean ||e||^2 * mean 1 / ||h||^2` over
        tokens, with e the error of the layer's output, h the residual stream behind the layer.

        Raises:
            UsageError: the statistics do not tell h.
        """
        tokens, inverse = max(self.layer.tokens, 1), self.layer.stream_inverse
        if self.layer.tokens and (inverse is None or not inverse[0]):
            raise UsageError(
                f"the statistics do not tell how large block {self.index}'s errors are beside what "
                "they are added to: use --scope layer, or measure the model again"
            )
        scale = 0.0 if inverse is None else float(inverse[0]) / tokens**2
        sums = [joint.error(self.matrix, self.first(n)) for n in range(most + 1)]
        return np.array(sums) * scale

    @cached_property
    def matrix(self) -> Float:
        """What the layer loses by pairs: `reconstruction` leaves nothing in place of an expert."""
        nothing = self.choice.method == RECONSTRUCTION
        return error_matrix(self.layer, "zero" if nothing else self.choice.replacement)

    def _scores(self) -> Float:
        if self.choice.method == ROUTER_NORM:
            return self.choice.router_change[self.index]
        if self.choice.method == NOVICE_ERROR:  # how many go; `fit` says which
            return CRITERIA["replacement-error"](self.layer, np.random.default_rng())
        rng = np.random.default_rng([self.choice.seed, self.index])
        return CRITERIA[self.choice.method](self.layer, rng)


def prune(
    layers: Mapping[int, LayerStats], scope: str, ratio: float, choice: Choice
) -> dict[int, set[int]]:
    """Ids of the experts that go, by layer.

    Raises:
        UsageError: the ratio leaves too few experts, or the statistics lack what is needed.
    """
    choices = {index: LayerChoice(index, layer, choice) for index, layer in layers.items()}
    if scope == "layer":
        return _same_in_every_layer(choices, ratio)
    if scope == "model" and choice.method not in SETS:
        return _over_model(choices, ratio)
    return _least_error(choices, ratio)


def merge(
    layers: Mapping[int, LayerStats], ratio: float, choice: Choice
) -> "tuple[dict[int, Groups], dict[int, Weights]]":
    """Groups of experts that become one each, as many in every layer, and what each expert weighs.

    Raises:
        UsageError: the ratio leaves too few experts, or the statistics lack what is needed.
    """
    from mone_edge import grouping

    choices = {index: LayerChoice(index, layer, choice) for index, layer in layers.items()}
    groups: dict[int, Groups] = {}
    for index, count in _counts_by_layer(choices, ratio).items():
        layer, alone = layers[index], choice.spared.get(index, ())
        left = layer.num_experts - count
        groups[index] = grouping.group(layer, choice.method, left, alone, choice.seed)
    return groups, {
        i: grouping.weights(layers[i], choice.method, found) for i, found in groups.items()
    }


def rounded(value: float) -> int:
    """Nearest whole number, halves up; 1e-9 absorbs the binary error of ratios like 0.1."""
    return math.floor(value + 0.5 + 1e-9)


def _same_in_every_layer(choices: Mapping[int, LayerChoice], ratio: float) -> dict[int, set[int]]:
    return {i: choices[i].first(count) for i, count in _counts_by_layer(choices, ratio).items()}


def _counts_by_layer(choices: Mapping[int, LayerChoice], ratio: float) -> dict[int, int]:
    counts: dict[int, int] = {}
    for index, layer in choices.items():
        experts = layer.layer.num_experts
        count = rounded(experts * ratio)
        if count > layer.most:
            floor = experts - layer.most
            raise UsageError(_too_few(experts, experts - count, floor, ratio, layer.choice))
        counts[index] = count
    return counts


def _count_over_model(choices: Mapping[int, LayerChoice], ratio: float) -> int:
    total = sum(layer.layer.num_experts for layer in choices.values())
    count, most = rounded(total * ratio), sum(layer.most for layer in choices.values())
    if count > most:
        some = next(iter(choices.values())).choice
        raise UsageError(_too_few(total, total - count, total - most, ratio, some))
    return count


def _over_model(choices: Mapping[int, LayerChoice], ratio: float) -> dict[int, set[int]]:
    """One ranking over all layers; a layer at its floor passes, the next lowest score goes."""
    count = _count_over_model(choices, ratio)
    ranking = sorted(
        (float(layer.scores[expert]), -expert, -index)
        for index, layer in choices.items()
        for expert in layer.candidates
    )
    pruned: dict[int, set[int]] = {index: set() for index in choices}
    for _, minus_expert, minus_index in ranking:
        if count == 0:
            break
        if len(pruned[-minus_index]) < choices[-minus_index].most:
            pruned[-minus_index].add(-minus_expert)
            count -= 1
    return pruned


def _least_error(choices: Mapping[int, LayerChoice], ratio: float) -> dict[int, set[int]]:
    """Counts whose predicted errors add up to the least (dynamic programming, exact)."""
    total = _count_over_model(choices, ratio)
    most = {i: min(c.most, _share_of(c, ratio)) for i, c in choices.items()}
    if sum(most.values()) < total:  # much is spared elsewhere
        most = {i: c.most for i, c in choices.items()}
    best = np.full(total + 1, math.inf)
    best[0] = 0
    taken: list[np.ndarray] = []
    for index, layer in choices.items():
        errors = layer.errors(min(most[index], total))
        # [removed here, removed so far]: the error of removing so many in this layer
        options = np.full((len(errors), total + 1), math.inf)
        for count, cost in enumerate(errors):
            options[count, count:] = best[: total + 1 - count] + cost
        taken.append(options.argmin(axis=0))
        best = options.min(axis=0)
    pruned: dict[int, set[int]] = {}
    for (index, layer), counts in reversed(list(zip(choices.items(), taken, strict=True))):
        count = int(counts[total])
        pruned[index] = layer.first(count)
        total -= count
    return pruned


def _share_of(choice: LayerChoice, ratio: float) -> int:
    """The most experts that a layer may lose while another has some left to lose."""
    return math.ceil(choice.layer.num_experts * ratio * MOST_SHARE - 1e-9)


def _too_few(experts: int, left: int, floor: int, ratio: float, choice: Choice) -> str:
    largest = math.floor((experts - floor) / experts * 10_000) / 10_000
    cuts = choice.replacement in CUTTING
    if choice.spared:
        reason = f"{floor} must stay with --protect-super"
    elif cuts:
        reason = f"the router selects top_k={floor} among those that stay"
    else:
        reason = f"{floor} must stay (one per layer)"
    remedy = ", or use --replacement mean" if choice.replacement == "drop" else ""
    return (
        f"--prune-ratio {ratio:g} leaves {left} of {experts} experts, and {reason}: "
        f"reduce --prune-ratio to at most {largest:g}{remedy}"
    )
