"""What pruning refuses by name, before anything is read."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from mone_edge import prune
from mone_edge.errors import MoneEdgeError
from mone_edge.model_file import LazyTensor, ModelFile, constant
from mone_edge.plan import make_plan
from tests.test_stats import make_stats


@dataclasses.dataclass(frozen=True)
class Value:
    """What gguf calls a GGUFValue."""

    value: Any


def model(arch: str, *names: str, **metadata: int) -> ModelFile:
    experts = len(next(iter(make_stats().layers.values())).count)
    keys = {"expert_count": experts, "block_count": len(make_stats().layers)} | metadata
    stack = constant(np.zeros((experts, 2, 2), np.float32))
    layers = [f"blk.{layer}.ffn_{part}_exps.weight" for layer in make_stats().layers
              for part in ("up", "down")]  # fmt: skip
    tensors: dict[str, LazyTensor] = dict.fromkeys((*layers, *names), stack)
    return ModelFile(
        arch, {f"{arch}.{k}": Value(v) for k, v in keys.items()}, tensors, lambda module: module
    )


@pytest.mark.parametrize(
    ("unfit", "told"),
    [
        (model("llama4"), "llama4 cannot be pruned yet: it applies the gate weights before"),
        (model("grovemoe"), "grovemoe cannot be pruned yet"),
        (model("deepseek2", expert_group_count=4), "routes within 4 groups"),
        (model("deepseek4", "blk.0.ffn_gate_tid2eid.weight"), "it holds blk.0.ffn_gate_tid2eid"),
        (model("olmoe", expert_count=999), "the model has 999"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(unfit: ModelFile, told: str) -> None:
    stats = make_stats()
    with pytest.raises(MoneEdgeError, match=told):
        prune.apply_plan(unfit, make_plan(stats, prune_ratio=0.5), stats)
