"""Random OLMoE-shaped GGUFs for timing, in which a chosen share of the slots goes to novices.

In: shape, type, kept experts, share. Out: a file. The weights are noise and the text is nonsense,
but sizes, types and routing are those of a model in use. Channel 0 of every token is 1 and nothing
writes to it, so that a constant in a novice's router row shifts its logit, in all layers alike; the
constant for a share is found by drawing logits.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from mone_edge.low_rank import NOVICE_BLOCK, stored_rank
from mone_edge.quantize import quantize_rows

LOGIT_STD = 2.0
DRAWS = 20_000
VOCABULARY = 4096


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the default is OLMoE-1B-7B's."""

    layers: int = 16
    width: int = 2048
    inner: int = 1024
    experts: int = 64
    top_k: int = 8
    heads: int = 16


SMALL = Shape(layers=4, width=512, inner=256, experts=32)


def types_of(outtype: str, layer: int, layers: int) -> dict[str, str]:
    """Type of each kind of matrix; Q4_K_M gives more bits to some down projections."""
    if outtype != "Q4_K_M":
        return dict.fromkeys(("attention", "experts", "down", "output"), outtype)
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    down = "Q6_K" if more else "Q4_K"
    return {"attention": "Q4_K", "experts": "Q4_K", "down": down, "output": "Q6_K"}


def shift_for(share: float, shape: Shape, kept: int) -> float:
    """What to take from a novice's logit so that this share of the slots goes to novices."""
    logits = np.random.default_rng(0).normal(0, LOGIT_STD, (DRAWS, shape.experts))
    low, high = -30.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        shifted = logits - np.where(np.arange(shape.experts) < kept, 0, middle)
        best = np.argpartition(-shifted, shape.top_k, axis=1)[:, : shape.top_k]
        low, high = (low, middle) if (best >= kept).mean() < share else (middle, high)
    return (low + high) / 2


def write(
    path: Path, shape: Shape, outtype: str, *, kept: int, share: float, rank: int = 0
) -> Path:
    """Write a model with `kept` experts in each layer (all: an ordinary file).

    Args:
        share: of the slots, that go to novices.
        rank: of low-rank novices, 0: constants alone.
    """
    writer = gguf.GGUFWriter(path, "olmoe")
    sizes = {
        "context_length": 4096, "embedding_length": shape.width, "block_count": shape.layers,
        "feed_forward_length": shape.inner, "expert_count": shape.experts,
        "expert_used_count": shape.top_k, "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.heads, "vocab_size": VOCABULARY,
    }  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"olmoe.{key}", value)
    writer.add_float32("olmoe.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "none")
    pruned = kept < shape.experts
    if pruned:
        writer.add_array("olmoe.expert_kept_count", [kept] * shape.layers)
    rng = np.random.default_rng(1)
    tokens = rng.normal(0, 1, (VOCABULARY, shape.width)).astype(np.float32)
    tokens[:, 0] = 1
    one = np.ones(shape.width, np.float32)
    writer.add_tensor("token_embd.weight", tokens.astype(np.float16))
    writer.add_tensor("output_norm.weight", one)
    put(writer, "output.weight", (VOCABULARY, shape.width), types_of(outtype, 0, 1)["output"])
    novice = np.arange(shape.experts) >= kept
    shift = shift_for(share, shape, kept) if share else 0.0
    for layer in range(shape.layers):
        block, types = f"blk.{layer}", types_of(outtype, layer, shape.layers)
        for name in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
            writer.add_tensor(f"{block}.{name}.weight", one)
        square = (shape.width, shape.width)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            put(writer, f"{block}.{name}.weight", square, types["attention"])
        router = rng.normal(0, LOGIT_STD / shape.width**0.5, (shape.experts, shape.width))
        router[:, 0] = np.where(novice, -shift, 0)
        writer.add_tensor(f"{block}.ffn_gate_inp.weight", router.astype(np.float32))
        for part in ("gate", "up"):
            stack = (kept, shape.inner, shape.width)
            put(writer, f"{block}.ffn_{part}_exps.weight", stack, types["experts"])
        down = (kept, shape.width, shape.inner)
        put(writer, f"{block}.ffn_down_exps.weight", down, types["down"])
        if pruned:
            bias = np.zeros((shape.experts, shape.width), np.float32)
            writer.add_tensor(f"{block}.ffn_down_exps.bias", bias)
        if pruned and rank:
            novices, stored = shape.experts - kept, stored_rank(rank)
            for part, sides in (("down", (stored, shape.width)), ("up", (shape.width, stored))):
                kind = "F16" if sides[-1] % NOVICE_BLOCK else "Q8_0"  # as `convert` has them
                put(writer, f"{block}.ffn_novice_{part}.weight", (novices, *sides), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Add a matrix, or a stack of one and the same, of faint noise."""
    data = noise(shape[-2:], kind)
    data = np.broadcast_to(data, (*shape[:-2], *data.shape))
    writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType[kind])


@functools.cache
def noise(shape: tuple[int, int], kind: str) -> NDArray[Any]:
    """Rows of a ggml type; so small that the residual stream stays what the token was."""
    values = np.random.default_rng(2).normal(0, 1e-3, shape).astype(np.float32)
    rows = quantize_rows(values, kind, None, 1).reshape(shape[0], -1)
    return rows.view(np.float16) if kind == "F16" else rows
