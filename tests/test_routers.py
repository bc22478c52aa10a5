"""Router rows on disk: norms against the tensors themselves; `--method router-norm` end to end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mone_edge import routers
from mone_edge.cli import run
from mone_edge.errors import MoneEdgeError
from mone_edge.plan import PrunePlan
from mone_edge.source import resolve
from mone_edge.stats import ExpertStats
from tests import tiny
from tests.bad_input import refused
from tests.conftest import Calibrated

TYPES = ("qwen2_moe", "olmoe", "mixtral", "granitemoe")


def router_weights(folder: Path) -> dict[str, Any]:
    tensors = load_file(folder / "model.safetensors")
    return {n: t for n, t in tensors.items() if n.endswith(tiny.ROUTERS) and "shared" not in n}


def before_tuning(checkpoint: Path, folder: Path, shrunk: float = 0.5) -> Path:
    """The model that `checkpoint` would come from, had fine-tuning made row i longer by i."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in router_weights(folder):
        rows = tensors[name]
        norms = rows.norm(dim=1, keepdim=True)
        growth = shrunk * torch.arange(len(rows))[:, None]
        tensors[name] = rows / norms * (norms - growth * norms.min() / len(rows))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_norms_are_those_of_the_tensors(model_type: str, dtype: str, tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(model_type, tmp_path / "m", dtype=dtype)
    norms = routers.router_norms(resolve(str(folder)))
    wanted = [t.double().norm(dim=1).numpy() for _, t in sorted(router_weights(folder).items())]
    assert list(norms) == [0, 1]
    np.testing.assert_allclose(list(norms.values()), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.7.mlp.gate.weight",
        "model.layers.7.block_sparse_moe.gate.weight",
        "model.layers.7.block_sparse_moe.router.layer.weight",
        "model.language_model.layers.7.feed_forward.router.weight",
        "transformer.blocks.7.ffn.router.layer.weight",
        "model.layers.7.router.proj.weight",
        "layers.7.ffn.gate.weight",
        "blk.7.ffn_gate_inp.weight",
    ],
)
def test_names_of_routers(name: str) -> None:
    match = routers.ROUTER.search(name)
    assert match and match["layer"] == "7"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.7.mlp.experts.0.gate_proj.weight",
        "model.layers.7.mlp.shared_expert_gate.weight",
        "blk.7.ffn_gate_inp_shexp.weight",
        "blk.7.ffn_gate_exps.weight",
        "model.gate.weight",
    ],
)
def test_names_of_others(name: str) -> None:
    assert not routers.ROUTER.search(name)


def test_the_experts_whose_rows_grew_least_go(
    calibrated: Callable[[str], Calibrated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    before_tuning(made.source.path, tmp_path / "before")
    arguments = ["--method", "router-norm", "--pretrained", "before", "--prune-ratio", "0.5"]
    assert run(["plan", str(made.stats_file), *arguments, "-o", "plan.json"]) == 0
    plan = PrunePlan.load(tmp_path / "plan.json")
    assert plan.kept == {0: (4, 5, 6, 7), 1: (4, 5, 6, 7)}
    assert plan.pretrained == "before"


def test_a_row_that_shrank_goes_before_one_that_stayed(
    calibrated: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    made = calibrated("olmoe")
    pretrained = resolve(str(before_tuning(made.source.path, tmp_path / "b", shrunk=-0.5)))
    for change in routers.norm_changes(made.source, pretrained).values():
        assert (np.diff(change) < 0).all() and change[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("built_runtime")
def test_convert_records_what_it_compared_with(
    calibrated: Callable[[str], Calibrated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    made = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    before_tuning(made.source.path, tmp_path / "before")
    arguments = ["convert", str(made.source.path), "--stats", str(made.stats_file)]
    arguments += ["--tokenizer-pre", "gpt-2", "--outtype", "F16", "--prune-ratio", "0.5"]
    arguments += ["--method", "router-norm", "--pretrained", "before", "-o", "m.gguf"]
    assert run(arguments) == 0
    recipe = yaml.safe_load((tmp_path / "m.recipe.yaml").read_text())
    assert recipe["method"] == "router-norm"
    assert recipe["pretrained"] == "before"


def test_what_is_missing_is_said(
    calibrated: Callable[[str], Calibrated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    plan = ["plan", made.stats_file, "-o", "plan.json", "--method", "router-norm"]
    other = ["plan", made.stats_file, "-o", "plan.json", "--pretrained", "before"]
    before_tuning(made.source.path, tmp_path / "before")
    tiny.make_checkpoint("olmoe", tmp_path / "small", experts=4, seed=1)
    stats = ExpertStats.load(made.stats_file)
    strange = vars(stats.provenance) | {"fingerprint": "0" * 64}
    document = {"version": 2, "provenance": strange}
    tensors = load_file(made.stats_file)
    save_file(tensors, tmp_path / "other.safetensors", {"mone-edge-stats": json.dumps(document)})
    for arguments, code, told in (
        (plan, 2, "name the model before it with --pretrained MODEL"),
        ([*plan, "--pretrained", "nowhere"], 1, "no model nowhere"),
        ([*plan, "--pretrained", made.source.path], 1, "nothing to rank by; name the model"),
        ([*plan, "--pretrained", "small"], 1, "routers in 2 blocks for [4] experts"),
        (other, 2, "--pretrained is for --method router-norm, not for joint"),
        (
            [plan[0], "other.safetensors", *plan[2:], "--pretrained", "before"],
            1,
            "is not the model that the statistics are of (000000000000)",
        ),
    ):
        refused(capfd, tmp_path, arguments, code, told)


def test_a_model_without_known_routers_is_refused(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint("olmoe", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    renamed = {n.replace("mlp.gate.", "mlp.chooser."): t for n, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoneEdgeError, match="no router weights of 8 rows"):
        routers.router_norms(resolve(str(folder)))
