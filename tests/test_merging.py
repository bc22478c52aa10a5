"""Merged experts: in memory, as a checkpoint that needs nothing of ours, as a GGUF without a patch.

Each is compared with the others; duplicates in a group must give themselves back.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from mone_edge import calibration, cli, convert, merging, novices, prune
from mone_edge.checkpoint import prune_checkpoint
from mone_edge.collect.experts import experts_modules
from mone_edge.collect.loading import load_model
from mone_edge.collect.torch_model import collect
from mone_edge.errors import MoneEdgeError
from mone_edge.gguf_header import read_header
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import MERGING, Recipe
from mone_edge.source import Source, resolve
from mone_edge.stats import ExpertStats
from tests import tiny
from tests.conftest import Calibrated
from tests.test_oracle import VISIBLE, assert_same, llama_logits, torch_logits, write
from tests.test_prune import CHUNKED, GROUPED, HASHED, model

Make = Callable[[str], Calibrated]
PAIRED = tuple((i, i + 4) for i in range(4))  # of 8 experts


def half(stats: ExpertStats, method: str) -> PrunePlan:
    return make_plan(stats, prune_ratio=0.5, method=method)


def logits(model: Any, tokens: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens)).logits


def merged_in_memory(source: Source, plan: PrunePlan) -> Any:
    return novices.apply(load_model(source.path, device="cpu", dtype="float32"), plan, None)


@pytest.mark.usefixtures("built_runtime")
@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("kind", tiny.MODEL_TYPES)
def test_gguf_agrees_with_torch_and_needs_no_patch(
    calibrated: Make, kind: str, method: str, tmp_path: Path
) -> None:
    case = calibrated(kind)
    plan = half(case.stats, method)
    assert any(len(ids) > 1 for groups in plan.groups.values() for ids in groups)
    gguf = write(case.source, plan, case.stats, tmp_path / "m.gguf", tokenizer_pre="gpt-2")
    tokens = case.tokens[:2].reshape(-1)
    merged = torch_logits(case.source, plan, case.stats, tokens)
    assert_same(llama_logits(gguf, tokens), merged)
    whole = torch_logits(case.source, None, case.stats, tokens)
    assert np.abs(merged - whole).max() > VISIBLE * (whole.max() - whole.min())
    header = read_header(gguf)
    assert header.value("{arch}.expert_count") == 4
    assert header.value("{arch}.expert_kept_count") is None
    assert not any("novice" in name or "exps.bias" in name for name in header.tensors)
    for layer, groups in plan.groups.items():
        group_of = header.value(f"mone.expert_group.{layer}")
        assert [[i for i, g in enumerate(group_of) if g == n] for n in range(4)] == [
            sorted(ids) for ids in groups
        ]
        assert header.tensors[f"blk.{layer}.ffn_gate_inp.weight"].shape[0] == 4


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("kind", tiny.MODEL_TYPES)
def test_the_checkpoint_is_an_ordinary_one_and_equals_the_model_in_memory(
    calibrated: Make, kind: str, method: str, tmp_path: Path
) -> None:
    case = calibrated(kind)
    plan = half(case.stats, method)
    made = prune_checkpoint(case.source, plan, None, tmp_path / "p", shard_bytes=100_000)
    assert made.experts_kept == (4, 4)
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert "quantization_config" not in config and "approximate_experts" not in config
    # what is left is transformers' own choice of kernel, which rounds otherwise
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "p", dtype="float32", experts_implementation="eager"
    )
    expected = merged_in_memory(case.source, plan).state_dict()
    got = loaded.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    tokens = case.tokens[:2]
    whole = logits(load_model(case.source.path, device="cpu", dtype="float32"), tokens)
    merged = logits(loaded, tokens)
    assert torch.equal(merged, logits(merged_in_memory(case.source, plan), tokens))
    assert (merged - whole).abs().max() > 0.01
    assert not resolve(str(tmp_path / "p")).is_pruned


def duplicated(folder: Path, kind: str, *, shuffled: bool) -> Path:
    """A checkpoint whose experts 4 to 7 are 0 to 3 again, with their neurons in another order."""
    tiny.make_checkpoint(kind, folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    orders: dict[str, np.ndarray] = {}
    for name in sorted(tensors):
        if match := re.fullmatch(r"(.*\.experts\.)([4-7])(\.(\w+)\.weight)", name):
            values = tensors[f"{match[1]}{int(match[2]) - 4}{match[3]}"]
            down = match[4] in ("down_proj", "w2")
            order = orders.setdefault(match[1] + match[2], rng.permutation(values.shape[down]))
            tensors[name] = np.take(values, order, axis=int(down)) if shuffled else values
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def paired(plan: PrunePlan) -> PrunePlan:
    """Expert i and i + 4 in a group, with uneven weights."""
    layers = plan.num_experts
    document = plan.document() | {
        "kept": dict.fromkeys(layers, (0, 1, 2, 3)),
        "groups": dict.fromkeys(layers, PAIRED),
        "merge_weights": dict.fromkeys(layers, ((0.7, 0.3),) * 4),
    }
    return PrunePlan.parse(document, "test")


@pytest.mark.parametrize("kind", ["olmoe", "mixtral"])
@pytest.mark.parametrize(("method", "shuffled"), [("dek", False), ("m-smoe", True)])
def test_duplicates_merge_to_themselves(
    calibrated: Make, kind: str, method: str, shuffled: bool, tmp_path: Path
) -> None:
    """To the last bit, and in the order of the group's first."""
    source = resolve(str(duplicated(tmp_path / "m", kind, shuffled=shuffled)))
    plan = paired(half(calibrated(kind).stats, method))
    before = load_model(source.path, device="cpu", dtype="float32")
    after = merged_in_memory(source, plan)
    for layer, (_, module) in experts_modules(after).items():
        whole = experts_modules(before)[layer][1]
        for name in ("gate_up_proj", "down_proj"):
            ours, theirs = getattr(module, name), getattr(whole, name)
            assert torch.equal(ours, theirs[:4])
            assert torch.equal(theirs[4:], theirs[:4]) != shuffled


def test_without_alignment_shuffled_duplicates_are_lost(calibrated: Make, tmp_path: Path) -> None:
    """What the alignment of the test above is good for."""
    source = resolve(str(duplicated(tmp_path / "m", "olmoe", shuffled=True)))
    module = experts_modules(
        merged_in_memory(source, paired(half(calibrated("olmoe").stats, "dek")))
    )[0][1]
    whole = experts_modules(load_model(source.path, device="cpu", dtype="float32"))[0][1]
    assert (module.down_proj - whole.down_proj[:4]).abs().max() > 0.1


@pytest.mark.parametrize("method", MERGING)
def test_duplicates_are_found(method: str, tmp_path: Path) -> None:
    """With router rows that are alike too (for m-smoe), from statistics measured on the model."""
    folder = duplicated(tmp_path / "m", "olmoe", shuffled=True)
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("mlp.gate.weight"):
            noise = np.random.default_rng(1).normal(size=values[4:].shape)
            values[4:] = values[:4] + 0.01 * noise.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = resolve(str(folder))
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT, encoding="utf-8")
    tokenizer = calibration.load_tokenizer(source.path)
    batches = calibration.load([str(text)], tokenizer, samples=4, seq_len=64, seed=0)
    stats = collect(source.path, batches, model=source.name, fingerprint=source.fingerprint)
    if method == "m-smoe":  # the dominant ones are those with most tokens: make them 0 to 3
        for layer in stats.layers.values():
            layer.count[:] = np.concatenate([layer.count[:4] + layer.count[4:], np.zeros(4)])
    for groups in half(stats, method).groups.values():
        assert sorted(tuple(sorted(ids)) for ids in groups) == list(PAIRED)


def test_importance_is_of_all_tokens_of_a_group(calibrated: Make) -> None:
    """Against the definition: the sums of the members over the tokens of the members."""
    case = calibrated("qwen3_moe")
    plan = half(case.stats, "hc-smoe")
    recipe = Recipe("m", method="hc-smoe", replacement="merge", tokenizer_pre="gpt-2")
    (job,) = convert.prepare(
        case.source, recipe, {"Q8_0": Path("m.gguf")}, plan=plan, stats=case.stats
    )
    assert job.imatrix is not None
    seen = 0
    for layer, groups in plan.groups.items():
        measured = case.stats.layers[layer]
        for part, sums in (("gate", measured.input_sq_sum), ("down", measured.inner_sq_sum)):
            rows = job.imatrix[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert len(rows) == 4
            for row, ids in zip(rows, map(list, groups), strict=True):
                if tokens := measured.count[ids].sum():
                    np.testing.assert_allclose(row, sums[ids].sum(0) / tokens, rtol=1e-5)
                    seen += len(ids) > 1
    assert seen
    aligned = half(case.stats, "m-smoe")
    rows = np.random.default_rng(0).random((8, 5), np.float32)
    own = merging.importance(rows, aligned, 0, None, inner=True)
    assert np.array_equal(own, rows[list(aligned.kept[0])])


@pytest.mark.usefixtures("built_runtime")
def test_quantised_and_by_command(
    calibrated: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plan`, `convert --plan`, `convert --method` and a recipe make the same file; `inspect` and
    the model card know it."""
    case = calibrated("qwen2_moe")
    plan, stats, folder = tmp_path / "plan.json", str(case.stats_file), str(case.source.path)
    asked = ["--method", "hc-smoe", "--prune-ratio", "0.5"]
    assert cli.run(["plan", stats, *asked, "-o", str(plan)]) == 0
    assert "50.0% of the experts are merged into others" in capsys.readouterr().out
    made = PrunePlan.load(plan)
    assert made.replacement == "merge" and made == PrunePlan.load(plan)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: hc-smoe\nprune_ratio: 0.5\n")
    base = ["convert", folder, "--stats", stats, "--outtype", "Q4_0", "--tokenizer-pre", "gpt-2"]
    for name, extra in (
        ("a", ["--plan", str(plan)]),
        ("b", asked),
        ("c", ["--recipe", str(recipe)]),
    ):
        assert cli.run([*base, *extra, "-o", str(tmp_path / f"{name}.gguf")]) == 0
    a, b, c = ((tmp_path / f"{name}.gguf").read_bytes() for name in "abc")
    assert a == b == c
    assert "replacement: merge" in (tmp_path / "b.recipe.yaml").read_text()
    card = (tmp_path / "a.md").read_text()
    assert "merged by `hc-smoe`" in card and "runs on any llama.cpp" in card
    capsys.readouterr()
    assert cli.run(["inspect", str(plan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replacement"] == "merge"
    command = ["prune", folder, "--plan", str(plan), "-o", str(tmp_path / "out"), "--json"]
    assert cli.run(command) == 0
    assert json.loads(capsys.readouterr().out)["experts_kept"] == [4, 4]


@pytest.mark.usefixtures("built_runtime")
def test_a_merged_checkpoint_converts_to_the_same_weights(calibrated: Make, tmp_path: Path) -> None:
    case = calibrated("mixtral")
    plan = half(case.stats, "m-smoe")
    direct = write(case.source, plan, case.stats, tmp_path / "a.gguf", tokenizer_pre="gpt-2")
    prune_checkpoint(case.source, plan, None, tmp_path / "p")
    merged = resolve(str(tmp_path / "p"))
    again = write(merged, None, None, tmp_path / "b.gguf", tokenizer_pre="gpt-2")
    one, two = (read_header(path).tensors for path in (direct, again))
    assert one.keys() == two.keys()
    for name, ref in one.items():
        other = two[name]
        assert (ref.shape, ref.dtype) == (other.shape, other.dtype)
        pair = [np.fromfile(r.file, np.uint8, r.size, offset=r.offset) for r in (ref, other)]
        assert np.array_equal(*pair), name


@pytest.mark.parametrize(
    ("unfit", "told"),
    [
        (GROUPED, "deepseek2 cannot be merged: it routes within 2 groups; use --method mone"),
        (HASHED, "deepseek4 cannot be merged: others depend on their order"),
        (CHUNKED, "grovemoe cannot be merged: others depend on their order"),
    ],
)
def test_routers_with_a_meaning_in_their_order_are_refused(unfit: Any, told: str) -> None:
    from tests.test_stats import make_stats

    stats = make_stats()
    plan = half(stats, "dek")
    with pytest.raises(MoneEdgeError, match=told):
        prune.apply_plan(unfit, plan, None)


def test_correction_biases_and_expert_biases_are_merged() -> None:
    from mone_edge.model_file import constant
    from tests.test_stats import make_stats

    plan = half(make_stats(), "dek")
    names = ("exp_probs_b.bias", "ffn_up_exps.bias", "ffn_down_exps.bias", "ffn_gate_inp.weight")
    whole = model("glm4moe", *(f"blk.0.{name}" for name in names))
    rng = np.random.default_rng(0)
    for name, shape in zip(names, [(1, 8), (8, 3), (8, 2), (8, 2)], strict=True):
        whole.tensors[f"blk.0.{name}"] = constant(rng.random(shape, np.float32))
    merged = prune.apply_plan(whole, plan, None)
    for name in names:
        values = whole.tensors[f"blk.0.{name}"].read()
        got = merged.tensors[f"blk.0.{name}"]
        rows = values.reshape(8, -1)
        want = np.array([rows[list(ids)].mean(0) for ids in plan.groups[0]])
        assert got.shape == ((1, 4) if values.shape == (1, 8) else (4, *values.shape[1:]))
        np.testing.assert_allclose(got.read().reshape(4, -1), want, rtol=1e-6)


def test_what_cannot_be_is_refused(
    calibrated: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = calibrated("olmoe")
    folder, stats = str(case.source.path), str(case.stats_file)
    for arguments, told in (
        (["--method", "dek", "--replacement", "mean"], "--method dek merges experts"),
        (["--replacement", "merge"], "needs a method that groups experts (dek, m-smoe, hc-smoe)"),
        (["--method", "dek", "--scope", "model"], "merge with --scope model leaves different"),
        (["--method", "dek", "--protect", "0"], "merge with --protect leaves different"),
        (["--method", "dek", "--prune-ratio", "0.9"], "the router selects top_k=2"),
    ):
        for command in (["plan", stats], ["convert", folder, "--tokenizer-pre", "gpt-2"]):
            assert cli.run([*command, *arguments, "-o", str(tmp_path / "out")]) == 2
            error = capsys.readouterr().err
            assert told in error and len(error.splitlines()) == 1
    with pytest.raises(MoneEdgeError, match="no novices"):
        novices.vectors(half(case.stats, "dek"), case.stats, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("built_runtime")
def test_ggufs_are_not_merged(
    calibrated: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = calibrated("olmoe")
    gguf = write(case.source, None, case.stats, tmp_path / "m.gguf", tokenizer_pre="gpt-2")
    out = str(tmp_path / "out.gguf")
    assert cli.run(["convert", str(gguf), "--method", "hc-smoe", "-o", out]) == 1
    assert "would quantise them a second time; merge those of the checkpoint" in (
        capsys.readouterr().err
    )
    text = tmp_path / "t.txt"
    text.write_text(tiny.TEXT, encoding="utf-8")
    stats = str(tmp_path / "s.safetensors")
    measure = ["stats", str(gguf), "-o", stats, "--data", str(text)]
    assert cli.run([*measure, "--samples", "2", "--seq-len", "32"]) == 0
    for method in MERGING:
        capsys.readouterr()
        assert cli.run(["plan", stats, "--method", method, "-o", str(tmp_path / "p.json")]) == 2
        assert "measure the checkpoint again: mone-edge stats" in capsys.readouterr().err


def test_quantised_checkpoints_are_refused(calibrated: Make, tmp_path: Path) -> None:
    case = calibrated("qwen3_moe")
    plan = half(case.stats, "dek")
    folder = tiny.make_checkpoint("qwen3_moe", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.astype(np.int8) if ".experts." in k else v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = resolve(str(folder))
    document = plan.document() | {"fingerprint": source.fingerprint}
    with pytest.raises(MoneEdgeError, match="is of type I8, and only floats"):
        prune_checkpoint(source, PrunePlan.parse(document, "p"), None, tmp_path / "p")


@pytest.mark.parametrize("method", MERGING)
def test_experts_in_one_tensor(method: str, tmp_path: Path) -> None:
    """granitemoe: merged as they lie, or refused where neurons would have to be put in order."""
    from tests.test_collect import batches

    source = resolve(str(tiny.make_checkpoint("granitemoe", tmp_path / "m", experts=8)))
    stats = collect(source.path, batches(2, 32), fingerprint=source.fingerprint)
    plan = half(stats, method)
    if method == "m-smoe":
        with pytest.raises(MoneEdgeError, match="convert to a GGUF with --plan instead"):
            prune_checkpoint(source, plan, None, tmp_path / "p")
        return
    prune_checkpoint(source, plan, None, tmp_path / "p")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="float32").state_dict()
    expected = merged_in_memory(source, plan).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_grouping_is_imported_late() -> None:
    """scipy takes long to load, and `--help` must not."""
    import subprocess
    import sys

    code = (
        "import sys, mone_edge.commands.options, mone_edge.selection; print('scipy' in sys.modules)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "False"


def test_matching_recovers_a_permutation() -> None:
    rng = np.random.default_rng(2)
    reference = [rng.random((20, 6), np.float32) for _ in range(3)]
    order = rng.permutation(20)
    noisy = [m[order] + 1e-3 * rng.random((20, 6), np.float32) for m in reference]
    assert np.array_equal(merging.match(reference, noisy), np.argsort(order))
