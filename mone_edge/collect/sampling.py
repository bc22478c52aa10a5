"""What all experts of a layer make of the same few tokens, routed to them or not.

In: inputs of sampled tokens and a loaded MoE block. Out: the sums that grouping experts needs, the
`SAMPLED` of `stats`. The sample has a fixed size, so that it costs as much as some thousand more
calibration tokens however many there are. Knows nothing about methods or plans.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mone_edge.collect.experts import num_experts, run_expert

TOKENS = 256  # a process, or all if there are fewer

Positions = NDArray[np.int64]


def positions(total: int, seed: int) -> Positions:
    """Which of `total` tokens to sample: one at random of each of `TOKENS` equal stretches."""
    count = min(TOKENS, total)
    edges = np.arange(count + 1) * total // count
    return np.random.default_rng([seed, count]).integers(edges[:-1], edges[1:])


class Sample:
    """Inputs of the sampled tokens of one layer."""

    def __init__(self, wanted: Positions) -> None:
        self.wanted = wanted  # ascending
        self.parts: list[Tensor] = []  # [n, H] each

    def take(self, hidden: Tensor, seen: int) -> None:
        """Keep what is wanted of a batch [T, H], whose first token is number `seen`."""
        first, last = np.searchsorted(self.wanted, (seen, seen + len(hidden)))
        if first < last:
            here = torch.from_numpy(self.wanted[first:last] - seen).to(hidden.device)
            self.parts.append(hidden[here].cpu())

    @property
    def inputs(self) -> Tensor:
        """[S, H]."""
        return torch.cat(self.parts)


def sums(model: Any, name: str, inputs: Tensor) -> dict[str, Any]:
    """Fields of `LayerStats` that are of sampled tokens.

    `||Y_i^T Y_j||_F^2` is the sum of the products of the Gram matrices `Y_i Y_i^T` and
    `Y_j Y_j^T`, tokens by tokens, of centred outputs: the numerator of linear CKA (Kornblith et al.
    2019). All in float64.

    Args:
        model: with the weights of the block in memory.
        name: of its experts module.
        inputs: [S, H] what the experts read (before gate weights, where those multiply inputs).

    Returns:
        Nothing where outputs overflow (an expert may never have seen such tokens in training).
    """
    module = model.get_submodule(name)
    experts, tokens = num_experts(module), len(inputs)
    inputs = inputs.to(module.down_proj.device)
    grams = np.empty((experts, tokens * tokens))
    totals = []
    for expert in range(experts):
        output = run_expert(module, expert, inputs)[1].cpu().double()
        if not output.isfinite().all():
            return {}
        totals.append(output.sum(0).numpy())
        centred = output - output.mean(0)
        grams[expert] = (centred @ centred.T).reshape(-1).numpy()
    found = {"sample_sum": np.stack(totals), "sample_kernel": grams @ grams.T / tokens}
    router = router_weight(model, name, inputs.shape[1])
    if router is not None:
        logits = (inputs.cpu().double() @ router.cpu().double().T).numpy()  # [S, E]
        found["sample_logits"] = logits.T @ logits
    return {"sampled": tokens, **found}


def router_weight(model: Any, name: str, width: int) -> Tensor | None:
    """The router's matrix [E, H]: the only one in the block outside of the experts that has a row
    for each of them, and a column for each of their inputs. None if there is no such one, or if its
    module scales what it reads (gemma4), so that the matrix alone does not make the logits."""
    block = model.get_submodule(name.rpartition(".")[0])
    inside, experts = name.rpartition(".")[2], num_experts(model.get_submodule(name))
    found: dict[str, Tensor] = {
        key: weight
        for key, weight in block.named_parameters()
        if not key.startswith(f"{inside}.") and tuple(weight.shape) == (experts, width)
    }
    if len(found) != 1:
        return None
    ((key, matrix),) = found.items()
    owner, dot, _ = key.partition(".")
    router = block.get_submodule(owner).parameters() if dot else ()
    scales = any(tuple(parameter.shape) == (width,) for parameter in router)
    return None if scales else matrix
