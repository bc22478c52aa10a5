"""Why llama.cpp computes something else for some architectures: torch made to do it is the same.

What docs/architectures.md gives as the cause of a deviation is put into transformers' model. Where
that is all of the cause, the logits agree; and each part of it alone is not all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import architectures as benchmark
from mone_edge.collect import gguf as collect_gguf
from mone_edge.collect.loading import load_model
from mone_edge.conversion import packages
from tests import architectures

pytestmark = pytest.mark.usefixtures("built_runtime")


def rms_norms(model: nn.Module) -> None:
    """phi3.cpp: `build_norm(..., LLM_NORM_RMS)`, with the bias of a layer norm."""

    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weight + self.bias

    _replace(model, "LayerNorm", forward)


def softmax_router(model: nn.Module) -> None:
    """phi3.cpp: `build_moe_ffn` with softmax, gate weights of the selected divided by their sum."""

    def forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden, self.weight)
        weights, experts = logits.softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), experts

    _replace(model, "PhimoeTopKRouter", forward)


def consecutive_pairs(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """llama-model.cpp: HY_V4 has LLAMA_ROPE_TYPE_NORM."""
    cos, sin = (
        x[..., : x.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim)
        for x in (cos, sin)
    )

    def rotate(x: Tensor) -> Tensor:
        other = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return x * cos + other * sin

    return rotate(q), rotate(k)


def test_phimoe_differs_by_its_norms_and_its_router(tmp_path: Path) -> None:
    trial = benchmark.Trial("phimoe", tmp_path)
    assert _deviation(trial, rms_norms) > benchmark.TOLERANCE
    assert _deviation(trial, softmax_router) > benchmark.TOLERANCE
    assert _deviation(trial, rms_norms, softmax_router) < 1e-5


def test_hy_v4_differs_by_the_pairs_that_are_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.hy_v4 import modeling_hy_v4

    trial = benchmark.Trial("hy_v4", tmp_path)
    assert _deviation(trial) > benchmark.TOLERANCE
    monkeypatch.setattr(modeling_hy_v4, "apply_rotary_pos_emb", consecutive_pairs)
    assert _deviation(trial) < 1e-4  # norms of latents have another epsilon too


def test_mimo_v2_flash_sees_one_more_key_by_sliding_window_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = architectures.ARCHITECTURES["mimo_v2_flash"].hub
    monkeypatch.setitem(hub, "sliding_window_size", 32)  # type: ignore[arg-type]
    trial = benchmark.Trial("mimo_v2_flash", tmp_path)
    assert load_model(trial.source.path, device="cpu", dtype="float32").config.sliding_window == 33
    assert _deviation(trial) > benchmark.TOLERANCE
    assert _deviation(trial, lambda model: _window(model, 32)) < 1e-5


def test_qwen4_exp_selects_keys_and_more_of_them_beyond_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers renames `layer_types`; conversion then wrote a model that attends to all keys.

    With a budget of 32 keys in blocks of 4, llama.cpp selects 35 whatever the length: as many as
    transformers where the last block lacks one, more elsewhere.
    """
    fields = architectures.ARCHITECTURES["qwen4_exp"].fields
    monkeypatch.setitem(fields, "indexer_budget", 32)  # type: ignore[arg-type]
    layers = ["linear_attention", "linear_attention", "indexed_attention"]
    monkeypatch.setitem(fields, "layer_types", layers)  # type: ignore[arg-type]
    trial = benchmark.Trial("qwen4_exp", tmp_path)
    ratios = packages()[0].GGUFReader(trial.gguf).fields["qwen4exp.attention.compress_ratios"]
    assert ratios.contents() == [0, 0, 4]
    ours = benchmark._llama_logits(trial.gguf, trial.tokens)
    deviation = np.abs(ours - trial.whole).max(1) / np.ptp(trial.whole)  # [positions]
    visible = np.arange(len(deviation)) + 1
    beyond, lacks_one = visible > 35, visible % 4 == 3
    assert deviation[~beyond].max() < 1e-5
    assert (deviation[beyond & lacks_one] < 1e-5).mean() > 0.9  # all but equal scores of blocks
    assert (deviation[beyond & ~lacks_one] < 1e-5).mean() < 0.1


@pytest.mark.parametrize(("name", "factor"), [("laguna", 1.5), ("minimax_m3_vl", 2.0)])
def test_gate_weights_differ_by_the_factor_after_the_experts(
    name: str, factor: float, tmp_path: Path
) -> None:
    trial = benchmark.Trial(name, tmp_path)
    seen = collect_gguf.collect(trial.gguf, trial.batches, threads=1)
    for index, layer in trial.stats.layers.items():
        ours = seen.layers[index]
        np.testing.assert_array_equal(ours.count, layer.count)
        for part, scale in (
            ("output_mean", 1.0),
            ("gate_sum", factor),
            ("gate_sq_norm_sq_sum", factor**2),
        ):
            expected = getattr(layer, part) * scale
            assert benchmark._distance(getattr(ours, part), expected) < 1e-5


def _replace(model: nn.Module, kind: str, forward: Callable[..., Any]) -> None:
    for module in model.modules():
        if type(module).__name__ == kind:
            module.forward = forward.__get__(module)  # type: ignore[method-assign]


def _window(model: nn.Module, keys: int) -> None:
    model.config.sliding_window = keys  # type: ignore[union-attr, assignment]


def _deviation(trial: benchmark.Trial, *changes: Callable[[nn.Module], None]) -> float:
    """llama.cpp's logits against those of transformers' model with the changes made."""
    model = load_model(trial.source.path, device="cpu", dtype="float32")
    for change in changes:
        change(model)
    expected = benchmark._logits(model, trial.tokens)
    return benchmark._deviation(benchmark._llama_logits(trial.gguf, trial.tokens), expected)
