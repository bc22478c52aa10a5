"""The network that is trained: dense weights, frozen, under routers and corrections.

One object is both the dense teacher (`dense=True`: no routing, no corrections) and the student. The
whole FFN is one dense matmul whose neuron activations are multiplied by per-neuron gates: on a CPU
that is faster than gathering tokens by expert, and it gives the router a gradient for the experts
that were not chosen.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo; the defaults are those of SmolLM2-135M cut into experts."""

    layers: int = 30
    hidden: int = 576
    neurons: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_width: int = 64
    vocabulary: int = 49152
    rope_theta: float = 100_000.0
    epsilon: float = 1e-5
    experts: int = 24
    expert_width: int = 32
    top_k: int = 12
    gate_up_rank: int = 16
    attention_rank: int = 8

    @property
    def shared(self) -> int:
        """Neurons of the always-on expert."""
        return self.neurons - self.experts * self.expert_width

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_width


def low_rank(layers: int, rows: int, columns: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Factors of a correction that starts at zero: up [layers, rows, rank], down [layers, rank,
    columns]."""
    up = nn.Parameter(torch.zeros(layers, rows, rank))
    down = nn.Parameter(torch.randn(layers, rank, columns) * columns**-0.5)
    return up, down


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [batch, heads, tokens, width], halves as in transformers."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def expert_mask(logits: Tensor, top_k: int, temperature: float = 0.5) -> Tensor:
    """1 for the `top_k` largest of [tokens, experts], else 0; gradient of a soft threshold between
    them."""
    values = logits.detach().topk(top_k + 1, dim=-1).values
    threshold = (values[:, top_k - 1 : top_k] + values[:, top_k:]) / 2
    hard = (logits.detach() > threshold).to(logits.dtype)
    width = temperature * logits.detach().std(dim=-1, keepdim=True) + 1e-6
    soft = torch.sigmoid((logits - threshold) / width)
    return hard + soft - soft.detach()


def four_bits(correction: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from -7 to 7 (int8, same shape) and one scale (bf16) for each column."""
    scale = (correction.abs().amax(dim=0) / 7).clamp_min(1e-12).to(torch.bfloat16)
    codes = (correction / scale.float()).round().clamp(-7, 7).to(torch.int8)
    return codes, scale


class Student(nn.Module):
    """Parameters are stacked by layer; frozen ones are buffers in bf16, trained ones float32."""

    embedding: Tensor  # [vocabulary, hidden]
    w_qkv: Tensor  # [layers, (heads + 2 kv_heads) * head_width, hidden]
    w_o: Tensor  # [layers, hidden, heads * head_width]
    w_gate_up: Tensor  # [layers, 2 * neurons, hidden], gate first
    w_down: Tensor  # [layers, hidden, neurons]
    dense_norms: Tensor  # [layers, 2, hidden]: before attention, before the FFN
    dense_final_norm: Tensor
    order: Tensor  # [layers, neurons]: which dense neuron stands where

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        s = self.shape = shape
        self.dtype = dtype

        def frozen(name: str, *sizes: int) -> None:
            self.register_buffer(name, torch.zeros(*sizes, dtype=dtype))

        frozen("embedding", s.vocabulary, s.hidden)
        frozen("w_qkv", s.layers, s.qkv, s.hidden)
        frozen("w_o", s.layers, s.hidden, s.heads * s.head_width)
        frozen("w_gate_up", s.layers, 2 * s.neurons, s.hidden)
        frozen("w_down", s.layers, s.hidden, s.neurons)
        self.register_buffer("dense_norms", torch.ones(s.layers, 2, s.hidden))
        self.register_buffer("dense_final_norm", torch.ones(s.hidden))
        self.register_buffer("order", torch.arange(s.neurons).repeat(s.layers, 1))
        self.norms = nn.Parameter(torch.ones(s.layers, 2, s.hidden))
        self.final_norm = nn.Parameter(torch.ones(s.hidden))
        self.router = nn.Parameter(torch.randn(s.layers, s.experts, s.hidden) * 0.02)
        self.shared_gate = nn.Parameter(torch.full((s.layers, s.hidden), 1e-4))
        self.qkv_up, self.qkv_down = low_rank(s.layers, s.qkv, s.hidden, s.attention_rank)
        self.o_up, self.o_down = low_rank(
            s.layers, s.hidden, s.heads * s.head_width, s.attention_rank
        )
        self.gate_up_up, self.gate_up_down = low_rank(
            s.layers, 2 * s.neurons, s.hidden, s.gate_up_rank
        )
        # not trained end to end: every layer was fitted to how the ones before it are rounded
        change = torch.zeros(s.layers, s.hidden, s.neurons)
        self.down_change = nn.Parameter(change, requires_grad=False)
        self._unbound: dict[str, tuple[Tensor, ...]] = {}

    def trained(self, name: str, layer: int) -> Tensor:
        """A layer's part of a parameter; while `forward` runs, one view of many taken at once,
        since the gradient of each single one would be as large as the whole parameter."""
        if name in self._unbound:
            return self._unbound[name][layer]
        part: Tensor = getattr(self, name)[layer]
        return part

    def fitted_down(self, layer: int) -> Tensor:
        """The student's `down_proj`: the dense one and its correction, as 4 bits hold it."""
        codes, scale = four_bits(self.down_change[layer])
        return (self.w_down[layer].float() + codes * scale.float()).to(self.dtype)

    def rotary(self, tokens: int) -> tuple[Tensor, Tensor]:
        s = self.shape
        frequency = s.rope_theta ** (-torch.arange(0, s.head_width, 2).float() / s.head_width)
        angle = torch.outer(torch.arange(tokens).float(), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def _linear(self, name: str, layer: int, x: Tensor, dense: bool) -> Tensor:
        if name == "down" and not dense:
            return F.linear(x, self.fitted_down(layer))
        y = F.linear(x, getattr(self, f"w_{name}")[layer])
        if dense:
            return y
        up = self.trained(f"{name}_up", layer).to(self.dtype)
        down = self.trained(f"{name}_down", layer).to(self.dtype)
        return y + F.linear(F.linear(x, down), up)

    def attention(self, layer: int, residual: Tensor, *, dense: bool = False) -> Tensor:
        """What attention adds to the residual stream [batch, tokens, hidden] (float32)."""
        s = self.shape
        batch, tokens, _ = residual.shape
        norms = self.dense_norms[layer] if dense else self.trained("norms", layer)
        x = rms_norm(residual, norms[0], s.epsilon).to(self.dtype)
        qkv = (
            self._linear("qkv", layer, x, dense)
            .view(batch, tokens, -1, s.head_width)
            .transpose(1, 2)
        )
        q, k, v = torch.split(qkv, [s.heads, s.kv_heads, s.kv_heads], dim=1)
        cos, sin = self.rotary(tokens)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeats = s.heads // s.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, -1)
        return self._linear("o", layer, mixed, dense).float()

    def ffn_input(self, layer: int, residual: Tensor, *, dense: bool = False) -> Tensor:
        """Normalised input of the FFN, [tokens, hidden]."""
        norms = self.dense_norms[layer] if dense else self.trained("norms", layer)
        x = rms_norm(residual, norms[1], self.shape.epsilon)
        return x.reshape(-1, self.shape.hidden).to(self.dtype)

    def activations(self, layer: int, x: Tensor, *, dense: bool = False) -> Tensor:
        """Neuron activations before any gate, [tokens, neurons]."""
        gate, up = self._linear("gate_up", layer, x, dense).chunk(2, dim=-1)
        return F.silu(gate) * up

    def gates(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates near 1: of the shared expert [tokens, 1], of the experts [tokens, experts] (0: not
        chosen)."""
        x = x.float()
        logits = F.linear(x, self.trained("router", layer))
        routed = self.shape.experts * logits.softmax(dim=-1) * expert_mask(logits, self.shape.top_k)
        shared = 2 * torch.sigmoid(x @ self.trained("shared_gate", layer))
        return shared.unsqueeze(-1), routed

    def apply_gates(self, hidden: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        s = self.shape
        head, tail = torch.split(hidden, [s.shared, s.neurons - s.shared], dim=-1)
        tail = tail.view(-1, s.experts, s.expert_width) * routed.to(self.dtype).unsqueeze(-1)
        return torch.cat((head * shared.to(self.dtype), tail.flatten(1)), dim=-1)

    def ffn(self, layer: int, residual: Tensor, *, dense: bool = False) -> Tensor:
        """What the FFN adds to the residual stream, same shape as `residual`."""
        x = self.ffn_input(layer, residual, dense=dense)
        hidden = self.activations(layer, x, dense=dense)
        if not dense:
            hidden = self.apply_gates(hidden, *self.gates(layer, x))
        return self._linear("down", layer, hidden, dense).view_as(residual).float()

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding).float()

    def final(self, residual: Tensor, *, dense: bool = False) -> Tensor:
        """Normalised last hidden state in the model's type, [batch * tokens, hidden]."""
        weight = self.dense_final_norm if dense else self.final_norm
        x = rms_norm(residual, weight, self.shape.epsilon)
        return x.reshape(-1, self.shape.hidden).to(self.dtype)

    def forward(self, tokens: Tensor, *, dense: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Last hidden state and the residual stream after every layer."""
        stacked = {n: p for n, p in self.named_parameters() if len(p) == self.shape.layers}
        self._unbound = {name: parameter.unbind() for name, parameter in stacked.items()}
        residual = self.embed(tokens)
        streams = []
        for layer in range(self.shape.layers):
            residual = residual + self.attention(layer, residual, dense=dense)
            residual = residual + self.ffn(layer, residual, dense=dense)
            streams.append(residual)
        self._unbound = {}
        return self.final(residual, dense=dense), streams


def load_dense(student: Student, weights: dict[str, Tensor]) -> None:
    """Copy a dense `llama` checkpoint into the frozen buffers; neurons keep their order."""
    student.embedding.copy_(weights["model.embed_tokens.weight"])
    student.dense_final_norm.copy_(weights["model.norm.weight"])
    for layer in range(student.shape.layers):
        block = {
            k.split(".", 3)[3]: w
            for k, w in weights.items()
            if k.startswith(f"model.layers.{layer}.")
        }
        student.w_qkv[layer] = torch.cat([block[f"self_attn.{name}_proj.weight"] for name in "qkv"])
        student.w_o[layer] = block["self_attn.o_proj.weight"]
        student.w_gate_up[layer] = torch.cat(
            [block["mlp.gate_proj.weight"], block["mlp.up_proj.weight"]]
        )
        student.w_down[layer] = block["mlp.down_proj.weight"]
        student.dense_norms[layer, 0] = block["input_layernorm.weight"]
        student.dense_norms[layer, 1] = block["post_attention_layernorm.weight"]
    with torch.no_grad():
        student.norms.copy_(student.dense_norms)
        student.final_norm.copy_(student.dense_final_norm)


def reorder(student: Student, layer: int, order: Tensor) -> None:
    """Put the neurons of a layer in `order` (a permutation of [neurons]): shared first, then expert
    by expert."""
    both = torch.cat([order, order + student.shape.neurons])
    student.w_gate_up[layer] = student.w_gate_up[layer][both]
    student.w_down[layer] = student.w_down[layer][:, order]
    student.order[layer] = student.order[layer][order]
    with torch.no_grad():
        student.down_change[layer] = student.down_change[layer][:, order]
