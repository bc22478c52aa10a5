"""Low-rank novices in GGUFs: logits of torch and llama.cpp, types, and all roads to one file."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from mone_edge import convert, novices
from mone_edge.cli import run
from mone_edge.collect.loading import load_model
from mone_edge.low_rank import LayerNovices, LowRankNovices
from mone_edge.plan import PrunePlan
from mone_edge.recipe import Recipe
from mone_edge.source import resolve
from tests import tiny
from tests.conftest import Calibrated
from tests.test_fit import fitted_novices
from tests.test_oracle import assert_same, llama_logits, uneven_plan

pytestmark = pytest.mark.usefixtures("built_runtime")
Make = Callable[[str], Calibrated]


def write(
    model: Calibrated, plan: PrunePlan, fitted: LowRankNovices, path: Path, outtype: str = "F32"
) -> Path:
    recipe = Recipe(model.source.name, imatrix="none", tokenizer_pre="gpt-2")
    jobs = convert.prepare(model.source, recipe, {outtype: path}, plan=plan, fitted=fitted)
    return convert.write(jobs, recipe)[0].outfile


def torch_logits(
    model: Calibrated, plan: PrunePlan, fitted: LowRankNovices, tokens: np.ndarray
) -> np.ndarray:
    network = load_model(model.source.path, device="cpu", dtype="float32")
    novices.apply(network, plan, None, fitted)
    with torch.inference_mode():
        return np.asarray(network(torch.from_numpy(tokens)[None]).logits[0])


def constants(fitted: LowRankNovices) -> LowRankNovices:
    """The same novices without their matrices."""
    layers: dict[int, LayerNovices] = {
        i: dataclasses.replace(n, down=n.down[:, :0], up=n.up[:, :, :0])
        for i, n in fitted.layers.items()
    }
    return dataclasses.replace(fitted, layers=layers)


@pytest.mark.parametrize("rank", [3, 32])
@pytest.mark.parametrize("kind", tiny.MODEL_TYPES)
def test_logits_agree_with_torch(kind: str, rank: int, calibrated: Make, tmp_path: Path) -> None:
    model = calibrated(kind)
    plan = uneven_plan(model.stats, f"rank-{rank}")
    fitted = fitted_novices(model, plan, tmp_path / "w")
    assert {layer.width for layer in fitted.layers.values()} == {rank}
    tokens = model.tokens[:2].reshape(-1)
    ours = torch_logits(model, plan, fitted, tokens)
    assert_same(llama_logits(write(model, plan, fitted, tmp_path / "m.gguf"), tokens), ours)
    without = torch_logits(model, plan, constants(fitted), tokens)
    assert np.abs(without - ours).max() > 1e-2 * (ours.max() - ours.min())


def test_novices_without_components_are_constants(calibrated: Make, tmp_path: Path) -> None:
    model = calibrated("olmoe")
    plan = uneven_plan(model.stats, "rank-4")
    fitted = constants(fitted_novices(model, plan, tmp_path / "w"))
    path = write(model, plan, fitted, tmp_path / "m.gguf")
    assert not [t.name for t in gguf.GGUFReader(path).tensors if "novice" in t.name]
    tokens = model.tokens[0]
    assert_same(llama_logits(path, tokens), torch_logits(model, plan, fitted, tokens))


@pytest.mark.parametrize(
    ("outtype", "rank", "down", "up"),
    [
        ("Q4_0", 32, "Q8_0", "Q8_0"),
        ("Q4_0", 4, "Q8_0", "F16"),
        ("BF16", 16, "BF16", "BF16"),
    ],
)
def test_types(
    outtype: str, rank: int, down: str, up: str, calibrated: Make, tmp_path: Path
) -> None:
    model = calibrated("olmoe")
    plan = uneven_plan(model.stats, f"rank-{rank}")
    fitted = fitted_novices(model, plan, tmp_path / "w")
    path = write(model, plan, fitted, tmp_path / "m.gguf", outtype)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for layer, novice in fitted.layers.items():
        for part, kind in (("down", down), ("up", up)):
            tensor = tensors[f"blk.{layer}.ffn_novice_{part}.weight"]
            assert tensor.tensor_type.name == kind
            stack = getattr(novice, part)
            assert tensor.shape.tolist() == list(stack.shape)[::-1]
            stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_allclose(stored, stack, atol=0.01 * np.abs(stack).max())
    assert np.isfinite(llama_logits(path, model.tokens[0])).all()


@pytest.mark.parametrize(("rank", "padded"), [(15, 15), (16, 32), (40, 64)])
def test_quantised_novices_are_padded_to_whole_blocks(
    rank: int, padded: int, calibrated: Make, tmp_path: Path
) -> None:
    model = calibrated("olmoe")
    plan = uneven_plan(model.stats, f"rank-{rank}")
    fitted = fitted_novices(model, plan, tmp_path / "w")
    path = write(model, plan, fitted, tmp_path / "m.gguf", "Q8_0")
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for layer, novice in fitted.layers.items():
        for part, axis in (("down", 1), ("up", 2)):
            tensor = tensors[f"blk.{layer}.ffn_novice_{part}.weight"]
            stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert stored.shape[axis] == padded
            stack = getattr(novice, part)
            used, rest = np.split(stored, [rank], axis)
            np.testing.assert_allclose(used, stack, atol=0.01 * np.abs(stack).max())
            assert not rest.any()
    tokens = model.tokens[0]
    logits, ours = llama_logits(path, tokens), torch_logits(model, plan, fitted, tokens)
    # typically: in Q8_0 a token near a tie is routed otherwise
    assert np.median(np.abs(logits - ours)) < 0.01 * (ours.max() - ours.min())


def tensors(path: Path) -> dict[str, Any]:
    found = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in found}


@pytest.mark.parametrize("method", ["mone", "novice-error"])
def test_all_roads_lead_to_one_file(
    method: str,
    calibrated: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`convert` alone, from its steps, from the pruned checkpoint, and from the cache."""
    model = calibrated("qwen2_moe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mone_edge.pipeline.cache_dir", lambda: tmp_path / "cache")
    text = ["--data", str(model.stats_file.with_name("text.txt"))]
    text += ["--samples", "10", "--seq-len", "64", "--seed", "0"]
    name, stats = str(model.source.path), str(model.stats_file)
    common = ["--outtype", "Q8_0", "--tokenizer-pre", "gpt-2", "--imatrix", "none"]
    how = ["--prune-ratio", "0.5", "--replacement", "rank", "--method", method]
    assert run(["convert", name, *how, *text, *common, "--stats", stats, "-o", "a.gguf"]) == 0
    assert list((tmp_path / "cache/novices").glob("*.safetensors"))
    assert run(["plan", stats, *how, "-o", "p.json"]) == 0
    assert run(["fit", name, "--plan", "p.json", "-o", "n.safetensors"]) == 0  # the same text
    given = ["--plan", "p.json", "--novices", "n.safetensors"]
    assert run(["convert", name, *given, *common, "-o", "b.gguf"]) == 0
    assert run(["prune", name, *given, "-o", "pruned"]) == 0
    assert run(["convert", "pruned", *common, "-o", "c.gguf"]) == 0
    capsys.readouterr()
    again = ["convert", name, *how, *common, "--stats", stats, "-o", "d.gguf"]
    assert run([*again, "--dry-run", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert run(again) == 0
    assert "novices from" in capsys.readouterr().err
    assert tensors(Path("a.gguf")) == tensors(Path("b.gguf"))
    assert tensors(Path("a.gguf")) == tensors(Path("c.gguf")) == tensors(Path("d.gguf"))
    recipes = [Path(f"{road}.recipe.yaml").read_text() for road in "abd"]
    assert recipes[0] == recipes[1] == recipes[2]
    assert estimate["bytes"] >= sum(len(t[2]) for t in tensors(Path("a.gguf")).values())
    assert run(["convert", name, *how[:2], *common, "--stats", stats, "-o", "e.gguf",
                "--novices", "n.safetensors"]) == 1  # fmt: skip
    assert "has no fitted novices" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["mone", "novice-error"])
def test_a_gguf_is_fitted_and_pruned_without_its_checkpoint(
    method: str, calibrated: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mone_edge.pipeline.cache_dir", lambda: tmp_path / "cache")
    common = ["--tokenizer-pre", "gpt-2", "--outtype", "Q8_0"]
    assert (
        run(["convert", str(model.source.path), "--prune-ratio", "0", *common, "-o", "w.gguf"]) == 0
    )
    text = ["--data", str(model.stats_file.with_name("text.txt")), "--samples", "12"]
    how = ["--prune-ratio", "0.5", "--replacement", "rank-32", "--method", method]
    how += ["--seq-len", "64"]
    assert run(["convert", "w.gguf", *how, *text, "-o", "rank.gguf"]) == 0
    assert (
        run(
            [
                "convert",
                "w.gguf",
                "--prune-ratio",
                "0.5",
                *text,
                "--seq-len",
                "64",
                "-o",
                "mean.gguf",
            ]
        )
        == 0
    )
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader("rank.gguf").tensors}
    assert kinds["blk.0.ffn_novice_up.weight"] == kinds["blk.1.ffn_novice_down.weight"] == "Q8_0"
    tokens = model.tokens[:4].reshape(-1)
    whole, close, far = (llama_logits(Path(f"{n}.gguf"), tokens) for n in ("w", "rank", "mean"))
    assert ((close - whole) ** 2).mean() < 0.8 * ((far - whole) ** 2).mean()
    assert resolve("w.gguf").num_experts == 8
