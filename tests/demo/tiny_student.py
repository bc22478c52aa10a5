"""A student small enough for tests: two layers, the demo's experts, weights random."""

import torch
from torch import Tensor

from mone_edge.demo.training.model import Shape, Student, load_dense

SHAPE = Shape(
    layers=2,
    hidden=32,
    heads=2,
    kv_heads=1,
    head_width=16,
    vocabulary=64,
    gate_up_rank=3,
    attention_rank=2,
)


def dense_weights(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """A random dense `llama` of this shape under its Hugging Face names, bf16."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * sizes[-1] ** -0.5).to(torch.bfloat16)

    attention, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    weights = {"model.embed_tokens.weight": random(shape.vocabulary, shape.hidden) * 4}
    weights["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for layer in range(shape.layers):
        block = {
            "self_attn.q_proj": random(attention, shape.hidden),
            "self_attn.k_proj": random(key, shape.hidden),
            "self_attn.v_proj": random(key, shape.hidden),
            "self_attn.o_proj": random(shape.hidden, attention),
            "mlp.gate_proj": random(shape.neurons, shape.hidden) * 2,
            "mlp.up_proj": random(shape.neurons, shape.hidden) * 2,
            "mlp.down_proj": random(shape.hidden, shape.neurons) * 2,
            "input_layernorm": 1 + random(shape.hidden),
            "post_attention_layernorm": 1 + random(shape.hidden),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": w for name, w in block.items()}
    return weights


def student(dtype: torch.dtype = torch.float32, shape: Shape = SHAPE) -> Student:
    torch.manual_seed(1)
    made = Student(shape, dtype)
    load_dense(made, dense_weights(shape))
    return made


def tokens(sequences: int, length: int, shape: Shape = SHAPE) -> Tensor:
    return torch.randint(
        shape.vocabulary, (sequences, length), generator=torch.Generator().manual_seed(2)
    )
