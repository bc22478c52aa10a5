"""A checkpoint's config.json: read, and refused where it cannot be true.

In: a folder, later the shapes its headers promise. Out: the config as a mapping. Knows the keys
that decide what a model costs, not what an architecture does with the others.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mone_edge.documents import parse_json, reason
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import is_file

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
              "top_k_experts")  # fmt: skip
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
WIDTH_KEYS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
MAY_BE_ZERO = (*EXPERT_COUNT_KEYS, *TOP_K_KEYS, "moe_intermediate_size", "head_dim")
NESTED_KEY = "ffn_config"  # where dbrx keeps the numbers of its experts
GROUP_KEYS = ("text_config", "rope_parameters", "rope_scaling", "quantization_config", NESTED_KEY)
NAME_KEYS = ("model_type", "dtype", "torch_dtype")
MAX_COUNT = 2**31 - 1

TEXT = r"^(?:model\.|language_model\.)*"
EXPERT = re.compile(r"\.experts\.(\d+)\.")
FUSED_EXPERTS = re.compile(r"\.experts\.(?:gate_up_proj|up_proj|down_proj)$")
LAYER = re.compile(TEXT + r"layers\.(\d+)\.")
EMBEDDING = re.compile(TEXT + r"embed_tokens\.weight$")


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint folder.

    Raises:
        MoneEdgeError: it is missing, is not a JSON object, or holds numbers that no model has.
    """
    path = folder / "config.json"
    if not is_file(path):
        raise MoneEdgeError(f"{folder} holds no config.json; it is not a Hugging Face checkpoint")
    try:
        document = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise MoneEdgeError(f"{path} is not readable JSON: {reason(error)}") from error
    if not isinstance(document, dict):
        raise MoneEdgeError(f"{path} is not a JSON object")
    _check_values(path, document)
    for key in ("text_config", NESTED_KEY):
        if isinstance(document.get(key), dict):
            _check_values(path, document[key])
    return document


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    for key in (*EXPERT_COUNT_KEYS, *TOP_K_KEYS, *LAYER_COUNT_KEYS, *WIDTH_KEYS):
        value = config.get(key)
        if value is None or isinstance(value, list):  # one number a layer: not ours to judge
            continue
        least = 0 if key in MAY_BE_ZERO else 1
        if type(value) is not int or not least <= value <= MAX_COUNT:
            raise MoneEdgeError(
                f"{path}: {key} is {_short(value)}, not a whole number from {least} to {MAX_COUNT}"
            )
    for key in GROUP_KEYS:
        if not isinstance(config.get(key), dict | None):
            raise MoneEdgeError(f"{path}: {key} is {_short(config[key])}, not a group of settings")
    for key in NAME_KEYS:
        if not isinstance(config.get(key), str | None):
            raise MoneEdgeError(f"{path}: {key} is {_short(config[key])}, not a name")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def check_shapes(
    path: Path, config: Mapping[str, Any], shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> None:
    """Compare the numbers of the language model's config with the tensors that are there.

    Args:
        path: of config.json, for messages.
        config: the language model's part.
        shapes: name and shape of every tensor.

    Raises:
        MoneEdgeError: experts, layers, vocabulary or width differ.
    """
    experts, layers = count(config, EXPERT_COUNT_KEYS), count(config, LAYER_COUNT_KEYS)
    found_experts = found_layers = tensors = 0
    for name, shape in shapes:
        tensors += 1
        if match := EXPERT.search(name):
            found_experts = max(found_experts, int(match[1]) + 1)
        elif FUSED_EXPERTS.search(name) and len(shape) == 3:
            found_experts = max(found_experts, shape[0])
        if match := LAYER.match(name):
            found_layers = max(found_layers, int(match[1]) + 1)
        if EMBEDDING.match(name):
            _check_embedding(path, config, name, shape)
    if experts and found_experts and experts != found_experts:
        raise MoneEdgeError(
            f"{path} says {experts} experts a layer, the weights are of {found_experts}"
        )
    if found_layers and layers > found_layers:  # more are those that predict further tokens
        raise MoneEdgeError(f"{path} says {layers} layers, the weights are of {found_layers}")
    if layers > tensors:
        raise MoneEdgeError(f"{path} says {layers} layers, and there are {tensors} tensors")


def _check_embedding(
    path: Path, config: Mapping[str, Any], name: str, shape: tuple[int, ...]
) -> None:
    wanted = (config.get("vocab_size"), config.get("hidden_size"))
    if None not in wanted and shape != wanted:
        raise MoneEdgeError(
            f"{path} says vocab_size {wanted[0]} and hidden_size {wanted[1]}, "
            f"{name} is {' x '.join(map(str, shape))}"
        )


def count(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The first of these numbers that is set (of one number a layer the largest), 0 for none."""
    places = (config, config.get(NESTED_KEY) or {})
    value = next((place[key] for place in places for key in keys if place.get(key)), 0)
    if isinstance(value, list) and all(isinstance(number, int) for number in value):
        return int(max(value, default=0))
    return value if isinstance(value, int) else 0
