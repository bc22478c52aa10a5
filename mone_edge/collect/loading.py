"""Checkpoint folder -> transformers model, or one clear line why not.

Local files only, safetensors only, no code from the checkpoint. Also the way back from the names
of modules in memory to the names of weights in the checkpoint.
"""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mone_edge import machine
from mone_edge.config import read_config
from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.safetensors_header import weight_bytes
from mone_edge.source import PRUNED_METHOD
from mone_edge.transformers_quiet import LOAD_ERRORS, quiet

MEMORY_SHARE = 0.85  # of the memory that weights may take; the rest is activations and sums
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def load_model(
    model_dir: Path, *, device: str = "auto", dtype: str = "auto", experts: str = "eager"
) -> Any:
    """Load a causal language model for inference.

    Args:
        model_dir: folder with config.json and safetensors.
        device: a torch device, or "auto".
        dtype: a torch dtype's name, or "auto" (see `choose_dtype`).
        experts: transformers' experts implementation.

    Raises:
        MoneEdgeError: not a loadable checkpoint, weights missing, or not enough memory.
        UsageError: no such device or dtype.
    """
    from transformers import AutoConfig

    if read_config(model_dir).get("quantization_config", {}).get("quant_method") == PRUNED_METHOD:
        importlib.import_module("mone_edge.pruned_model")  # registers its loader
    elif config_names_novices(config := read_config(model_dir)):
        raise MoneEdgeError(
            f"{model_dir} was pruned by another tool, whose model ({config.get('model_type')}) "
            "cannot be run here; convert it to a GGUF"
        )
    place = choose_device(device)
    precision = torch_dtype(dtype) if dtype != "auto" else choose_dtype(model_dir, place)
    try:
        with quiet():
            local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(model_dir, **local)
            model, report = auto_model(config).from_pretrained(
                model_dir,
                dtype=precision,
                use_safetensors=True,
                experts_implementation=experts,
                output_loading_info=True,
                **local,
            )
    except LOAD_ERRORS as error:
        raise MoneEdgeError(f"cannot load {model_dir}: {reason(error)}") from error
    missing = sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise MoneEdgeError(
            f"{model_dir}: {len(missing)} weights are missing or have the wrong shape "
            f"(first: {missing[0]}); the checkpoint is incomplete"
        )
    return model.eval().to(place)


def config_names_novices(config: Mapping[str, Any]) -> bool:
    """Whether a config says that experts are missing, in the form of any pruner."""
    nested = config.get("text_config")
    places = (config, nested if isinstance(nested, dict) else {})
    return any(place.get(key) for place in places for key in ("approximate_experts", "mone"))


def auto_model(config: Any) -> Any:
    """transformers' class that makes the model of a config: with pictures only where it must."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    pictures = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    only_pictures = type(config) in pictures and type(config) not in text
    return AutoModelForImageTextToText if only_pictures else AutoModelForCausalLM


def choose_device(device: str) -> torch.device:
    """Resolve "auto" to CUDA if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used: {reason(error)}") from error


def choose_dtype(model_dir: Path, device: torch.device) -> torch.dtype:
    """float32 where the whole model takes at most half of the memory, else the checkpoint's own.

    Raises:
        MoneEdgeError: the model does not fit in the memory at all.
    """
    own = stored_dtype(model_dir)
    size, limit = weight_bytes(model_dir), memory_bytes(device)
    if size / _ITEM_BYTES[own] * 4 <= limit / 2:
        return torch.float32
    if not fits(model_dir, device):
        raise MoneEdgeError(
            f"{model_dir} has {size / 2**30:.1f} GiB of weights and {device} has "
            f"{limit / 2**30:.1f} GiB of memory; keep one layer at a time in it with --sequential, "
            "or collect statistics on a larger machine and bring the file (--stats FILE)"
        )
    return torch_dtype(own)


def fits(model_dir: Path, device: torch.device) -> bool:
    """Whether all weights have room in the memory, with space left to compute in."""
    return weight_bytes(model_dir) <= MEMORY_SHARE * memory_bytes(device)


def stored_dtype(model_dir: Path) -> str:
    """Name of the torch dtype that the checkpoint's weights are meant to be loaded in."""
    config = read_config(model_dir)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return stored if stored in _ITEM_BYTES else "bfloat16"


def checkpoint_names(model: Any, modules: Iterable[str]) -> dict[str, list[str]]:
    """Names of `modules` as in the checkpoint's weight keys, without ".weight".

    transformers renames some weights while loading; a fused module gives several names.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names: dict[str, list[str]] = {}
    for name in modules:
        weight = model.get_submodule(name).weight
        placeholder = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        try:
            keys = list(revert_weight_conversion(model, {f"{name}.weight": placeholder}))
        except (RuntimeError, ValueError, KeyError, NotImplementedError):
            keys = [f"{name}.weight"]  # a conversion that needs its other parts
        names[name] = [key.removesuffix(".weight") for key in keys]
    return names


def torch_dtype(name: str) -> torch.dtype:
    """A floating point type by its name.

    Raises:
        UsageError: there is none of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"--dtype {name}: choose auto, float32, bfloat16 or float16")
    return dtype


def memory_bytes(device: torch.device) -> int:
    """Memory of the machine or the accelerator, in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine.memory_bytes()
