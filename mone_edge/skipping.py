"""Dynamic skipping: a token runs only those of its experts whose gate weight is not small beside
its largest.

In: a threshold. Out: the metadata of a GGUF that has it, or a torch model that computes the same,
the oracle for the patched llama.cpp. NAEE (arXiv 2402.14800) for two experts a token, here for any
number: with `w` the gate weights of a token, expert `i` is skipped where
`w_i <= threshold * max w`. Where the model normalises its weights, those of the others grow to the
same sum, as in NAEE; elsewhere they stay. Knows nothing about plans or quantising.
"""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_edge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from mone_edge.model_file import ModelFile

KEY = "{arch}.expert_skip_threshold"
IMPLEMENTATION = "mone-edge-skipping"
# Gate weights multiply the experts' inputs; or experts run that were not selected.
UNSUPPORTED = ("llama4", "grovemoe")


def set_threshold(model: "ModelFile", threshold: float) -> "ModelFile":
    """The model with this threshold in its metadata; without one if it is 0.

    Raises:
        UsageError: it is no threshold, the architecture cannot skip, or a token has one expert.
    """
    from mone_edge.conversion import packages

    if not (threshold >= 0 and ctypes.c_float(threshold).value < 1):  # as the GGUF holds it
        raise UsageError(
            f"--skip-threshold {threshold}: a share of a token's largest gate weight, "
            "0 <= threshold < 1"
        )
    key = KEY.format(arch=model.arch)
    metadata = {name: entry for name, entry in model.metadata.items() if name != key}
    if not threshold:
        return replace(model, metadata=metadata)
    if model.arch in UNSUPPORTED:
        raise UsageError(f"--skip-threshold: experts of {model.arch} cannot be skipped")
    used = model.value("{arch}.expert_used_count", 0)
    if max(used if isinstance(used, list) else [used]) < 2:
        raise UsageError("--skip-threshold: a token of this model has one expert; none to skip")
    gguf, _ = packages()
    entry = gguf.gguf_writer.GGUFValue(threshold, gguf.GGUFValueType.FLOAT32)
    return replace(model, metadata=metadata | {key: entry})


def threshold_of(path: Path) -> float:
    """The threshold of a GGUF; 0 where it has none, or none that llama.cpp would take."""
    from mone_edge.gguf_header import read_header

    found = read_header(path).value(KEY, 0.0)
    return found if isinstance(found, float) and 0 < found < 1 else 0.0


def never(api: Any, path: Path) -> Any:
    """What makes llama.cpp run every selected expert of a GGUF, whatever its threshold.

    Args:
        api: `llama_cpp.llama_cpp`.

    Returns:
        `kv_overrides` of a model's parameters.
    """
    from mone_edge.gguf_header import read_header

    overrides = (api.llama_model_kv_override * 2)()  # the second is the end
    overrides[0].tag = api.LLAMA_KV_OVERRIDE_TYPE_FLOAT
    overrides[0].key = KEY.format(arch=read_header(path).arch).encode()
    overrides[0].value.val_f64 = 0.0
    return ctypes.cast(overrides, ctypes.POINTER(api.llama_model_kv_override))


def run_weights(weights: "Tensor", threshold: float, *, normalised: bool) -> "Tensor":
    """Gate weights with those of skipped experts at 0.

    Args:
        weights: [T, K], not negative.
        normalised: whether the model divides the weights of the selected experts by their sum.
    """
    largest = weights.max(dim=-1, keepdim=True).values
    left = weights * (weights / largest > threshold)
    if not normalised:
        return left
    return left * weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)


def apply(model: Any, threshold: float, *, normalised: bool) -> Any:
    """Have a transformers model skip experts, in place, and return it.

    Experts that `novices.apply` has replaced stay replaced.
    """
    from mone_edge.collect.experts import experts_modules, register, set_implementation
    from mone_edge.novices import experts_with_novices

    def experts(module: Any, hidden: "Tensor", index: "Tensor", weights: "Tensor") -> "Tensor":
        left = run_weights(weights, threshold, normalised=normalised)
        return experts_with_novices(module, hidden, index, left)

    experts_modules(model)  # adapts what transformers has no common function for
    register(IMPLEMENTATION, experts)
    set_implementation(model, IMPLEMENTATION)
    return model
