"""What pruning refuses by name, before anything is read."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from mone_edge import prune
from mone_edge.errors import MoneEdgeError
from mone_edge.model_file import LazyTensor, ModelFile, constant
from mone_edge.plan import make_plan
from tests.test_stats import make_stats

LAYERS = sorted(make_stats().layers)
EXPERTS = len(make_stats().layers[LAYERS[0]].count)
ROUTERS = tuple(f"blk.{layer}.ffn_gate_inp.weight" for layer in LAYERS)
SLOTS = "ffn_gate_eid2slot.weight"


@dataclasses.dataclass(frozen=True)
class Value:
    """What gguf calls a GGUFValue."""

    value: Any


def model(arch: str, *names: str, **metadata: int) -> ModelFile:
    experts = len(next(iter(make_stats().layers.values())).count)
    keys = {"expert_count": experts, "block_count": len(make_stats().layers)} | metadata
    stack = constant(np.random.default_rng(0).random((experts, 2, 2), np.float32))
    layers = [f"blk.{layer}.ffn_{part}_exps.weight" for layer in make_stats().layers
              for part in ("up", "down")]  # fmt: skip
    tensors: dict[str, LazyTensor] = dict.fromkeys((*layers, *names), stack)
    return ModelFile(
        arch, {f"{arch}.{k}": Value(v) for k, v in keys.items()}, tensors, lambda module: module
    )


GROUPED = model("deepseek2", *ROUTERS, expert_group_count=2)
HASHED = model("deepseek4", *ROUTERS, "blk.0.ffn_gate_tid2eid.weight")
CHUNKED = model("grovemoe", *ROUTERS, *(f"blk.{i}.ffn_up_chexps.weight" for i in LAYERS))


@pytest.mark.parametrize(
    ("unfit", "told", "replacement"),
    [
        (GROUPED, "deepseek2 cannot be dropped: it routes within 2 groups", "drop"),
        (HASHED, "deepseek4 cannot be dropped: others depend on their order", "drop"),
        (CHUNKED, "grovemoe cannot be dropped: others depend on their order", "drop"),
        (model("olmoe", expert_count=999), "the model has 999", "mean"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(
    unfit: ModelFile, told: str, replacement: str
) -> None:
    stats = make_stats()
    plan = make_plan(stats, prune_ratio=0.5, replacement=replacement)
    with pytest.raises(MoneEdgeError, match=told):
        prune.apply_plan(unfit, plan, stats)


@pytest.mark.parametrize(
    ("whole", "ordered"),
    [(GROUPED, LAYERS), (CHUNKED, LAYERS), (HASHED, LAYERS[:1]), (model("olmoe", *ROUTERS), [])],
)
def test_routers_with_a_meaning_in_their_order_keep_it(
    whole: ModelFile, ordered: list[int]
) -> None:
    stats = make_stats()
    plan = make_plan(stats, prune_ratio=0.5, replacement="mean")
    pruned = prune.apply_plan(whole, plan, stats)
    for layer in LAYERS:
        router, slots = (f"blk.{layer}.{n}" for n in ("ffn_gate_inp.weight", SLOTS))
        order = list(plan.order(layer))
        before = whole.tensors[router].read()
        if layer in ordered:
            assert pruned.tensors[router] is whole.tensors[router]
            ids = pruned.tensors[slots]
            assert (ids.dtype, ids.shape) == ("I32", (len(order),))
            assert [order[slot] for slot in ids.read()] == list(range(len(order)))
        else:
            assert slots not in pruned.tensors
            assert np.array_equal(pruned.tensors[router].read(), before[order])
        kept = len(plan.kept[layer])
        bias = pruned.tensors[f"blk.{layer}.ffn_down_exps.bias"].read()  # in the order of slots
        assert np.allclose(bias[kept:], stats.layers[layer].output_mean[order][kept:])
        assert pruned.tensors[f"blk.{layer}.ffn_up_exps.weight"].shape[0] == kept


def test_a_layer_may_keep_no_expert() -> None:
    stats = make_stats()
    plan = make_plan(stats, prune_ratio=0.5, replacement="mean")
    first = LAYERS[0]
    plan = dataclasses.replace(plan, kept={**plan.kept, first: ()})
    pruned = prune.apply_plan(model("olmoe", *ROUTERS), plan, stats)
    assert not [
        name for name in pruned.tensors if re.match(rf"blk.{first}.ffn_(up|down)_exps.w", name)
    ]
    bias = pruned.tensors[f"blk.{first}.ffn_down_exps.bias"].read()
    assert np.allclose(bias, stats.layers[first].output_mean)
    assert pruned.value("{arch}.expert_kept_count")[first] == 0


def test_biases_of_pruned_experts_are_zero() -> None:
    stats = make_stats()
    plan = make_plan(stats, prune_ratio=0.5, replacement="mean")
    name = f"blk.{LAYERS[0]}.ffn_up_exps.bias"
    whole = model("gpt-oss", *ROUTERS, name)
    values, kept = whole.tensors[name].read(), plan.kept[LAYERS[0]]
    bias = prune.apply_plan(whole, plan, stats).tensors[name].read()
    assert bias.shape == values.shape
    assert np.array_equal(bias[: len(kept)], values[list(kept)]) and not bias[len(kept) :].any()


@pytest.mark.parametrize(
    ("arch", "part", "shape"),
    [
        ("glm4moe", "exp_probs_b.bias", (EXPERTS,)),
        ("hy_v3", "exp_probs_b", (EXPERTS,)),
        ("ernie4_5-moe", "exp_probs_b.bias", (1, EXPERTS)),
    ],
)
def test_correction_biases_of_every_form_are_permuted(
    arch: str, part: str, shape: tuple[int, ...]
) -> None:
    stats = make_stats()
    plan, name = make_plan(stats, prune_ratio=0.5, replacement="mean"), f"blk.{LAYERS[0]}.{part}"
    whole = model(arch, *ROUTERS)
    whole.tensors[name] = constant(np.arange(EXPERTS, dtype=np.float32).reshape(shape))
    bias = prune.apply_plan(whole, plan, stats).tensors[name]
    assert bias.shape == shape
    assert bias.read().reshape(-1).tolist() == list(plan.order(LAYERS[0]))


def test_novices_carry_the_scale_that_is_part_of_the_gate_weight() -> None:
    stats = make_stats()
    plan, layer = make_plan(stats, prune_ratio=0.5, replacement="mean"), LAYERS[0]
    whole = model("gemma4", *ROUTERS)
    scale = np.arange(1, EXPERTS + 1, dtype=np.float32)
    whole.tensors[f"blk.{layer}.ffn_down_exps.scale"] = constant(scale)
    bias = prune.apply_plan(whole, plan, stats).tensors[f"blk.{layer}.ffn_down_exps.bias"].read()
    pruned = list(plan.pruned(layer))
    expected = stats.layers[layer].output_mean[pruned] * scale[pruned][:, None]
    assert np.allclose(bias[len(plan.kept[layer]) :], expected)
