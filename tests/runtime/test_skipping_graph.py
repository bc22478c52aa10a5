"""The graph that skips experts: what every operation is given, against weights of zero."""

import re
import subprocess
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
from tests.runtime.test_hostile_files import load_in_subprocess
from tests.runtime.test_pruned_graph import (
    FEW,
    KEPT,
    NONE,
    RUNS,
    STOCK_TOLERANCE,
    assert_same,
    everything,
)

BETA = 0.5
WATCHED = re.compile(r"ffn_moe_(weights|run|run_ids)-\d+")  # a view has more behind its name
WHOLE = [tiny.N_EXPERTS] * tiny.N_LAYERS


def skipping(model: tiny.Model, threshold: float = BETA) -> tiny.Model:
    return replace(model, keys=model.keys | {"expert_skip_threshold": float(threshold)})


@pytest.mark.parametrize(
    ("arch", "quant", "kept"),
    [("olmoe", quant, kept) for quant in tiny.QUANTS for kept in (KEPT, NONE)]
    + [
        (arch, quant, FEW)
        for arch in ("qwen2moe", "qwen3moe", "llama")
        for quant in ("F32", "Q4_0")
    ],
    ids=str,
)
def test_skipped_is_weighted_with_zero(
    llama: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    quant: str,
    kept: list[int],
) -> None:
    """The other graph computes skipped experts and weights them with zero: nothing is added."""
    model = skipping(tiny.pruned(tiny.random_model(arch), kept))
    path = tiny.write(tmp_path / "m.gguf", model, quant, kept=kept)
    skips = tiny.logits(llama, path, RUNS)
    monkeypatch.setenv("LLAMA_MOE_SKIP_DISABLE", "1")
    stock = tiny.logits(llama, path, RUNS)
    for a, b in zip(skips, stock, strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= STOCK_TOLERANCE.get(quant, 1e-2) * (a.max() - a.min())


@pytest.mark.parametrize("quant", tiny.QUANTS)
def test_a_whole_model_is_equal_to_the_last_bit(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    path = tiny.write(tmp_path / "m.gguf", skipping(tiny.random_model("qwen3moe")), quant)
    skips = tiny.logits(llama, path, RUNS)
    monkeypatch.setenv("LLAMA_MOE_SKIP_DISABLE", "1")
    for a, b in zip(skips, tiny.logits(llama, path, RUNS), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("arch", ["olmoe", "llama"])
@pytest.mark.parametrize("threshold", [0.0, 1e-30])
def test_a_threshold_that_skips_nothing(
    llama: ModuleType, tmp_path: Path, arch: str, threshold: float
) -> None:
    model = tiny.pruned(tiny.random_model(arch), FEW)
    plain = tiny.write(tmp_path / "plain.gguf", model, kept=FEW)
    keyed = tiny.write(tmp_path / "keyed.gguf", skipping(model, threshold), kept=FEW)
    assert_same(llama, plain, keyed)


class Reads:
    """Checks every id that an operation is given, and what is skipped."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.weights: np.ndarray = np.empty(0)
        self.skipped = self.slots = self.left_out = 0

    def start(self) -> None:
        pass

    def wants(self, node: Node) -> bool:
        return bool(WATCHED.fullmatch(node.name)) or node.op in ("MUL_MAT_ID", "ADD_ID", "GET_ROWS")

    def see(self, node: Node) -> bool:
        watched = WATCHED.fullmatch(node.name)
        part = watched[1] if watched else ""
        if part == "weights":
            self.weights = node.values().copy()  # [tokens, top_k, 1]
        elif part == "run":
            run = node.values()
            wanted = self.weights / self.weights.max(1, keepdims=True) > self.threshold
            assert np.array_equal(run, wanted.astype(np.float32))
            self.skipped += int((run == 0).sum())
            self.slots += run.size
        elif part == "run_ids":
            self.left_out += int((node.values() < 0).sum())
        self._ids_in_range(node)
        return True

    def _ids_in_range(self, node: Node) -> None:
        if node.op not in ("ADD_ID", "GET_ROWS"):
            return
        first = 1 if node.op == "ADD_ID" else 0
        table, ids = node.source(first), node.source(first + 1)
        assert table
        assert ids
        assert (ids.values() >= 0).all()
        assert (ids.values() < table.values().shape[-2]).all()


@pytest.mark.parametrize("name", ["whole", "reordered", "grouped"])
def test_every_id_is_one_that_its_reader_can_have(
    built_runtime: runtime.RuntimeInfo, tmp_path: Path, name: str
) -> None:
    kept = WHOLE if name == "whole" else NONE
    model = tiny.random_model("qwen2moe") if name == "whole" else everything(NONE)
    if name == "grouped":
        keys = {"expert_group_count": 4, "expert_group_used_count": 2}
        model = replace(model, keys=model.keys | keys)
    watch = Reads(BETA)
    path = tiny.write(tmp_path / "m.gguf", skipping(model), kept=kept)
    with GgufModel(path, observer=watch) as gguf_model:
        gguf_model.read(range(1, 60))
    assert 0.1 < watch.skipped / watch.slots < 0.9
    assert watch.left_out >= watch.skipped * (1 if name == "whole" else 0.6)


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
@pytest.mark.parametrize("kept", [NONE, FEW], ids=str)
def test_everything_at_once(
    llama: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quant: str,
    kept: list[int],
) -> None:
    """Pruned, reordered, low-rank novices, and skipping."""
    path = tiny.write(tmp_path / "m.gguf", skipping(everything(kept)), quant, kept=kept)
    skips = tiny.logits(llama, path, RUNS)
    monkeypatch.setenv("LLAMA_MOE_SKIP_DISABLE", "1")
    for a, b in zip(skips, tiny.logits(llama, path, RUNS), strict=True):
        assert np.abs(a - b).max() <= max(STOCK_TOLERANCE[quant], 1e-4) * (a.max() - a.min())


def test_tools_keep_the_threshold(llama: ModuleType, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", skipping(tiny.random_model("olmoe")))
    model = tiny.load_model(llama, path)
    llama.llama_model_save_to_file(model, str(tmp_path / "saved.gguf").encode())
    llama.llama_model_free(model)
    assert_same(llama, path, tmp_path / "saved.gguf")
    small = tmp_path / "q8.gguf"
    command = [str(runtime.tool("llama-quantize")), str(path), str(small), "Q8_0", "1"]
    subprocess.run(command, check=True, capture_output=True)
    field = gguf.GGUFReader(small).fields["olmoe.expert_skip_threshold"]
    assert field.contents() == BETA


def test_what_is_left_out_is_zero(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    watch = Stacks()
    path = tiny.write(tmp_path / "m.gguf", skipping(tiny.random_model("olmoe")))
    with GgufModel(path, observer=watch) as model:
        model.read(range(1, 60))
    assert watch.rows > 0


class Stacks:
    """Rows of a product that are left out are zero."""

    rows = 0

    def start(self) -> None:
        pass

    def wants(self, node: Node) -> bool:
        return node.op == "MUL_MAT_ID"

    def see(self, node: Node) -> bool:
        ids = node.source(2)
        assert ids
        left_out = ids.values() < 0
        assert (node.values()[left_out] == 0).all()
        self.rows += int(left_out.sum())
        return True


KEY = "olmoe.expert_skip_threshold"
WRONG = {
    "nan": (lambda w: w.add_float32(KEY, float("nan")), "is nan, must be at least 0"),
    "negative": (lambda w: w.add_float32(KEY, -0.25), "is -0.25"),
    "one": (lambda w: w.add_float32(KEY, 1.0), "is 1, must be at least 0 and less than 1"),
    "large": (lambda w: w.add_float32(KEY, 3e38), "is 3e.38, must be at least 0 and less than 1"),
    "infinite": (lambda w: w.add_float32(KEY, float("inf")), "is inf"),
    "integer": (lambda w: w.add_uint32(KEY, 0), "has wrong type u32 but expected type f32"),
    "double": (lambda w: w.add_float64(KEY, 0.5), "has wrong type f64 but expected type f32"),
    "string": (lambda w: w.add_string(KEY, "0.5"), "has wrong type str but expected type f32"),
    "array": (lambda w: w.add_array(KEY, [0.5, 0.5]), "has wrong type arr but expected type f32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_thresholds(built_runtime: runtime.RuntimeInfo, tmp_path: Path, name: str) -> None:
    add, reason = WRONG[name]
    model = tiny.random_model("olmoe")
    writer = tiny.start(tmp_path / "m.gguf", model)
    add(writer)
    for tensor, value in model.tensors.items():
        writer.add_tensor(tensor, value)
    log = load_in_subprocess(tiny.finish(writer, tmp_path / "m.gguf"))
    assert re.search(f"{KEY} {reason}", log), log[-1500:]


def test_models_that_cannot_skip(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    log = load_in_subprocess(tiny.write(tmp_path / "g.gguf", skipping(tiny.grovemoe())))
    assert "expert_skip_threshold: not supported for the architecture grovemoe" in log
    dense = tiny.random_model("llama")
    keys = {k: v for k, v in dense.keys.items() if not k.startswith("expert_")}
    dense = skipping(replace(dense, keys=keys))
    log = load_in_subprocess(tiny.write(tmp_path / "d.gguf", dense, bias_type=None))
    assert "expert_skip_threshold: the model has no experts" in log


def test_warming_up_leaves_nothing_behind(llama: ModuleType, tmp_path: Path) -> None:
    """It runs all experts; the graph for that is not used again."""
    path = tiny.write(tmp_path / "m.gguf", skipping(tiny.random_model("qwen3moe")))
    model = tiny.load_model(llama, path)
    found = []
    for warms_up in (False, True):
        params = llama.llama_context_default_params()
        params.n_ctx = 256
        context = llama.llama_init_from_model(model, params)
        if warms_up:
            llama.llama_set_warmup(context, True)
            decoded(llama, context, 3)
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            llama.llama_set_warmup(context, False)
        found.append(decoded(llama, context, 5))
        llama.llama_free(context)
    llama.llama_model_free(model)
    assert np.array_equal(*found)


def decoded(llama: ModuleType, context: object, token: int) -> np.ndarray:
    """Logits [vocabulary] after one token at the start."""
    batch = llama.llama_batch_get_one((llama.llama_token * 1)(token), 1)
    assert llama.llama_decode(context, batch) == 0
    return np.ctypeslib.as_array(llama.llama_get_logits(context), (tiny.N_VOCAB,)).copy()
