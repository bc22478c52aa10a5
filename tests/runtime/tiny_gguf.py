"""Tiny random MoE GGUFs, pruned and whole, and the logits that the patched library gives them.

The oracle: a file that stores only the kept experts must give, bit for bit, the logits of the file
that stores all of them with the pruned ones' down projections zeroed, both with the same expert
bias. Routing, order of addition and kernels are then the same, and only the skipping differs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import numpy.typing as npt

N_LAYERS, N_EMBD, N_FF, N_EXPERTS, TOP_K, N_VOCAB = 3, 64, 96, 8, 4, 128
N_HEADS = 4
PARTS = ("gate", "up", "down")

Array = npt.NDArray[np.float32]
QUANTS = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
}


@dataclass(frozen=True)
class Model:
    """A model before it is written: hyper-parameters and F32 tensors in torch order."""

    arch: str
    keys: dict[str, int | float]
    tensors: dict[str, Array]
    bias: dict[int, Array] = field(default_factory=dict)


def random_model(arch: str, seed: int = 0, n_embd: int = N_EMBD, n_ff: int = N_FF) -> Model:
    """A random model of `arch` (qwen2moe, qwen3moe, olmoe or llama), with an expert bias."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 0.1) -> Array:
        return rng.normal(0, scale, shape).astype(np.float32)

    def norm(n: int) -> Array:
        return (1 + draw(n)).astype(np.float32)

    head = n_embd // N_HEADS
    tensors = {
        "token_embd.weight": draw(N_VOCAB, n_embd, scale=1.0),
        "output_norm.weight": norm(n_embd),
        "output.weight": draw(N_VOCAB, n_embd),
    }
    bias = {}
    for layer in range(N_LAYERS):
        block = {
            "attn_norm.weight": norm(n_embd),
            "attn_q.weight": draw(n_embd, n_embd),
            "attn_k.weight": draw(n_embd, n_embd),
            "attn_v.weight": draw(n_embd, n_embd),
            "attn_output.weight": draw(n_embd, n_embd),
            "ffn_norm.weight": norm(n_embd),
            "ffn_gate_inp.weight": draw(N_EXPERTS, n_embd, scale=0.5),
            "ffn_gate_exps.weight": draw(N_EXPERTS, n_ff, n_embd),
            "ffn_up_exps.weight": draw(N_EXPERTS, n_ff, n_embd),
            "ffn_down_exps.weight": draw(N_EXPERTS, n_embd, n_ff),
        }
        if arch in ("olmoe", "qwen3moe"):
            width = n_embd if arch == "olmoe" else head
            block |= {"attn_q_norm.weight": norm(width), "attn_k_norm.weight": norm(width)}
        if arch == "qwen2moe":
            block |= {
                "attn_q.bias": draw(n_embd),
                "attn_k.bias": draw(n_embd),
                "attn_v.bias": draw(n_embd),
                "ffn_gate_inp_shexp.weight": draw(n_embd),
                "ffn_gate_shexp.weight": draw(n_ff, n_embd),
                "ffn_up_shexp.weight": draw(n_ff, n_embd),
                "ffn_down_shexp.weight": draw(n_embd, n_ff),
            }
        tensors |= {f"blk.{layer}.{name}": value for name, value in block.items()}
        bias[layer] = draw(N_EXPERTS, n_embd)
    keys = {
        "context_length": 256,
        "embedding_length": n_embd,
        "block_count": N_LAYERS,
        "feed_forward_length": n_ff,
        "expert_feed_forward_length": n_ff,
        "expert_shared_feed_forward_length": n_ff,
        "expert_count": N_EXPERTS,
        "expert_used_count": TOP_K,
        "attention.head_count": N_HEADS,
        "attention.head_count_kv": N_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "vocab_size": N_VOCAB,
    }
    return Model(arch, keys, tensors, bias)


def grovemoe(chunk_size: int = 2, n_chunk_ff: int = 32) -> Model:
    """A random grovemoe: neighbouring experts share a chunk expert."""
    model = random_model("qwen3moe")
    rng = np.random.default_rng(3)
    tensors, chunks = dict(model.tensors), N_EXPERTS // chunk_size
    for layer in range(N_LAYERS):
        for part in PARTS:
            shape = (N_EMBD, n_chunk_ff) if part == "down" else (n_chunk_ff, N_EMBD)
            draw = rng.normal(0, 0.1, (chunks, *shape)).astype(np.float32)
            tensors[f"blk.{layer}.ffn_{part}_chexps.weight"] = draw
    keys = model.keys | {
        "expert_chunk_feed_forward_length": n_chunk_ff,
        "expert_group_scale": 0.5,
        "experts_per_group": chunk_size,
    }
    return Model("grovemoe", keys, tensors, model.bias)


def zeroed(
    model: Model, kept: Sequence[int], orders: Mapping[int, Sequence[int]] | None = None
) -> Model:
    """All experts stored, the down projections of those from `kept[layer]` on all zero.

    With `orders`, as in `stored_in_order`, those that come from `kept[layer]` on in that order.
    """
    tensors = dict(model.tensors)
    for layer, n_kept in enumerate(kept):
        order = (orders or {}).get(layer, range(N_EXPERTS))
        name = f"blk.{layer}.ffn_down_exps.weight"
        tensors[name] = tensors[name].copy()
        tensors[name][list(order[n_kept:])] = 0
    return replace(model, tensors=tensors)


def pruned(model: Model, kept: Sequence[int]) -> Model:
    """Only the first `kept[layer]` experts of each layer stored; where it is 0, no tensors."""
    tensors = dict(model.tensors)
    for layer, n_kept in enumerate(kept):
        for part in PARTS:
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            whole = tensors.pop(name)
            if n_kept:
                tensors[name] = whole[:n_kept]
    return replace(model, tensors=tensors)


def stored_in_order(model: Model, orders: Mapping[int, Sequence[int]]) -> Model:
    """The same model with the experts of some layers stored in another order, the router as it was.

    Args:
        model: of which nothing is pruned yet.
        orders: by layer, the router's id of the expert in each slot.
    """
    tensors, bias = dict(model.tensors), dict(model.bias)
    for layer, order in orders.items():
        for part in PARTS:
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            tensors[name] = tensors[name][list(order)]
        bias[layer] = bias[layer][list(order)]
        slots = np.argsort(order).astype(np.int32)
        tensors[f"blk.{layer}.ffn_gate_eid2slot.weight"] = slots
    return replace(model, tensors=tensors, bias=bias)


def with_novices(model: Model, kept: Sequence[int], ranks: Sequence[int], seed: int = 2) -> Model:
    """`model`, pruned to `kept`, with random low-rank novices of `ranks[layer]` (0: none)."""
    rng = np.random.default_rng(seed)
    tensors = dict(model.tensors)
    n_embd = int(model.keys["embedding_length"])
    for layer, (n_kept, rank) in enumerate(zip(kept, ranks, strict=True)):
        if rank:
            count = N_EXPERTS - n_kept
            down, up = (count, rank, n_embd), (count, n_embd, rank)
            for part, shape in (("down", down), ("up", up)):
                draw = rng.normal(0, 0.2, shape).astype(np.float32)
                tensors[f"blk.{layer}.ffn_novice_{part}.weight"] = draw
    return replace(model, tensors=tensors)


def write(
    path: Path,
    model: Model,
    quant: str = "F32",
    *,
    kept: Sequence[int] | None = None,
    bias_type: type[np.floating] | None = np.float32,
    bias_layers: Sequence[int] = range(N_LAYERS),
    novice_quant: str = "F32",
    text: bool = False,
) -> Path:
    """Write `model` as GGUF; `kept` writes the key, `bias_type` None leaves the bias out.

    With `text`, there is a tokenizer: every ASCII character is a token.
    """
    writer = start(path, model, text=text)
    if kept is not None:
        writer.add_array(f"{model.arch}.expert_kept_count", [int(n) for n in kept])
    for name, value in model.tensors.items():
        if value.dtype == np.int32:
            writer.add_tensor(name, value)
            continue
        wants = value.ndim >= 2 and not name.endswith("ffn_gate_inp.weight")
        kind = QUANTS[novice_quant if "novice" in name else quant] if wants else QUANTS["F32"]
        if value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = QUANTS["F16"]
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    if bias_type is not None:
        for layer in bias_layers:
            writer.add_tensor(
                f"blk.{layer}.ffn_down_exps.bias", model.bias[layer].astype(bias_type)
            )
    return finish(writer, path)


def start(path: Path, model: Model, *, text: bool = False) -> gguf.GGUFWriter:
    """A writer with the hyper-parameters of `model`, and with a tokenizer if `text`."""
    writer = gguf.GGUFWriter(path, model.arch)
    for key, value in model.keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{model.arch}.{key}", value)
    if text:
        add_tokenizer(writer)
    else:
        writer.add_string("tokenizer.ggml.model", "none")
    return writer


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Bytes 4 to 127, a space, and three control tokens: `N_VOCAB` in all."""
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", "\u2581", *(f"<0x{byte:02X}>" for byte in range(4, N_VOCAB))]
    )
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.NORMAL] + [kinds.BYTE] * (N_VOCAB - 4)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    """Write everything out."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(
    llama: ModuleType, path: Path, runs: Sequence[tuple[int, int]], seed: int = 1
) -> list[Array]:
    """Logits of random tokens, one batch for each (tokens, threads): [tokens, N_VOCAB] each."""
    model = load_model(llama, path)
    try:
        return [batch_logits(llama, model, *run, seed=seed) for run in runs]
    finally:
        llama.llama_model_free(model)


def batch_logits(
    llama: ModuleType, model: ctypes.c_void_p, n_tokens: int, threads: int, seed: int
) -> Array:
    """Logits of all positions of one batch, in a context of its own."""
    params = llama.llama_context_default_params()
    params.n_ctx = 256
    params.n_batch = params.n_ubatch = max(n_tokens, 32)
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    assert context
    batch = llama.llama_batch_init(n_tokens, 0, 1)
    try:
        tokens = np.random.default_rng(seed).integers(0, N_VOCAB, n_tokens)
        batch.n_tokens = n_tokens
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
        kind = ctypes.POINTER(ctypes.c_float * (n_tokens * N_VOCAB))
        values = ctypes.cast(llama.llama_get_logits(context), kind).contents
        return np.array(values, dtype=np.float32).reshape(n_tokens, N_VOCAB)
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)


def load_model(llama: ModuleType, path: Path) -> ctypes.c_void_p:
    """Load a model.

    Raises:
        ValueError: it does not load.
    """
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ValueError(f"{path} does not load")
    return ctypes.c_void_p(model) if isinstance(model, int) else model
