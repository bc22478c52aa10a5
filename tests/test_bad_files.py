"""Damaged and hostile files: one clear line, no crash, nothing run, nothing left."""

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mone_edge.cli import run
from tests import tiny
from tests.bad_input import copy_of, edit_json, refused
from tests.conftest import Calibrated

Refused = Callable[..., None]
CONVERT = ("convert", "model", "--tokenizer-pre", "gpt-2", "--outtype", "Q8_0", "-o", "o.gguf")
NORM = "model.layers.0.input_layernorm.weight"
EXPERT = "model.layers.0.mlp.experts.0.down_proj.weight"


@pytest.fixture(name="workspace")
def make_workspace(
    calibrated: Callable[[str], Calibrated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder to stand in, with a model to spoil, its statistics and plan, and a text."""
    made = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    copy_of(made.source.path, tmp_path)
    shutil.copy(made.stats_file, tmp_path / "s.safetensors")
    assert run(["plan", "s.safetensors", "-o", "p.json", "-q"]) == 0
    (tmp_path / "text.txt").write_text(tiny.TEXT * 2, encoding="utf-8")
    return tmp_path


@pytest.fixture(name="refuses")
def make_refuses(workspace: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    def check(*arguments: Any, told: str, code: int = 1) -> None:
        refused(capfd, workspace, list(arguments), code, told)

    return check


@pytest.fixture(scope="module", name="gguf")
def make_gguf(
    calibrated: Callable[[str], Calibrated],
    tmp_path_factory: pytest.TempPathFactory,
    built_runtime: object,
) -> bytes:
    """A pruned GGUF."""
    made = calibrated("olmoe")
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    options = ["--stats", str(made.stats_file), "--tokenizer-pre", "gpt-2", "--outtype", "F16"]
    assert run(["convert", str(made.source.path), *options, "-o", str(path)]) == 0
    return path.read_bytes()


@pytest.mark.parametrize(
    "content", ["", "[", "[]", "null", '"x"', "{}", "\xff", "[" * 9999, '{"model_type": []}']
)
def test_config_that_is_none(content: str, workspace: Path, refuses: Refused) -> None:
    (workspace / "model/config.json").write_bytes(content.encode("latin-1"))
    for command in (("inspect", "model"), CONVERT, ("stats", "model"), ("eval", "model")):
        told = "text.txt" if command[0] == "eval" else ""
        extra = ("--ppl", "text.txt") if told else ()
        if content == "{}" and told:
            continue
        refuses(*command, *extra, told="model")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_experts": -1}, "num_experts is -1"),
        ({"num_experts": "8"}, "num_experts is '8'"),
        ({"num_experts": True}, "num_experts is True"),
        ({"num_experts": 10**30}, "num_experts is 1000"),
        ({"num_experts": 10**9}, "1000000000 experts a layer, the weights are of 8"),
        ({"num_experts": 4}, "4 experts a layer, the weights are of 8"),
        ({"num_experts": 0}, "is a dense model"),
        ({"num_experts": None}, "is a dense model"),
        ({"num_experts_per_tok": 0}, "0 experts a token of 8"),
        ({"num_experts_per_tok": 99}, "99 experts a token of 8"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers, the weights are of 2"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"hidden_size": 128}, "hidden_size 128, model.embed_tokens.weight is 512 x 64"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"text_config": [1]}, "text_config is [1]"),
        ({"dtype": [1]}, "dtype is [1]"),
    ],
)
def test_config_that_cannot_be(
    changes: dict[str, Any], told: str, workspace: Path, refuses: Refused
) -> None:
    edit_json(workspace / "model/config.json", **changes)
    refuses("inspect", "model", told=told)
    refuses("stats", "model", "-o", "x.safetensors", told=told)


@pytest.mark.parametrize(
    "changes", [{"intermediate_size": 64}, {"num_attention_heads": 3}, {"rms_norm_eps": "x"}]
)
def test_config_that_llama_cpp_finds_wrong(
    changes: dict[str, Any], workspace: Path, refuses: Refused, built_runtime: object
) -> None:
    edit_json(workspace / "model/config.json", **changes)
    refuses(*CONVERT, "--prune-ratio", "0", told="model")


def test_code_that_a_checkpoint_brings_is_not_run(
    workspace: Path, refuses: Refused, built_runtime: object
) -> None:
    (workspace / "model/evil.py").write_text(f"open({str(workspace / 'ran')!r}, 'w')")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit_json(workspace / "model/config.json", auto_map=auto_map, model_type="evil")
    data = ("--data", "text.txt", "--samples", "1", "--seq-len", "32")
    refuses("stats", "model", *data, "-o", "x.safetensors", told="custom code")
    assert run([*CONVERT, "--prune-ratio", "0"]) == 0
    assert not (workspace / "ran").exists()


class _Bomb:
    def __reduce__(self) -> Any:
        return open, ("ran", "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickles_are_never_opened(name: str, workspace: Path, refuses: Refused) -> None:
    (workspace / "model/model.safetensors").unlink()
    (workspace / "model" / name).write_bytes(pickle.dumps(_Bomb()))
    for command in (("inspect", "model"), CONVERT, ("stats", "model")):
        refuses(*command, told=name)
    refuses("eval", "model", "--ppl", "text.txt", told=name)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1])
def test_truncated_weights(keep: int, workspace: Path, refuses: Refused) -> None:
    file = workspace / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses("inspect", "model", told="truncated")
    refuses("eval", "model", "--ppl", "text.txt", told="truncated")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32"', b'"F16"'),
        (b'"F32"', b'"X32"'),
        (b"[64]", b"[65]"),
        (b"[64]", b"[-4]"),
        (b'"shape"', b'"shale"'),
        (b'":{"dtype', b'":["dtype'),
    ],
)
def test_weights_with_a_damaged_header(
    old: bytes, new: bytes, workspace: Path, refuses: Refused
) -> None:
    file = workspace / "model/model.safetensors"
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    refuses("inspect", "model", told="model.safetensors has a damaged header")


@pytest.mark.parametrize(
    ("tensor", "value", "outtype"),
    [
        (EXPERT, "nan", "Q8_0"),
        (EXPERT, "inf", "F16"),
        (NORM, "nan", "F32"),
        (EXPERT, "3e38", "F16"),
    ],
)
def test_weights_that_are_no_numbers(
    tensor: str, value: str, outtype: str, workspace: Path, refuses: Refused, built_runtime: object
) -> None:
    file = workspace / "model/model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    offset = start + json.loads(content[8:start])[tensor]["data_offsets"][0]
    content[offset : offset + 4] = struct.pack("<f", float(value))
    file.write_bytes(content)
    convert = [outtype if argument == "Q8_0" else argument for argument in CONVERT]
    refuses(*convert, "--prune-ratio", "0", told="the model is damaged")


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside its folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "lacks 1 of 1 shards, first gone.safetensors"),
        ({"weight_map": {"a": 1}}, "index.json"),
        ([1], "is damaged"),
        ({}, "is damaged: it has no weight_map"),
    ],
)
def test_index_files(index: Any, told: str, workspace: Path, refuses: Refused) -> None:
    (workspace / "model/model.safetensors.index.json").write_text(json.dumps(index))
    refuses("inspect", "model", told=told)


@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_tokenizers(
    content: str | None, workspace: Path, refuses: Refused, built_runtime: object
) -> None:
    if content is None:
        for file in (workspace / "model").glob("tokenizer*"):
            file.unlink()
    else:
        (workspace / "model/tokenizer.json").write_text(content)
    refuses("stats", "model", "--data", "text.txt", "-o", "x.safetensors", told="tokenizer")
    refuses(*CONVERT, "--prune-ratio", "0", told="tokenizer")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kept": {"0": [0, 99], "1": [0]}}, "keeps 2 experts of 8"),
        ({"kept": {"0": [-1, 1], "1": [0]}}, "not a whole number"),
        ({"kept": {"0": [0.5], "1": [0]}}, "not a whole number"),
        ({"kept": {"0": [], "1": [0]}, "replacement": "drop"}, "keeps 0 experts of 8"),
        ({"kept": {}, "num_experts": {}}, "or none"),
        ({"kept": [1]}, "is not a readable plan"),
        ({"num_experts": {"0": 10**9, "1": 10**9}}, "the plan is for 1000000000 experts"),
        (
            {"kept": {"0": [0], "7": [0]}, "num_experts": {"0": 8, "7": 8}},
            "layer 7, which holds no",
        ),
        ({"prune_ratio": "x"}, "has the wrong type"),
        ({"method": [1]}, "has the wrong type"),
        ({"top_k": -1}, "not a whole number"),
        ({"bogus": 1}, "'bogus', which means nothing here"),
        ({"fingerprint": "0" * 64}, "the plan is of"),
        ({"stats_path": "/nowhere"}, "which is not there"),
        ({"stats_sha256": "0"}, "is not the statistics file"),
    ],
)
def test_plans(
    changes: dict[str, Any], told: str, workspace: Path, refuses: Refused, built_runtime: object
) -> None:
    edit_json(workspace / "p.json", **changes)
    refuses(*CONVERT, "--plan", "p.json", told=told)


@pytest.mark.parametrize("name", ["s.safetensors", "p.json"])
def test_flipped_bits_of_statistics_and_plans(
    name: str, workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, rng = (workspace / name).read_bytes(), random.Random(0)
    codes = set()
    for _ in range(40):
        content = bytearray(whole)
        content[rng.randrange(min(len(whole), 3400))] ^= 1 << rng.randrange(8)
        (workspace / name).write_bytes(content)
        codes.add(_one_line_or_done(["inspect", name], capfd))
    assert codes == {0, 1}


def _one_line_or_done(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> int:
    capfd.readouterr()
    code = run(arguments)
    out, err = capfd.readouterr()
    assert code in (0, 1)
    if code:
        assert err.count("\n") == 1 and len(err) < 600 and not out
        assert "unexpected Err" not in err and "(MONE_EDGE_DEBUG" not in err
    return code


def test_flipped_bits_and_cuts_of_a_gguf(
    gguf: bytes, workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng, codes = random.Random(1), set()
    file = workspace / "bad.gguf"
    for number in range(40):
        content = bytearray(gguf)
        content[rng.randrange(4, 1500 if number % 2 else 14_000)] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        codes.add(_one_line_or_done(["inspect", "bad.gguf", "--json"], capfd))
    assert codes == {0, 1}
    for keep in (0, 3, 8, 24, 5000, len(gguf) // 2, len(gguf) - 1):
        file.write_bytes(gguf[:keep])
        assert _one_line_or_done(["inspect", "bad.gguf"], capfd) == 1


def test_numbers_that_would_take_hours(
    gguf: bytes, workspace: Path, refuses: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    key = b"olmoe.block_count"
    place = gguf.index(key) + len(key)
    for kind, value in ((4, struct.pack("<I", 2**32 - 1)), (6, struct.pack("<f", float("nan")))):
        spoilt = gguf[:place] + struct.pack("<I", kind) + value + gguf[place + 8 :]
        (workspace / "bad.gguf").write_bytes(spoilt)
        assert _one_line_or_done(["inspect", "bad.gguf", "--json"], capfd) == 0
    (workspace / "bad.gguf").write_bytes(
        gguf[:place] + struct.pack("<II", 4, 2**32 - 1) + gguf[place + 8 :]
    )
    refuses("convert", "bad.gguf", "--dry-run", told="says 4294967295 blocks, and has")
    shape = [999_999_999_999] * 9
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    (workspace / "far").mkdir()
    shutil.copy(workspace / "model" / "config.json", workspace / "far")
    (workspace / "far" / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(4)
    )
    refuses("inspect", "far", told="damaged header: 9 axes")


@pytest.mark.parametrize(
    ("key", "value"), [("expert_used_count", 0), ("expert_used_count", 999), ("head_count", 0)]
)
def test_header_that_ends_the_process_which_loads_it(
    key: str, value: int, gguf: bytes, workspace: Path, refuses: Refused
) -> None:
    name = f"olmoe.{'attention.' if 'head' in key else ''}{key}".encode()
    place = gguf.index(name) + len(name) + 4
    spoilt = gguf[:place] + struct.pack("<I", value) + gguf[place + 4 :]
    (workspace / "bad.gguf").write_bytes(spoilt)
    refuses("run", "bad.gguf", "-p", "x", told="bad.gguf")
    refuses("eval", "bad.gguf", "--ppl", "text.txt", told="bad.gguf")
    refuses("bench", "bad.gguf", "-p", "4", "-n", "1", "-r", "1", told="bad.gguf")
    refuses("serve", "bad.gguf", "--port", "18099", told="bad.gguf")


def test_importance_matrices(gguf: bytes, workspace: Path, refuses: Refused) -> None:
    convert = (*CONVERT, "--prune-ratio", "0", "--imatrix")
    (workspace / "m.gguf").write_bytes(gguf)
    (workspace / "cut.gguf").write_bytes(gguf[:5000])
    refuses(*convert, "nothing", told="--imatrix nothing is not a file")
    refuses(*convert, "text.txt", told="is not in GGUF form")
    refuses(*convert, "m.gguf", told="holds no importance matrix")
    refuses(*convert, "cut.gguf", told="cut.gguf is a damaged GGUF")


def test_importance_matrix_of_another_model(
    workspace: Path, refuses: Refused, built_runtime: object
) -> None:
    import numpy as np

    from mone_edge.imatrix import write_imatrix

    name = "blk.0.ffn_down_exps.weight"
    write_imatrix({name: np.ones((8, 7), np.float32)}, workspace / "i.gguf")
    write_imatrix({"other": np.ones(7, np.float32)}, workspace / "j.gguf")
    convert = (*CONVERT, "--prune-ratio", "0", "--imatrix")
    refuses(*convert, "i.gguf", told=f"{name} is 8 x 64 x 32 here, its row there 8 x 7")
    refuses(*convert, "j.gguf", told="it has no tensor of this one")


def test_statistics_of_another_model(
    calibrated: Callable[[str], Calibrated],
    workspace: Path,
    refuses: Refused,
    built_runtime: object,
) -> None:
    other = calibrated("mixtral").stats_file
    refuses(*CONVERT, "--stats", other, told="the statistics are of")
    refuses("merge-stats", "s.safetensors", other, "-o", "x", told="cannot be merged")


def test_prompts(gguf: bytes, workspace: Path, refuses: Refused) -> None:
    (workspace / "m.gguf").write_bytes(gguf)
    refuses("run", "m.gguf", "-p", "", code=2, told="no prompt")
    refuses("run", "m.gguf", "-c", "16", "-p", "word " * 500, told="the context 16; give -c")
    refuses("run", "model", "-p", "x", told="model is a folder")
