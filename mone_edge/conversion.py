"""A checkpoint as llama.cpp's own `conversion` package sees it: names, metadata, lazy tensors.

In: a checkpoint folder. Out: a `ModelFile`. Nothing about architectures or tokenizers is decided
here; the package of the pinned llama.cpp tree does it, in process. Reads no weights.
"""

import functools
import importlib
import inspect
import json
import mmap
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mone_edge import rowwise, runtime
from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.model_file import Array, Chunk, LazyTensor, ModelFile
from mone_edge.novices import NOVICE_PARTS
from mone_edge.plan import PrunePlan
from mone_edge.source import EXPERT_KEY, FOREIGN_SUFFIX, Checkpoint
from mone_edge.transformers_quiet import LOAD_ERRORS, quiet

FUSED_KEY = re.compile(r"\.(?:experts|moe)\.")  # of all experts of a layer, unless a router's
BLOCK_VALUES = 1 << 24  # of a matrix, that are floats at a time: 64 MiB
# Of a layer that predicts further tokens: by its name, or by its number.
MTP_KEY = re.compile(r"(?:^|\.)(?:mtp|mtp_layers)\.|(?:^|\.)layers\.(\d+)\.")
ADVICE_BYTES = 1 << 21  # more at once than the kernel reads ahead by itself is cut off
LAYER_TYPES = {"qwen4_exp_text": {"indexed_attention": "full_attention"}}
UNQUANTISED = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}


@functools.cache
def packages() -> tuple[ModuleType, ModuleType]:
    """`gguf` and `conversion` of the pinned tree, which belong together."""
    tree = runtime.source_tree()
    for name in [m for m in sys.modules if m.partition(".")[0] == "gguf"]:
        del sys.modules[name]
    sys.path[:0] = [str(tree / "gguf-py"), str(tree)]
    try:
        gguf, conversion = (importlib.import_module(name) for name in ("gguf", "conversion"))
    finally:
        del sys.path[:2]
    _read_whole_tensors(gguf.utility.LocalTensor)
    return gguf, conversion


def _read_whole_tensors(local_tensor: Any) -> None:
    """Ask the kernel for exactly the bytes of a tensor when it is mapped.

    Left to page faults, it reads ahead beyond the end (8 MB, on some machines), into experts that
    are pruned, and waits for the disk in small pieces.
    """
    map_bytes = local_tensor.mmap_bytes

    def mmap_bytes(self: Any) -> Any:
        data = map_bytes(self)
        if hasattr(data.base, "madvise"):
            for start in range(0, len(data.base), ADVICE_BYTES):
                data.base.madvise(mmap.MADV_WILLNEED, start, ADVICE_BYTES)
        return data

    local_tensor.mmap_bytes = mmap_bytes


def open_checkpoint(
    source: Checkpoint, *, dtype: str = "F32", tokenizer_pre: str = ""
) -> ModelFile:
    """The model that llama.cpp's converter would write for `dtype`, with nothing read yet.

    Args:
        dtype: "F32", "F16" or "BF16": the type of the unquantised file.
        tokenizer_pre: name of the pre-tokenizer, for one that the package does not recognise.

    Raises:
        MoneEdgeError: the architecture or the tokenizer is unknown, or the checkpoint is damaged.
    """
    if tokenizer_pre:
        _require_known_pre(tokenizer_pre)
    try:
        try:
            model = _converted(source, dtype, tokenizer_pre)
        except KeyError:  # a key that transformers' config class has renamed or dropped
            model = _converted(source, dtype, tokenizer_pre, plain_config=True)
    except MoneEdgeError:
        raise
    except LOAD_ERRORS as error:
        source.tokenizer()  # says more, where that is what is damaged
        raise MoneEdgeError(f"{source.name} cannot be converted: {reason(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # the Rust tokenizer raises nothing more special
            raise
        raise MoneEdgeError(f"{source.name}: damaged tokenizer: {reason(error)}") from error
    gguf, _ = packages()
    known: rowwise.Known = {}
    tensors = {
        name: _lazy(gguf, info, known)
        for part in model.gguf_writer.tensors
        for name, info in part.items()
    }
    metadata = {k: v for part in model.gguf_writer.kv_data for k, v in part.items()}
    arch = gguf.MODEL_ARCH_NAMES[model.model_arch]
    tensors = _without_padding(tensors, source)
    return ModelFile(arch, metadata, tensors, functools.partial(_weight_columns, model))


def _converted(
    source: Checkpoint, dtype: str, tokenizer_pre: str, *, plain_config: bool = False
) -> Any:
    """The package's model with its tensors and metadata prepared.

    Args:
        plain_config: read config.json as it is, as the package does where transformers cannot.
    """
    gguf, conversion = packages()
    with (
        quiet(),
        _inference(),
        _own_names(gguf.TensorNameMap),
        _stacks_in_chunks(gguf, conversion.LazyTorchTensor),
        _configured(conversion.ModelBase, source, plain=plain_config),
        _pruned_experts_filled_in(conversion.ModelBase, source),
    ):
        model_class = _model_class(conversion, source)
        with _without_missing_mtp(model_class, source):
            model = model_class(
                source.path, gguf.LlamaFileType[UNQUANTISED[dtype]], Path("model.gguf")
            )
            if source.is_pruned:  # some model classes read config.json themselves
                model.hparams.pop("quantization_config", None)
            if tokenizer_pre:
                model.get_vocab_base_pre = lambda tokenizer: tokenizer_pre
            model.prepare_tensors()
            _prepare_metadata(model, source)
    return model


def _model_class(conversion: ModuleType, source: Checkpoint) -> Any:
    try:
        hparams = conversion.ModelBase.load_hparams(source.path, False)
        architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
        return conversion.get_model_class(architecture)
    except LOAD_ERRORS as error:
        raise MoneEdgeError(
            f"{source.name}: llama.cpp's conversion does not know {source.architecture} "
            f"({reason(error)})"
        ) from error


def known_pre_tokenizers() -> list[str]:
    """Names that `--tokenizer-pre` takes."""
    _, conversion = packages()
    text = inspect.getsource(conversion.TextModel.get_vocab_base_pre)
    return sorted(set(re.findall(r'res = "([\w.-]+)"', text)))


def _require_known_pre(name: str) -> None:
    if name not in (known := known_pre_tokenizers()):
        raise UsageError(f"no pre-tokenizer {name}; llama.cpp knows {', '.join(known)}")


def _prepare_metadata(model: Any, source: Checkpoint) -> None:
    try:
        model.prepare_metadata(vocab_only=False)
    except NotImplementedError as error:
        if "pre-tokenizer" not in str(error):
            raise
        raise MoneEdgeError(
            f"{source.name}: llama.cpp's conversion does not recognise this tokenizer's "
            "pre-tokenizer; name the one it was made with, for example --tokenizer-pre gpt-2 "
            f"(known: {', '.join(known_pre_tokenizers())})"
        ) from error


def _weight_columns(model: Any, module: str, values: Array) -> tuple[str, Array]:
    """See `ModelFile.weight_columns`: with the package's names, and where it moves columns."""
    import torch

    item = model.filter_tensors((f"{module}.weight", lambda: None))
    if item is None:
        return "", values
    name = item[0]
    try:
        tensor: str = model.map_tensor_name(name)
    except ValueError:
        return "", values
    if ".linear_attn.out_proj." in name:  # heads of a delta net, in the order of their states
        row = torch.from_numpy(values)[None]
        ((_, moved),) = model.modify_tensors(row, name, int(re.findall(r"\.(\d+)\.", name)[0]))
        values = moved[0].numpy()
    return tensor, values


@contextmanager
def _inference() -> Iterator[None]:
    import torch

    with torch.inference_mode():
        yield


@contextmanager
def _own_names(name_map: Any) -> Iterator[None]:
    """Keep the names of tensors that an architecture has for itself from the models after it."""
    before = name_map.block_mappings_cfg
    name_map.block_mappings_cfg = dict(before)  # the package adds to it, for the whole process
    try:
        yield
    finally:
        name_map.block_mappings_cfg = before


@contextmanager
def _without_missing_mtp(model_class: Any, source: Checkpoint) -> Iterator[None]:
    """Do not promise layers that predict further tokens where the checkpoint has none.

    transformers leaves them out when it saves a model; the package goes by the config, or by how
    many the published model has.
    """
    before, layers = model_class.no_mtp, source.num_layers
    found = (MTP_KEY.search(key) for key in source.tensors)
    if not any(match and (not match[1] or int(match[1]) >= layers) for match in found):
        model_class.no_mtp = True
    try:
        yield
    finally:
        model_class.no_mtp = before


@contextmanager
def _stacks_in_chunks(gguf: ModuleType, lazy_torch: Any) -> Iterator[None]:
    """Make `torch.stack` of lazy experts a tensor that is read one expert at a time.

    The package stacks the experts of a layer into one tensor. Its writer already knows tensors
    that are written in chunks (`LazyChunkedTensor`); a stack along dimension 0 is one.
    """
    import torch

    class ExpertStack(lazy_torch):  # type: ignore[misc]
        _tensor_type = torch.Tensor

        def numpy(self) -> Any:
            parts = self._args[0]
            chunks = [
                lambda part=part: rowwise.evaluate(part, gguf.LazyBase).numpy() for part in parts
            ]
            dtype = lazy_torch._dtype_map[self._meta.dtype]
            return gguf.LazyChunkedTensor(chunks, tuple(self._meta.shape), dtype)

    original = lazy_torch.__dict__["__torch_function__"]

    def intercept(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = original.__func__(cls, func, types, args, kwargs)
        along = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
        if func is torch.stack and along == 0 and isinstance(result, lazy_torch):
            return ExpertStack(
                meta=result._meta, args=result._args, kwargs=result._kwargs, func=func
            )
        return result

    lazy_torch.__torch_function__ = classmethod(intercept)
    try:
        yield
    finally:
        lazy_torch.__torch_function__ = original


@contextmanager
def _configured(base: Any, source: Checkpoint, *, plain: bool) -> Iterator[None]:
    """Have the package read config.json as it is, if `plain`; as its model's own, if a pruner
    has given it another name; with layer types that it knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    load = base.__dict__["load_hparams"]
    config = dict(source.config)
    original = source.architecture.removesuffix(FOREIGN_SUFFIX)
    if original != source.architecture and original in NAMES:
        config |= {"model_type": original, "architectures": [NAMES[original]]}
        plain = True

    def load_hparams(*args: Any, **kwargs: Any) -> dict[str, Any]:
        read = json.loads(json.dumps(config)) if plain else load.__func__(*args, **kwargs)
        return _as_package_knows(read)

    base.load_hparams = staticmethod(load_hparams)
    try:
        yield
    finally:
        base.load_hparams = load


def _as_package_knows(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose layer types have the names that checkpoints on the hub and the package use.

    transformers renames some as it reads config.json, and writes the new names when it saves. The
    package takes a layer of a name that it does not know for another kind, without a word.
    """
    for part in (config, config.get("text_config") or {}):
        names = LAYER_TYPES.get(part.get("model_type", ""), {})
        if names and "layer_types" in part:
            part["layer_types"] = [names.get(kind, kind) for kind in part["layer_types"]]
    return config


@contextmanager
def _pruned_experts_filled_in(base: Any, source: Checkpoint) -> Iterator[None]:
    """Show the package a pruned checkpoint as if it were whole.

    It stacks the tensors of all experts of a layer. In place of a pruned one it gets a kept one,
    which is never read: the plan leaves it out again.
    """
    if not source.is_pruned:
        yield
        return
    index = base.__dict__["index_tensors"]

    def index_all(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _filled_in(index(self, *args, **kwargs), source)

    base.index_tensors = index_all
    try:
        yield
    finally:
        base.index_tensors = index


def _filled_in(tensors: dict[str, Any], source: Checkpoint) -> dict[str, Any]:
    found: dict[tuple[str, str], dict[int, Any]] = {}
    whole = {n: load for n, load in tensors.items() if not set(n.split(".")) & set(NOVICE_PARTS)}
    for name, load in whole.items():
        if match := EXPERT_KEY.fullmatch(name):
            found.setdefault((match["prefix"], match["part"]), {})[int(match["id"])] = load
    for (prefix, part), loads in found.items():
        for expert in range(source.num_experts):
            whole.setdefault(f"{prefix}{expert}.{part}", next(iter(loads.values())))
    fused = {} if found else {n: load for n, load in whole.items() if FUSED_KEY.search(n)}
    if fused and not source.pruned_plan:
        raise MoneEdgeError(
            f"{source.name} stores all experts of a layer in one tensor and does not say which "
            "are left; convert the model it was made from with --plan"
        )
    return whole | {name: _padded(name, load, source) for name, load in fused.items()}


def _padded(name: str, load: Callable[[], Any], source: Checkpoint) -> Callable[[], Any]:
    """A tensor of all kept experts, as the package wants it.

    Several rows of one expert each are as good without the others. Where an expert has several rows
    (dbrx), the package divides them by the number of experts; where one is left, it loses the
    dimension (step3p7). Zeros, which are cut off again, fill those up.
    """
    layer = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    plan = PrunePlan.parse(source.pruned_plan, f"{source.path / 'config.json'}")
    kept = len(plan.kept.get(int(layer[1]), ())) if layer else 0

    def padded() -> Any:
        import torch

        tensor = load()
        rows = tensor.shape[0] // max(1, kept)
        if ".experts." not in name and tensor.ndim != 3:  # a router
            return tensor
        if not kept or rows * kept != tensor.shape[0] or (rows == 1 and kept > 1):
            return tensor
        missing = (source.num_experts - kept) * rows
        return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing))

    return padded


def _without_padding(tensors: dict[str, LazyTensor], source: Checkpoint) -> dict[str, LazyTensor]:
    """Tensors of experts cut to the kept ones, where a pruned checkpoint holds no others."""
    if not source.pruned_plan or any(
        EXPERT_KEY.fullmatch(key)
        for key in source.tensors
        if key.rpartition(".")[2] not in NOVICE_PARTS
    ):
        return tensors
    plan = PrunePlan.parse(source.pruned_plan, f"{source.path / 'config.json'}")
    cut = dict(tensors)
    for layer, kept in plan.kept.items():
        of_experts = re.compile(rf"blk\.{layer}\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)")
        for name in filter(of_experts.fullmatch, tensors):
            if cut[name].shape[0] != len(kept):
                cut[name] = cut[name].select(range(len(kept)))
    return cut


def _lazy(gguf: ModuleType, info: Any, known: rowwise.Known) -> LazyTensor:
    shape, data, lazy = tuple(int(n) for n in info.shape), info.tensor, gguf.LazyBase
    if isinstance(data, gguf.LazyChunkedTensor):
        loads: list[Any] | None = list(data._chunks)
    else:
        rows = 1 if len(shape) > 2 else max(1, BLOCK_VALUES // shape[-1])
        blocked = len(shape) > 1 and rows < shape[0]
        loads = rowwise.blocks(data, lazy, rows, known) if blocked else None
    loads = loads or [functools.partial(rowwise.evaluate, data, lazy)]
    return LazyTensor(shape, tuple(map(_checked, loads)), info.dtype.name)


def _checked(load: Callable[[], Any]) -> Chunk:
    def chunk() -> Array:
        return np.ascontiguousarray(load())

    return chunk
