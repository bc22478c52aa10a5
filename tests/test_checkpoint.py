"""Pruned checkpoints: torch's logits, the direct road's GGUF, and the bytes that were kept."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mone_edge import cli, convert, novices, pipeline, pruned_checkpoint
from mone_edge.checkpoint import prune_checkpoint
from mone_edge.collect.loading import load_model
from mone_edge.conversion import _filled_in, packages
from mone_edge.errors import MoneEdgeError
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Calibration, Recipe
from mone_edge.safetensors_file import Entry, write_shards
from mone_edge.source import Checkpoint, Source, resolve
from tests.conftest import Calibrated
from tests.test_oracle import uneven_plan
from tests.tiny import MODEL_TYPES

Make = Callable[[str], Calibrated]
SHARD = 100_000


def pruned(model: Calibrated, folder: Path, replacement: str = "mean") -> tuple[Source, PrunePlan]:
    if replacement == "drop":
        plan = make_plan(model.stats, prune_ratio=0.5, replacement="drop")
    else:
        plan = uneven_plan(model.stats, replacement)
    made = prune_checkpoint(model.source, plan, model.stats, folder, shard_bytes=SHARD)
    assert made.experts_kept == tuple(map(len, plan.kept.values()))
    return resolve(str(made.outfile)), plan


def logits(model: Any, tokens: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens)).logits


@pytest.mark.parametrize(
    ("replacement", "dtype"),
    [
        ("mean", "float32"),
        ("mean", "bfloat16"),
        ("gate2-mean", "float32"),
        ("zero", "float32"),
        ("drop", "float32"),
    ],
)
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_reloaded_logits_equal_the_model_pruned_in_memory(
    calibrated: Make, kind: str, replacement: str, dtype: str, tmp_path: Path
) -> None:
    model = calibrated(kind)
    source, plan = pruned(model, tmp_path / "p", replacement)
    # What is left of "drop" is transformers' own choice of kernel, which rounds otherwise.
    eager = {"experts_implementation": "eager"} if replacement == "drop" else {}
    loaded = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, **eager)
    expected = load_model(model.source.path, device="cpu", dtype=dtype)
    whole = logits(expected, model.tokens[:2])
    novices.apply(expected, plan, model.stats)
    got = logits(loaded, model.tokens[:2])
    assert torch.equal(got, logits(expected, model.tokens[:2]))
    assert (got - whole).abs().max() > 0.01
    again = logits(load_model(source.path, device="cpu", dtype=dtype), model.tokens[:2])
    assert torch.equal(again, got)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_kept_tensors_are_the_models_byte_for_byte(
    calibrated: Make, kind: str, tmp_path: Path
) -> None:
    model = calibrated(kind)
    source, plan = pruned(model, tmp_path / "p")
    before, after = model.source.tensors, source.tensors
    new = after.keys() - before.keys()
    assert all(key.endswith(".approx_value") for key in new)
    assert len(new) == sum(len(plan.pruned(layer)) for layer in plan.kept)
    assert len({ref.file for ref in after.values()}) > 1
    for key in after.keys() & before.keys():
        old, kept = before[key], after[key]
        assert (old.dtype, old.shape, old.size) == (kept.dtype, kept.shape, kept.size)
        assert _bytes(old) == _bytes(kept)
    gone = before.keys() - after.keys()
    assert gone and all(".experts." in key for key in gone)


def _bytes(ref: Any) -> bytes:
    with ref.file.open("rb") as file:
        file.seek(ref.offset)
        return file.read(ref.size)


def test_files_around_the_weights_are_kept(calibrated: Make, tmp_path: Path) -> None:
    model = calibrated("olmoe")
    (model.source.path / "generation_config.json").write_text('{"temperature": 0.5}')
    source, plan = pruned(model, tmp_path / "p")
    assert (source.path / "generation_config.json").read_text() == '{"temperature": 0.5}'
    ours, theirs = (AutoTokenizer.from_pretrained(s.path) for s in (source, model.source))
    assert ours.encode("the river") == theirs.encode("the river")
    config = json.loads((source.path / "config.json").read_text())
    assert config["approximate_experts"]["0"] == list(plan.pruned(0))
    assert config["num_experts"] == 8
    assert source.is_pruned and not model.source.is_pruned
    assert source.base_fingerprint == model.source.fingerprint != source.fingerprint
    assert pruned_checkpoint.read_plan(source).kept == plan.kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]


def test_dropped_checkpoints_need_nothing_of_ours(calibrated: Make, tmp_path: Path) -> None:
    source, _ = pruned(calibrated("qwen2_moe"), tmp_path / "p", "drop")
    assert source.num_experts == 4 and not source.is_pruned
    config = json.loads((source.path / "config.json").read_text())
    assert not {"quantization_config", "approximate_experts"} & config.keys()
    assert not any(key.endswith(".approx_value") for key in source.tensors)


def test_import_is_light() -> None:
    code = "import sys, mone_edge; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("built_runtime")
@pytest.mark.parametrize("replacement", ["mean", "gate2-mean", "zero", "drop"])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_it_converts_to_the_tensors_of_the_direct_road(
    calibrated: Make, kind: str, replacement: str, tmp_path: Path
) -> None:
    model = calibrated(kind)
    source, plan = pruned(model, tmp_path / "p", replacement)
    command = ["convert", "--outtype", "F32", "--outtype", "Q8_0", "--tokenizer-pre", "gpt-2"]
    (tmp_path / "direct").mkdir()
    plan.save(tmp_path / "plan.json")
    direct = [str(model.source.path), "--plan", str(tmp_path / "plan.json"), "--imatrix", "none",
              "--stats", str(model.stats_file)]  # fmt: skip
    ratio = ["--prune-ratio", "0"] if replacement == "drop" else []
    for name, arguments in (("direct", direct), ("via", [str(source.path), *ratio])):
        target = str(tmp_path / f"{name}-{{ftype}}.gguf")
        assert cli.run([*command, *arguments, "-o", target]) == 0
    for ftype in ("F32", "Q8_0"):
        ours, expected = (_tensors(tmp_path / f"{n}-{ftype}.gguf") for n in ("via", "direct"))
        assert ours == expected


def _tensors(gguf: Path) -> dict[str, tuple[Any, ...]]:
    reader = packages()[0].GGUFReader(gguf)
    return {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


@pytest.mark.usefixtures("built_runtime")
def test_the_statistics_give_its_importance_matrix(calibrated: Make, tmp_path: Path) -> None:
    model = calibrated("mixtral")
    source, plan = pruned(model, tmp_path / "p")
    jobs = [
        convert.prepare(s, Recipe(s.name, tokenizer_pre="gpt-2"), {"Q8_0": tmp_path / "x.gguf"},
                        plan=plan, stats=model.stats)[0]
        for s in (source, model.source)
    ]  # fmt: skip
    ours, direct = (job.imatrix for job in jobs)
    assert ours is not None and direct is not None and ours.keys() == direct.keys()
    assert all(np.array_equal(ours[name], direct[name]) for name in direct)


@pytest.mark.usefixtures("built_runtime")
def test_other_pruners_checkpoints_are_read(calibrated: Make, tmp_path: Path) -> None:
    """`approximate_experts` and `<expert>.approx_value` alone, as llm-compressor writes them."""
    model = calibrated("olmoe")
    source, plan = pruned(model, tmp_path / "p")
    config = json.loads((source.path / "config.json").read_text())
    del config["quantization_config"]
    (source.path / "config.json").write_text(json.dumps(config))
    foreign = resolve(str(source.path))
    found = pruned_checkpoint.read_plan(foreign)
    assert dict(found.kept) == dict(plan.kept) and found.num_experts == plan.num_experts
    means = pruned_checkpoint.read_novices(foreign, found)
    for layer in plan.kept:
        np.testing.assert_array_equal(
            novices.vectors(found, means, layer), novices.vectors(plan, model.stats, layer)
        )
    arguments = ["convert", str(source.path), "--outtype", "F32", "--tokenizer-pre", "gpt-2"]
    assert cli.run([*arguments, "-o", str(tmp_path / "m.gguf")]) == 0


def test_experts_in_one_tensor_are_refused_without_a_plan(tmp_path: Path) -> None:
    config = {"num_experts": 8, "approximate_experts": {"0": [1]}}
    foreign = Checkpoint("theirs", tmp_path, config)
    with pytest.raises(MoneEdgeError, match="all experts of a layer in one tensor"):
        _filled_in({"model.layers.0.mlp.experts.down_proj": None}, foreign)


def test_what_cannot_be_is_refused(
    calibrated: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = calibrated("olmoe")
    plan = uneven_plan(model.stats, "mean")
    with pytest.raises(MoneEdgeError, match="not of"):
        prune_checkpoint(calibrated("mixtral").source, plan, model.stats, tmp_path / "p")
    with pytest.raises(MoneEdgeError, match="--stats"):
        prune_checkpoint(model.source, plan, None, tmp_path / "p")
    with pytest.raises(MoneEdgeError, match="is the model itself"):
        prune_checkpoint(model.source, plan, model.stats, model.source.path, force=True)
    with pytest.raises(MoneEdgeError, match="left alone"):
        prune_checkpoint(model.source, plan, model.stats, tmp_path, force=True)
    uneven = PrunePlan(**{**vars(plan), "replacement": "drop"})
    with pytest.raises(MoneEdgeError, match="one count for all"):
        prune_checkpoint(model.source, uneven, None, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
    source, _ = pruned(model, tmp_path / "p")
    (tmp_path / "p" / ".DS_Store").touch()
    prune_checkpoint(model.source, plan, model.stats, tmp_path / "p", force=True)
    with pytest.raises(MoneEdgeError, match="exists; add --force"):
        prune_checkpoint(model.source, plan, model.stats, tmp_path / "p")
    with pytest.raises(MoneEdgeError, match="is pruned already"):
        prune_checkpoint(source, plan, model.stats, tmp_path / "q")
    with pytest.raises(MoneEdgeError, match="is pruned already"):
        pipeline.calibrate(source, Calibration())
    with pytest.raises(ValueError, match="not serializable"):
        load_model(source.path, device="cpu").save_pretrained(tmp_path / "s")
    assert cli.run(["convert", str(source.path), "--prune-ratio", "0.5"]) == 2
    assert "--prune-ratio cannot be carried out" in capsys.readouterr().err


def test_a_checkpoint_without_a_novice_is_refused(calibrated: Make, tmp_path: Path) -> None:
    source, plan = pruned(calibrated("olmoe"), tmp_path / "p")
    for file in {ref.file for ref in source.tensors.values()}:
        tensors = load_file(file)
        save_file({k: v for k, v in tensors.items() if "approx" not in k}, file)
    index = json.loads((source.path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "approx" not in k}
    (source.path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MoneEdgeError, match="has no novice for"):
        pruned_checkpoint.read_novices(resolve(str(source.path)), plan)
    with pytest.raises(MoneEdgeError, match="weights are missing"):
        load_model(source.path, device="cpu")


def test_command(calibrated: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, plan, out = calibrated("qwen3_moe"), tmp_path / "plan.json", tmp_path / "out"
    stats = str(model.stats_file)
    assert cli.run(["plan", stats, "--prune-ratio", "0.5", "-o", str(plan)]) == 0
    capsys.readouterr()
    arguments = ["prune", str(model.source.path), "--plan", str(plan), "-o", str(out)]
    assert cli.run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["experts_kept"] == [4, 4] and document["outfile"] == str(out)
    assert document["bytes"] == resolve(str(out)).size and document["peak_rss_bytes"] > 0
    assert cli.run(arguments) == 1
    assert cli.run([*arguments, "--force"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plan.json"]


def test_a_wrong_size_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(MoneEdgeError, match="w has 3 bytes, not 4"):
        write_shards(tmp_path, [Entry("w", "U8", (4,), 4, lambda: iter([b"abc"]))])


FOREIGN: dict[str, dict[str, Any]] = {
    "mode-pd": {"model_type": "olmoe_compressed", "architectures": ["OlmoneForCausalLM"]},
    "llm-compressor": {},
    "vLLM": {"approximate_experts": None},
}


def foreign(folder: Path, pruner: str) -> Source:
    """A checkpoint of ours as another pruner would have written it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    ids = config["approximate_experts"]
    if pruner == "mode-pd":
        config["approximate_experts"] = [ids[layer] for layer in sorted(ids)]
    if pruner == "vLLM":
        described = {"version": 1, "replacement_type": "constant", "experts_by_layer": ids}
        config["mone"] = described
    file.write_text(json.dumps(config | FOREIGN[pruner]))
    return resolve(str(folder))


@pytest.mark.usefixtures("built_runtime")
@pytest.mark.parametrize("pruner", FOREIGN)
def test_checkpoints_of_other_pruners_convert(
    calibrated: Make, pruner: str, tmp_path: Path
) -> None:
    source, plan = pruned(calibrated("olmoe"), tmp_path / "p")
    command = ["convert", "--outtype", "F32", "--tokenizer-pre", "gpt-2"]
    assert cli.run([*command, str(source.path), "-o", str(tmp_path / "ours.gguf")]) == 0
    theirs = foreign(tmp_path / "p", pruner)
    assert pruned_checkpoint.read_plan(theirs).kept == plan.kept
    assert cli.run([*command, str(theirs.path), "-o", str(tmp_path / "theirs.gguf")]) == 0
    assert _tensors(tmp_path / "theirs.gguf") == _tensors(tmp_path / "ours.gguf")
    with pytest.raises(MoneEdgeError, match="pruned by another tool"):
        load_model(theirs.path, device="cpu")


def test_unknown_replacements_of_other_pruners_are_refused(
    calibrated: Make, tmp_path: Path
) -> None:
    source, _ = pruned(calibrated("olmoe"), tmp_path / "p")
    file = source.path / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    config["mone"] = {"version": 2, "replacement_type": "linear", "experts_by_layer": {}}
    file.write_text(json.dumps(config))
    with pytest.raises(MoneEdgeError, match="mone is .*'version': 2.*only .* is known"):
        assert resolve(str(source.path)).is_pruned
