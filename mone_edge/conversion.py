"""A checkpoint as llama.cpp's own `conversion` package sees it: names, metadata, lazy tensors.

In: a checkpoint folder. Out: a `ModelFile`. Nothing about architectures or tokenizers is decided
here; the package of the pinned llama.cpp tree does it, in process. Reads no weights.
"""

import functools
import importlib
import inspect
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
from mone_edge.source import EXPERT_KEY, Checkpoint
from mone_edge.transformers_quiet import LOAD_ERRORS, quiet

BLOCK_VALUES = 1 << 24  # of a matrix, that are floats at a time: 64 MiB
UNQUANTISED = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}


@functools.cache
def packages() -> tuple[ModuleType, ModuleType]:
    """`gguf` and `conversion` of the pinned tree, which belong together."""
    tree = runtime.source_tree()
    for name in [m for m in sys.modules if m.partition(".")[0] == "gguf"]:
        del sys.modules[name]
    sys.path[:0] = [str(tree / "gguf-py"), str(tree)]
    try:
        return importlib.import_module("gguf"), importlib.import_module("conversion")
    finally:
        del sys.path[:2]


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
    gguf, conversion = packages()
    if tokenizer_pre:
        _require_known_pre(tokenizer_pre)
    with quiet():
        model_class = _model_class(conversion, source)
    with (
        quiet(),
        _inference(),
        _stacks_in_chunks(gguf, conversion.LazyTorchTensor),
        _pruned_experts_filled_in(conversion.ModelBase, source),
    ):
        try:
            model = model_class(
                source.path, gguf.LlamaFileType[UNQUANTISED[dtype]], Path("model.gguf")
            )
            if tokenizer_pre:
                model.get_vocab_base_pre = lambda tokenizer: tokenizer_pre
            model.prepare_tensors()
            _prepare_metadata(model, source)
        except MoneEdgeError:
            raise
        except LOAD_ERRORS as error:
            raise MoneEdgeError(f"{source.name} cannot be converted: {reason(error)}") from error
        except Exception as error:
            if type(error) is not Exception:  # the Rust tokenizer raises nothing more special
                raise
            raise MoneEdgeError(f"{source.name}: damaged tokenizer: {reason(error)}") from error
    known: rowwise.Known = {}
    tensors = {
        name: _lazy(gguf, info, known)
        for part in model.gguf_writer.tensors
        for name, info in part.items()
    }
    metadata = {k: v for part in model.gguf_writer.kv_data for k, v in part.items()}
    arch = gguf.MODEL_ARCH_NAMES[model.model_arch]
    return ModelFile(arch, metadata, tensors, functools.partial(_module_tensor, model))


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


def _module_tensor(model: Any, module: str) -> str | None:
    try:
        name: str = model.map_tensor_name(f"{module}.weight")
    except ValueError:
        return None
    return name


@contextmanager
def _inference() -> Iterator[None]:
    import torch

    with torch.inference_mode():
        yield


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
def _pruned_experts_filled_in(base: Any, source: Checkpoint) -> Iterator[None]:
    """Show the package a pruned checkpoint as if it were whole.

    It stacks the tensors of all experts of a layer. In place of a pruned one it gets a kept one,
    which is never read: the plan leaves it out again.
    """
    if not source.is_pruned:
        yield
        return
    index, load = base.__dict__["index_tensors"], base.__dict__["load_hparams"]

    def index_all(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _filled_in(index(self, *args, **kwargs), source.num_experts)

    def load_plain(*args: Any, **kwargs: Any) -> dict[str, Any]:
        hparams: dict[str, Any] = load.__func__(*args, **kwargs)
        hparams.pop("quantization_config", None)
        return hparams

    base.index_tensors, base.load_hparams = index_all, staticmethod(load_plain)
    try:
        yield
    finally:
        base.index_tensors, base.load_hparams = index, load


def _filled_in(tensors: dict[str, Any], experts: int) -> dict[str, Any]:
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for name in [n for n in tensors if n.rpartition(".")[2] in NOVICE_PARTS]:
        del tensors[name]
    for name, load in tensors.items():
        if match := EXPERT_KEY.fullmatch(name):
            found.setdefault((match["prefix"], match["part"]), {})[int(match["id"])] = load
    if not found:
        raise MoneEdgeError(
            "this pruned checkpoint stores all experts of a layer in one tensor, which llama.cpp's "
            "conversion cannot read; convert the model it was made from with --plan"
        )
    for (prefix, part), loads in found.items():
        for expert in range(experts):
            tensors.setdefault(f"{prefix}{expert}.{part}", next(iter(loads.values())))
    return tensors


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
