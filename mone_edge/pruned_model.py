"""Pruned checkpoints for transformers: after importing this module `from_pretrained` loads them.

In: a checkpoint whose config.json has `quantization_config.quant_method` "mone-edge" (written by
`mone_edge.checkpoint`). Out: the model, with the kept experts' weights only and their novices.
It is a quantizer to transformers because that is its hook for modules of another shape.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from mone_edge.collect.experts import (
    expert_parameters,
    experts_modules,
    input_width,
    num_experts,
    output_width,
    register,
    routed,
    routed_inputs,
    run_expert,
    set_implementation,
)
from mone_edge.errors import MoneEdgeError
from mone_edge.novices import Novice
from mone_edge.plan import PrunePlan
from mone_edge.recipe import low_rank
from mone_edge.source import PRUNED_METHOD

if TYPE_CHECKING:
    from torch import Tensor

IMPLEMENTATION = "mone-edge-pruned"
# Parameters of an experts module, for pruned experts, ids ascending: [P, D], [P, r, H], [P, D, r]
NOVICES, NOVICES_DOWN, NOVICES_UP = "novices", "novices_down", "novices_up"
_ROWS = "_mone_edge_rows"


class NoviceConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a pruned checkpoint: the plan that was carried out."""

    def __init__(
        self,
        version: int = 0,
        plan: dict[str, Any] | None = None,
        novice_rank: dict[str, int] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = PRUNED_METHOD
        self.version = version
        self.plan = plan or {}
        self.novice_rank = novice_rank or {}  # of layers whose novices are of low rank


class NoviceQuantizer(HfQuantizer):  # type: ignore[misc]
    """Shrinks the experts modules before loading, and selects the function that runs them."""

    def is_serializable(self) -> bool:
        """False: `save_pretrained` would number the kept experts anew."""
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        plan = PrunePlan.parse(self.quantization_config.plan, "config.json")
        for layer, (name, module) in experts_modules(model).items():
            if layer not in plan.kept or plan.num_experts[layer] != num_experts(module):
                raise MoneEdgeError(f"config.json has no plan for {name}")
            _shrink(module, plan, layer)
            _add_novices(module, len(plan.pruned(layer)), self._rank(plan, layer))
        return model

    def _rank(self, plan: PrunePlan, layer: int) -> int:
        """Components of the layer's novices; 0 for constants."""
        if not low_rank(plan.replacement) or not plan.pruned(layer):
            return 0
        rank = self.quantization_config.novice_rank.get(str(layer))
        if type(rank) is not int or rank < 0:
            raise MoneEdgeError(f"config.json: novice_rank of layer {layer} is {rank!r}")
        return rank

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        set_implementation(model, IMPLEMENTATION)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """Stack `experts.<id>.approx_value` (and `approx_down`, `approx_up`) into the module's
        novices, ascending ids."""
        from transformers.core_model_loading import MergeModulelist, WeightConverter

        return [
            WeightConverter([f"experts.*.{part}"], f"experts.{name}", [MergeModulelist(dim=0)])
            for part, name in (
                ("approx_value", NOVICES),
                ("approx_down", NOVICES_DOWN),
                ("approx_up", NOVICES_UP),
            )
        ]


def _shrink(module: Any, plan: PrunePlan, layer: int) -> None:
    """Leave room for the kept experts only (on meta)."""
    kept, pruned = plan.kept[layer], plan.pruned(layer)
    for owner, name, rows in list(expert_parameters(module)):
        parameter = getattr(owner, name)
        small = parameter.new_empty(rows * len(kept), *parameter.shape[1:])
        setattr(owner, name, nn.Parameter(small, requires_grad=parameter.requires_grad))
    rows_of = {expert: row for row, expert in enumerate(kept)}
    setattr(module, _ROWS, rows_of | {expert: ~row for row, expert in enumerate(pruned)})


def _add_novices(module: Any, pruned: int, rank: int) -> None:
    """Leave room for the novices (on meta)."""
    like, width = module.down_proj, output_width(module)
    shapes: dict[str, tuple[int, ...]] = {NOVICES: (pruned, width)} if pruned else {}
    if rank:
        shapes |= {
            NOVICES_DOWN: (pruned, rank, input_width(module)),
            NOVICES_UP: (pruned, width, rank),
        }
    for name, shape in shapes.items():
        empty = torch.empty(shape, dtype=like.dtype, device=like.device)
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def _novice(module: Any, row: int) -> Novice:
    names = (NOVICES, NOVICES_DOWN, NOVICES_UP)
    return Novice(*(getattr(module, name)[row] for name in names if hasattr(module, name)))


def _run_kept_experts(
    module: Any, hidden: "Tensor", index: "Tensor", weights: "Tensor"
) -> "Tensor":
    """Kept experts by their row, novices for the others: [T,H], [T,K], [T,K] -> [T,D]."""
    rows: dict[int, int] = getattr(module, _ROWS)
    result = hidden.new_zeros(len(hidden), output_width(module))
    for expert, token, slot in routed(index):
        inputs, gate = routed_inputs(module, hidden[token], weights[token, slot])
        row = rows[expert]
        output = run_expert(module, row, inputs)[1] if row >= 0 else _novice(module, ~row)(inputs)
        result.index_add_(0, token, (output * gate[:, None]).to(result.dtype))
    return result


register(IMPLEMENTATION, _run_kept_experts)
if PRUNED_METHOD not in AUTO_QUANTIZER_MAPPING:  # a second import under another name
    register_quantization_config(PRUNED_METHOD)(NoviceConfig)
    register_quantizer(PRUNED_METHOD)(NoviceQuantizer)
