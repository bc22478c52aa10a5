"""A trained student as the asset that ships: codes of 4 bits and int8 factors, the rest bf16.

What `build.py` makes of the asset must not depend on the machine. A product of factors is a sum of
int8 * int8 * bf16, and float64 holds it exactly as long as the scales of one matrix lie within
2**24 of each other: `require_exact` checks that.
"""

from typing import Any

import torch
from torch import Tensor

from mone_edge.demo.training.model import four_bits
from mone_edge.errors import MoneEdgeError

LARGEST_SCALE_SPREAD = 2.0**24
FACTORS = ("qkv", "o", "gate_up")


def quantise(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors up [layers, out, rank] and down [layers, rank, in] as int8, with scale [layers,
    rank]."""
    tiny = torch.finfo(torch.float32).tiny
    down_scale = (down.abs().amax(dim=2) / 127).clamp_min(tiny)
    scale = (up.abs().amax(dim=1) / 127 * down_scale).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    up_scale = scale.float() / down_scale
    up_int = (up / up_scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    down_int = (down / down_scale.unsqueeze(2)).round().clamp(-127, 127).to(torch.int8)
    return up_int, down_int, scale


def require_exact(scale: Tensor, name: str) -> None:
    """Refuse scales [layers, rank] so far apart that float64 could round the sum over ranks."""
    spread = float((scale.float().amax(dim=1) / scale.float().amin(dim=1)).max())
    if spread > LARGEST_SCALE_SPREAD:
        raise MoneEdgeError(
            f"the scales of {name} are a factor {spread:.3g} apart; "
            f"at most {LARGEST_SCALE_SPREAD:.3g}"
        )


def two_in_a_byte(codes: Tensor) -> Tensor:
    """Codes from -8 to 7 [..., neurons] as bytes [..., neurons / 2]; `build.py` undoes it."""
    shifted = (codes + 8).to(torch.uint8)
    return shifted[..., 0::2] | shifted[..., 1::2] << 4


def pack(state: dict[str, Any]) -> dict[str, Tensor]:
    """The asset's tensors, from a checkpoint of `distill`."""
    parameters = {name: tensor.detach() for name, tensor in state["parameters"].items()}
    parts: dict[str, Tensor] = {"order": state["order"].to(torch.int16)}
    for name in ("router", "shared_gate", "norms", "final_norm"):
        parts[name] = parameters[name].to(torch.bfloat16)
    if not bool(parts["shared_gate"].float().abs().amax(dim=1).all()):
        raise MoneEdgeError("a shared gate is all zero: llama.cpp divides by its logit")
    codes, scales = zip(*(four_bits(change) for change in parameters["down_change"]), strict=True)
    parts["down.codes"] = two_in_a_byte(torch.stack(codes))
    parts["down.scale"] = torch.stack(scales)
    for name in FACTORS:
        up, down, scale = quantise(parameters[f"{name}_up"], parameters[f"{name}_down"])
        require_exact(scale, name)
        parts |= {f"{name}.up": up, f"{name}.down": down, f"{name}.scale": scale}
    return {name: tensor.contiguous() for name, tensor in parts.items()}
