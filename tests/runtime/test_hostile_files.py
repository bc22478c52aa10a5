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
    "zero": (lambda w, k: w.add_array(k, [4, 0, 8]), "is 0, must be from 1 to 8"),
    "negative": (lambda w, k: w.add_array(k, [4, -1, 8]), "is -1, must be from 1 to 8"),
    "too many": (lambda w, k: w.add_array(k, [4, 9, 8]), "is 9, must be from 1 to 8"),
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


@pytest.mark.parametrize("arch", ["llama4", "grovemoe"])
def test_refused_architecture(
    built_runtime: runtime.RuntimeInfo, tmp_path: Path, arch: str
) -> None:
    model = replace(tiny.pruned(tiny.random_model("olmoe"), KEPT), arch=arch)
    log = load_in_subprocess(tiny.write(tmp_path / "m.gguf", model, kept=KEPT))
    assert f"pruned experts are not supported for architecture {arch}" in log


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
