"""A GGUF as input: what is kept bit for bit, what equals the checkpoint's road, what is refused."""

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mone_edge import convert, pipeline, quantize
from mone_edge import imatrix as imatrices
from mone_edge.calibration import Batches
from mone_edge.cli import run
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.gguf_file import GgufSource
from mone_edge.inspection import inspect
from mone_edge.llama import GgufModel
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Calibration, Recipe
from mone_edge.source import Checkpoint, Source, resolve
from mone_edge.stats import ExpertStats
from tests import tiny
from tests.conftest import Calibrated
from tests.test_convert import llama_quantize, tensors

pytestmark = pytest.mark.usefixtures("built_runtime")
Calibrate = Callable[[str], Calibrated]


def write(
    source: Source,
    path: Path,
    outtype: str = "keep",
    plan: PrunePlan | None = None,
    stats: ExpertStats | None = None,
    split: int = 0,
    **options: Any,
) -> Path:
    pre = "" if source.keeps_types else "gpt-2"
    recipe = Recipe(model=source.name, imatrix="none", tokenizer_pre=pre, **options)
    jobs = convert.prepare(source, recipe, {outtype: path}, plan=plan, stats=stats)
    return convert.write(jobs, recipe, split_max_bytes=split)[0].outfile


def of_model(source: Source, stats: ExpertStats) -> ExpertStats:
    """The same numbers, as if measured on another file of the model."""
    provenance = dataclasses.replace(stats.provenance, fingerprint=source.fingerprint)
    return dataclasses.replace(stats, provenance=provenance)


@pytest.mark.parametrize("replacement", ["mean", "zero", "drop"])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_pruning_the_gguf_is_pruning_the_checkpoint(
    model_type: str, replacement: str, calibrated: Calibrate, tmp_path: Path
) -> None:
    model = calibrated(model_type)
    scope = "layer" if replacement == "drop" else "model"
    plan = make_plan(model.stats, prune_ratio=0.5, scope=scope, replacement=replacement)
    theirs = write(model.source, tmp_path / "a.gguf", "F32", plan, model.stats)
    source = resolve(str(write(model.source, tmp_path / "whole.gguf", "F32")))
    stats = of_model(source, model.stats)
    same = dataclasses.replace(plan, fingerprint=source.fingerprint)
    ours = write(source, tmp_path / "b.gguf", "keep", same, stats)
    assert tensors(ours) == tensors(theirs)
    mine, other = (gguf.GGUFReader(path).fields for path in (ours, theirs))
    assert mine.keys() == other.keys()
    differ = {k for k in mine if mine[k].contents() != other[k].contents()}
    assert differ <= {"mone.recipe", "mone.base_fingerprint", "general.name"}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """llama-quantize's files of a small model with k-quants in its experts."""
    folder = tmp_path_factory.mktemp("quantised")
    checkpoint = resolve(
        str(tiny.make_checkpoint("qwen3_moe", folder / "tiny", hidden=256, inner=256, layers=3))
    )
    floats = write(checkpoint, folder / "tiny-F32.gguf", "F32")

    def make(outtype: str) -> Path:
        path = folder / f"tiny-{outtype}.gguf"
        return path if path.exists() else llama_quantize(floats, path, outtype)

    return make


def random_plan(source: Source, replacement: str = "mean") -> tuple[PrunePlan, ExpertStats]:
    """Any experts, and novices that are not zero."""
    shape = pipeline._shape_of_stats(source, source.open())
    rng = np.random.default_rng(0)
    layers = {
        i: dataclasses.replace(s, output_mean=rng.normal(size=s.output_mean.shape))
        for i, s in shape.layers.items()
    }
    stats = dataclasses.replace(shape, layers=layers)
    plan = make_plan(stats, prune_ratio=0.5, method="random", replacement=replacement)
    first = min(plan.kept)
    uneven = {**plan.kept, first: (2, 5, 6)} if replacement != "drop" else plan.kept
    return dataclasses.replace(plan, kept=uneven), stats


@pytest.mark.parametrize("outtype", ["Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "IQ4_NL", "F16", "BF16"])
def test_kept_experts_are_the_inputs_blocks(
    outtype: str, quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    source = resolve(str(quantised(outtype)))
    plan, stats = random_plan(source)
    before = source.path.read_bytes()
    whole, pruned = (
        {t.name: t for t in gguf.GGUFReader(path).tensors}
        for path in (source.path, write(source, tmp_path / "p.gguf", "keep", plan, stats))
    )
    biases = {f"blk.{layer}.ffn_down_exps.bias" for layer in plan.kept}
    assert pruned.keys() == whole.keys() | biases
    for name, tensor in whole.items():
        assert pruned[name].tensor_type == tensor.tensor_type
        data, layer = tensor.data, int(name.split(".")[1]) if name.startswith("blk.") else -1
        if "_exps.weight" in name:
            data = data[list(plan.kept[layer])]
        elif "ffn_gate_inp" in name:
            data = data[list(plan.order(layer))]
        assert np.array_equal(pruned[name].data, data), name
    assert source.path.read_bytes() == before


@pytest.mark.parametrize("outtype", ["F32", "Q4_K_M"])
def test_unpruned_the_file_is_copied_byte_for_byte(
    outtype: str, quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    source = resolve(str(quantised(outtype)))
    assert write(source, tmp_path / "copy.gguf").read_bytes() == source.path.read_bytes()


def zeroed(path: Path, out: Path, plan: PrunePlan, stats: ExpertStats) -> Path:
    """All experts of a GGUF, in the plan's order; those that it removes are constants instead.

    In the router's own order its softmax would add up in another one than the pruned file's.
    """
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, arch)
    for key, entry in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kinds = entry.types
            sub = kinds[1] if len(kinds) > 1 else None
            writer.add_key_value(key, entry.contents(), kinds[0], sub)
    for tensor in reader.tensors:
        data, layer = tensor.data, int(tensor.name.split(".")[1]) if "blk." in tensor.name else -1
        if "_exps.weight" in tensor.name or "ffn_gate_inp" in tensor.name:
            data = np.array(data[list(plan.order(layer))])
        if "ffn_down_exps" in tensor.name:
            kept = len(plan.kept[layer])
            data[kept:] = 0
            bias = np.zeros_like(stats.layers[layer].output_mean, dtype=np.float32)
            bias[kept:] = stats.layers[layer].output_mean[list(plan.pruned(layer))]
            writer.add_tensor(f"blk.{layer}.ffn_down_exps.bias", bias)
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def logits(path: Path, tokens: list[int]) -> np.ndarray:
    with GgufModel(path, exact=True, threads=1) as model:
        return np.asarray(model.logits(tokens))


@pytest.mark.parametrize("outtype", ["F32", "Q8_0", "Q4_0", "Q4_K_M"])
def test_logits_are_those_of_the_input_with_constants_for_the_pruned(
    outtype: str, quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    """An all-zero block is zero in each of these types; routing has no ties, so the same
    experts run, added in the same order."""
    source = resolve(str(quantised(outtype)))
    plan, stats = random_plan(source)
    pruned = write(source, tmp_path / "p.gguf", "keep", plan, stats)
    oracle = zeroed(source.path, tmp_path / "z.gguf", plan, stats)
    tokens = np.random.default_rng(1).integers(2, tiny.VOCAB, 96).tolist()
    ours, theirs = logits(pruned, tokens), logits(oracle, tokens)
    assert np.array_equal(ours, theirs)
    assert np.abs(ours - logits(source.path, tokens)).max() > 0.1


def test_split_files_in_and_out(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    source = resolve(str(quantised("Q4_K_M")))
    first = write(source, tmp_path / "m.gguf", split=200_000)
    assert first.name.startswith("m-00001-of-")
    split = resolve(str(first))
    assert split.label == "m"
    assert (split.fingerprint, split.size) == (source.fingerprint, source.size)
    whole, parted = (inspect(str(s.path)) for s in (source, split))
    assert {parted[k] for k in ("parameters", "tensors")} == {whole["parameters"], whole["tensors"]}
    assert parted["bytes"] > whole["bytes"] > first.stat().st_size
    plan, stats = random_plan(source)
    one, other = (write(s, tmp_path / f"{s.label}.out.gguf", "keep", plan, stats)
                  for s in (source, split))  # fmt: skip
    assert tensors(one) == tensors(other)
    second = first.with_name(first.name.replace("00001-of", "00002-of"))
    with pytest.raises(MoneEdgeError, match=f"is part 00002 of .*; name {first.name}"):
        resolve(str(second))
    second.unlink()
    with pytest.raises(MoneEdgeError, match=f"lacks 1 of .* parts, first {second.name}"):
        resolve(str(first))


@pytest.mark.parametrize("outtype", ["Q8_0", "Q4_0", "F16"])
def test_requantising_is_llama_quantizes(
    outtype: str, quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    source = resolve(str(quantised("Q4_K_M")))
    theirs = llama_quantize(source.path, tmp_path / "t.gguf", outtype, "--allow-requantize")
    ours = write(source, tmp_path / "o.gguf", outtype)
    assert tensors(ours) == tensors(theirs)
    fields = [gguf.GGUFReader(path).fields["general.file_type"] for path in (ours, theirs)]
    assert fields[0].contents() == fields[1].contents()


def test_damaged_weights_are_not_quantised(calibrated: Calibrate, tmp_path: Path) -> None:
    half = resolve(str(write(calibrated("olmoe").source, tmp_path / "half.gguf", "F16")))
    ref = half.tensors["blk.1.ffn_down_exps.weight"]
    with ref.file.open("r+b") as file:
        file.seek(ref.offset + 1000)
        file.write(np.array([np.nan], np.float16).tobytes())
    with pytest.raises(MoneEdgeError, match=r"blk\.1\.ffn_down_exps\.weight holds values that are"):
        write(half, tmp_path / "out.gguf", "Q8_0")


def test_cached_statistics_are_of_the_same_routing_and_tokens(
    quantised: Callable[[str], Path], calibrated: Calibrate
) -> None:
    checkpoint, file = calibrated("olmoe").source, resolve(str(quantised("Q8_0")))
    assert isinstance(checkpoint, Checkpoint)
    assert isinstance(file, GgufSource)
    other = dataclasses.replace(checkpoint, config={**checkpoint.config, "norm_topk_prob": True})
    header = file.parts[0]
    key = next(name for name in header.metadata if name.endswith(".expert_used_count"))
    entry = dataclasses.replace(header.metadata[key], value=6)
    changed = dataclasses.replace(header, metadata=header.metadata | {key: entry})
    for one, two in (
        (checkpoint, other),
        (file, dataclasses.replace(file, parts=(changed, *file.parts[1:]))),
    ):
        assert one.fingerprint == two.fingerprint
        places = [pipeline.cached_stats(source, Calibration()) for source in (one, one, two)]
        assert places[0] == places[1] != places[2]


def test_the_input_is_never_the_output(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    whole = resolve(str(quantised("Q8_0")))
    with pytest.raises(MoneEdgeError, match="is the input itself"):
        write(whole, whole.path)
    link = tmp_path / "link.gguf"
    link.symlink_to(whole.path)
    with pytest.raises(MoneEdgeError, match="is the input itself"):
        write(whole, link)
    split = resolve(str(write(whole, tmp_path / "m.gguf", split=300_000)))
    with pytest.raises(MoneEdgeError, match="is the input itself"):
        write(split, tmp_path / "m.gguf", split=200_000)


def test_a_pruned_gguf_is_refused(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    source = resolve(str(quantised("Q8_0")))
    for replacement in ("mean", "drop"):
        plan, stats = random_plan(source, replacement)
        pruned = write(source, tmp_path / f"{replacement}.gguf", "keep", plan, stats)
        share = f"{plan.removed_fraction:.1%}"
        with pytest.raises(MoneEdgeError, match=rf"is pruned already \({share} of its experts\)"):
            resolve(str(pruned))


def test_options_for_checkpoints_are_refused(quantised: Callable[[str], Path]) -> None:
    source = resolve(str(quantised("Q8_0")))
    with pytest.raises(UsageError, match="--tokenizer-pre is for checkpoints"):
        source.open(tokenizer_pre="gpt-2")
    with pytest.raises(UsageError, match="changes types"):
        quantize.tensor_types(source.open(), "keep", overrides=("ffn=q4_0",))


def put(path: Path, source: Path, position: int, data: bytes) -> Path:
    content = bytearray(source.read_bytes())
    content[position : position + len(data)] = data
    path.write_bytes(content)
    return path


def test_damaged_files_give_one_clear_line(
    quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = quantised("Q8_0")
    huge, bad = struct.pack("<Q", 1 << 62), tmp_path / "bad.gguf"
    cases = {
        "neither a GGUF": lambda: bad.write_bytes(b"nothing"),
        "version 50331648": lambda: put(bad, whole, 4, struct.pack(">I", 3)),
        "asks for .* bytes": lambda: put(bad, whole, 8, huge),
        "truncated\\?": lambda: put(bad, whole, 16, huge),
        "is truncated": lambda: bad.write_bytes(whole.read_bytes()[:-1000]),
        "damaged GGUF": lambda: bad.write_bytes(whole.read_bytes()[:3000]),
        "has type 99": lambda: put(
            bad, whole, 24 + 8 + len("general.architecture"), struct.pack("<I", 99)
        ),
    }
    for message, make in cases.items():
        make()
        with pytest.raises(MoneEdgeError, match=message) as caught:
            resolve(str(bad))
        assert "\n" not in str(caught.value)


def test_every_truncation_and_flip_is_a_clear_line_or_fine(
    quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = quantised("Q8_0").read_bytes()
    bad, rng = tmp_path / "bad.gguf", np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        content[int(rng.integers(4, 6000))] ^= 1 << int(rng.integers(8))
        bad.write_bytes(content[: int(rng.integers(10, len(content)))])
        with pytest.raises(MoneEdgeError):
            resolve(str(bad))


def test_a_gguf_without_experts_is_dense(tmp_path: Path) -> None:
    path = tmp_path / "d.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(MoneEdgeError, match=r"\(llama\) is a dense model"):
        resolve(str(path))


def test_stacks_must_hold_all_experts(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    whole = quantised("Q8_0")
    key = b"qwen3moe.expert_count"
    position = whole.read_bytes().index(key) + len(key) + 4
    bad = put(tmp_path / "bad.gguf", whole, position, struct.pack("<I", 9))
    with pytest.raises(MoneEdgeError, match="is for 8 experts, qwen3moe.expert_count says 9"):
        resolve(str(bad))


def test_imatrix_of_the_statistics_guides_requantising(
    quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    source = resolve(str(quantised("Q8_0")))
    tokens = np.random.default_rng(0).integers(2, tiny.VOCAB, (2, 64))
    batches = Batches(tokens, ("random",), "", 0, *tokens.shape, tokens.size)
    stats = source.collect(batches)
    imatrix = tmp_path / "imatrix.gguf"
    imatrices.write_imatrix(imatrices.imatrix_from_stats(source.open(), stats), imatrix)
    options = ["--allow-requantize", "--imatrix", str(imatrix)]
    theirs = llama_quantize(source.path, tmp_path / "t.gguf", "Q4_0", *options)
    recipe = Recipe(source.name, imatrix="auto")
    jobs = convert.prepare(source, recipe, {"Q4_0": tmp_path / "o.gguf"}, stats=stats)
    assert tensors(convert.write(jobs, recipe)[0].outfile) == tensors(theirs)
    assert tensors(theirs) != tensors(write(source, tmp_path / "plain.gguf", "Q4_0"))


def test_prune_command(
    quantised: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = resolve(str(quantised("Q4_K_M")))
    plan, stats = random_plan(source)
    stats.save(tmp_path / "stats.safetensors")
    plan.save(tmp_path / "plan.json")
    common = ["--plan", str(tmp_path / "plan.json"), "--stats", str(tmp_path / "stats.safetensors")]
    out = tmp_path / "out.gguf"
    assert run(["prune", str(source.path), *common, "-o", str(out)]) == 0
    assert run(["convert", str(source.path), *common, "-o", str(tmp_path / "c.gguf")]) == 0
    assert tensors(out) == tensors(tmp_path / "c.gguf")
    assert run(["prune", str(source.path), *common, "-o", str(source.path), "--force"]) == 1
    assert "is an input of this command" in capsys.readouterr().err
    arguments = ["convert", str(source.path), *common, "--outtype", "Q4_0"]
    assert run([*arguments, "-o", str(tmp_path / "{ftype}.gguf"), "--dry-run"]) == 0
    assert "a second time" in capsys.readouterr().err
