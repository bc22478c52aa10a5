"""What a pruned checkpoint says of itself: its plan, and the novices in it.

In: a checkpoint folder as `checkpoint` writes it, or as another MoNE pruner does. Out: the
`PrunePlan` and novices it was made with, so that it converts like the model it was made from. Knows
nothing about weights other than novices.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mone_edge import novices
from mone_edge.errors import MoneEdgeError
from mone_edge.low_rank import LayerNovices, LowRankNovices
from mone_edge.plan import UNKNOWN_METHOD, PrunePlan
from mone_edge.recipe import low_rank
from mone_edge.safetensors_header import TensorRef, item_bytes
from mone_edge.source import EXPERT_KEY, Checkpoint
from mone_edge.stats import ExpertStats, LayerStats, Provenance, empty_layer


def read_plan(source: Checkpoint) -> PrunePlan:
    """The plan that a pruned checkpoint carries.

    A checkpoint of another MoNE pruner names its pruned experts only (`approximate_experts`).

    Raises:
        MoneEdgeError: config.json holds no plan, or one that does not fit.
    """
    where = str(source.path / "config.json")
    if source.pruned_plan:
        return PrunePlan.parse(source.pruned_plan, where)
    layers = sorted({layer for layer, _, _ in _expert_keys(source)})
    total = source.num_experts
    pruned = {layer: set(map(int, source.novice_ids.get(str(layer), ()))) for layer in layers}
    removed = sum(map(len, pruned.values()))
    document = {
        "model": source.name,
        "fingerprint": source.fingerprint,
        "method": UNKNOWN_METHOD,
        "scope": "model",
        "replacement": "mean",
        "prune_ratio": removed / max(1, total * len(layers)),
        "top_k": source.top_k,
        "num_experts": dict.fromkeys(layers, total),
        "kept": {i: [e for e in range(total) if e not in pruned[i]] for i in layers},
        "protect": [],
    }
    return PrunePlan.parse(document, where)


def read_novices(source: Checkpoint, plan: PrunePlan) -> ExpertStats:
    """The novices of a pruned checkpoint, as statistics: its vectors are their means.

    Raises:
        MoneEdgeError: a pruned expert has no novice.
    """
    refs = {
        (layer, expert): source.tensors[key]
        for layer, expert, key in _expert_keys(source)
        if key.endswith(f".{novices.APPROX_VALUE}")
    }
    layers: dict[int, LayerStats] = {}
    for layer, total in plan.num_experts.items():
        missing = [e for e in plan.pruned(layer) if (layer, e) not in refs]
        if missing:
            raise MoneEdgeError(f"{source.name}: layer {layer} has no novice for {missing[0]}")
        vectors = {e: _values(refs[layer, e]) for e in plan.pruned(layer)}
        width = max((v.size for v in vectors.values()), default=1)
        if odd := next((e for e, v in vectors.items() if v.shape != (width,)), None):
            raise MoneEdgeError(
                f"{source.name}: layer {layer}, the novice of expert {odd} has shape "
                f"{list(vectors[odd].shape)}, others {width}"
            )
        layers[layer] = empty_layer(total, width, 1, top_k=plan.top_k)
        for expert, vector in vectors.items():
            layers[layer].output_mean[expert] = vector
            layers[layer].gate_sq_mean[expert] = vector
    made = Provenance(source.name, source.base_fingerprint, source.architecture)
    return ExpertStats(made, layers)


def read_fitted(source: Checkpoint, plan: PrunePlan) -> LowRankNovices | None:
    """The low-rank novices of a pruned checkpoint; None of a plan that has none.

    Raises:
        MoneEdgeError: a pruned expert lacks a part of its novice.
    """
    if not low_rank(plan.replacement):
        return None
    refs = {
        (layer, expert, key.rpartition(".")[2]): source.tensors[key]
        for layer, expert, key in _expert_keys(source)
    }
    layers = {i: _fitted_layer(source, plan, i, refs) for i in plan.kept if plan.pruned(i)}
    pruned = {layer: plan.pruned(layer) for layer in plan.kept}
    made = Provenance(source.name, source.base_fingerprint, source.architecture)
    return LowRankNovices(made, plan.replacement, pruned, layers)


def _fitted_layer(
    source: Checkpoint,
    plan: PrunePlan,
    layer: int,
    refs: Mapping[tuple[int, int, str], TensorRef],
) -> LayerNovices:
    pruned = plan.pruned(layer)
    parts = [novices.APPROX_VALUE, novices.APPROX_DOWN, novices.APPROX_UP]
    if (layer, pruned[0], novices.APPROX_DOWN) not in refs:
        parts = parts[:1]
    try:
        found = [
            np.stack(
                [_values(ref).reshape(ref.shape) for e in pruned for ref in [refs[layer, e, p]]]
            )
            for p in parts
        ]
    except (KeyError, ValueError) as error:
        raise MoneEdgeError(
            f"{source.name}: a novice of layer {layer} lacks a part, or parts differ in shape"
        ) from error
    bias, down, up = (a.astype(np.float32) for a in (*found, *_no_matrices(found[0]))[:3])
    zeros = np.zeros(len(pruned))
    counts = np.full(len(pruned), down.shape[1]), np.zeros(len(pruned), np.int64)
    return LayerNovices(bias, down, up, *counts, zeros, zeros)


def _no_matrices(bias: Any) -> tuple[Any, Any]:
    return np.zeros((len(bias), 0, 1)), np.zeros((*bias.shape, 0))


def _expert_keys(source: Checkpoint) -> Iterator[tuple[int, int, str]]:
    """(layer, expert, key) of every tensor of a single expert."""
    for key in source.tensors:
        match, block = EXPERT_KEY.fullmatch(key), re.search(r"\b(?:layers|blocks)\.(\d+)\.", key)
        if match and block:
            yield int(block[1]), int(match["id"]), key


def _values(ref: TensorRef) -> Any:
    """A small tensor as float64."""
    with ref.file.open("rb") as file:
        file.seek(ref.offset)
        data = file.read(ref.size)
    if ref.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if ref.dtype not in ("F64", "F32", "F16"):
        raise MoneEdgeError(f"{ref.file}: a novice of type {ref.dtype}")
    return np.frombuffer(data, f"<f{item_bytes(ref.dtype)}").astype(np.float64)
