"""Moments of what pruned experts read and wrote -> the low-rank novices of a layer.

In: for each pruned expert, moments of its inputs and outputs weighted by the squared gate weight,
part of them held out. Out: `LayerNovices`. Decides the ranks, and under the method "novice-error"
which experts go; knows nothing about models, text or how moments are gathered (`collect.fitting`,
`collect.gguf_fitting`).

The weight makes the regression minimise `sum g^2 ||f - novice(x)||^2`, what the layer's output
loses. An expert keeps as many components as lower its held-out error, none if none does: what has
seen few tokens falls back to fewer ranks, then to the constant. Asked to choose ("rank"), a layer
gets the largest of `RANKS` whose bytes take away more error than whole experts for the same bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mone_edge.low_rank import EXPERT_BITS, LayerNovices, stored_bits
from mone_edge.plan import PrunePlan
from mone_edge.recipe import NOVICE_ERROR, rank_of
from mone_edge.regression import LowRank, Moments, fit

Pairs = Iterable[tuple[Moments, Moments]]

RANKS = (4, 8, 32, 64)  # that "rank" chooses from; 16 would be stored as 32 (`quantize`)
EXPERT_SHARE = 0.25  # of an expert's weights that a novice may have, where the rank is left open
RUNS, HELD_OUT_EVERY = 40, 5  # runs of text, so that held-out tokens are not neighbours of others


def held_out(tokens: int) -> NDArray[np.bool_]:
    """[tokens] which of them judge: every fifth of 40 runs of the text."""
    run = np.arange(tokens) * RUNS // max(tokens, 1)
    return np.asarray(run % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)


@dataclass(frozen=True)
class Limits:
    """The ranks that a layer's novices may have."""

    replacement: str
    inputs: int  # H
    outputs: int  # D
    expert_parameters: int

    @property
    def largest(self) -> int:
        """The rank to fit."""
        whole = min(self.inputs, self.outputs)
        rank = rank_of(self.replacement)
        if rank is not None:
            return min(rank, whole)
        affordable = int(EXPERT_SHARE * self.expert_parameters) // (self.inputs + self.outputs)
        return max((r for r in RANKS if r <= min(whole, affordable)), default=min(RANKS[0], whole))

    def choose(self, fits: "Sequence[LowRank]") -> int:
        """The rank to store.

        Where it is left open, a larger one is taken if what its novices leave is less than what
        those of the smaller one would leave if its worst experts were kept for the same bytes of a
        Q4_K_M file.
        """
        if rank_of(self.replacement) is not None:
            return self.largest
        chosen, left = 0, _left(fits, 0)
        for rank in (r for r in RANKS if r <= self.largest):
            after = _left(fits, rank)
            more = len(fits) * (self._share(rank) - self._share(chosen))
            if after.sum() < _without(left, more / (1 - self._share(chosen))):
                chosen, left = rank, after
        return chosen

    def _share(self, rank: int) -> float:
        """Bytes of a novice's matrices, as a share of an expert's."""
        whole = EXPERT_BITS * self.expert_parameters
        return stored_bits(rank, self.inputs, self.outputs) / whole


def _left(fits: "Sequence[LowRank]", rank: int) -> NDArray[np.float64]:
    """[experts] what the first `rank` components leave of the layer's output, held out."""
    return np.array([f.left(rank) for f in fits])


def _without(left: NDArray[np.float64], count: float) -> float:
    """The sum without so many of the largest, the last of them in part."""
    whole = int(count)
    falling = np.append(np.sort(left)[::-1], np.zeros(whole + 1))
    return float(falling[whole:].sum() - (count - whole) * falling[whole])


def candidates(plan: PrunePlan, layer: int) -> tuple[int, ...]:
    """The experts of a layer that are fitted: those that go, or all that the fit chooses from."""
    chooses = plan.method == NOVICE_ERROR and plan.pruned(layer)
    return tuple(range(plan.num_experts[layer])) if chooses else plan.pruned(layer)


def plan_novices(
    plan: PrunePlan, layer: int, pairs: Pairs, limits: Limits
) -> tuple[tuple[int, ...], LayerNovices]:
    """Fit a layer's `candidates`: the ids of the experts that go, and their novices.

    Under "novice-error" those go whose novices leave the least error (`LowRank.left`), in units of
    the layer's output, so that the experts of a layer can be compared.

    Args:
        pairs: (to fit, held out) of each candidate, ids ascending; read one at a time.
        limits: what ranks may be.
    """
    ids = candidates(plan, layer)
    fits, tokens = _fit_each(pairs, limits)
    left = [found.left() for found in fits]
    count = len(plan.pruned(layer))
    places = sorted(sorted(range(len(ids)), key=lambda place: (left[place], -place))[:count])
    chosen = [fits[place] for place in places], [tokens[place] for place in places]
    return tuple(ids[place] for place in places), _novices(*chosen, limits)


def _fit_each(pairs: Pairs, limits: Limits) -> tuple[list[LowRank], list[int]]:
    """The fits of the experts, and the tokens that each has seen."""
    fits: list[LowRank] = []
    tokens: list[int] = []
    for train, judge in pairs:
        fits.append(fit(train, judge, limits.largest))
        tokens.append(train.pairs + judge.pairs)
    return fits, tokens


def _novices(fits: list[LowRank], tokens: list[int], limits: Limits) -> LayerNovices:
    width = limits.choose(fits)
    ranks = [int(found.errors[: width + 1].argmin()) for found in fits]
    width = width if any(ranks) else 0
    down = np.zeros((len(fits), width, limits.inputs), np.float32)
    up = np.zeros((len(fits), limits.outputs, width), np.float32)
    for index, (found, rank) in enumerate(zip(fits, ranks, strict=True)):
        down[index, :rank] = found.down[:rank]
        up[index, :, :rank] = found.up[:, :rank]
    errors = [
        f.errors[rank] / f.errors[0] if rank else 1.0 for f, rank in zip(fits, ranks, strict=True)
    ]
    return LayerNovices(
        bias=np.array([f.bias(r) for f, r in zip(fits, ranks, strict=True)], np.float32),
        down=down,
        up=up,
        rank=np.array(ranks, np.int64),
        tokens=np.array(tokens, np.int64),
        ridge=np.array([f.ridge for f in fits]),
        error=np.array(errors),
    )
