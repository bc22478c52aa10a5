"""torch with novices against the patched llama.cpp: the same logits, for every architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mone_edge import calibration, convert, demo, novices
from mone_edge.collect.loading import load_model
from mone_edge.collect.torch_model import collect
from mone_edge.llama import GgufModel
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Recipe
from mone_edge.source import Source, resolve
from mone_edge.stats import ExpertStats
from tests import tiny
from tests.conftest import Calibrated

TOLERANCE = 1e-4  # of the range of the logits; keys, values and weights in F32 on both sides
NEAR_TIE = 2e-4  # of the range: closer candidates may change places
VISIBLE = 1e-2  # of the range: what pruning changes at least


def uneven_plan(stats: ExpertStats, replacement: str) -> PrunePlan:
    """Keep 1 expert in the first layer (fewer than top-k) and 5 of 8 in the last."""
    plan = make_plan(stats, prune_ratio=0.5, method="random", replacement=replacement)
    first, *_, last = plan.num_experts
    return PrunePlan(**{**vars(plan), "kept": {**plan.kept, first: (3,), last: (0, 2, 4, 5, 7)}})


def torch_logits(
    source: Source, plan: PrunePlan | None, stats: ExpertStats, tokens: np.ndarray
) -> np.ndarray:
    import torch

    model = load_model(source.path, device="cpu", dtype="float32")
    if plan:
        novices.apply(model, plan, stats)
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(tokens)[None]).logits[0].numpy())


def llama_logits(gguf: Path, tokens: np.ndarray) -> np.ndarray:
    with GgufModel(gguf, exact=True) as model:
        return np.asarray(model.logits([int(t) for t in tokens]))


def assert_same(ours: np.ndarray, oracle: np.ndarray) -> None:
    span = oracle.max() - oracle.min()
    assert np.abs(ours - oracle).max() <= TOLERANCE * span
    best = np.sort(oracle, axis=-1)
    decided = best[:, -1] - best[:, -2] > NEAR_TIE * span
    assert decided.mean() > 0.5
    assert (ours.argmax(-1) == oracle.argmax(-1))[decided].all()


def write(
    source: Source, plan: PrunePlan | None, stats: ExpertStats, path: Path, **extra: Any
) -> Path:
    recipe = Recipe(model=source.name, imatrix="none", **extra)
    jobs = convert.prepare(source, recipe, {"F32": path}, plan=plan, stats=stats)
    return convert.write(jobs, recipe)[0].outfile


@pytest.mark.usefixtures("built_runtime")
@pytest.mark.parametrize("replacement", ["mean", "gate2-mean", "zero", "drop"])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_pruned_logits_agree_with_torch(
    model_type: str,
    replacement: str,
    calibrated: Callable[[str], Calibrated],
    tmp_path: Path,
) -> None:
    model = calibrated(model_type)
    if replacement == "drop":
        plan = make_plan(model.stats, prune_ratio=0.5, replacement="drop")
    else:
        plan = uneven_plan(model.stats, replacement)
    gguf = write(model.source, plan, model.stats, tmp_path / "m.gguf", tokenizer_pre="gpt-2")
    tokens = model.tokens[:2].reshape(-1)
    pruned = torch_logits(model.source, plan, model.stats, tokens)
    assert_same(llama_logits(gguf, tokens), pruned)
    whole = torch_logits(model.source, None, model.stats, tokens)
    assert np.abs(pruned - whole).max() > VISIBLE * (whole.max() - whole.min())


@pytest.mark.usefixtures("built_runtime")
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_unpruned_logits_agree_with_torch(
    model_type: str, calibrated: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    model = calibrated(model_type)
    gguf = write(model.source, None, model.stats, tmp_path / "m.gguf", tokenizer_pre="gpt-2")
    tokens = model.tokens[0]
    assert_same(llama_logits(gguf, tokens), torch_logits(model.source, None, model.stats, tokens))


@pytest.mark.usefixtures("built_runtime")
def test_the_demo_model_pruned_agrees_with_torch(tmp_path: Path) -> None:
    source = resolve("demo")
    tokenizer = calibration.load_tokenizer(source.path)
    batches = calibration.load([str(demo.calibration_text())], tokenizer, samples=4, seq_len=128)
    stats = collect(source.path, batches, model="demo", fingerprint=source.fingerprint)
    plan = make_plan(stats, prune_ratio=0.5, scope="model")
    assert len({len(ids) for ids in plan.kept.values()}) > 3
    gguf = write(source, plan, stats, tmp_path / "demo.gguf")
    text = demo.evaluation_text().read_text(encoding="utf-8")[:600]
    tokens = np.array(tokenizer.ids(text)[:128])
    oracle = torch_logits(source, plan, stats, tokens)
    assert_same(llama_logits(gguf, tokens), oracle)
