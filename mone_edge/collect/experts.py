"""The one seam to transformers' experts: run a single expert, walk the routed ones.

In: an experts module of any architecture behind `ALL_EXPERTS_FUNCTIONS` (fused parameters,
`use_experts_implementation`). Out: tensors. Knows nothing about statistics or plans.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mone_edge.errors import MoneEdgeError

ExpertsFunction = Callable[[Any, Tensor, Tensor, Tensor], Tensor]

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def register(name: str, function: ExpertsFunction) -> None:
    """Make `function(self, hidden [T,H], index [T,K], weights [T,K]) -> [T,H]` selectable."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def experts_modules(model: nn.Module) -> dict[int, tuple[str, Any]]:
    """Name and experts module of every MoE block, by block index.

    Raises:
        MoneEdgeError: the architecture does not route through the common experts interface.
    """
    found: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "is_transposed") or not hasattr(module, "down_proj"):
            continue
        block = _BLOCK.search(name)
        if block is None or int(block[1]) in found:
            raise MoneEdgeError(f"{model_type(model)}: cannot tell which block {name} belongs to")
        found[int(block[1])] = (name, module)
    if not found:
        raise MoneEdgeError(
            f"model type {model_type(model)} has no experts that this version of transformers "
            "exposes (a dense model, or an architecture that is not supported yet)"
        )
    return found


def model_type(model: nn.Module) -> str:
    """transformers' name of the architecture."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


@contextmanager
def experts_implementation(model: Any, name: str) -> Iterator[None]:
    """Route every experts module of `model` through the registered function `name`."""
    before = model.config._experts_implementation or "eager"
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def routed(index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (expert, token ids [n], top-k slots [n]) for each expert that got tokens.

    Args:
        index: [tokens, top_k] expert ids.
    """
    flat = index.reshape(-1)
    experts, counts = torch.unique(flat, return_counts=True)
    groups = torch.split(torch.argsort(flat, stable=True), counts.tolist())
    for expert, positions in zip(experts.tolist(), groups, strict=True):
        yield expert, positions // index.shape[1], positions % index.shape[1]


def input_width(module: Any) -> int:
    """Width of what an experts module reads."""
    stack = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    if stack is None:  # other names: all known ones read what they write
        return int(module.down_proj.shape[2 if module.is_transposed else 1])
    return int(stack.shape[1 if module.is_transposed else 2])


def run_expert(module: Any, expert: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Run one expert.

    Args:
        module: the experts module.
        inputs: [n, H].

    Returns:
        The input of the down projection [n, I], and the raw output [n, D] before its gate weight.
    """
    if module.has_gate:
        inner = module._apply_gate(_project(module, "gate_up_proj", expert, inputs))
    else:
        inner = module.act_fn(_project(module, "up_proj", expert, inputs))
    output = _project(module, "down_proj", expert, inner)
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    return inner, output


def _project(module: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    # of the input's precision already, but for streamed models
    weight = getattr(module, name)[expert].to(inputs.dtype)
    bias = getattr(module, f"{name}_bias")[expert].to(inputs.dtype) if module.has_bias else None
    return nn.functional.linear(inputs, weight.T if module.is_transposed else weight, bias)
