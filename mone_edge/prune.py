"""A model and a plan -> the pruned model: kept experts only, routers permuted, novices added.

In: a `ModelFile`, a `PrunePlan`, the statistics or the fitted novices that go with it. Out: a
`ModelFile` in the MoNE format (`docs/format.md`). Lazy like its input: pruned experts are never
read.
"""

import functools
import re
from dataclasses import replace
from typing import Any

import numpy as np

from mone_edge import novices
from mone_edge.conversion import packages
from mone_edge.errors import MoneEdgeError
from mone_edge.low_rank import LowRankNovices
from mone_edge.model_file import LazyTensor, ModelFile, constant
from mone_edge.plan import PrunePlan
from mone_edge.stats import ExpertStats

FORMAT_VERSION = 1
DOWN_BIAS = "blk.{layer}.ffn_down_exps.bias"
NOVICE = "blk.{layer}.ffn_novice_{part}.weight"
EXPERT_WEIGHT = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.weight")
EXPERT_VECTOR = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(bias|scale)")
ROUTER = re.compile(r"ffn_gate_inp\.(weight|bias)|exp_probs_b\.bias")
UNSUPPORTED_TENSOR = re.compile(r"ffn_\w+_chexps\.|ffn_gate_tid2eid\.")
UNSUPPORTED_ARCH = {
    "llama4": "it applies the gate weights before the experts",
    "grovemoe": "its experts share adjugate experts",
}


def apply_plan(
    model: ModelFile,
    plan: PrunePlan,
    stats: ExpertStats | None,
    fitted: LowRankNovices | None = None,
) -> ModelFile:
    """The model with the plan carried out.

    Args:
        model: unpruned.
        plan: made for the same weights (the caller compares fingerprints).
        stats: needed where novices come from them (`recipe.MEASURED`).
        fitted: needed where novices are of low rank.

    Raises:
        MoneEdgeError: the plan does not fit the model, or the architecture cannot hold it.
    """
    _require_fit(model, plan)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in model.tensors.items():
        layer, part = _split(name)
        touched = layer in plan.kept and bool(plan.pruned(layer))
        tensors[name] = _pruned_tensor(part, tensor, plan, layer) if touched else tensor
    if plan.replacement != "drop":
        tensors |= _novice_biases(tensors, plan, stats, fitted)
        tensors |= _novice_matrices(plan, fitted)
    return replace(model, tensors=tensors, metadata=model.metadata | _metadata(model, plan))


def _split(name: str) -> tuple[int, str]:
    """`blk.3.ffn_up_exps.weight` -> 3 and `ffn_up_exps.weight`; -1 outside blocks."""
    match = re.match(r"blk\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (-1, name)


def _require_fit(model: ModelFile, plan: PrunePlan) -> None:
    if model.arch in UNSUPPORTED_ARCH:
        raise MoneEdgeError(f"{model.arch} cannot be pruned yet: {UNSUPPORTED_ARCH[model.arch]}")
    groups = model.value("{arch}.expert_group_count", 1)
    if groups > 1:
        raise MoneEdgeError(
            f"{model.arch} routes within {groups} groups of experts, which pruning would mix up; "
            "it cannot be pruned yet"
        )
    for name in model.tensors:
        if UNSUPPORTED_TENSOR.match(_split(name)[1]):
            raise MoneEdgeError(f"{model.arch} cannot be pruned yet: it holds {name}")
    for layer, count in plan.num_experts.items():
        if not any(
            f"blk.{layer}.ffn_{part}_exps.weight" in model.tensors for part in ("up", "gate_up")
        ):
            raise MoneEdgeError(
                f"the plan prunes layer {layer}, which holds no experts in this model"
            )
        if count != model.num_experts:
            raise MoneEdgeError(
                f"the plan is for {count} experts in layer {layer}, "
                f"the model has {model.num_experts}"
            )


def _pruned_tensor(part: str, tensor: LazyTensor, plan: PrunePlan, layer: int) -> LazyTensor:
    kept, order = plan.kept[layer], plan.order(layer)
    if EXPERT_WEIGHT.fullmatch(part):
        return tensor.select(kept)
    if EXPERT_VECTOR.fullmatch(part) or ROUTER.fullmatch(part):
        return tensor.select(kept if plan.replacement == "drop" else order)
    return tensor


def _novice_biases(
    tensors: dict[str, LazyTensor],
    plan: PrunePlan,
    stats: ExpertStats | None,
    fitted: LowRankNovices | None,
) -> dict[str, LazyTensor]:
    """`ffn_down_exps.bias` of every pruned layer: [experts, width], zero rows for kept experts."""
    biases: dict[str, LazyTensor] = {}
    for layer in plan.kept:
        name = DOWN_BIAS.format(layer=layer)
        if not plan.pruned(layer) or (plan.replacement == "zero" and name not in tensors):
            continue
        vectors = novices.vectors(plan, stats, layer, fitted)
        if name in tensors:  # the model's own biases are part of the measured outputs
            own = tensors[name].read()
            vectors[: len(plan.kept[layer])] = own[: len(plan.kept[layer])]
        biases[name] = constant(vectors)
    return biases


def _novice_matrices(plan: PrunePlan, fitted: LowRankNovices | None) -> dict[str, LazyTensor]:
    """`ffn_novice_down` [P, r, H] and `ffn_novice_up` [P, D, r], an expert read at a time."""
    tensors: dict[str, LazyTensor] = {}
    for layer in plan.kept:
        found = novices.matrices(plan, fitted, layer)
        for part, stack in (("down", found.down), ("up", found.up)) if found else ():
            chunks = tuple(functools.partial(np.array, rows) for rows in stack)
            tensors[NOVICE.format(layer=layer, part=part)] = LazyTensor(stack.shape, chunks)
    return tensors


def _metadata(model: ModelFile, plan: PrunePlan) -> dict[str, Any]:
    gguf, _ = packages()
    value, kind = gguf.gguf_writer.GGUFValue, gguf.GGUFValueType
    entries: dict[str, Any] = {
        "mone.version": value(FORMAT_VERSION, kind.UINT32),
        "mone.method": value(plan.method, kind.STRING),
        "mone.replacement": value(plan.replacement, kind.STRING),
        "mone.scope": value(plan.scope, kind.STRING),
        "mone.prune_ratio": value(plan.prune_ratio, kind.FLOAT32),
        "mone.stats.sha256": value(plan.stats_sha256, kind.STRING),
    }
    for layer in plan.kept:
        ids = plan.kept[layer] if plan.replacement == "drop" else plan.order(layer)
        entries[f"mone.expert_order.{layer}"] = value(list(ids), kind.ARRAY, kind.INT32)
    if plan.replacement == "drop":
        kept = {len(ids) for ids in plan.kept.values()}
        if len(kept) != 1:
            raise MoneEdgeError(
                f"dropping leaves {min(kept)} to {max(kept)} experts a layer, and a GGUF has one "
                "count for all; use --scope layer without --protect, or --replacement mean"
            )
        entries[f"{model.arch}.expert_count"] = value(kept.pop(), kind.UINT32)
    else:
        counts = [len(plan.kept.get(i, range(model.num_experts))) for i in range(model.num_layers)]
        entries[f"{model.arch}.expert_kept_count"] = value(counts, kind.ARRAY, kind.INT32)
    return entries
