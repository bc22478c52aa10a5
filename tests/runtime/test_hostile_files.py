"""Wrong files are refused with a reason; each is loaded in a process of its own: it may crash."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from mone_edge import runtime
from tests.runtime import tiny_gguf as tiny

KEPT = [4, 1, tiny.N_EXPERTS]

LOAD = """
import sys
from mone_edge import runtime
llama = runtime.load(verbose=True)
errors = []
callback = llama.llama_log_callback(lambda level, text, _: errors.append(text.decode()))
llama.llama_log_set(callback, None)
llama.llama_backend_init()
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
print("".join(errors))
sys.exit(0 if model else 3)
"""


def load_in_subprocess(path: Path) -> str:
    """The log of a load that is expected to fail, and not to crash."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, (done.returncode, done.stdout[-2000:], done.stderr[-500:])
    return done.stdout


def with_key(
    path: Path, add: Callable[[gguf.GGUFWriter, str], None], kept: list[int] = KEPT
) -> Path:
    """A file pruned to `kept` whose key is what `add` writes."""
    model = tiny.pruned(tiny.random_model("olmoe"), kept)
    writer = tiny.start(path, model)
    add(writer, "olmoe.expert_kept_count")
    for name, value in model.tensors.items():
        writer.add_tensor(name, value)
    return tiny.finish(writer, path)


WRONG_KEYS = {
    "too short": (lambda w, k: w.add_array(k, [4, 1]), "has 2 entries, but the model has 3 blocks"),
    "too long": (lambda w, k: w.add_array(k, [4, 1, 8, 8]), "has 4 entries"),
    "empty": (lambda w, k: w.add_array(k, []), "blocks|shape"),
    "zero": (lambda w, k: w.add_array(k, [4, 0, 8]), "blk.1.*belongs to a block for which .* is 0"),
    "negative": (lambda w, k: w.add_array(k, [4, -1, 8]), "is -1, must be from 0 to 8"),
    "too many": (lambda w, k: w.add_array(k, [4, 9, 8]), "is 9, must be from 0 to 8"),
    "huge": (lambda w, k: w.add_array(k, [4, 2**31 - 1, 8]), "is 2147483647, must be"),
    "scalar": (lambda w, k: w.add_uint32(k, 4), "must be an array of 32-bit integers"),
    "string": (lambda w, k: w.add_string(k, "4"), "must be an array of 32-bit integers"),
    "floats": (lambda w, k: w.add_array(k, [4.0, 1.0, 8.0]), "must be an array of 32-bit"),
    "strings": (lambda w, k: w.add_array(k, ["4", "1", "8"]), "must be an array of 32-bit"),
    "other count": (lambda w, k: w.add_array(k, [4, 2, 8]), "blk.1.ffn_.*wrong shape"),
    "missing": (lambda w, k: None, "blk.0.ffn_.*wrong shape"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_wrong_key(built_runtime: runtime.RuntimeInfo, tmp_path: Path, name: str) -> None:
    add, reason = WRONG_KEYS[name]
    log = load_in_subprocess(with_key(tmp_path / "m.gguf", add))
    assert re.search(reason, log), log[-1500:]


def test_no_experts(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    model = tiny.random_model("llama")
    keys = {k: v for k, v in model.keys.items() if not k.startswith("expert_")}
    path = tiny.write(tmp_path / "m.gguf", replace(model, keys=keys), kept=KEPT, bias_type=None)
    assert "the model has no experts" in load_in_subprocess(path)


def refused(path: Path, model: tiny.Model, kept: list[int] = KEPT) -> str:
    """The log of the refusal of a file made of `model`."""
    return load_in_subprocess(tiny.write(path, model, kept=kept))


def test_order_matters_but_is_missing(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    reason = "tensor 'blk.0.ffn_gate_eid2slot.weight' not found"
    log = refused(tmp_path / "grove.gguf", tiny.pruned(tiny.grovemoe(), KEPT))
    assert f"derives the ids of chunk experts from theirs: {reason}" in log
    model = tiny.pruned(tiny.random_model("olmoe"), KEPT)
    keys = {"expert_group_count": 4, "expert_group_used_count": 2}
    log = refused(tmp_path / "groups.gguf", replace(model, keys=model.keys | keys))
    assert f"the model selects groups of experts: {reason}" in log


WRONG_SLOTS = {
    "twice": ([0, 1, 2, 3, 4, 5, 6, 6], "is not a permutation: entry 7 is 6"),
    "negative": ([0, 1, 2, -1, 4, 5, 6, 7], "is not a permutation: entry 3 is -1"),
    "beyond": ([0, 1, 2, 3, 4, 5, 6, 8], "is not a permutation: entry 7 is 8"),
    "huge": ([2**31 - 1, 1, 2, 3, 4, 5, 6, 7], "is not a permutation: entry 0 is 2147483647"),
    "few": ([0, 1, 2, 3], "has wrong shape"),
    "many": (list(range(16)), "has wrong shape"),
    "floats": ([0.0, 1, 2, 3, 4, 5, 6, 7], "has type f32; expected i32"),
}


@pytest.mark.parametrize("name", WRONG_SLOTS)
def test_wrong_eid2slot(built_runtime: runtime.RuntimeInfo, tmp_path: Path, name: str) -> None:
    slots, reason = WRONG_SLOTS[name]
    model = tiny.pruned(tiny.random_model("olmoe"), KEPT)
    kind = np.float32 if isinstance(slots[0], float) else np.int32
    model.tensors["blk.1.ffn_gate_eid2slot.weight"] = np.array(slots, kind)
    log = refused(tmp_path / "m.gguf", model)
    assert f"tensor 'blk.1.ffn_gate_eid2slot.weight' {reason}" in log


DOWN, UP = "blk.1.ffn_novice_down.weight", "blk.1.ffn_novice_up.weight"
WRONG_NOVICES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "no up": ({DOWN: (7, 4, 64)}, f"tensor '{DOWN}' without '{UP}'"),
    "no down": ({UP: (7, 64, 4)}, f"tensor '{UP}' without '{DOWN}'"),
    "count": ({DOWN: (8, 4, 64), UP: (8, 64, 4)}, f"tensor '{DOWN}' has wrong shape"),
    "count of up": ({DOWN: (7, 4, 64), UP: (6, 64, 4)}, f"tensor '{UP}' has wrong shape"),
    "ranks": ({DOWN: (7, 4, 64), UP: (7, 64, 5)}, f"tensor '{UP}' has wrong shape"),
    "input": ({DOWN: (7, 4, 32), UP: (7, 64, 4)}, f"tensor '{DOWN}' has wrong shape"),
    "output": ({DOWN: (7, 4, 64), UP: (7, 32, 4)}, f"tensor '{UP}' has wrong shape"),
    "two axes": ({DOWN: (7, 64), UP: (7, 64, 4)}, f"tensor '{DOWN}' has wrong shape"),
}


@pytest.mark.parametrize("name", WRONG_NOVICES)
def test_wrong_novices(built_runtime: runtime.RuntimeInfo, tmp_path: Path, name: str) -> None:
    shapes, reason = WRONG_NOVICES[name]
    model = tiny.pruned(tiny.random_model("olmoe"), KEPT)
    for tensor, shape in shapes.items():
        model.tensors[tensor] = np.zeros(shape, np.float32)
    assert reason in refused(tmp_path / "m.gguf", model)


def test_novices_of_other_kinds(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    model = tiny.with_novices(tiny.pruned(tiny.random_model("olmoe"), KEPT), KEPT, [0, 4, 0])
    model.tensors[UP] = model.tensors[UP].astype(np.int32)
    log = refused(tmp_path / "int.gguf", model)
    assert f"tensor '{UP}' has type i32, which weights cannot have" in log
    whole = tiny.random_model("olmoe")
    whole.tensors[DOWN] = np.zeros((1, 4, 64), np.float32)
    whole.tensors[UP] = np.zeros((1, 64, 4), np.float32)
    log = refused(tmp_path / "whole.gguf", whole, [tiny.N_EXPERTS] * 3)
    assert f"tensor '{DOWN}' has rank 4 for the 0 pruned experts of block 1" in log


def test_nothing_left_of_a_layer(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    model = tiny.pruned(tiny.random_model("olmoe"), [4, 0, 8])
    path = tiny.write(tmp_path / "m.gguf", model, kept=[4, 0, 8], bias_layers=[0, 2])
    assert "tensor 'blk.1.ffn_down_exps.bias' not found" in load_in_subprocess(path)


@pytest.mark.parametrize("shape", [(tiny.N_EXPERTS - 1, tiny.N_EMBD), (tiny.N_EXPERTS, 32), (64,)])
def test_bias_of_wrong_shape(
    built_runtime: runtime.RuntimeInfo, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    model = tiny.pruned(tiny.random_model("olmoe"), KEPT)
    model.bias[1] = np.zeros(shape, np.float32)
    log = load_in_subprocess(tiny.write(tmp_path / "m.gguf", model, kept=KEPT))
    assert "'blk.1.ffn_down_exps.bias' has wrong shape" in log


def test_bias_of_wrong_type(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    model = tiny.pruned(tiny.random_model("olmoe"), KEPT)
    path = tiny.write(tmp_path / "m.gguf", model, kept=KEPT, bias_type=np.float64)
    assert "has type f64; expected f32 or f16" in load_in_subprocess(path)


LOAD_ADAPTER = """
import sys
from mone_edge import runtime
llama = runtime.load(verbose=True)
llama.llama_backend_init()
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
assert model
sys.exit(0 if llama.llama_adapter_lora_init(model, sys.argv[2].encode()) else 3)
"""


def write_adapter(path: Path, tensor: str, *shape: int) -> Path:
    """A LoRA of rank 2 for one tensor of torch shape `[..., rows, columns]`."""
    *experts, rows, columns = shape
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.add_tensor(f"{tensor}.lora_a", np.ones((*experts, 2, columns), np.float32))
    writer.add_tensor(f"{tensor}.lora_b", np.ones((*experts, rows, 2), np.float32))
    return tiny.finish(writer, path)


def test_adapters(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    """One for attention is taken, one for pruned experts is refused by name."""
    model = tiny.pruned(tiny.random_model("olmoe"), KEPT)
    path = tiny.write(tmp_path / "m.gguf", model, kept=KEPT)
    attention = write_adapter(tmp_path / "a.gguf", "blk.0.attn_q.weight", tiny.N_EMBD, tiny.N_EMBD)
    experts = write_adapter(
        tmp_path / "e.gguf", "blk.0.ffn_down_exps.weight", tiny.N_EXPERTS, tiny.N_EMBD, tiny.N_FF
    )
    for adapter, code in ((attention, 0), (experts, 3)):
        done = subprocess.run(
            [sys.executable, "-c", LOAD_ADAPTER, str(path), str(adapter)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr[-2000:]
    assert "some of which have been pruned: not supported" in done.stderr
