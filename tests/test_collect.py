"""Statistics from torch models against a slow float64 loop over tokens and experts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mone_edge.calibration import Batches
from mone_edge.collect import sampling
from mone_edge.collect.experts import experts_implementation, experts_modules
from mone_edge.collect.loading import choose_dtype, load_model
from mone_edge.collect.torch_model import IMPLEMENTATION, collect, collect_loaded, observe_experts
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.stats import ARRAYS, PAIRS, SAMPLED, STREAM, LayerStats
from tests.tiny import MODEL_TYPES, VOCAB, make_checkpoint

EXPERTS, TOP_K = 16, 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny")
    return {
        kind: make_checkpoint(kind, root / kind, experts=EXPERTS, top_k=TOP_K)
        for kind in MODEL_TYPES
    }


def batches(samples: int, seq_len: int, seed: int = 0) -> Batches:
    tokens = np.random.default_rng(seed).integers(2, VOCAB, (samples, seq_len))
    return Batches(tokens, ("random",), f"sha-{seed}", seed, samples, seq_len, tokens.size)


def routed_calls(model: Any, tokens: np.ndarray) -> dict[int, list[tuple[np.ndarray, ...]]]:
    """What each block's experts module was called with: hidden, index, weights."""
    calls: dict[int, list[tuple[np.ndarray, ...]]] = {}
    handles = []
    for index, (_, module) in experts_modules(model).items():
        sink = calls.setdefault(index, [])
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, sink=sink: sink.append(tuple(a.numpy().copy() for a in args))
            )
        )
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(tokens))
    for handle in handles:
        handle.remove()
    return calls


def inverse_streams(model: Any, tokens: np.ndarray) -> dict[int, np.ndarray]:
    """The sum over tokens of 1 / ||h||^2 behind each layer."""
    states: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, args, out: states.append(out))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(tokens))
    for handle in handles:
        handle.remove()
    squares = [np.square(h.double().numpy()).sum(-1) for h in states]
    return {i: np.array([(1 / square).sum()]) for i, square in enumerate(squares)}


def reference(
    module: Any, hidden: np.ndarray, index: np.ndarray, weights: np.ndarray, router: np.ndarray
) -> LayerStats:
    """Token by token, expert by expert, textbook formulas."""
    gate_up, down = (
        p.detach().numpy().astype(np.float64) for p in (module.gate_up_proj, module.down_proj)
    )
    experts, width = len(down), down.shape[1]
    seen: list[list[tuple[float, np.ndarray, np.ndarray, np.ndarray]]] = [
        [] for _ in range(experts)
    ]
    for token, x in enumerate(hidden.astype(np.float64)):
        for expert, g in zip(index[token], weights[token].astype(np.float64), strict=True):
            gate, up = np.split(gate_up[expert] @ x, 2)
            inner = gate / (1 + np.exp(-gate)) * up
            seen[expert].append((g, x, inner, down[expert] @ inner))
    rows: dict[str, list[Any]] = {n: [] for n in ARRAYS if n not in (*PAIRS, *SAMPLED, STREAM)}
    means = np.zeros((experts, width))
    for expert, calls in enumerate(seen):
        g = np.array([c[0] for c in calls])
        x = np.array([c[1] for c in calls]).reshape(len(calls), hidden.shape[1])
        a = np.array([c[2] for c in calls]).reshape(len(calls), down.shape[2])
        f = np.array([c[3] for c in calls]).reshape(len(calls), width)
        norm = np.sqrt((f**2).sum(1))
        mean = f.mean(0) if calls else np.zeros(width)
        means[expert] = mean
        weighted = (g[:, None] ** 2 * f).sum(0) / (g**2).sum() if calls else np.zeros(width)
        values = {
            "count": len(calls),
            "gate_sum": g.sum(),
            "gate_sq_sum": (g**2).sum(),
            "output_mean": mean,
            "output_m2": ((f - mean) ** 2).sum(0),
            "gate_sq_mean": weighted,
            "norm_sum": norm.sum(),
            "norm_sq_sum": (norm**2).sum(),
            "gate_norm_sum": (g * norm).sum(),
            "gate_sq_norm_sq_sum": (g**2 * norm**2).sum(),
            "input_sq_sum": (x**2).sum(0),
            "inner_sq_sum": (a**2).sum(0),
            "output_max": np.abs(f).max(initial=0),
        }
        for name, value in values.items():
            rows[name].append(value)
    gates, residuals = np.zeros((len(hidden), experts)), np.zeros((len(hidden), experts, width))
    positions = [0] * experts
    for token, ids in enumerate(index):
        for expert in ids:
            g, _, _, output = seen[expert][positions[expert]]
            positions[expert] += 1
            gates[token, expert] = g
            residuals[token, expert] = g * (output - means[expert])
    arrays = {k: np.array(v) for k, v in rows.items()}
    arrays["pair_gate"] = gates.T @ gates
    arrays["pair_error"] = np.einsum("tid,tjd->ij", residuals, residuals)
    return LayerStats(
        len(hidden), index.shape[1], **arrays, **sampled(hidden, gate_up, down, router)
    )


def sampled(
    hidden: np.ndarray, gate_up: np.ndarray, down: np.ndarray, router: np.ndarray
) -> dict[str, Any]:
    """All experts on all tokens; CKA's products of D x D matrices, as it is defined."""
    x = hidden.astype(np.float64)
    outputs = []
    for one, two in zip(gate_up, down, strict=True):
        gate, up = np.split(x @ one.T, 2, axis=1)
        outputs.append(gate / (1 + np.exp(-gate)) * up @ two.T)
    centred = [f - f.mean(0) for f in outputs]
    products = [[np.linalg.norm(a.T @ b, "fro") ** 2 for b in centred] for a in centred]
    logits = x @ router.astype(np.float64).T
    return {
        "sampled": len(x),
        "sample_sum": np.array([f.sum(0) for f in outputs]),
        "sample_kernel": np.array(products) / len(x),
        "sample_logits": logits.T @ logits,
    }


def assert_same(
    actual: LayerStats, expected: LayerStats, rtol: float, but: tuple[str, ...] = ()
) -> None:
    assert (actual.tokens, actual.top_k) == (expected.tokens, expected.top_k)
    for name in set(ARRAYS) - set(but):
        want = getattr(expected, name)
        atol = rtol * np.abs(want).max()
        np.testing.assert_allclose(getattr(actual, name), want, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-11), ("float32", 2e-5)])
def test_statistics_equal_the_float64_reference(
    checkpoints: dict[str, Path], kind: str, dtype: str, rtol: float
) -> None:
    model = load_model(checkpoints[kind], device="cpu", dtype=dtype)
    few = batches(1, 16)
    stats = collect_loaded(model, few)
    calls, streams = routed_calls(model, few.tokens), inverse_streams(model, few.tokens)
    counts = np.concatenate([layer.count for layer in stats.layers.values()])
    assert (counts == 0).any() and (counts == 1).any(), "the case must cover rare experts"
    for index, (name, module) in experts_modules(model).items():
        ((hidden, ids, weights),) = calls[index]
        router = model.get_submodule(name.replace("experts", "gate")).weight.detach().numpy()
        assert stats.layers[index].sampled == few.tokens.size
        expected = reference(module, hidden, ids, weights, router)
        expected = replace(expected, stream_inverse=streams[index])
        assert_same(stats.layers[index], expected, rtol)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_instrumented_logits_equal_eager(checkpoints: dict[str, Path], kind: str) -> None:
    model = load_model(checkpoints[kind], device="cpu", dtype="float32")
    tokens = torch.from_numpy(batches(2, 32).tokens)
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        with observe_experts(model):
            actual = model(input_ids=tokens).logits
        after = model(input_ids=tokens).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_sampled_tokens_are_spread_over_the_text() -> None:
    for total in (1, 255, 256, 257, 1000, 262_144):
        wanted = sampling.positions(total, seed=1)
        assert len(wanted) == min(total, sampling.TOKENS)
        assert (np.diff(wanted) > 0).all()
        assert (wanted // (total / len(wanted)) - np.arange(len(wanted))).max() <= 0
        assert wanted[0] >= 0 and wanted[-1] >= total - total / len(wanted) - 1
    assert not np.array_equal(wanted, sampling.positions(total, seed=2))


@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_the_sampled_tokens_are_those_wanted(
    checkpoints: dict[str, Path], batch_tokens: int
) -> None:
    """However the 384 tokens are divided into calls."""
    model = load_model(checkpoints["qwen3_moe"], device="cpu", dtype="float64")
    some = batches(12, 32, seed=5)
    stats = collect_loaded(model, some, batch_tokens=batch_tokens)
    calls = routed_calls(model, some.tokens)
    for index, (name, module) in experts_modules(model).items():
        hidden = calls[index][0][0][sampling.positions(12 * 32, some.seed)]
        weights = [w.detach().numpy() for w in (module.gate_up_proj, module.down_proj)]
        router = model.get_submodule(name.replace("experts", "gate")).weight.detach().numpy()
        for field, value in sampled(hidden, *weights, router).items():
            want = np.asarray(value)
            atol = 1e-11 * np.abs(want).max()
            np.testing.assert_allclose(getattr(stats.layers[index], field), want, 1e-9, atol)


def test_overflowing_outputs_leave_no_sample(checkpoints: dict[str, Path]) -> None:
    """An expert that no token is sent to may overflow on what it never sees; the rest is kept."""
    model = load_model(checkpoints["olmoe"], device="cpu")
    _, module = experts_modules(model)[1]
    few = batches(1, 16)
    unseen = int(np.flatnonzero(collect_loaded(model, few).layers[1].count == 0)[0])
    with torch.no_grad():
        module.down_proj[unseen] = float("inf")
    layers = collect_loaded(model, few).layers
    assert layers[1].sample_kernel is None and layers[1].sampled == 0
    assert layers[0].sample_kernel is not None and layers[1].pair_error is not None


def test_a_router_that_scales_its_input_is_not_its_matrix() -> None:
    model: Any = torch.nn.Module()
    model.experts, model.router = torch.nn.Module(), torch.nn.Module()
    model.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 6, 8))
    model.router.proj = torch.nn.Linear(6, 4, bias=False)
    layer: Any = torch.nn.Module()
    layer.block = model
    assert sampling.router_weight(layer, "block.experts", 6) is model.router.proj.weight
    alone: Any = torch.nn.Module()
    alone.experts, alone.weight = model.experts, torch.nn.Parameter(torch.ones(4, 6))
    layer.other = alone
    assert sampling.router_weight(layer, "other.experts", 6) is alone.weight
    model.router.scale = torch.nn.Parameter(torch.ones(6))
    assert sampling.router_weight(layer, "block.experts", 6) is None


def test_parts_merge_to_the_whole(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["olmoe"], device="cpu", dtype="float64")
    whole = batches(6, 32)
    parts = [
        Batches(whole.tokens[rows], whole.specs, f"part-{rows}", 0, 2, 32, 64)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    first, second, third = (collect_loaded(model, part) for part in parts)
    merged = first.merge(second).merge(third)
    expected = collect_loaded(model, whole)
    for index, layer in expected.layers.items():
        assert_same(merged.layers[index], layer, 1e-12, but=("pair_error", "sample_kernel"))
        # outputs of other tokens: within parts of 2 or 3 sequences only
        assert merged.layers[index].sampled == layer.sampled == whole.tokens.size
    assert merged.linears.keys() == expected.linears.keys()
    for name, linear in expected.linears.items():
        np.testing.assert_allclose(
            merged.linears[name].input_sq_sum, linear.input_sq_sum, rtol=1e-12
        )
    assert merged.provenance.samples == 6
    assert len(merged.provenance.data_sha256) == 3


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_linears_are_named_as_in_the_checkpoint(checkpoints: dict[str, Path], kind: str) -> None:
    folder = checkpoints[kind]
    few = batches(2, 24)
    stats = collect(folder, few, model="org/name", fingerprint="abc", device="cpu")
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        keys = set(file.keys())
    assert {f"{name}.weight" for name in stats.linears} <= keys
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} <= stats.linears.keys()
    assert all(linear.count == few.tokens.size for linear in stats.linears.values())
    assert not any("experts." in name for name in stats.linears)
    assert stats.provenance.model == "org/name"
    assert stats.provenance.architecture == kind


def test_linear_moments_equal_direct_ones(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["qwen2_moe"], device="cpu", dtype="float32")
    few = batches(2, 24)
    seen: dict[str, torch.Tensor] = {}
    names = (
        "lm_head",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.shared_expert.down_proj",
    )
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].double())
        )
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(few.tokens))
    direct = {name: x.reshape(-1, x.shape[-1]).square().sum(0).numpy() for name, x in seen.items()}
    linears = collect_loaded(model, few).linears
    for name in names:
        np.testing.assert_allclose(linears[name].input_sq_sum, direct[name], rtol=1e-5)
    assert collect_loaded(model, few, linears=False).linears == {}


def test_bfloat16_accumulates_in_float32(tmp_path: Path) -> None:
    folder = make_checkpoint("olmoe", tmp_path / "m", dtype="bfloat16", experts=EXPERTS)
    model = load_model(folder, device="cpu", dtype="bfloat16")
    few = batches(2, 32)
    stats = collect_loaded(model, few)
    exact = collect_loaded(model.float(), few)
    for index, layer in stats.layers.items():
        assert layer.count.sum() == few.tokens.size * TOP_K
        mean = layer.norm_sum.sum() / layer.count.sum()
        want = exact.layers[index].norm_sum.sum() / exact.layers[index].count.sum()
        assert mean == pytest.approx(want, rel=0.05)


def test_progress_is_told(checkpoints: dict[str, Path]) -> None:
    steps: list[tuple[int, int]] = []
    model = load_model(checkpoints["olmoe"], device="cpu")
    collect_loaded(model, batches(5, 16), batch_tokens=32, on_progress=lambda *s: steps.append(s))
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_interrupt_passes_and_leaves_the_model_clean(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["olmoe"], device="cpu")
    tokens = torch.from_numpy(batches(1, 16).tokens)
    before = model(input_ids=tokens).logits

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_loaded(model, batches(2, 16), on_progress=stop)
    assert model(input_ids=tokens).logits.shape == before.shape
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_dense_models_are_refused_by_name() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(MoneEdgeError, match="llama"):
        collect_loaded(LlamaForCausalLM(config), batches(1, 16))


def test_experts_that_miss_tokens_are_refused(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["olmoe"], device="cpu")
    experts = experts_modules(model)[1][1]
    experts.forward = lambda hidden, index, weights: hidden  # bypasses the interface
    with pytest.raises(
        MoneEdgeError, match=r"olmoe, block 1: the experts saw 0 routed tokens of 16"
    ):
        collect_loaded(model, batches(1, 16))


def test_not_finite_outputs_are_refused(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["olmoe"], device="cpu")
    with torch.no_grad():
        experts_modules(model)[1][1].down_proj[:] = float("inf")
    with pytest.raises(MoneEdgeError, match=r"block 1: the outputs of .* not finite"):
        collect_loaded(model, batches(1, 16))


def test_damaged_checkpoints_get_one_line(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(MoneEdgeError, match=r"no config\.json"):
        load_model(tmp_path)
    source = checkpoints["olmoe"]
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(MoneEdgeError, match=r"holds no model\*.safetensors"):
        load_model(tmp_path)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoneEdgeError, match=r"1 weights are missing .*q_proj"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + b"\0" * 20)
    with pytest.raises(MoneEdgeError) as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)


def test_device_and_dtype_are_checked(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints["olmoe"]
    with pytest.raises(UsageError, match="--device nowhere"):
        load_model(folder, device="nowhere")
    with pytest.raises(UsageError, match="--dtype int8"):
        load_model(folder, dtype="int8")
    cpu = torch.device("cpu")
    assert choose_dtype(folder, cpu) == torch.float32
    monkeypatch.setattr("mone_edge.collect.loading.memory_bytes", lambda device: 1000)
    with pytest.raises(MoneEdgeError, match="GiB of weights"):
        choose_dtype(folder, cpu)


def test_implementation_is_restored(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["olmoe"], device="cpu")
    with experts_implementation(model, IMPLEMENTATION):
        assert model.config._experts_implementation == IMPLEMENTATION
    assert model.config._experts_implementation == "eager"
