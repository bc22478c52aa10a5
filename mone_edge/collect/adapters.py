"""Experts that transformers does not send through its experts interface, made to look as if it did.

In: a transformers model. Out: the same model; its modules of the classes below get a subclass that
takes `implementation` from the registry, as `use_experts_implementation` does for the others. One
entry a class: what it lacks to be run one expert at a time.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mone_edge.errors import MoneEdgeError

EAGER = "eager"  # the class's own forward


class Adapted:
    """What every experts module behind the interface has."""

    implementation = EAGER
    is_transposed = False
    has_gate, has_bias, has_post_expert_norm = True, False, False
    weighs_inputs = False  # whether gate weights multiply the inputs of experts, not their outputs
    stacked: tuple[str, ...] = ()  # parameters in submodules with an equal share of rows an expert

    def forward(self, *args: Tensor) -> Tensor:
        function = registered(self.implementation)
        if function is None:
            result: Tensor = super().forward(*args)  # type: ignore[misc]
            return result
        hidden, index, weights = args
        rows: Tensor = function(self, hidden.reshape(-1, hidden.shape[-1]), index, weights)
        return rows.reshape(hidden.shape)


class Step3p7(Adapted):
    """Only the decorator is missing."""


class Dbrx(Adapted):
    """All experts of a layer below each other in matrices [experts * I, H]."""

    is_transposed = True
    stacked = ("mlp.w1", "mlp.v1", "mlp.w2")
    mlp: Any
    ffn_hidden_size: int

    @property
    def down_proj(self) -> Tensor:
        """[experts, I, H]."""
        return self._stack("w2")

    def run_one(self, expert: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `experts.run_expert`."""
        gate, up = (inputs @ self._stack(name)[expert].T for name in ("w1", "v1"))
        inner = self.mlp.activation_fn(gate) * up
        return inner, inner @ self.down_proj[expert]

    def _stack(self, name: str) -> Tensor:
        weight: Tensor = getattr(self.mlp, name)
        return weight.view(-1, self.ffn_hidden_size, weight.shape[1])


class Llama4(Adapted):
    """Gate weights multiply the inputs; the block (below) hands routed tokens over."""

    is_transposed = weighs_inputs = True
    act_fn: Any

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.act_fn(gate)  # type: ignore[no-any-return]


class Llama4Block:
    """A block that runs all experts on all tokens, but for their own implementation."""

    experts: Any
    router: Any
    shared_expert: Any
    top_k: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.experts.implementation == EAGER:
            result: tuple[Tensor, Tensor] = super().forward(hidden_states)  # type: ignore[misc]
            return result
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(hidden)  # [T, E]
        index = torch.topk(logits, self.top_k, dim=1).indices
        routed = self.experts(hidden, index, scores.gather(1, index))
        return self.shared_expert(hidden) + routed, logits


ADAPTERS: dict[str, type] = {
    "Step3p7Experts": Step3p7,
    "DbrxExperts": Dbrx,
    "Llama4TextExperts": Llama4,
    "Llama4TextMoe": Llama4Block,
}
REFUSED = {
    "LongcatFlashExperts": "its router also selects experts that only copy their input",
}


def adapt(model: nn.Module) -> None:
    """Give modules of undecorated classes their adapters; nothing happens to others, or twice.

    Raises:
        MoneEdgeError: the model has experts that cannot be run one at a time.
    """
    for module in model.modules():
        kind = type(module)
        if why := REFUSED.get(kind.__name__):
            raise MoneEdgeError(f"{kind.__name__}: {why}; it cannot be measured or pruned")
        if adapter := ADAPTERS.get(kind.__name__):
            module.__class__ = type(f"Adapted{kind.__name__}", (adapter, kind), {})


def registered(name: str) -> Any:
    """The function of that name in transformers' registry; None for `EAGER`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return None if name == EAGER else ALL_EXPERTS_FUNCTIONS[name]
