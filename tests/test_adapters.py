"""Experts that transformers does not send through its interface, against plain loops in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mone_edge.collect.experts import experts_modules
from mone_edge.collect.torch_model import observe_experts
from mone_edge.errors import MoneEdgeError
from mone_edge.stats import LayerStats
from tests import architectures, tiny

TOKENS = torch.arange(96)[None]


def observed(name: str) -> tuple[Any, Any, torch.Tensor, LayerStats]:
    """The model, its first MoE block, what the block read [T, H], and what was measured."""
    model = architectures.build(name).double().eval()
    tiny.fill(model, 0)
    layer, (path, _) = min(experts_modules(model).items())
    block = model.get_submodule(path.rpartition(".")[0])
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode(), observe_experts(model) as sums:
        model(input_ids=TOKENS)
    measured = sums[layer].total
    assert measured is not None
    return model, block, seen[0].flatten(0, 1), measured


def test_llama4_measures_contributions() -> None:
    _, block, hidden, measured = observed("llama4")
    with torch.inference_mode():
        logits = hidden @ block.router.weight.T
        best = logits.argmax(1)
        inputs = hidden * logits.sigmoid().gather(1, best[:, None])
        gate, up = torch.einsum("th,thi->ti", inputs, block.experts.gate_up_proj[best]).chunk(2, -1)
        inner = up * torch.nn.functional.silu(gate)
        outputs = torch.einsum("ti,tih->th", inner, block.experts.down_proj[best])
    for expert in range(architectures.EXPERTS):
        rows = best == expert
        assert measured.count[expert] == measured.gate_sum[expert] == rows.sum()
        if not rows.any():
            continue
        assert np.allclose(measured.output_mean[expert], outputs[rows].mean(0))
        assert np.allclose(measured.gate_sq_mean[expert], outputs[rows].mean(0))
        assert np.allclose(measured.input_sq_sum[expert], inputs[rows].square().sum(0))
        assert np.allclose(measured.inner_sq_sum[expert], inner[rows].square().sum(0))


def test_dbrx_measures_its_stacked_experts() -> None:
    _, block, hidden, measured = observed("dbrx")
    stacks = [w.view(architectures.EXPERTS, -1, hidden.shape[1]) for w in
              (block.experts.mlp.w1, block.experts.mlp.v1, block.experts.mlp.w2)]  # fmt: skip
    with torch.inference_mode():
        weights, index = block.route_tokens_to_experts(block.router(hidden))
        for expert in range(architectures.EXPERTS):
            rows, slots = torch.where(index == expert)
            if not len(rows):
                continue
            gate, up = (hidden[rows] @ stack[expert].T for stack in stacks[:2])
            outputs = (torch.nn.functional.silu(gate) * up) @ stacks[2][expert]
            assert np.allclose(measured.output_mean[expert], outputs.mean(0))
            assert np.allclose(measured.gate_sum[expert], weights[rows, slots].sum())


def test_experts_that_copy_their_input_are_refused() -> None:
    sizes = {"hidden_size": 32, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16,
             "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 1,
             "vocab_size": 64, "q_lora_rank": 16, "kv_lora_rank": 16}  # fmt: skip
    config = AutoConfig.for_model("longcat_flash", **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(MoneEdgeError, match="LongcatFlashExperts: .*only copy their input"):
        experts_modules(model)
