"""The experts of a transformers block merged in memory: the oracle for checkpoints and GGUFs.

In: an experts module and a plan with groups. Out: tensors with a row a group where they had one an
expert. Knows nothing about files.
"""

from typing import Any

import torch
from torch import Tensor

from mone_edge import merging
from mone_edge.errors import MoneEdgeError
from mone_edge.model_file import Array
from mone_edge.plan import PrunePlan

INPUTS, DOWN = "gate_up_proj", "down_proj"
NEURONS = {INPUTS: 1, DOWN: 2}  # their dimension in [rows an expert, ..., ...]


class Merge:
    """Called with [experts, ...], gives [groups, ...]; the module's own parameters must not change
    before all of them are merged."""

    def __init__(self, experts: Any, plan: PrunePlan, layer: int) -> None:
        self.merger = merging.layer_merger(plan, layer, self._neurons)
        self.experts = experts
        plain = not hasattr(experts, "run_one") and not experts.is_transposed
        if self.merger.read and not (plain and experts.has_gate and not experts.has_bias):
            raise MoneEdgeError(
                f"the neurons of {type(experts).__name__} cannot be put in order in memory; use a "
                f"--method other than {plan.method}"
            )

    def __call__(self, rows: Tensor, name: str) -> Tensor:
        groups, axis = range(len(self.merger.groups)), NEURONS.get(name)
        experts = [self.merger.expert(n, lambda i: _array(rows[i]), axis) for n in groups]
        merged = torch.stack([torch.from_numpy(values) for values in experts])
        return merged.to(rows.device, rows.dtype)

    def _neurons(self, expert: int) -> list[Array]:
        inputs, down = (_array(getattr(self.experts, n).data[expert]) for n in (INPUTS, DOWN))
        return merging.neurons(down, [inputs])


def _array(values: Tensor) -> Array:
    return values.detach().float().cpu().numpy()
