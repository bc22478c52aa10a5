"""Pruned files against whole files with zeroed experts: the difference must be exactly 0."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from mone_edge import runtime
from mone_edge.graph import Node
from mone_edge.llama import GgufModel
from tests.runtime import tiny_gguf as tiny

RUNS = [(1, 1), (5, 2), (96, 2)]
# uneven, fewer than the top-k, a single one, and a layer left whole
KEPT = [4, 1, tiny.N_EXPERTS]
FEW = [3, 5, 2]
# no expert at all in one layer
NONE = [0, tiny.N_EXPERTS, 3]
# activations are rounded to 8 bits before they meet quantised weights: a last bit may flip
STOCK_TOLERANCE = {"F32": 1e-5, "Q8_0": 1e-2, "Q4_0": 1e-2}
ORDERS = {0: (6, 1, 4, 3, 0, 7, 2, 5), 2: (3, 2, 7, 0, 5, 6, 1, 4)}


def assert_same(llama: ModuleType, whole: Path, pruned: Path) -> None:
    for a, b in zip(tiny.logits(llama, whole, RUNS), tiny.logits(llama, pruned, RUNS), strict=True):
        assert np.isfinite(a).all()
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("arch", "quant", "kept"),
    [("olmoe", quant, kept) for quant in tiny.QUANTS for kept in (KEPT, FEW, NONE)]
    + [
        (arch, quant, KEPT)
        for arch in ("qwen2moe", "qwen3moe", "llama")
        for quant in ("F16", "Q4_0")
    ]
    + [("qwen2moe", "F16", NONE)],
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


@pytest.mark.parametrize("kept", [FEW, NONE], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_experts_in_another_order(
    llama: ModuleType, tmp_path: Path, groups: int, kept: list[int]
) -> None:
    """The router in its own order, in groups or not; the second layer has no eid2slot."""
    kept = [kept[0], tiny.N_EXPERTS, kept[2]]
    model = tiny.random_model("qwen2moe")
    keys = {"expert_group_count": groups, "expert_group_used_count": groups // 2}
    model = replace(model, keys=model.keys | keys if groups > 1 else model.keys)
    whole = tiny.write(tmp_path / "whole.gguf", tiny.zeroed(model, kept, ORDERS), "Q8_0")
    part = tiny.pruned(tiny.stored_in_order(model, ORDERS), kept)
    assert_same(llama, whole, tiny.write(tmp_path / "pruned.gguf", part, "Q8_0", kept=kept))


def test_grovemoe(llama: ModuleType, tmp_path: Path) -> None:
    """Chunk experts are selected by the router's ids."""
    model = tiny.grovemoe()
    whole = tiny.write(tmp_path / "whole.gguf", tiny.zeroed(model, FEW, ORDERS))
    part = tiny.pruned(tiny.stored_in_order(model, ORDERS | {1: range(8)}), FEW)
    assert_same(llama, whole, tiny.write(tmp_path / "pruned.gguf", part, kept=FEW))


class NoviceWatch:
    """Low-rank novices of a graph against NumPy."""

    def __init__(self, path: Path) -> None:
        self.weights = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(path).tensors
            if "novice" in tensor.name
        }
        self.input = np.empty(0)
        self.errors: dict[str, float] = {}

    def start(self) -> None:
        pass

    def wants(self, node: Node) -> bool:
        return node.name.startswith(("ffn_moe_novice_down-", "ffn_moe_novice_up-"))

    def see(self, node: Node) -> bool:
        part, layer = node.name.split("-")
        x, ids = node.source(1), node.source(2)
        assert x
        assert ids
        if part.endswith("down"):
            self.input = x.values()[:, 0].copy()  # [tokens, n_embd]
            return True
        down, up = (
            self.weights[f"blk.{layer}.ffn_novice_{name}.weight"] for name in ("down", "up")
        )
        expected = np.zeros(node.values().shape, np.float64)  # [tokens, top_k, n_embd]
        for token, slot in np.argwhere(ids.values() >= 0):
            j = ids.values()[token, slot]
            expected[token, slot] = up[j].astype(float) @ (
                down[j].astype(float) @ self.input[token]
            )
        assert np.abs(expected).max() > 0
        assert (node.values()[ids.values() < 0] == 0).all()
        self.errors[layer] = np.abs(node.values() - expected).max() / np.abs(expected).max()
        return True


@pytest.mark.parametrize(
    ("quant", "ranks", "kept", "tolerance"),
    [
        ("F32", [3, 4, 0], KEPT, 1e-5),
        ("F16", [16, 5, 0], KEPT, 2e-3),
        ("BF16", [1, 64, 0], KEPT, 2e-2),
        ("Q8_0", [16, 32, 0], KEPT, 2e-2),
        ("Q4_0", [32, 64, 0], KEPT, 2e-2),
        ("F32", [7, 0, 2], NONE, 1e-5),
    ],
)
def test_low_rank_novices(
    built_runtime: runtime.RuntimeInfo,
    tmp_path: Path,
    quant: str,
    ranks: list[int],
    kept: list[int],
    tolerance: float,
) -> None:
    model = tiny.with_novices(tiny.pruned(tiny.random_model("olmoe"), kept), kept, ranks)
    path = tiny.write(tmp_path / "m.gguf", model, kept=kept, novice_quant=quant)
    watch = NoviceWatch(path)
    with GgufModel(path, exact=True, observer=watch) as gguf_model:
        gguf_model.read(range(1, 90))
    assert set(watch.errors) == {str(layer) for layer, rank in enumerate(ranks) if rank}
    assert max(watch.errors.values()) < tolerance, watch.errors


@pytest.mark.parametrize("kept", [KEPT, NONE], ids=str)
def test_low_rank_novices_are_added(llama: ModuleType, tmp_path: Path, kept: list[int]) -> None:
    """Novices of zeros change nothing, others do."""
    model = tiny.pruned(tiny.random_model("olmoe"), kept)
    ranks = [1 if n_kept < tiny.N_EXPERTS else 0 for n_kept in kept]
    plain = tiny.write(tmp_path / "plain.gguf", model, kept=kept)
    zero = tiny.with_novices(model, kept, ranks)
    for name, value in zero.tensors.items():
        if "novice_up" in name:
            value[:] = 0
    nothing = tiny.write(tmp_path / "zero.gguf", zero, kept=kept)
    assert_same(llama, plain, nothing)
    some = tiny.write(tmp_path / "some.gguf", tiny.with_novices(model, kept, ranks), kept=kept)
    a, b = (tiny.logits(llama, path, [(5, 1)])[0] for path in (plain, some))
    assert np.abs(a - b).max() > 0.01


def everything(kept: list[int]) -> tiny.Model:
    """Pruned, reordered, with low-rank novices."""
    model = tiny.random_model("olmoe", n_embd=256, n_ff=256)
    orders = dict.fromkeys(range(tiny.N_LAYERS), ORDERS[0])
    ranks = [16 if n_kept < tiny.N_EXPERTS else 0 for n_kept in kept]
    return tiny.with_novices(tiny.pruned(tiny.stored_in_order(model, orders), kept), kept, ranks)


def test_quantize_leaves_novices_alone(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    plain = tiny.write(tmp_path / "f32.gguf", everything(NONE), kept=NONE, novice_quant="F16")
    small = tmp_path / "q4.gguf"
    command = [str(runtime.tool("llama-quantize")), str(plain), str(small), "Q4_K_M", "1"]
    subprocess.run(command, check=True, capture_output=True)
    before, after = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (plain, small)
    )
    assert set(before) == set(after)
    for name, tensor in before.items():
        if "novice" in name or "eid2slot" in name or name.endswith("exps.bias"):
            assert after[name].tensor_type == tensor.tensor_type
            assert (after[name].data == tensor.data).all()
    assert "K" in after["blk.2.ffn_down_exps.weight"].tensor_type.name


def test_split_and_saved_files_are_the_same_model(llama: ModuleType, tmp_path: Path) -> None:
    """llama-gguf-split, and what llama.cpp writes of a model in memory."""
    path = tiny.write(tmp_path / "m.gguf", everything(NONE), kept=NONE, novice_quant="F16")
    command = [runtime.tool("llama-gguf-split"), "--split-max-tensors", "9", path, tmp_path / "s"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    assert_same(llama, path, next(tmp_path.glob("s-00001-of-*.gguf")))
    model = tiny.load_model(llama, path)
    llama.llama_model_save_to_file(model, str(tmp_path / "saved.gguf").encode())
    llama.llama_model_free(model)
    assert_same(llama, path, tmp_path / "saved.gguf")


@pytest.mark.parametrize(
    ("make", "quant", "kept"),
    [
        (lambda kept: tiny.pruned(tiny.random_model("olmoe"), kept), "F32", KEPT),
        (lambda kept: tiny.pruned(tiny.random_model("qwen2moe"), kept), "Q8_0", FEW),
        (lambda kept: tiny.pruned(tiny.random_model("llama"), kept), "F32", [6, 7, 5]),
        (everything, "F32", NONE),
        (everything, "Q4_0", FEW),
    ],
    ids=["olmoe", "qwen2moe", "llama", "everything", "everything-few"],
)
@pytest.mark.parametrize("bias_type", [np.float32, np.float16, None])
def test_graph_for_devices_that_do_not_skip(
    llama: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[list[int]], tiny.Model],
    quant: str,
    kept: list[int],
    bias_type: type[np.floating] | None,
) -> None:
    """Made of stock operations, it gives the same logits but for the order of the additions."""
    if not bias_type and 0 in kept:
        pytest.skip("the bias is all that there is of a layer")
    path = tiny.write(tmp_path / "m.gguf", make(kept), quant, kept=kept, bias_type=bias_type)
    skipping = tiny.logits(llama, path, RUNS)
    monkeypatch.setenv("LLAMA_MOE_SKIP_DISABLE", "1")
    stock = tiny.logits(llama, path, RUNS)
    for a, b in zip(skipping, stock, strict=True):
        assert np.abs(a - b).max() <= STOCK_TOLERANCE[quant] * (a.max() - a.min())


@pytest.mark.parametrize(
    ("shape", "kept", "rank"), [((16, 64, 8), 32, 16), ((24, 64, 16), 0, 0)], ids=str
)
@pytest.mark.parametrize("disable", ["", "1"])
def test_many_layers_have_room_in_the_graph(
    llama: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    kept: int,
    rank: int,
    disable: str,
) -> None:
    """More nodes than the 1024 that the graph of a small model may have; without room for them
    llama.cpp aborts."""
    for name, value in zip(("N_LAYERS", "N_EXPERTS", "TOP_K"), shape, strict=True):
        monkeypatch.setattr(tiny, name, value)
    if disable:
        monkeypatch.setenv("LLAMA_MOE_SKIP_DISABLE", disable)
    counts = [kept] * shape[0]
    model = tiny.pruned(tiny.random_model("olmoe", n_embd=32, n_ff=32), counts)
    model = tiny.with_novices(model, counts, [rank] * shape[0])
    layers = range(shape[0])
    path = tiny.write(tmp_path / "m.gguf", model, kept=counts, bias_layers=layers)
    (found,) = tiny.logits(llama, path, [(9, 1)])
    assert np.isfinite(found).all()


def test_experts_that_were_not_selected_make_nothing_of_a_token(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that fill up a selection of the stock graph overflow here, and weigh nothing."""
    kept = [4] * tiny.N_LAYERS
    model = tiny.pruned(tiny.random_model("qwen3moe"), kept)
    finite = []
    for expert in range(4):
        tensors = dict(model.tensors)
        name = f"blk.{tiny.N_LAYERS - 1}.ffn_down_exps.weight"
        tensors[name] = tensors[name].copy()
        tensors[name][expert] = 3e38
        path = tiny.write(tmp_path / f"{expert}.gguf", replace(model, tensors=tensors), kept=kept)
        for disable in ("0", "1"):
            monkeypatch.setenv("LLAMA_MOE_SKIP_DISABLE", disable)
            finite.append(bool(np.isfinite(tiny.logits(llama, path, [(1, 1)])[0]).all()))
    assert finite[::2] == finite[1::2]
    assert set(finite) == {True, False}


def test_a_shared_experts_gate_at_zero_is_half(llama: ModuleType, tmp_path: Path) -> None:
    model = tiny.random_model("qwen2moe")
    found = []
    for gate in (0.0, 1e-9):
        tensors = dict(model.tensors)
        for layer in range(tiny.N_LAYERS):
            name = f"blk.{layer}.ffn_gate_inp_shexp.weight"
            tensors[name] = np.full_like(tensors[name], gate)
        path = tiny.write(tmp_path / f"{gate}.gguf", replace(model, tensors=tensors))
        found.append(tiny.logits(llama, path, [(5, 1)])[0])
    assert np.isfinite(found[0]).all()
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize("part", ["ffn_gate_inp", "ffn_down_exps"])
def test_adapters_of_experts_in_another_order_are_refused(
    llama: ModuleType, tmp_path: Path, part: str
) -> None:
    """Also of the router, whose rows have that order, and where a block stores one expert."""
    model, kept = tiny.random_model("qwen2moe"), [1, 1, 1]
    shape = model.tensors[f"blk.0.{part}.weight"].shape
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "qwen2moe")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for layer in range(tiny.N_LAYERS):
        down, up = np.ones((*shape[:-2], 4, shape[-1])), np.ones((*shape[:-1], 4))
        for name, values in (("a", down), ("b", up)):
            writer.add_tensor(f"blk.{layer}.{part}.weight.lora_{name}", values.astype(np.float32))
    tiny.finish(writer, tmp_path / "lora.gguf")
    orders = dict.fromkeys(range(tiny.N_LAYERS), ORDERS[0])
    placed = tiny.pruned(tiny.stored_in_order(model, orders), kept)
    for made, count, taken in (
        (model, None, True),
        (tiny.pruned(model, kept), kept, False),
        (placed, kept, part == "ffn_gate_inp"),
    ):
        loaded = tiny.load_model(llama, tiny.write(tmp_path / "m.gguf", made, kept=count))
        adapter = llama.llama_adapter_lora_init(loaded, os.fsencode(tmp_path / "lora.gguf"))
        assert bool(adapter) == taken
        llama.llama_model_free(loaded)


def test_stock_graph_never_leaves_an_expert_out(
    built_runtime: runtime.RuntimeInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No id that has no matrix, and none twice in a token, in any MUL_MAT_ID."""
    monkeypatch.setenv("LLAMA_MOE_SKIP_DISABLE", "1")
    path = tiny.write(tmp_path / "m.gguf", everything(FEW), kept=FEW)
    watch = IdWatch()
    with GgufModel(path, observer=watch) as model:
        model.read(range(1, 40))
    assert watch.seen >= 5 * tiny.N_LAYERS


class IdWatch:
    """Checks the ids of every MUL_MAT_ID."""

    seen = 0

    def start(self) -> None:
        pass

    def wants(self, node: Node) -> bool:
        return node.op == "MUL_MAT_ID"

    def see(self, node: Node) -> bool:
        weights, ids = node.source(0), node.source(2)
        assert weights
        assert ids
        values = ids.values()
        assert (values >= 0).all()
        assert (values < weights.stacked).all()
        assert all(len(set(row)) == len(row) for row in values.tolist())
        self.seen += 1
        return True
