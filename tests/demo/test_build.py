"""The build: what the trained student computes is what transformers computes of the checkpoint."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from mone_edge import demo
from mone_edge.demo import build, dense
from mone_edge.demo.perplexity import compare
from mone_edge.demo.training.model import Shape, Student, four_bits, reorder
from mone_edge.demo.training.pack import pack, quantise, require_exact, two_in_a_byte
from mone_edge.errors import MoneEdgeError
from tests.demo import tiny_student


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """The real demo checkpoint, built unless the cache has it."""
    return demo.model_dir()


def test_checkpoint_computes_what_the_student_computed():
    shape = tiny_student.SHAPE
    student = tiny_student.student()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in range(shape.layers):
            reorder(student, layer, torch.randperm(shape.neurons, generator=generator))
        for name, parameter in student.named_parameters():
            if name.endswith("_up"):
                parameter.normal_(std=0.02, generator=generator)
        student.shared_gate.normal_(generator=generator)
        student.down_change.normal_(std=0.02, generator=generator)
    parts = pack(state_of(student))
    with torch.no_grad():  # the student as packed
        for name, parameter in student.named_parameters():
            if name == "down_change":  # rounded as it is packed
                continue
            factor, _, side = name.rpartition("_")
            if f"{factor}.scale" in parts:
                scale = parts[f"{factor}.scale"].unsqueeze(1) if side == "up" else 1
                parameter.copy_(parts[f"{factor}.{side}"].float() * scale)
            else:
                parameter.copy_(parts[name])
    tensors = build.moe_tensors(tiny_student.dense_weights(shape), parts)

    config = Qwen2MoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        rms_norm_eps=shape.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        **{
            key: value
            for key, value in build.moe_config({}).items()
            if key not in ("architectures", "model_type")
        },
    )
    model = Qwen2MoeForCausalLM(config)
    folder_state = {name: tensor.float() for name, tensor in tensors.items()}
    missing = load_into(model, folder_state)
    assert not missing
    tokens = tiny_student.tokens(2, 16)
    with torch.no_grad():
        last, _ = student(tokens)
        wanted = F.linear(last, student.embedding)
        found = model(tokens).logits.view_as(wanted)
        student.router.zero_()
        other = F.linear(student(tokens)[0], student.embedding)
    error = (found - wanted).square().mean() / wanted.square().mean()
    assert error < 1e-9
    assert (other - wanted).square().mean() / wanted.square().mean() > 10 * error


def state_of(student: Student) -> dict[str, Any]:
    """What a checkpoint of the training holds."""
    return {"order": student.order, "parameters": dict(student.named_parameters())}


def test_four_bits_are_near_and_a_column_is_scaled_by_its_largest():
    correction = torch.randn(32, 48, generator=torch.Generator().manual_seed(5)) * 0.02
    codes, scale = four_bits(correction)
    assert codes.abs().amax(dim=0).eq(7).all()
    assert (codes.float() * scale.float() - correction).norm() / correction.norm() < 0.2


def test_two_codes_in_a_byte_come_back():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(1, 3, 1)
    parts = {"down.codes": two_in_a_byte(codes), "down.scale": torch.full((1, 16), 0.5)}
    assert torch.equal(build.down_correction(parts, 0), codes[0].double() / 2)


def load_into(model: Qwen2MoeForCausalLM, tensors: dict[str, torch.Tensor]) -> set[str]:
    """Fill a model from per-expert tensors, as transformers does from disk; returns misfits."""
    filled = dict(tensors)
    experts = model.config.num_experts
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = [
            {k: filled.pop(f"{prefix}.{e}.{k}_proj.weight") for k in ("gate", "up", "down")}
            for e in range(experts)
        ]
        gate_up = [torch.cat([part["gate"], part["up"]]) for part in parts]
        filled[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        filled[f"{prefix}.down_proj"] = torch.stack([part["down"] for part in parts])
    result = model.load_state_dict(filled, strict=False)
    return set(result.missing_keys) | set(result.unexpected_keys)


def test_corrections_do_not_depend_on_the_order_of_sums():
    """The claim of `build.py`: float64 holds the products exactly, in any order."""
    parts = load_file(build.CORRECTIONS)
    turned = dict(parts)
    for name in ("qkv", "o", "gate_up"):
        turned[f"{name}.up"] = parts[f"{name}.up"].flip(2)
        turned[f"{name}.scale"] = parts[f"{name}.scale"].flip(1)
        turned[f"{name}.down"] = parts[f"{name}.down"].flip(1)
        for layer in (0, 17, 29):
            one, other = (build.correction(p, name, layer) for p in (parts, turned))
            assert torch.equal(one, other)
        require_exact(parts[f"{name}.scale"], name)
    assert float(build.down_correction(parts, 3).abs().max()) > 0


def test_scales_too_far_apart_are_refused():
    with pytest.raises(MoneEdgeError, match="apart"):
        require_exact(torch.tensor([[1.0, 1e-9]]), "down")


def test_quantised_factors_keep_the_product():
    up, down = torch.randn(2, 30, 4), torch.randn(2, 4, 20)
    up[1, :, 2] = 0
    up_int, down_int, scale = quantise(up, down)
    product = (up_int.float() * scale.float().unsqueeze(1)) @ down_int.float()
    assert (product - up @ down).norm() / (up @ down).norm() < 0.02


def test_a_dead_shared_gate_is_refused():
    """llama.cpp computes its sigmoid as silu(x) / x: a gate of zeros would be 0 / 0 there."""
    student = tiny_student.student(shape=replace(tiny_student.SHAPE))
    with torch.no_grad():
        student.shared_gate[1] = 0
    state = state_of(student)
    with pytest.raises(MoneEdgeError, match="shared gate"):
        pack(state)


def test_demo_is_a_moe_as_promised(demo_dir: Path):
    config = json.loads((demo_dir / "config.json").read_text())
    assert config["model_type"] == "qwen2_moe"
    assert config["num_experts"] >= 16
    assert config["num_experts_per_tok"] <= config["num_experts"] // 2
    active = config["shared_expert_intermediate_size"]
    active += config["num_experts_per_tok"] * config["moe_intermediate_size"]
    assert active <= 0.75 * config["intermediate_size"]
    shape = Shape()
    assert (shape.experts, shape.expert_width) == (build.EXPERTS, build.EXPERT_WIDTH)
    assert (shape.top_k, shape.shared) == (build.TOP_K, build.SHARED_NEURONS)


def test_demo_is_built_once_and_its_bits_are_the_published_ones(demo_dir: Path):
    weights = demo_dir / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert demo.model_dir(offline=True) == demo_dir
    assert weights.stat().st_mtime_ns == before
    assert dense.tensors_sha256(load_file(weights)) == build.TENSORS_SHA256


def test_damaged_corrections_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    damaged = tmp_path / "corrections.safetensors"
    data = bytearray(build.CORRECTIONS.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    monkeypatch.setattr(build, "CORRECTIONS", damaged)
    with pytest.raises(MoneEdgeError, match="damaged"):
        build.model_dir()


def test_demo_loads_and_speaks(demo_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(demo_dir)
    model, report = AutoModelForCausalLM.from_pretrained(demo_dir, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_demo_is_near_the_dense_model(demo_dir: Path):
    """A sample of what `python -m mone_edge.demo.perplexity` measures."""
    found = compare(demo.evaluation_text(), 256, 8, "bfloat16")
    assert found["ratio"] < 1.4
    assert 15 < found["dense_ppl"] < 60
    assert math.isclose(found["moe_ppl"] / found["dense_ppl"], found["ratio"], rel_tol=1e-3)
