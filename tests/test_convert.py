"""Conversion against llama.cpp's own two steps, and what pruning does to each tensor."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from mone_edge import cli, convert, novices, runtime
from mone_edge import imatrix as imatrices
from mone_edge.checkpoint import prune_checkpoint
from mone_edge.errors import MoneEdgeError
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Recipe
from mone_edge.recipe import load as load_recipe
from mone_edge.source import Source, resolve
from tests import architectures, tiny
from tests.conftest import Calibrated

pytestmark = pytest.mark.usefixtures("built_runtime")
Calibrate = Callable[[str], Calibrated]

LLAMA_CPP_CONVERT = """
import sys
sys.path[:0] = [{tree!r} + "/gguf-py", {tree!r}]
sys.argv = ["convert", {model!r}, "--outfile", {out!r}, "--outtype", {outtype!r}]
import conversion
conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def llama_cpp_convert(source: Source, out: Path, outtype: str) -> Path:
    code = LLAMA_CPP_CONVERT.format(
        tree=str(runtime.source_tree()), model=str(source.path), out=str(out), outtype=outtype
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return out


def llama_quantize(float_file: Path, out: Path, outtype: str, *options: str) -> Path:
    tool = str(runtime.tool("llama-quantize"))
    subprocess.run(
        [tool, *options, str(float_file), str(out), outtype], check=True, capture_output=True
    )
    return out


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape (llama-quantize does not store dimensions of 1) and bytes of each tensor."""
    return {
        t.name: (t.tensor_type.name, [int(n) for n in t.shape if n > 1], t.data.tobytes())
        for t in GGUFReader(path).tensors
    }


def arrays(path: Path) -> dict[str, Any]:
    return {t.name: np.array(t.data) for t in GGUFReader(path).tensors}


def run(source: Source, path: Path, outtype: str, **options: Any) -> Path:
    plan, stats = options.pop("plan", None), options.pop("stats", None)
    recipe = Recipe(model=source.name, tokenizer_pre="gpt-2", **options)
    jobs = convert.prepare(source, recipe, {outtype: path}, plan=plan, stats=stats)
    return convert.write(jobs, recipe)[0].outfile


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
@pytest.mark.parametrize("outtype", ["F32", "F16", "BF16"])
def test_unpruned_float_file_is_llama_cpps_own(
    model_type: str, outtype: str, calibrated: Calibrate, tmp_path: Path
) -> None:
    source = calibrated(model_type).source
    theirs = llama_cpp_convert(source, tmp_path / "theirs.gguf", outtype.lower())
    ours = run(source, tmp_path / "ours.gguf", outtype)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture(scope="session")
def k_quantable(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Widths of 256 in the experts only: k-quants there, fall-backs elsewhere."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return resolve(
        str(tiny.make_checkpoint("qwen3_moe", folder, hidden=64, inner=256, dtype="bfloat16"))
    )


@pytest.mark.parametrize("outtype", ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "IQ4_NL"])
def test_unpruned_quantised_tensors_are_llama_quantizes(
    outtype: str, k_quantable: Source, tmp_path: Path
) -> None:
    floats = llama_cpp_convert(k_quantable, tmp_path / "f.gguf", "f32")
    theirs = llama_quantize(floats, tmp_path / "theirs.gguf", outtype)
    ours = run(k_quantable, tmp_path / "ours.gguf", outtype)
    assert tensors(ours) == tensors(theirs)


def test_tensor_type_overrides_are_llama_quantizes(k_quantable: Source, tmp_path: Path) -> None:
    floats = llama_cpp_convert(k_quantable, tmp_path / "f.gguf", "f32")
    override = "ffn_down_exps=q8_0"
    theirs = llama_quantize(floats, tmp_path / "t.gguf", "Q4_K_M", "--tensor-type", override)
    ours = run(k_quantable, tmp_path / "ours.gguf", "Q4_K_M", tensor_type=(override,))
    assert tensors(ours) == tensors(theirs)
    assert tensors(ours)["blk.0.ffn_down_exps.weight"][0] == "Q8_0"


def test_our_importance_matrix_quantises_as_llama_quantize_does_with_it(
    calibrated: Calibrate, tmp_path: Path
) -> None:
    model = calibrated("qwen2_moe")
    floats = llama_cpp_convert(model.source, tmp_path / "f.gguf", "f32")
    whole = model.source.open(tokenizer_pre="gpt-2")
    imatrix = imatrices.imatrix_from_stats(whole, model.stats)
    file = tmp_path / "imatrix.gguf"
    imatrices.write_imatrix(imatrix, file)
    theirs = llama_quantize(floats, tmp_path / "t.gguf", "Q4_0", "--imatrix", str(file))
    ours = run(model.source, tmp_path / "ours.gguf", "Q4_0", stats=model.stats)
    again = run(model.source, tmp_path / "again.gguf", "Q4_0", imatrix=str(file))
    plain = run(model.source, tmp_path / "plain.gguf", "Q4_0")
    assert tensors(ours) == tensors(theirs) == tensors(again)
    assert tensors(ours) != tensors(plain)
    expected = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps",
                "ffn_down_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}  # fmt: skip
    assert {f"blk.1.{name}.weight" for name in expected} <= imatrix.keys()


@pytest.mark.parametrize("kept", [(3,), (1, 6)])
def test_kept_experts_are_quantised_with_their_own_importance(
    kept: tuple[int, ...], calibrated: Calibrate, tmp_path: Path
) -> None:
    model = calibrated("olmoe")
    plan = make_plan(model.stats, prune_ratio=0.5)
    plan = replace(plan, kept={**plan.kept, 1: kept})
    whole = arrays(run(model.source, tmp_path / "whole.gguf", "Q4_0", stats=model.stats))
    pruned = run(model.source, tmp_path / "p.gguf", "Q4_0", plan=plan, stats=model.stats)
    for part in ("gate", "up", "down"):
        name = f"blk.1.ffn_{part}_exps.weight"
        np.testing.assert_array_equal(arrays(pruned)[name], whole[name][list(kept)])


@pytest.mark.parametrize("outtype", ["F32", "Q8_0"])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_pruned_tensors_are_slices_of_the_unpruned_ones(
    model_type: str, outtype: str, calibrated: Calibrate, tmp_path: Path
) -> None:
    model = calibrated(model_type)
    plan = make_plan(model.stats, prune_ratio=0.5, scope="model")
    whole = arrays(run(model.source, tmp_path / "whole.gguf", outtype, imatrix="none"))
    pruned_file = run(
        model.source, tmp_path / "p.gguf", outtype, imatrix="none", plan=plan, stats=model.stats
    )
    pruned = arrays(pruned_file)
    biases = {f"blk.{layer}.ffn_down_exps.bias" for layer in plan.kept if plan.pruned(layer)}
    assert pruned.keys() == whole.keys() | biases
    for name, tensor in whole.items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        if "_exps.weight" in name:
            tensor = tensor[list(plan.kept[layer])]
        elif "ffn_gate_inp.weight" in name:
            tensor = tensor[list(plan.order(layer))]
        assert np.array_equal(pruned[name], tensor), name
    for layer in plan.kept:
        if plan.pruned(layer):
            stored = pruned[f"blk.{layer}.ffn_down_exps.bias"]
            assert np.array_equal(stored, novices.vectors(plan, model.stats, layer))


def test_metadata_of_a_pruned_file(calibrated: Calibrate, tmp_path: Path) -> None:
    model = calibrated("olmoe")
    plan = make_plan(model.stats, prune_ratio=0.25, stats_sha256="ab")
    file = run(model.source, tmp_path / "p.gguf", "Q4_0", plan=plan, stats=model.stats)
    fields = {k: f.contents() for k, f in GGUFReader(file).fields.items()}
    assert fields["olmoe.expert_count"] == 8
    assert fields["olmoe.expert_kept_count"] == [6, 6]
    assert fields["mone.version"] == 1
    assert fields["mone.expert_order.1"] == list(plan.order(1))
    assert fields["mone.method"] == "joint"
    assert fields["mone.stats.sha256"] == "ab"
    assert fields["general.file_type"] == 2
    assert "prune_ratio: 0.25" in fields["mone.recipe"]
    assert (tmp_path / "p.recipe.yaml").read_text() == fields["mone.recipe"]
    assert "25.0% of its routed experts" in (tmp_path / "p.md").read_text()


@pytest.mark.parametrize("given", ["stats", "plan"])
def test_the_command_on_the_card_makes_the_same_file(
    given: str, calibrated: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    options = ["--stats", str(model.stats_file), "--prune-ratio", "0.5"]
    if given == "plan":
        assert cli.run(["plan", *options[1:], "--scope", "model", "-o", "p.json"]) == 0
        options = ["--plan", "p.json"]
    Path("out dir").mkdir()
    types = ["--outtype", "Q8_0", "--outtype", "F16", "-o", "out dir/x {ftype}.gguf"]
    name = str(model.source.path)
    assert cli.run(["convert", name, *options, *types, "--tokenizer-pre", "gpt-2"]) == 0
    for outtype in ("Q8_0", "F16"):
        made = Path(f"out dir/x {outtype}.gguf").read_bytes()
        card = Path(f"out dir/x {outtype}.md").read_text(encoding="utf-8")
        (command,) = (line for line in card.splitlines() if line.startswith("mone-edge convert"))
        assert cli.run([*shlex.split(command)[1:], "--force"]) == 0
        assert Path(f"out dir/x {outtype}.gguf").read_bytes() == made


@pytest.mark.parametrize(
    ("outtype", "told"), [("Q4_0", "for the importance matrix"), ("F16", "none needed")]
)
def test_the_card_of_an_unpruned_file_tells_what_statistics_were_for(
    outtype: str, told: str, calibrated: Calibrate, tmp_path: Path
) -> None:
    model = calibrated("olmoe")
    run(model.source, tmp_path / "m.gguf", outtype, stats=model.stats)
    assert f"Statistics: {told}." in (tmp_path / "m.md").read_text(encoding="utf-8")


def test_the_recipe_names_the_text_that_the_statistics_read(
    calibrated: Calibrate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    base = ["convert", str(model.source.path), "--stats", str(model.stats_file)]
    base += ["--outtype", "F16", "--tokenizer-pre", "gpt-2", "-o"]
    text = str(model.stats_file.with_name("text.txt"))
    assert cli.run([*base, "a.gguf"]) == 0
    read = {"data": [text], "samples": 10, "seq_len": 64, "seed": 0}
    assert load_recipe(Path("a.recipe.yaml"))["calibration"] == read
    Path("r.yaml").write_text("calibration: {samples: 5, seq_len: 32, seed: null}")
    capsys.readouterr()
    assert cli.run([*base, "b.gguf", "--recipe", "r.yaml", "--samples", "6", "--seed", "7"]) == 0
    unused = "warning: --samples is what the statistics say; what is given is unused"
    assert unused in capsys.readouterr().err
    assert load_recipe(Path("b.recipe.yaml"))["calibration"] == {**read, "seed": 7}
    merged = ["merge-stats", str(model.stats_file), str(model.stats_file), "-o", "both.st"]
    assert cli.run([*merged, "--force"]) == 0
    base[3] = "both.st"
    assert cli.run([*base, "c.gguf"]) == 0
    found = load_recipe(Path("c.recipe.yaml"))["calibration"]
    assert (found["data"], found["samples"]) == ([text], 20)


def test_another_method_than_the_recipes_has_its_own_replacement(
    calibrated: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("method: joint\nreplacement: gate2-mean\nprune_ratio: 0.5\n")
    base = ["convert", str(model.source.path), "--stats", str(model.stats_file), "--outtype", "F16"]
    base += ["--tokenizer-pre", "gpt-2", "--recipe", "r.yaml"]
    for method, replacement in (("joint", "gate2-mean"), ("mone", "mean"), ("hc-smoe", "merge")):
        outfile = f"{method}.gguf"
        assert cli.run([*base, "--method", method, "-o", outfile]) == 0
        assert load_recipe(Path(f"{method}.recipe.yaml"))["replacement"] == replacement


def test_a_checkpoint_with_fewer_experts_converts_as_it_is(
    calibrated: Calibrate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    plan = make_plan(model.stats, prune_ratio=0.25, method="hc-smoe", replacement="merge")
    prune_checkpoint(model.source, plan, model.stats, Path("cut"))
    command = ["convert", "cut", "--tokenizer-pre", "gpt-2", "--outtype", "F32", "-o", "cut.gguf"]
    assert cli.run(command) == 0
    told = "cut is pruned already: 6 of 8 experts a layer are left, by hc-smoe; --prune-ratio"
    assert f"{told} removes more" in capsys.readouterr().err
    assert len(arrays(Path("cut.gguf"))["blk.0.ffn_down_exps.weight"]) == 6
    assert cli.run([*command, "--prune-ratio", "0.5", "--dry-run", "--force"]) == 0
    assert f"warning: {told} is of those" in capsys.readouterr().err


def test_a_recipe_may_say_one_value_where_a_list_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "prune_ratio: 1e-1\nouttype: Q8_0\ntensor_type: attn=Q8_0\nprotect: 0\n"
        "calibration: {data: a.txt}\n"
    )
    assert load_recipe(file) == {
        "prune_ratio": 0.1, "outtype": ["Q8_0"], "tensor_type": ["attn=Q8_0"], "protect": [0],
        "calibration": {"data": ["a.txt"]},
    }  # fmt: skip
    file.write_text("protect: 0,2-4")
    assert load_recipe(file) == {"protect": "0,2-4"}


@pytest.mark.parametrize("protect", ["-2", "1", "1-1"])
def test_convert_protects_the_layers_that_plan_does(
    protect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four blocks, of which the second and the last have experts."""
    monkeypatch.chdir(tmp_path)
    architectures.make("jamba", Path("jamba"))
    Path("text.txt").write_text(tiny.TEXT * 2)
    text = ["--data", "text.txt", "--samples", "4", "--seq-len", "64"]
    half = ["--prune-ratio", "0.5", f"--protect={protect}"]
    assert cli.run(["stats", "jamba", "-o", "s.st", *text]) == 0
    assert cli.run(["plan", "s.st", *half, "-o", "p.json"]) == 0
    assert {i: len(ids) for i, ids in PrunePlan.load(Path("p.json")).kept.items()} == {1: 8, 3: 4}
    one_go = ["convert", "jamba", *half, "--stats", "s.st", "--tokenizer-pre", "gpt-2"]
    assert cli.run([*one_go, "--outtype", "F32", "-o", "one.gguf"]) == 0
    made = arrays(Path("one.gguf"))
    assert [len(made[f"blk.{i}.ffn_down_exps.weight"]) for i in (1, 3)] == [8, 4]


def test_a_pruned_expert_is_never_read(calibrated: Calibrate, tmp_path: Path) -> None:
    model = calibrated("olmoe")
    plan = make_plan(model.stats, prune_ratio=0.5)
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for file in model.source.path.iterdir():
        (spoiled / file.name).write_bytes(file.read_bytes())
    gone = plan.pruned(0)[0]
    ref = model.source.tensors[f"model.layers.0.mlp.experts.{gone}.up_proj.weight"]
    with (spoiled / ref.file.name).open("r+b") as handle:
        handle.seek(ref.offset + 1000)
        handle.write(b"\xff" * 400)  # not a number; the fingerprint's bytes stay as they are
    source = resolve(str(spoiled))
    good = run(model.source, tmp_path / "a.gguf", "Q8_0", plan=plan, stats=model.stats)
    ours = run(source, tmp_path / "b.gguf", "Q8_0", plan=plan, stats=model.stats)
    assert tensors(ours) == tensors(good)
    with pytest.raises(MoneEdgeError, match=r"blk\.0\.ffn_up_exps\.weight holds values"):
        run(source, tmp_path / "c.gguf", "Q8_0")
    assert sorted(p.name for p in tmp_path.glob("c*")) == []


def test_several_types_from_one_read_equal_separate_runs(
    calibrated: Calibrate, tmp_path: Path
) -> None:
    source = calibrated("mixtral").source
    recipe = Recipe(model=source.name, tokenizer_pre="gpt-2", outtype=("Q8_0", "F16"))
    outfiles = {"Q8_0": tmp_path / "q8" / "m.gguf", "F16": tmp_path / "f16" / "m.gguf"}
    both = convert.write(convert.prepare(source, recipe, outfiles), recipe)
    for made in both:
        alone = run(source, tmp_path / "alone.gguf", made.outtype)
        assert made.outfile.read_bytes() == alone.read_bytes()
        assert made.bytes == made.outfile.stat().st_size


def test_split_files_hold_the_same_tensors(calibrated: Calibrate, tmp_path: Path) -> None:
    source = calibrated("olmoe").source
    recipe = Recipe(model=source.name, tokenizer_pre="gpt-2")
    jobs = convert.prepare(source, recipe, {"F16": tmp_path / "m.gguf"})
    made = convert.write(jobs, recipe, split_max_bytes=150_000)[0]
    assert [f.name for f in made.files] == [
        f"m-{i:05}-of-{len(made.files):05}.gguf" for i in range(1, len(made.files) + 1)
    ]
    assert len(made.files) > 1
    beside = {path.name for path in tmp_path.iterdir()} - {f.name for f in made.files}
    assert beside == {"m.md", "m.recipe.yaml"}
    card = made.card.read_text(encoding="utf-8")
    told = shlex.join(["--split-max-size", "150000", "-o", str(tmp_path / "m.gguf")])
    assert f"{shlex.quote(str(tmp_path / 'm.recipe.yaml'))} {told}" in card
    parts = {k: v for file in made.files for k, v in tensors(file).items()}
    assert parts == tensors(run(source, tmp_path / "one.gguf", "F16"))


def test_what_comes_into_being_meanwhile_is_left_alone(
    calibrated: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = calibrated("olmoe").source
    recipe = Recipe(model=source.name, tokenizer_pre="gpt-2")
    jobs = convert.prepare(source, recipe, {"F16": tmp_path / "m.bin"})
    write_beside = convert._write_beside

    def slowly(*arguments: Any) -> None:
        (tmp_path / "m.md").write_text("mine")
        write_beside(*arguments)

    monkeypatch.setattr(convert, "_write_beside", slowly)
    with pytest.raises(MoneEdgeError, match=r"m.md has come into being meanwhile"):
        convert.write(jobs, recipe, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m.md"]
    monkeypatch.undo()
    made = convert.write(jobs, recipe, split_max_bytes=150_000, force=True)[0]
    assert made.card.read_text(encoding="utf-8") != "mine"
    for path in (made.card, *made.files):
        path.unlink()
    assert convert.write(jobs, recipe, force=False)  # beside its own recipe
    assert len(made.files) > 1


def test_unknown_pre_tokenizer_is_refused_before_any_work(
    calibrated: Calibrate, tmp_path: Path
) -> None:
    source = calibrated("olmoe").source
    for pre, message in (("", "--tokenizer-pre gpt-2"), ("gpt-3", "no pre-tokenizer gpt-3")):
        recipe = Recipe(model=source.name, tokenizer_pre=pre)
        with pytest.raises(MoneEdgeError, match=message):
            convert.prepare(source, recipe, {"F16": tmp_path / "m.gguf"})


def test_statistics_and_plans_of_another_model_are_refused(
    calibrated: Calibrate, tmp_path: Path
) -> None:
    olmoe, mixtral = calibrated("olmoe"), calibrated("mixtral")
    plan = make_plan(mixtral.stats, prune_ratio=0.5)
    with pytest.raises(MoneEdgeError, match="the plan is of .* not of"):
        run(olmoe.source, tmp_path / "m.gguf", "F16", plan=plan, stats=olmoe.stats)
    with pytest.raises(MoneEdgeError, match="the statistics are of"):
        run(olmoe.source, tmp_path / "m.gguf", "F16", stats=mixtral.stats)


def test_a_full_disk_is_refused_before_writing(
    calibrated: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = calibrated("olmoe").source
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(MoneEdgeError, match=r"0\.00 GB free, the result needs"):
        run(source, tmp_path / "m.gguf", "F16")
    assert list(tmp_path.iterdir()) == []
