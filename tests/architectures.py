"""Tiny random checkpoints of every MoE architecture that transformers and llama.cpp share.

An entry of `ARCHITECTURES` is what differs from `COMMON` in the config of one model type: sizes
that an architecture names in its own way, and what makes its MoE blocks special (dense first
layers, shared experts, correction biases, groups). `make` saves one as a checkpoint folder.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mone_edge.collect.loading import auto_model
from tests import tiny

HIDDEN, INNER, EXPERTS, TOP_K, LAYERS = 64, 32, 8, 2, 3
Fields = dict[str, Any]
COMMON: Fields = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
HEAD: Fields = {"head_dim": 16}
SIZES: Fields = {"intermediate_size": 2 * INNER, "moe_intermediate_size": INNER}
LOCAL: Fields = {"num_local_experts": EXPERTS, "intermediate_size": INNER}
NUM: Fields = SIZES | {"num_experts": EXPERTS}
ROUTED: Fields = SIZES | {"n_routed_experts": EXPERTS}
DENSE_FIRST: Fields = {"first_k_dense_replace": 1}
SPARSE_AFTER_DENSE: Fields = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
MLA: Fields = {  # latent attention
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
INDEXER: Fields = {  # sparse attention that selects more keys than there are: not what is tested
    "index_topk": 512,
    "index_head_dim": 64,
    "index_n_heads": 4,
    "layer_types": ["indexed_attention"] * LAYERS,
}
MAMBA: Fields = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
DELTA_NET: Fields = {
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": INNER,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
SLIDING: Fields = {"sliding_window": 32}
SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention"]
ROPE: Fields = {"rope_type": "default", "rope_theta": 10000.0}
HALF_ROPE: Fields = ROPE | {"partial_rotary_factor": 0.5}
SIGMOID: Fields = {"scoring_func": "sigmoid"}
VISION: Fields = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
GLM_TOKENS = ("[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>")


@dataclass(frozen=True)
class Tiny:
    """How to make a model of one architecture small."""

    fields: Mapping[str, Any] = field(default_factory=dict)  # over COMMON, in its own config's keys
    model_type: str = ""  # in transformers, where it is not the entry's name
    common: bool = True  # whether the config knows the keys of COMMON
    vision: Mapping[str, Any] | None = None  # fields then describe its text_config
    hub: Mapping[str, Any] = field(default_factory=dict)  # config.json's keys that saving loses
    rename: Mapping[str, str] = field(default_factory=dict)  # saved weights -> as on the hub
    transpose: str = ""  # weights that the hub has the other way round
    tokens: tuple[str, ...] = ()  # that llama.cpp's conversion looks for by name
    tokenizer: str = "byte-level"  # or "llama", "sentencepiece": what the conversion reads
    own_tokenizer: bool = False  # whether the conversion runs Python code of the checkpoint for it


ARCHITECTURES: dict[str, Tiny] = {
    "afmoe": Tiny(
        NUM
        | HEAD
        | SLIDING
        | {"num_dense_layers": 1, "num_shared_experts": 1, "num_hidden_layers": 4}
        | {"route_scale": 1.5, "mup_enabled": True},
        hub={"route_norm": True, "score_func": "sigmoid"},
    ),
    "cohere2_moe": Tiny(
        HEAD
        | SLIDING
        | {"num_experts": EXPERTS, "intermediate_size": INNER, "num_shared_experts": 1}
        | {"pad_token_id": 0, "tie_word_embeddings": True}
    ),
    "dbrx": Tiny(
        {"d_model": HIDDEN, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 512}
        | {"vocab_size": tiny.VOCAB, "bos_token_id": 0, "eos_token_id": 1}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
        | {
            "ffn_config": {
                "hidden_size": HIDDEN,
                "ffn_hidden_size": INNER,
                "moe_num_experts": EXPERTS,
                "moe_top_k": TOP_K,
            }
        },
        common=False,
    ),
    "deepseek_v2": Tiny(
        ROUTED
        | MLA
        | HEAD
        | DENSE_FIRST
        | {"n_shared_experts": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
        | {"routed_scaling_factor": 1.5}
    ),
    "deepseek_v3": Tiny(
        ROUTED
        | MLA
        | HEAD
        | DENSE_FIRST
        | {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
        hub=SIGMOID,
    ),
    "deepseek_v3 (groups)": Tiny(
        ROUTED
        | MLA
        | HEAD
        | DENSE_FIRST
        | {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0},
        model_type="deepseek_v3",
        hub=SIGMOID,
    ),
    "deepseek_v32": Tiny(
        ROUTED
        | MLA
        | HEAD
        | DENSE_FIRST
        | INDEXER
        | SPARSE_AFTER_DENSE
        | {"n_group": 1, "topk_group": 1},
        hub=SIGMOID,
        own_tokenizer=True,
    ),
    "deepseek_v4": Tiny(
        INDEXER
        | SLIDING
        | {"moe_intermediate_size": INNER, "num_key_value_heads": 1, "head_dim": 32}
        | {"q_lora_rank": 32, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
        | {"o_groups": 2, "o_lora_rank": 32, "hc_mult": 2}
        | {"mlp_layer_types": ["hash_moe", "moe", "moe"]}
        | {
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
            ]
        }
    ),
    "dots1": Tiny(
        ROUTED
        | HEAD
        | DENSE_FIRST
        | {"n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
        | {"num_key_value_heads": 4},
        hub=SIGMOID,
    ),
    "dots3_note": Tiny(
        ROUTED
        | MLA
        | INDEXER
        | SLIDING
        | SPARSE_AFTER_DENSE
        | {"head_dim": 32, "shared_experts_intermediate_size": INNER, "pad_token_id": 0}
        | {"layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"]}
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32}
        | {"swa_kv_lora_rank": 32, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16}
        | {"swa_v_head_dim": 16},
        model_type="dots3_note_text",
        hub=SIGMOID
        | {
            "apply_mla_qkv_lora_rescale": True,
            "use_dsa": True,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "rope_parameters": None,
            "rope_theta": 8e7,
            "swa_rope_theta": 5e4,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 32,
            "swa_kv_lora_rank": 32,
            "swa_head_dim": 32,
            "swa_qk_nope_head_dim": 16,
            "swa_qk_rope_head_dim": 16,
            "swa_v_head_dim": 16,
            "sliding_window_size": 32,
            "first_k_dense_replace": 1,
        },
        tokens=("<|endofassistant|>",),
    ),
    "ernie4_5_moe": Tiny(
        SIZES
        | HEAD
        | {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
        tokenizer="sentencepiece",
    ),
    "exaone_moe": Tiny(
        NUM | HEAD | SLIDING | DENSE_FIRST | SPARSE_AFTER_DENSE | {"num_shared_experts": 1},
        hub=SIGMOID,
    ),
    "gemma4": Tiny(
        NUM
        | HEAD
        | SLIDING
        | {"top_k_experts": TOP_K, "enable_moe_block": True, "tie_word_embeddings": True}
        | {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0}
        | {"vocab_size_per_layer_input": tiny.VOCAB, "layer_types": SLIDING_THEN_FULL},
        model_type="gemma4_text",
        tokenizer="llama",
    ),
    "glm4_moe": Tiny(
        ROUTED
        | HEAD
        | DENSE_FIRST
        | {"routed_scaling_factor": 1.5, "num_nextn_predict_layers": 0, "use_qk_norm": True},
        tokens=GLM_TOKENS,
    ),
    "glm4_moe_lite": Tiny(
        ROUTED | MLA | HEAD | SPARSE_AFTER_DENSE,
        hub=SIGMOID | DENSE_FIRST,
        tokens=GLM_TOKENS,
    ),
    "glm4v_moe": Tiny(
        ROUTED
        | HEAD
        | DENSE_FIRST
        | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
        vision=VISION | {"out_hidden_size": HIDDEN},
        tokens=GLM_TOKENS,
    ),
    "glm5_next": Tiny(
        ROUTED
        | MLA
        | INDEXER
        | SPARSE_AFTER_DENSE
        | {"qk_rope_head_dim": 0, "index_kpool": 4, "hc_mult": 4, "pad_token_id": 0}
        | {"linear_head_dim": 32, "linear_num_heads": 4}
        | {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"]},
        vision=VISION | {"out_hidden_size": HIDDEN},
        hub=SIGMOID
        | DENSE_FIRST
        | {
            "mla_use_nope": True,
            "linear_attn_config": {
                "num_heads": 4,
                "head_dim": 32,
                "short_conv_kernel_size": 4,
                "gate_lower_bound": -5.0,
            },
        },
        tokens=GLM_TOKENS,
    ),
    "glm_moe_dsa": Tiny(
        ROUTED
        | MLA
        | HEAD
        | DENSE_FIRST
        | INDEXER
        | SPARSE_AFTER_DENSE
        | {"indexer_types": ["full"] * LAYERS},
        hub=SIGMOID,
        tokens=GLM_TOKENS,
    ),
    "gpt_oss": Tiny(LOCAL | HEAD | SLIDING | {"rope_parameters": ROPE}),
    "granitemoe": Tiny(LOCAL),
    "granitemoeshared": Tiny(LOCAL | {"shared_intermediate_size": INNER}),
    "granitemoehybrid": Tiny(
        LOCAL
        | MAMBA
        | {"shared_intermediate_size": INNER, "mamba_n_heads": 4, "mamba_d_head": 32}
        | {"layer_types": ["mamba", "attention", "mamba"]},
        hub={"layer_types": ["mamba", "attention", "mamba"]},
    ),
    "hunyuan_v1_moe": Tiny(
        HEAD
        | {"num_experts": EXPERTS, "moe_topk": TOP_K, "intermediate_size": INNER}
        | {"pad_token_id": 0},
        hub={
            "moe_topk": [TOP_K] * LAYERS,
            "moe_intermediate_size": [INNER] * LAYERS,
            "num_shared_expert": [1] * LAYERS,
        },
        own_tokenizer=True,
    ),
    "hy_v3": Tiny(NUM | HEAD | SPARSE_AFTER_DENSE),
    "hy_v4": Tiny(
        ROUTED
        | MLA
        | HEAD
        | INDEXER
        | SPARSE_AFTER_DENSE
        | {"indexer_types": ["full"] * LAYERS, "hc_mult": 2, "pad_token_id": 0},
        rename={
            r"\.(mlp|shared_experts)\.linear_gate": r".\1.gate_proj",
            r"\.hc_pre\.hc_head\.": ".hc_head.",
            r"\.hc_pre\.hc_(attn|mlp)_layer\.": r".hc_\1_layer.hc_pre.",
        },
    ),
    "jamba": Tiny(
        MAMBA
        | {"num_experts": EXPERTS, "intermediate_size": INNER, "mamba_dt_rank": 8}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_hidden_layers": 4}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
        | {"pad_token_id": 0},
        tokenizer="sentencepiece",
    ),
    "kimi_linear": Tiny(
        NUM
        | MLA
        | HEAD
        | SPARSE_AFTER_DENSE
        | {"num_experts_per_token": TOP_K, "q_lora_rank": None, "pad_token_id": 0}
        | {"linear_head_dim": 32, "linear_num_heads": 4, "model_max_length": 512}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        hub={
            "first_k_dense_replace": 1,
            "moe_router_activation_func": "sigmoid",
            "linear_attn_config": {
                "full_attn_layers": [2],
                "kda_layers": [1, 3],
                "head_dim": 32,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
        },
        rename={r"\.0\.block_sparse_moe\.": ".0.mlp."},
    ),
    "laguna": Tiny(
        NUM
        | HEAD
        | SLIDING
        | SPARSE_AFTER_DENSE
        | {"shared_expert_intermediate_size": INNER, "moe_routed_scaling_factor": 1.5}
        | {"num_attention_heads_per_layer": [4] * LAYERS}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    ),
    "lfm2_moe": Tiny(
        NUM
        | {"num_dense_layers": 1, "tie_word_embeddings": True, "pad_token_id": 0}
        | {"layer_types": ["conv", "full_attention", "conv"]}
    ),
    "llama4": Tiny(
        LOCAL
        | HEAD
        | {"intermediate_size_mlp": 2 * INNER, "num_experts_per_tok": 1, "num_hidden_layers": 4},
        model_type="llama4_text",
    ),
    "mellum": Tiny(
        SIZES
        | HEAD
        | SLIDING
        | {"num_local_experts": EXPERTS, "norm_topk_prob": True, "layer_types": SLIDING_THEN_FULL}
        | {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
    ),
    "mimo_v2_flash": Tiny(
        ROUTED
        | SLIDING
        | SPARSE_AFTER_DENSE
        | {"head_dim": 32, "v_head_dim": 16}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        hub=SIGMOID
        | {
            "topk_method": "noaux_tc",
            "swa_head_dim": 32,
            "swa_v_head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "hybrid_layer_pattern": [0, 1, 0],
            "moe_layer_freq": [0, 1, 1],
            "partial_rotary_factor": 0.334,  # as transformers has it, whatever config.json says
            "rope_theta": 5e6,
            "swa_rope_theta": 1e4,
            "layernorm_epsilon": 1e-5,
            "rope_parameters": None,
        },
    ),
    "minimax_m2": Tiny(LOCAL | HEAD, hub=SIGMOID | {"rotary_dim": 16}),
    "minimax_m3_vl": Tiny(
        LOCAL
        | HEAD
        | SPARSE_AFTER_DENSE
        | {"dense_intermediate_size": 2 * INNER, "shared_intermediate_size": INNER}
        | {"rope_parameters": HALF_ROPE, "index_n_heads": 2, "index_head_dim": 16}
        | {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
        vision={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        | {"num_attention_heads": 2},
        hub=SIGMOID
        | {
            "n_shared_experts": 1,
            "rotary_dim": 8,
            "moe_layer_freq": [0, 1, 1],
            "sparse_attention_config": {
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 16,
                "sparse_topk_blocks": 16,
                "sparse_block_size": 128,
                "sparse_local_block": 1,
            },
        },
    ),
    "mixtral": Tiny(LOCAL),
    "nemotron_h": Tiny(
        ROUTED
        | HEAD
        | {"moe_shared_expert_intermediate_size": INNER, "num_hidden_layers": 4}
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}
        | {"ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1}
        | {"pad_token_id": 0, "use_mamba_kernels": False}
        | {"time_step_min": 1e-9}  # below it torch clamps, which llama.cpp does not
    ),
    "olmoe": Tiny({"num_experts": EXPERTS, "intermediate_size": INNER, "num_key_value_heads": 4}),
    "phimoe": Tiny(
        LOCAL | {"lm_head_bias": True, "attention_bias": True},
        hub={"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 512},
        own_tokenizer=True,
    ),
    "qwen2_moe": Tiny(NUM | {"shared_expert_intermediate_size": INNER}),
    "qwen3_moe": Tiny(NUM | HEAD | {"norm_topk_prob": True}),
    "qwen3_next": Tiny(NUM | DELTA_NET),
    "qwen3_vl_moe": Tiny(
        NUM
        | HEAD
        | {"moe_intermediate_size": 3 * INNER}  # no square matrix, so that a transposed one shows
        | {"rope_parameters": ROPE | {"mrope_section": [3, 3, 2], "mrope_interleaved": True}},
        vision=VISION | {"out_hidden_size": HIDDEN, "deepstack_visual_indexes": []},
        transpose=r"\.experts\.(gate_up|down)_proj$",
    ),
    "qwen3_5_moe": Tiny(NUM | DELTA_NET, model_type="qwen3_5_moe_text", tokens=("<|endoftext|>",)),
    "qwen4_exp": Tiny(
        NUM
        | DELTA_NET
        | {"hc_count": 2, "hc_lowrank": 16, "indexer_n_heads": 4, "indexer_kv_heads": 1}
        | {"indexer_head_dim": 32, "indexer_budget": 512, "indexer_compress_ratio": 4}
        | {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"]}
        | {"output_gate_type": "sigmoid"}
        | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}},
        model_type="qwen4_exp_text",
    ),
    "sarvam_moe": Tiny(
        ROUTED
        | HEAD
        | DENSE_FIRST
        | {"n_shared_experts": 1, "routed_scaling_factor": 1.5, "use_qk_norm": True},
        hub={"architectures": ["SarvamMoEForCausalLM"], "score_function": "sigmoid"}
        | {"num_experts": EXPERTS, "num_shared_experts": 1},
    ),
    "solar_open": Tiny(
        ROUTED | HEAD | {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
        tokens=("<|endoftext|>", "<|startoftext|>", "<unk>"),
    ),
    "step3p7": Tiny(
        ROUTED
        | HEAD
        | SLIDING
        | SPARSE_AFTER_DENSE
        | {"share_expert_dim": INNER, "num_sliding_attention_heads": 4, "pad_token_id": 0}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
        | {"rope_theta": [10000.0] * LAYERS, "partial_rotary_factors": [0.5, 1.0, 0.5]},
        vision={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 28, "patch_size": 14},
        hub={
            "num_attention_groups": 2,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
            "moe_layers_enum": "1,2",
            "moe_router_activation": "sigmoid",
            "norm_expert_weight": True,
            "rope_theta": [10000.0] * LAYERS,
            "partial_rotary_factors": [0.5, 1.0, 0.5],
        },
    ),
}


NOTES: dict[str, str] = {  # for the table; causes are tested in test_architecture_causes.py
    "deepseek_v32": "the conversion insists on a class of tokenizer; this one is read as GPT-2's",
    "deepseek_v4": "llama.cpp's conversion takes the published MXFP4 experts only, not the plain "
    "ones that transformers saves",
    "gemma4": "scales of experts are part of the gate weight in torch, of the output in llama.cpp; "
    "novices in a GGUF carry them",
    "hunyuan_v1_moe": "the published tokenizer is Python code of the checkpoint; this one is read "
    "as GPT-2's",
    "hy_v4": "llama.cpp (`llama_model_rope_type`) rotates consecutive pairs of queries and keys, "
    "transformers (`apply_rotary_pos_emb`) the two halves; with pairs in torch too, logits agree. "
    "Router and experts are the same, but what reaches them is not: measure a plan on the GGUF "
    "that it is for",
    "laguna": "transformers scales after the experts (`moe_routed_scaling_factor`, here 1.5), "
    "llama.cpp in the gate weights: sums of gate weights differ by that factor, of their squares "
    "by its square, all else agrees; a factor common to all layers changes no novices and no "
    "rankings",
    "mimo_v2_flash": "where config.json has `sliding_window_size`, transformers attends to one key "
    "more than llama.cpp; this one does not have it",
    "minimax_m3_vl": "as laguna (`routed_scaling_factor`, here 2)",
    "nemotron_h": "torch clamps time steps at `time_step_min`, llama.cpp does not; here it is 1e-9",
    "phimoe": "llama.cpp (`phi3.cpp`) has RMS norms with a bias where transformers has layer "
    "norms, and a softmax over the selected experts where transformers has `sparsemixer`, whose "
    "gate weights are mostly 1 each; with both in torch too, logits agree. The same logits select "
    "the same experts, but torch's statistics are of a model that llama.cpp does not run: measure "
    "a plan on the GGUF that it is for",
    "qwen4_exp": "beyond `indexer_budget` keys, which are more than here, llama.cpp "
    "(`build_qsa_top_k`) always selects `indexer_compress_ratio` - 1 more, transformers as many as "
    "the last, incomplete block has",
    "sarvam_moe": "since transformers 5.24",
}


def make(name: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a random checkpoint of an entry of `ARCHITECTURES` and return its folder."""
    import torch

    entry = ARCHITECTURES[name]
    torch.manual_seed(seed)  # for what `fill` leaves as it is
    model = build(name, **overrides).to(torch.float32)
    tiny.fill(model, seed)
    model.save_pretrained(folder)
    _save_tokenizer(entry, folder)
    _edit(folder / "config.json", entry.hub, None if entry.vision is None else "text_config")
    _edit_weights(folder / "model.safetensors", entry)
    return folder


def build(name: str, **overrides: Any) -> Any:
    """The transformers model of an entry, with its own initialisation."""
    from transformers import AutoConfig

    entry = ARCHITECTURES[name]
    fields = (COMMON if entry.common else {}) | dict(entry.fields) | overrides
    if entry.vision is not None:
        fields = {"text_config": fields, "vision_config": dict(entry.vision)}
    config = AutoConfig.for_model(entry.model_type or name.partition(" ")[0], **fields)
    return auto_model(config).from_config(config)


def _edit(file: Path, changes: Mapping[str, Any], part: str | None = None) -> None:
    document = json.loads(file.read_text(encoding="utf-8"))
    place = document if part is None else document[part]
    place |= changes
    file.write_text(json.dumps(document, indent=1), encoding="utf-8")


def _edit_weights(file: Path, entry: Tiny) -> None:
    from safetensors.torch import load_file, save_file

    if not entry.rename and not entry.transpose:
        return
    weights = {}
    for name, weight in load_file(file).items():
        if entry.transpose and re.search(entry.transpose, name):
            weight = weight.transpose(-1, -2).contiguous()
        for pattern, hub in entry.rename.items():
            name = re.sub(pattern, hub, name)
        weights[name] = weight
    save_file(weights, file, metadata={"format": "pt"})


def _save_tokenizer(entry: Tiny, folder: Path) -> None:
    """A tokenizer of the kind that llama.cpp's conversion reads for this architecture.

    Which tokens it has does not matter: models are given the ids that calibration packed.
    """
    tokenizer = tiny.make_tokenizer(tiny.VOCAB - len(entry.tokens))
    tokenizer.add_special_tokens({"additional_special_tokens": list(entry.tokens)})
    tokenizer.save_pretrained(folder)
    if entry.tokenizer == "sentencepiece":
        _train_sentencepiece(folder)
    if entry.tokenizer == "llama":
        file = folder / "tokenizer.json"
        document = json.loads(file.read_text(encoding="utf-8"))
        document["model"]["byte_fallback"] = True
        document["decoder"] = {"type": "Sequence", "decoders": [document["decoder"]]}
        file.write_text(json.dumps(document), encoding="utf-8")


def _train_sentencepiece(folder: Path) -> None:
    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny.TEXT.splitlines()),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
