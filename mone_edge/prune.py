"""A model and a plan -> the pruned model: kept experts only, routers permuted, novices added; or
merged experts with a router of as many rows.

In: a `ModelFile`, a `PrunePlan`, the statistics or the fitted novices that go with it. Out: a
`ModelFile` in the MoNE format (`docs/format.md`). Lazy like its input: pruned experts are never
read.
"""

import functools
import re
from dataclasses import replace
from typing import Any

import numpy as np

from mone_edge import merging, novices
from mone_edge.conversion import packages
from mone_edge.errors import MoneEdgeError
from mone_edge.low_rank import LowRankNovices
from mone_edge.model_file import Array, LazyTensor, ModelFile, constant
from mone_edge.plan import PrunePlan
from mone_edge.stats import ExpertStats

FORMAT_VERSION = 1
DOWN = "blk.{layer}.ffn_down_exps.weight"
DOWN_BIAS = "blk.{layer}.ffn_down_exps.bias"
NOVICE = "blk.{layer}.ffn_novice_{part}.weight"
EXPERT_WEIGHT = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.weight")
EXPERT_VECTOR = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(bias|scale)")
INPUT_PARTS = ("gate", "up", "gate_up")  # whose outputs are neurons
ROUTER = re.compile(r"ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias)?")  # hy-v3: no suffix
# Where the order of experts means something: groups of experts share one, or tokens have their own.
ORDERED = re.compile(r"ffn_\w+_chexps\.|ffn_gate_tid2eid\.")
SLOTS = "blk.{layer}.ffn_gate_eid2slot.weight"
# Whose `ffn_down_exps.scale` is part of the gate weight that statistics are of.
SCALED_GATES = ("gemma4",)


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
    ordered = _ordered_layers(model, plan)
    mergers = {layer: _merger(model, plan, layer) for layer in plan.groups}
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in model.tensors.items():
        layer, part = _split(name)
        if layer not in plan.kept or not plan.pruned(layer):
            tensors[name] = tensor
        elif layer in mergers:
            tensors[name] = _merged_tensor(name, part, tensor, mergers[layer])
        elif not EXPERT_WEIGHT.fullmatch(part) or plan.kept[layer]:
            tensors[name] = _pruned_tensor(part, tensor, plan, layer, ordered=layer in ordered)
    if not plan.cuts:
        tensors |= _novice_biases(model, tensors, plan, stats, fitted)
        tensors |= _novice_matrices(model, plan, fitted)
        tensors |= {SLOTS.format(layer=layer): _slots(plan, layer) for layer in ordered}
    return replace(model, tensors=tensors, metadata=model.metadata | _metadata(model, plan))


def _split(name: str) -> tuple[int, str]:
    """`blk.3.ffn_up_exps.weight` -> 3 and `ffn_up_exps.weight`; -1 outside blocks."""
    match = re.match(r"blk\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (-1, name)


def _require_fit(model: ModelFile, plan: PrunePlan) -> None:
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


def _ordered_layers(model: ModelFile, plan: PrunePlan) -> tuple[int, ...]:
    """Pruned layers whose router has to stay as it is.

    Raises:
        MoneEdgeError: the plan would cut such a router, or merge rows of it.
    """
    groups = model.value("{arch}.expert_group_count", 1)
    marked = {_split(name)[0] for name in model.tensors if ORDERED.match(_split(name)[1])}
    ordered = tuple(i for i in plan.kept if plan.pruned(i) and (groups > 1 or i in marked))
    if ordered and plan.cuts:
        why = f"it routes within {groups} groups" if groups > 1 else "others depend on their order"
        done, other = (
            ("merged", "--method mone") if plan.groups else ("dropped", "--replacement mean")
        )
        raise MoneEdgeError(f"experts of {model.arch} cannot be {done}: {why}; use {other}")
    return ordered


def _slots(plan: PrunePlan, layer: int) -> LazyTensor:
    """Where each of the router's experts is stored: the inverse of the plan's order."""
    return constant(np.argsort(plan.order(layer)).astype(np.int32), "I32")


def _pruned_tensor(
    part: str, tensor: LazyTensor, plan: PrunePlan, layer: int, *, ordered: bool
) -> LazyTensor:
    kept, order = plan.kept[layer], plan.order(layer)
    rows = kept if plan.replacement == "drop" else order
    if EXPERT_WEIGHT.fullmatch(part):  # already without the others in a pruned checkpoint
        return tensor if tensor.shape[0] == len(kept) else tensor.select(kept)
    if EXPERT_VECTOR.fullmatch(part):
        if plan.replacement == "drop":
            return tensor.select(kept)
        return _kept_then_zeros(tensor, plan, layer)
    if ROUTER.fullmatch(part) and not ordered:
        one_row = tensor.shape == (1, plan.num_experts[layer])
        return tensor.select_columns(rows) if one_row else tensor.select(rows)
    return tensor


def _merger(model: ModelFile, plan: PrunePlan, layer: int) -> merging.LayerMerger:
    def stack(part: str) -> LazyTensor | None:
        return model.tensors.get(f"blk.{layer}.ffn_{part}_exps.weight")

    def read(expert: int) -> list[Array]:
        inputs = (found.slice(expert) for part in INPUT_PARTS if (found := stack(part)))
        return merging.neurons(model.tensors[DOWN.format(layer=layer)].slice(expert), inputs)

    return merging.layer_merger(plan, layer, read)


def _merged_tensor(
    name: str, part: str, tensor: LazyTensor, merger: merging.LayerMerger
) -> LazyTensor:
    """A tensor with a slice a group where it had one an expert; others as they are.

    Raises:
        MoneEdgeError: it does not hold floats.
    """
    match = EXPERT_WEIGHT.fullmatch(part) or EXPERT_VECTOR.fullmatch(part)
    if not match and not ROUTER.fullmatch(part):
        return tensor
    if tensor.dtype != "F32":
        raise MoneEdgeError(
            f"{name} is of type {tensor.dtype}, and only floats can be merged; merge the experts "
            "of the checkpoint before it was quantised"
        )
    groups = len(merger.groups)
    if tensor.shape[0] == 1:  # a correction bias in one row
        row = (lambda: merger.rows(tensor.read().reshape(-1))[None],)
        return LazyTensor((1, groups), row)
    axis = None
    if match and not part.endswith("scale"):
        axis = 0 if match[1] in INPUT_PARTS else 1 if part.endswith("weight") else None
    shape = (groups, *tensor.shape[1:])
    one = functools.partial(merger.expert, part=tensor.slice, axis=axis)
    if EXPERT_WEIGHT.fullmatch(part):
        return LazyTensor(shape, tuple(functools.partial(one, i) for i in range(groups)))
    return LazyTensor(shape, (lambda: np.stack([one(i) for i in range(groups)]),))


def _kept_then_zeros(tensor: LazyTensor, plan: PrunePlan, layer: int) -> LazyTensor:
    """Biases and scales of kept experts; nothing reads those of the others."""
    kept, total = plan.kept[layer], plan.num_experts[layer]
    own = tensor if tensor.shape[0] == len(kept) else tensor.select(kept)

    def values() -> Array:
        rows = own.read()
        return np.concatenate([rows, np.zeros((total - len(kept), *rows.shape[1:]), rows.dtype)])

    return LazyTensor((total, *tensor.shape[1:]), (values,), tensor.dtype)


def _novice_biases(
    model: ModelFile,
    tensors: dict[str, LazyTensor],
    plan: PrunePlan,
    stats: ExpertStats | None,
    fitted: LowRankNovices | None,
) -> dict[str, LazyTensor]:
    """`ffn_down_exps.bias` of every pruned layer: [experts, width], zero rows for kept experts."""
    biases: dict[str, LazyTensor] = {}
    for layer in plan.kept:
        name = DOWN_BIAS.format(layer=layer)
        needed = name in tensors or not plan.kept[layer]
        if not plan.pruned(layer) or (plan.replacement == "zero" and not needed):
            continue
        vectors = novices.vectors(plan, stats, layer, fitted) * _scales(model, plan, layer)
        if name in tensors:  # the model's own biases are part of the measured outputs
            own = tensors[name].read()
            vectors[: len(plan.kept[layer])] = own[: len(plan.kept[layer])]
        biases[name] = constant(vectors)
    return biases


def _novice_matrices(
    model: ModelFile, plan: PrunePlan, fitted: LowRankNovices | None
) -> dict[str, LazyTensor]:
    """`ffn_novice_down` [P, r, H] and `ffn_novice_up` [P, D, r], an expert read at a time."""
    tensors: dict[str, LazyTensor] = {}
    for layer in plan.kept:
        found = novices.matrices(plan, fitted, layer)
        if found is None:
            continue
        scales = np.broadcast_to(_scales(model, plan, layer), (plan.num_experts[layer], 1))
        up = found.up * scales[len(plan.kept[layer]) :, :, None]
        for part, stack in (("down", found.down), ("up", up)):
            chunks = tuple(functools.partial(np.array, rows) for rows in stack)
            tensors[NOVICE.format(layer=layer, part=part)] = LazyTensor(stack.shape, chunks)
    return tensors


def _scales(model: ModelFile, plan: PrunePlan, layer: int) -> Array:
    """What llama.cpp multiplies outputs by before the bias: [experts, 1] in the plan's order."""
    scale = model.tensors.get(f"blk.{layer}.ffn_down_exps.scale")
    if scale is None or model.arch not in SCALED_GATES:
        return np.ones((1, 1), np.float32)
    return scale.read().reshape(-1, 1)[list(plan.order(layer))]


def _metadata(model: ModelFile, plan: PrunePlan) -> dict[str, Any]:
    gguf, _ = packages()
    value, kind = gguf.gguf_writer.GGUFValue, gguf.GGUFValueType
    entries: dict[str, Any] = {
        "mone.version": value(FORMAT_VERSION, kind.UINT32),
        "mone.method": value(plan.method, kind.STRING),
        "mone.replacement": value(plan.replacement, kind.STRING),
        "mone.scope": value(plan.scope, kind.STRING),
        "mone.prune_ratio": value(plan.prune_ratio, kind.FLOAT32),
        "mone.base_expert_count": value(model.num_experts, kind.UINT32),
        "mone.stats.sha256": value(plan.stats_sha256, kind.STRING),
    }
    for layer in plan.kept:
        ids = plan.kept[layer] if plan.cuts else plan.order(layer)
        entries[f"mone.expert_order.{layer}"] = value(list(ids), kind.ARRAY, kind.INT32)
    for layer, groups in plan.groups.items():
        group_of = {expert: number for number, ids in enumerate(groups) for expert in ids}
        entries[f"mone.expert_group.{layer}"] = value(
            [group_of[expert] for expert in range(len(group_of))], kind.ARRAY, kind.INT32
        )
    if plan.cuts:
        kept = {len(ids) for ids in plan.kept.values()}
        if len(kept) != 1:
            raise MoneEdgeError(
                f"the plan leaves {min(kept)} to {max(kept)} experts a layer, and a GGUF has one "
                "count for all; use --scope layer without --protect, or --replacement mean"
            )
        entries[f"{model.arch}.expert_count"] = value(kept.pop(), kind.UINT32)
    else:
        counts = [len(plan.kept.get(i, range(model.num_experts))) for i in range(model.num_layers)]
        entries[f"{model.arch}.expert_kept_count"] = value(counts, kind.ARRAY, kind.INT32)
    return entries
