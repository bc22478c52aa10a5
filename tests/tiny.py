"""Tiny random Mixture-of-Experts checkpoints with a real tokenizer, made on the spot.

They look like a hub checkpoint (config, safetensors, tokenizer.json), so that everything that
reads checkpoints can be tested without a network. Routing is decisive (router logits have a
standard deviation of about 2) and experts matter (their outputs are as large as the residual
stream), so that pruning one is visible in the logits.
"""

from pathlib import Path
from typing import Any

MODEL_TYPES = ("qwen2_moe", "olmoe", "qwen3_moe", "mixtral")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embeddings.weight")
ROUTERS = (
    *("gate.weight", "router.weight", "router.layer.weight", "router.classifier.weight"),
    *("router.proj.weight", "router.gate.weight"),
)
CORRECTIONS = ("e_score_correction_bias", "expert_bias", "moe_statics")
OWN_START = ("A_log", "dt_bias", ".D")
BOS, EOS = "<s>", "</s>"
VOCAB = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
TEXT = """\
The river left the mountains before dawn and reached the harbour in the evening. Along its banks
stood mills, farms and small workshops, and every one of them used the water in its own way. The
miller measured the depth with a notched pole; the farmer counted the days between two floods; the
dyer looked only at the colour. When the bridge fell in the winter of the great storm, they met for
the first time to decide who would pay for the stones. It took them forty-two evenings, 1,200 cups
of tea and one clerk who wrote everything down. "Who crosses the bridge?" asked the clerk. "All of
us," said the miller, "but not equally often." So they counted: on Monday 17 carts, on Tuesday 23,
on Wednesday 9. The clerk divided the cost by the carts, rounded down, and put the remainder into a
jar. Years later nobody remembered the argument, but the jar was still there, half full, and the
bridge carried whoever came. def weight(cart): return cart.load + sum(w.mass for w in cart.wheels)
"""


def make_checkpoint(
    model_type: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    layers: int = 2,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 64,
    inner: int = 32,
    **overrides: Any,
) -> Path:
    """Save a random checkpoint of one of `MODEL_TYPES`, or granitemoe, and return its folder.

    Args:
        hidden, inner: widths; multiples of 256 make every weight fit k-quants, 32 the others.
        overrides: further fields of the model's config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = _config_fields(model_type, layers, experts, top_k, hidden, inner) | overrides
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    fill(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer(size: int = VOCAB) -> Any:
    """A byte-level BPE of `size` tokens trained on `TEXT` (pre-tokenizer: GPT-2's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config_fields(
    model_type: str, layers: int, experts: int, top_k: int, hidden: int, inner: int
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4
        if model_type == "olmoe"
        else 2,  # llama.cpp: k_norm is n_embd wide
        "num_experts_per_tok": top_k,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    own: dict[str, dict[str, Any]] = {
        "qwen2_moe": {
            "num_experts": experts,
            "moe_intermediate_size": inner,
            "shared_expert_intermediate_size": 2 * inner,
            "intermediate_size": 2 * inner,
        },
        "olmoe": {"num_experts": experts, "intermediate_size": inner},
        "qwen3_moe": {
            "num_experts": experts,
            "moe_intermediate_size": inner,
            "intermediate_size": 2 * inner,
            "head_dim": hidden // 4,
            "norm_topk_prob": True,
        },
        "mixtral": {"num_local_experts": experts, "intermediate_size": inner},
        "granitemoe": {"num_local_experts": experts, "intermediate_size": inner},
    }
    return fields | own[model_type]


def fill(model: Any, seed: int) -> None:
    """Seeded weights: fan-in scaled, a decisive router, loud experts, embeddings off centre.

    What a state space, a delta net or a hyper-connection starts from keeps its own values.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith(OWN_START) or ".hc_" in name or "_hc." in name:
                continue
            if weight.ndim == 1:
                norm = "norm" in name or name.endswith("scale")
                weight.copy_(float(norm) + 0.1 * noise)
            elif name.endswith(EMBEDDINGS):
                # A shared offset gives every expert a mean output worth keeping.
                weight.copy_(noise + 0.5 * torch.randn(weight.shape[1], generator=generator))
            else:
                gain = 2.0 if name.endswith(ROUTERS) or ".experts." in name else 1.0
                weight.copy_(gain * noise / _inputs(model, name, weight) ** 0.5)
        for name, values in model.named_buffers():
            if name.endswith(CORRECTIONS):
                values.copy_(0.1 * torch.randn(values.shape, generator=generator))
            elif name.endswith("tid2eid"):  # the experts of each token, none twice
                experts = model.config.n_routed_experts
                order = torch.rand(len(values), experts, generator=generator).argsort(1)
                values.copy_(order[:, : values.shape[1]])


def _inputs(model: Any, name: str, weight: Any) -> int:
    """Numbers that one output of a weight is a sum over."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return int(weight.shape[-2 if getattr(owner, "is_transposed", False) else -1])
