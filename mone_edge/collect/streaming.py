"""A transformers model of which one layer at a time has its weights in memory.

In: a checkpoint. Out: the model on the meta device, whose parts load their own keys through
transformers' conversion of checkpoints and go back to meta. Knows nothing about statistics.

Experts keep the type that they are stored in: `experts.run_expert` widens one at a time to the
precision of its input. The output head is never read: it passes on what it is given.

Uses internals of transformers (`convert_and_load_state_dict_in_model`), so its version range is
pinned in pyproject.toml.
"""

import ctypes
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mone_edge.collect.adapters import EAGER
from mone_edge.collect.experts import experts_modules, model_type, set_implementation
from mone_edge.collect.loading import auto_model, stored_dtype, torch_dtype
from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError
from mone_edge.safetensors_header import item_bytes
from mone_edge.source import Checkpoint
from mone_edge.transformers_quiet import LOAD_ERRORS, quiet

READ_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"
TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
OUTSIDE = ""  # the part of the model that is no layer: embeddings, norm, output head


class StreamedModel:
    """A causal language model on meta, and the layers that load one at a time.

    Raises:
        MoneEdgeError: the architecture does not run layer by layer, or cannot be built.
    """

    def __init__(self, source: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.model = on_meta(source, dtype)
        self._head = _without_head(self.model)
        _keep_experts_narrow(self.model, _stored(source))
        self.layers = _layers(self.model)
        self.blocks = {
            i: self.part_of(name) for i, (name, _) in experts_modules(self.model).items()
        }

    def load(self, part: str) -> None:
        """Read the weights of one part: a layer's name, or `OUTSIDE`.

        Raises:
            MoneEdgeError: weights are missing or have the wrong shape.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        try:
            with ExitStack() as stack, quiet(), _read_in_turn():
                weights = self._slices(part, stack)
                info, _ = convert_and_load_state_dict_in_model(
                    self.model, weights, self._load_config
                )
        except LOAD_ERRORS as error:
            raise MoneEdgeError(f"cannot load {self.source.path}: {reason(error)}") from error
        if part == OUTSIDE:
            self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        self._make_buffers(part)
        self._require_whole(part, info)
        _give_back_freed_memory()

    def release(self, part: str) -> None:
        """Give a layer's memory back."""
        self.model.get_submodule(part).to("meta")
        _give_back_freed_memory()

    @cached_property
    def keys(self) -> Mapping[str, list[str]]:
        """Checkpoint keys of every part."""
        parts: dict[str, list[str]] = {name: [] for name in (OUTSIDE, *self.layers)}
        for key, name in self._names.items():
            if name.rpartition(".")[0] != self._head:
                parts[self.part_of(name)].append(key)
        return parts

    @cached_property
    def _names(self) -> Mapping[str, str]:
        return module_names(self.model, self.source.tensors)

    def part_bytes(self, part: str) -> int:
        """Bytes of a part's weights in the types that they are loaded in."""
        loaded, total = self.model.state_dict(), 0
        for key in self.keys[part]:
            ref, parameter = self.source.tensors[key], loaded.get(self._names[key])
            item = self.dtype if parameter is None else parameter.dtype
            total += ref.size // item_bytes(ref.dtype) * item.itemsize
        return total

    @cached_property
    def _load_config(self) -> Any:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        return LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=get_model_conversion_mapping(self.model),
        )

    def part_of(self, name: str) -> str:
        """The part that a module or weight lies in: `model.layers.3.mlp` -> `model.layers.3`."""
        pieces = name.split(".")
        prefixes = (".".join(pieces[:n]) for n in range(1, len(pieces) + 1))
        return next((prefix for prefix in prefixes if prefix in self.layers), OUTSIDE)

    def _slices(self, part: str, stack: ExitStack) -> dict[str, Any]:
        """Lazy tensors of the part; their files stay open until `stack` closes."""
        from safetensors import safe_open

        handles: dict[Any, Any] = {}
        slices = {}
        for key in self.keys[part]:
            file = self.source.tensors[key].file
            if file not in handles:
                handles[file] = stack.enter_context(safe_open(file, framework="pt"))
            slices[key] = handles[file].get_slice(key)
        return slices

    def _modules(self, part: str) -> Iterator[tuple[str, nn.Module]]:
        """Modules of a part, with their full names."""
        for name, module in self.model.named_modules():
            if self.part_of(name) == part:
                yield name, module

    def _make_buffers(self, part: str) -> None:
        """Compute what no checkpoint stores (frequencies of rotary embeddings)."""
        for name, module in self._modules(part):
            missing = [
                key
                for key in module._non_persistent_buffers_set
                if getattr(module, key) is not None and getattr(module, key).is_meta
            ]
            for key in missing:
                setattr(module, key, torch.empty_like(getattr(module, key), device=self.device))
            if missing:
                with torch.no_grad():
                    self._owner(name)._init_weights(module)

    def _owner(self, name: str) -> Any:
        """The innermost transformers model that a module belongs to."""
        from transformers import PreTrainedModel

        while name:
            name = name.rpartition(".")[0]
            owner = self.model.get_submodule(name)
            if isinstance(owner, PreTrainedModel):
                return owner
        return self.model

    def _require_whole(self, part: str, info: Any) -> None:
        bad = [str(key[0]) for key in info.mismatched_keys] + list(info.conversion_errors)
        for name, module in self._modules(part):
            if name == self._head:
                continue
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            bad += [f"{name}.{key}" for key, value in own if value.is_meta]
        if bad:
            raise MoneEdgeError(
                f"{self.source.path}: {len(bad)} weights are missing or have the wrong shape "
                f"(first: {bad[0]}); the checkpoint is incomplete"
            )


def module_names(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Where transformers loads each checkpoint key: the name of a parameter in the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    return {key: rename_source_key(key, renamings, converters, prefix, known)[0] for key in keys}


def on_meta(source: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model of a checkpoint's config, without weights.

    Raises:
        MoneEdgeError: transformers cannot build it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"), quiet():
            model = auto_model(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise MoneEdgeError(f"cannot load {source.path}: {reason(error)}") from error
    set_implementation(model, EAGER)
    return model.eval()


def _without_head(model: Any) -> str:
    """Make the output head pass its input on; returns its name. Hooks on it see the input still."""
    head = model.get_output_embeddings()
    if head is None:
        return ""
    head.forward = lambda states: states
    return str(next(name for name, module in model.named_modules() if module is head))


def _stored(source: Checkpoint) -> torch.dtype:
    """The type of most of the weights, whatever the config says; of FP8 and blocks the config's."""
    sizes: Counter[str] = Counter()
    for ref in source.tensors.values():
        sizes[ref.dtype] += ref.size
    largest = max(sizes, key=lambda dtype: sizes[dtype], default="")
    return torch_dtype(TYPES.get(largest) or stored_dtype(source.path))


def _keep_experts_narrow(model: Any, stored: torch.dtype) -> None:
    """Let the loader leave experts in their stored type where it is narrower than the model's."""
    for _, module in experts_modules(model).values():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if stored.itemsize < parameter.dtype.itemsize:
                setattr(module, name, nn.Parameter(parameter.to(stored), requires_grad=False))


@contextmanager
def _read_in_turn() -> Iterator[None]:
    """Let transformers read what it fuses when it fuses it, not all of a layer ahead."""
    before = os.environ.get(READ_IN_TURN)
    os.environ[READ_IN_TURN] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[READ_IN_TURN]
        else:
            os.environ[READ_IN_TURN] = before


def _give_back_freed_memory() -> None:
    """Thousands of freed tensors of experts otherwise stay with glibc's allocator."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _layers(model: Any) -> dict[str, nn.Module]:
    """The list of decoder layers that holds the experts, in the order they run."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = set()
    for name, _ in experts_modules(model).values():
        while name and not isinstance(model.get_submodule(name), GradientCheckpointingLayer):
            name = name.rpartition(".")[0]
        lists.add(name.rpartition(".")[0])
    if len(lists) != 1 or "" in lists:
        raise MoneEdgeError(
            f"model type {model_type(model)} has no single list of layers; it cannot be measured "
            "with --sequential"
        )
    parent = lists.pop()
    return {f"{parent}.{name}": m for name, m in model.get_submodule(parent).named_children()}
