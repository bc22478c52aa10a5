"""The one seam to transformers' experts: run a single expert, walk the routed ones.

In: an experts module of any architecture behind `ALL_EXPERTS_FUNCTIONS` (fused parameters,
`use_experts_implementation`, or an entry of `adapters`). Out: tensors. Knows nothing about
statistics or plans.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mone_edge.collect import adapters
from mone_edge.errors import MoneEdgeError

ExpertsFunction = Callable[[Any, Tensor, Tensor, Tensor], Tensor]

_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.")


def register(name: str, function: ExpertsFunction) -> None:
    """Make `function(self, hidden [T,H], index [T,K], weights [T,K]) -> [T,H]` selectable."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def experts_modules(model: nn.Module) -> dict[int, tuple[str, Any]]:
    """Name and experts module of every MoE block, by block index.

    Raises:
        MoneEdgeError: the architecture does not route through the common experts interface.
    """
    adapters.adapt(model)
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
    before = model.config._experts_implementation or adapters.EAGER
    set_implementation(model, name)
    try:
        yield
    finally:
        set_implementation(model, before)


def set_implementation(model: Any, name: str) -> None:
    """Have a registered function run the experts of every block."""
    model.set_experts_implementation(name)
    for module in model.modules():
        if isinstance(module, adapters.Adapted):
            module.implementation = name


def num_experts(module: Any) -> int:
    """Experts that a module has weights of."""
    return len(module.down_proj)


def input_width(module: Any) -> int:
    """Width of an expert's input."""
    if hasattr(module, "run_one"):
        return output_width(module)
    stack = module.gate_up_proj if module.has_gate else module.up_proj
    return int(stack.shape[1 if module.is_transposed else 2])


def output_width(module: Any) -> int:
    """Width of an expert's output."""
    return int(module.down_proj.shape[2 if module.is_transposed else 1])


def expert_parameters(module: Any) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield (owner, name, rows an expert has) of each parameter that holds all experts."""
    total = num_experts(module)
    for name, parameter in list(module.named_parameters()):
        owner, _, own = name.rpartition(".")
        if name in getattr(module, "stacked", ()) or (not owner and len(parameter) == total):
            yield module.get_submodule(owner), own, len(parameter) // total


def weighs_inputs(module: Any) -> bool:
    """Whether gate weights multiply the inputs of the experts (llama4), not their outputs."""
    return bool(getattr(module, "weighs_inputs", False))


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


def routed_inputs(module: Any, inputs: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """What an expert is given, and the weight of what it puts out.

    Args:
        inputs, gate: [n, H] and [n], hidden states and gate weights of the tokens routed to it.
            Where weights multiply the inputs, outputs weigh 1: an output is a contribution then.
    """
    if not weighs_inputs(module):
        return inputs, gate
    return inputs * gate[:, None].to(inputs.dtype), torch.ones_like(gate)


def run_expert(module: Any, expert: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Run one expert.

    Args:
        module: the experts module.
        inputs: [n, H].

    Returns:
        The input of the down projection [n, I], and the raw output [n, D] before its gate weight.
    """
    if hasattr(module, "run_one"):
        return module.run_one(expert, inputs)  # type: ignore[no-any-return]
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
