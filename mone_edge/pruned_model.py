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

from mone_edge.collect.experts import experts_modules, register, routed, run_expert
from mone_edge.errors import MoneEdgeError
from mone_edge.plan import PrunePlan
from mone_edge.source import PRUNED_METHOD

if TYPE_CHECKING:
    from torch import Tensor

IMPLEMENTATION = "mone-edge-pruned"
NOVICES = "novices"  # parameter of an experts module: [pruned experts, D], ids ascending
_ROWS = "_mone_edge_rows"


class NoviceConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a pruned checkpoint: the plan that was carried out."""

    def __init__(self, version: int = 0, plan: dict[str, Any] | None = None, **_: Any) -> None:
        self.quant_method = PRUNED_METHOD
        self.version = version
        self.plan = plan or {}


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
            if layer not in plan.kept or plan.num_experts[layer] != len(module.down_proj):
                raise MoneEdgeError(f"config.json has no plan for {name}")
            _shrink(module, plan, layer)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.set_experts_implementation(IMPLEMENTATION)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """Stack `experts.<id>.approx_value` into the module's novices, ascending ids."""
        from transformers.core_model_loading import MergeModulelist, WeightConverter

        return [
            WeightConverter(
                ["experts.*.approx_value"], f"experts.{NOVICES}", [MergeModulelist(dim=0)]
            )
        ]


def _shrink(module: Any, plan: PrunePlan, layer: int) -> None:
    """Leave room for the kept experts and the novices only (on meta)."""
    total, kept, pruned = plan.num_experts[layer], plan.kept[layer], plan.pruned(layer)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    dtype = module.down_proj.dtype
    for name, parameter in list(module.named_parameters(recurse=False)):
        if len(parameter) == total:
            rows = parameter.new_empty(len(kept), *parameter.shape[1:])
            setattr(module, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    if pruned:
        novices = torch.empty(len(pruned), width, dtype=dtype, device=module.down_proj.device)
        module.register_parameter(NOVICES, nn.Parameter(novices, requires_grad=False))
    rows_of = {expert: row for row, expert in enumerate(kept)}
    setattr(module, _ROWS, rows_of | {expert: ~row for row, expert in enumerate(pruned)})


def _run_kept_experts(
    module: Any, hidden: "Tensor", index: "Tensor", weights: "Tensor"
) -> "Tensor":
    """Kept experts by their row, novices for the others: [T,H], [T,K], [T,K] -> [T,D]."""
    rows: dict[int, int] = getattr(module, _ROWS)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    result = hidden.new_zeros(len(hidden), width)
    for expert, token, slot in routed(index):
        row = rows[expert]
        if row >= 0:
            output = run_expert(module, row, hidden[token])[1]
        else:
            output = getattr(module, NOVICES)[~row][None]
        result.index_add_(0, token, (output * weights[token, slot, None]).to(result.dtype))
    return result


register(IMPLEMENTATION, _run_kept_experts)
if PRUNED_METHOD not in AUTO_QUANTIZER_MAPPING:  # a second import under another name
    register_quantization_config(PRUNED_METHOD)(NoviceConfig)
    register_quantizer(PRUNED_METHOD)(NoviceQuantizer)
