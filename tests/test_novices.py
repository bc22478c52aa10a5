"""Novice vectors, and the pruned torch model against an independent construction."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mone_edge.calibration import Batches
from mone_edge.collect.experts import experts_modules
from mone_edge.collect.loading import load_model
from mone_edge.collect.torch_model import collect_loaded
from mone_edge.errors import MoneEdgeError
from mone_edge.novices import apply, vectors
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.stats import ExpertStats
from tests.tiny import MODEL_TYPES, VOCAB, make_checkpoint

TOKENS = np.random.default_rng(5).integers(2, VOCAB, (4, 32))


@pytest.fixture(scope="module", params=MODEL_TYPES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, ExpertStats]:
    torch.set_num_threads(1)
    folder = make_checkpoint(
        request.param, tmp_path_factory.mktemp(request.param), experts=8, top_k=2
    )
    model = load_model(folder, device="cpu", dtype="float64")
    calibration = Batches(TOKENS, ("random",), "sha", 0, *TOKENS.shape, TOKENS.size)
    return model, collect_loaded(model, calibration)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(TOKENS)).logits


def constant_experts(model: Any, plan: PrunePlan, stats: ExpertStats) -> Any:
    """Oracle: hooks around eager experts swap what pruned experts add for g * constant."""
    model = copy.deepcopy(model)
    for index, (_, module) in experts_modules(model).items():
        pruned = torch.tensor(plan.pruned(index), dtype=torch.long)
        constants = torch.zeros_like(torch.from_numpy(stats.layers[index].output_mean))
        if plan.replacement != "zero":
            field = {"mean": "output_mean", "gate2-mean": "gate_sq_mean"}[plan.replacement]
            constants[pruned] = torch.from_numpy(getattr(stats.layers[index], field))[pruned]
        with torch.no_grad():
            module.down_proj[pruned] = 0

        def add_constants(
            _: Any, args: Any, output: Any, constants: torch.Tensor = constants
        ) -> Any:
            _, ids, weights = args
            return output + (weights.double()[..., None] * constants[ids]).sum(1)

        module.register_forward_hook(add_constants)
    return model


@pytest.mark.parametrize("replacement", ["mean", "gate2-mean", "zero"])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_pruned_model_equals_constants(
    case: tuple[Any, ExpertStats], replacement: str, scope: str
) -> None:
    model, stats = case
    plan = make_plan(stats, prune_ratio=0.5, replacement=replacement, scope=scope)
    pruned = apply(copy.deepcopy(model), plan, stats)
    torch.testing.assert_close(
        logits(pruned), logits(constant_experts(model, plan, stats)), rtol=1e-5, atol=1e-5
    )
    assert (logits(pruned) - logits(model)).abs().max() > 0.01


def test_dropped_model_equals_masked_routing(case: tuple[Any, ExpertStats]) -> None:
    model, stats = case
    plan = make_plan(stats, prune_ratio=0.5, replacement="drop")
    masked = copy.deepcopy(model)
    for index, (name, _) in experts_modules(masked).items():
        router = masked.get_submodule(name.rpartition(".")[0]).gate
        bias = torch.zeros(8, dtype=torch.float64)
        bias[list(plan.pruned(index))] = -torch.inf
        router.forward = _masked_router(router, bias)
    dropped = apply(copy.deepcopy(model), plan, stats)
    for _, module in experts_modules(dropped).values():
        assert len(module.down_proj) == len(module.gate_up_proj) == module.num_experts == 4
    torch.testing.assert_close(logits(dropped), logits(masked), rtol=1e-5, atol=1e-5)
    earlier = apply(copy.deepcopy(model), make_plan(stats, prune_ratio=0.25), stats)
    torch.testing.assert_close(
        logits(apply(earlier, plan, stats)), logits(masked), rtol=1e-5, atol=1e-5
    )


def _masked_router(router: Any, bias: torch.Tensor) -> Any:
    """The four routers' formula, written anew; renormalised where the model does so."""

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        router_logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T + bias
        weights, ids = torch.softmax(router_logits.float(), -1).topk(router.top_k)
        if getattr(router, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return router_logits, weights, ids

    return forward


def test_vectors_follow_the_plans_order(case: tuple[Any, ExpertStats]) -> None:
    _, stats = case
    plan = make_plan(stats, prune_ratio=0.25, replacement="mean")
    for layer in plan.kept:
        rows = vectors(plan, stats, layer)
        assert rows.shape == stats.layers[layer].output_mean.shape
        assert rows.dtype == np.float32
        for row, expert in zip(rows, plan.order(layer), strict=True):
            pruned = expert in plan.pruned(layer)
            mean = stats.layers[layer].output_mean[expert]
            np.testing.assert_array_equal(row, (mean if pruned else 0 * mean).astype(np.float32))
    zero = dataclasses.replace(plan, replacement="zero")
    assert not vectors(zero, stats, 0).any()


def test_foreign_plans_are_refused(case: tuple[Any, ExpertStats]) -> None:
    model, stats = case
    plan = make_plan(stats, prune_ratio=0.25)
    with pytest.raises(MoneEdgeError, match="the plan is for"):
        vectors(dataclasses.replace(plan, fingerprint="other"), stats, 0)
    fewer = ExpertStats(stats.provenance, {0: stats.layers[0]})
    with pytest.raises(MoneEdgeError, match="MoE layers"):
        vectors(plan, fewer, 0)
    with pytest.raises(MoneEdgeError, match="the model has 2"):
        apply(model, make_plan(fewer, prune_ratio=0.25), fewer)
    with pytest.raises(MoneEdgeError, match="no novices"):
        vectors(dataclasses.replace(plan, replacement="drop"), stats, 0)


def test_nothing_pruned_changes_nothing(case: tuple[Any, ExpertStats], tmp_path: Path) -> None:
    model, stats = case
    same = apply(copy.deepcopy(model), make_plan(stats, prune_ratio=0), stats)
    torch.testing.assert_close(logits(same), logits(model), rtol=1e-6, atol=1e-6)
