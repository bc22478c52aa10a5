"""Pruned files against whole files with zeroed experts: the difference must be exactly 0."""

import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mone_edge import runtime
from tests.runtime import tiny_gguf as tiny

RUNS = [(1, 1), (5, 2), (96, 2)]
# uneven, fewer than the top-k, a single one, and a layer left whole
KEPT = [4, 1, tiny.N_EXPERTS]
FEW = [3, 5, 2]


def assert_same(llama: ModuleType, whole: Path, pruned: Path) -> None:
    for a, b in zip(tiny.logits(llama, whole, RUNS), tiny.logits(llama, pruned, RUNS), strict=True):
        assert np.isfinite(a).all()
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("arch", "quant", "kept"),
    [("olmoe", quant, kept) for quant in tiny.QUANTS for kept in (KEPT, FEW)]
    + [
        (arch, quant, KEPT)
        for arch in ("qwen2moe", "qwen3moe", "llama")
        for quant in ("F16", "Q4_0")
    ],
    ids=str,
)
def test_pruned_equals_zeroed(
    llama: ModuleType, tmp_path: Path, arch: str, quant: str, kept: list[int]
) -> None:
    model = tiny.random_model(arch)
    whole = tiny.write(tmp_path / "whole.gguf", tiny.zeroed(model, kept), quant)
    pruned = tiny.write(tmp_path / "pruned.gguf", tiny.pruned(model, kept), quant, kept=kept)
    assert_same(llama, whole, pruned)


@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q2_K", "Q5_0"])
def test_pruned_equals_zeroed_after_llama_quantize(
    llama: ModuleType, tmp_path: Path, ftype: str
) -> None:
    """K-quants take the tiled path or are repacked; llama-quantize must keep key and bias."""
    model = tiny.random_model("olmoe", n_embd=256, n_ff=256)
    files = []
    for name, part, count in (
        ("whole", tiny.zeroed(model, FEW), None),
        ("pruned", tiny.pruned(model, FEW), FEW),
    ):
        plain = tiny.write(tmp_path / f"{name}.gguf", part, kept=count)
        files.append(tmp_path / f"{name}-{ftype}.gguf")
        command = [str(runtime.tool("llama-quantize")), str(plain), str(files[-1]), ftype, "1"]
        subprocess.run(command, check=True, capture_output=True)
    assert_same(llama, *files)


def test_f16_bias(llama: ModuleType, tmp_path: Path) -> None:
    model = tiny.random_model("qwen3moe")
    for bias in model.bias.values():
        bias[:] = bias.astype(np.float16)
    part = tiny.pruned(model, KEPT)
    wide = tiny.write(tmp_path / "f32.gguf", part, kept=KEPT)
    narrow = tiny.write(tmp_path / "f16.gguf", part, kept=KEPT, bias_type=np.float16)
    assert_same(llama, wide, narrow)


def test_bias_is_optional(llama: ModuleType, tmp_path: Path) -> None:
    """No bias means zero constants, in all layers or in some."""
    model = tiny.random_model("olmoe")
    for layer in (0, 2):
        model.bias[layer][:] = 0
    part = tiny.pruned(model, KEPT)
    full = tiny.write(tmp_path / "full.gguf", part, kept=KEPT)
    sparse = tiny.write(tmp_path / "sparse.gguf", part, kept=KEPT, bias_layers=[1])
    assert_same(llama, full, sparse)


def test_bias_matters(llama: ModuleType, tmp_path: Path) -> None:
    model = tiny.pruned(tiny.random_model("olmoe"), KEPT)
    files = [
        tiny.write(tmp_path / f"{kind}.gguf", model, kept=KEPT, bias_type=kind)
        for kind in (np.float32, None)
    ]
    with_bias, without = (tiny.logits(llama, file, [(5, 1)])[0] for file in files)
    assert np.abs(with_bias - without).max() > 0.01


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_keeping_everything_changes_nothing(llama: ModuleType, tmp_path: Path, quant: str) -> None:
    """The ordinary file, the same with the key at N, and with a bias of zeros."""
    model = tiny.random_model("qwen2moe")
    everything = [tiny.N_EXPERTS] * tiny.N_LAYERS
    ordinary = tiny.write(tmp_path / "a.gguf", model, quant, bias_type=None)
    keyed = tiny.write(tmp_path / "b.gguf", model, quant, kept=everything, bias_type=None)
    assert_same(llama, ordinary, keyed)
    for bias in model.bias.values():
        bias[:] = 0
    assert_same(llama, ordinary, tiny.write(tmp_path / "c.gguf", model, quant))


def test_kept_count_can_be_asked_for(llama: ModuleType, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", tiny.pruned(tiny.random_model("olmoe"), KEPT), kept=KEPT)
    model = tiny.load_model(llama, path)
    query = llama.llama_cpp._lib.llama_model_n_expert_kept
    assert [query(model, layer) for layer in range(tiny.N_LAYERS)] == KEPT
    assert query(model, -1) == query(model, tiny.N_LAYERS) == -1
    llama.llama_model_free(model)
