"""Quantising as llama.cpp does it: its type mixture, its C quantisers, its importance matrices.

In: a `ModelFile` and the name of a file type. Out: the type of every tensor, and bytes. Nothing
of llama-quantize is rewritten: the mixture is what `llama-quantize --dry-run` says of a file that
has the model's header and no data.
"""

import ctypes
import functools
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mone_edge import probe, runtime
from mone_edge.conversion import UNQUANTISED, packages
from mone_edge.errors import MoneEdgeError, RuntimeMissing, UsageError
from mone_edge.imatrix import Imatrix, write_imatrix
from mone_edge.low_rank import NOVICE_BLOCK, stored_rank
from mone_edge.model_file import Array, Chunk, LazyTensor, ModelFile

KEEP = "keep"  # every tensor in the type it has, for sources that have types
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "F32": "F32"}
NOT_WRITTEN = {"GUESSED", "NVFP4", "MXFP4_MOE"}  # no quantiser makes these from floats here
DRY_RUN_LINE = re.compile(
    r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[[^]]*\], type =\s*(\w+), size =.*?(?:\((\w+)\))?$", re.M
)
OVERRIDE_FAULT = re.compile(
    r"^(?:parse_tensor_type: |.*failed to quantize: (?=.*regular))(.+)", re.M
)
NOVICE_MATRIX = re.compile(r"blk\.\d+\.ffn_novice_(down|up)\.weight")
F16_MAX = 65504.0
ROW_BYTES = 1 << 20  # of float input that a thread quantises at a time
READ_AHEAD = 2  # chunks that are read before they are worked on
IN_WORK = 2  # chunks that are worked on while one is written
AHEAD = READ_AHEAD + IN_WORK


def file_types() -> list[str]:
    """Names that `--outtype` takes."""
    from gguf import LlamaFileType

    names = [t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in LlamaFileType]
    return [name for name in names if name not in NOT_WRITTEN]


def file_type(name: str) -> str:
    """The canonical name of a file type.

    Raises:
        UsageError: llama.cpp has no such type.
    """
    wanted = ALIASES.get(name.upper(), name.upper())
    if wanted not in (known := file_types()):
        raise UsageError(f"no type {name}; there are {', '.join(known)}")
    return wanted


def tensor_types(
    model: ModelFile,
    outtype: str,
    *,
    overrides: tuple[str, ...] = (),
    imatrix: Imatrix | None = None,
    requantise: bool = False,
) -> dict[str, str]:
    """The ggml type of each tensor in a file of this type, fall-backs included.

    Args:
        overrides: "REGEX=TYPE", as llama-quantize's --tensor-type.
        imatrix: its presence lets very low types through, as in llama-quantize.
        requantise: the model's tensors may be quantised already, and change their types.

    Raises:
        UsageError: an override is malformed, matches no tensor, or all types are kept.
        MoneEdgeError: llama-quantize refuses the model or the type.
    """
    if outtype == KEEP and overrides:
        raise UsageError(f"--tensor-type {overrides[0]} changes types: give an --outtype too")
    if outtype == KEEP or (outtype in UNQUANTISED and not requantise):
        return {name: tensor.dtype for name, tensor in model.tensors.items()}
    _require_matches(overrides, model)
    with tempfile.TemporaryDirectory(prefix="mone-edge-") as folder:
        header = Path(folder) / "header.gguf"
        _write_header_only(model, header)
        command = [str(runtime.tool("llama-quantize")), "--dry-run"]
        if requantise:
            command.append("--allow-requantize")
        for override in overrides:
            command += ["--tensor-type", override]
        if imatrix is not None:
            write_imatrix(imatrix, Path(folder) / "imatrix.gguf")
            command += ["--imatrix", str(Path(folder) / "imatrix.gguf")]
        done = subprocess.run(
            [*command, str(header), outtype], capture_output=True, text=True, errors="replace"
        )
    said = done.stdout + done.stderr
    types = {m[1]: (m[3] or m[2]).upper() for m in DRY_RUN_LINE.finditer(said)}
    if done.returncode and (said_no := OVERRIDE_FAULT.search(said)):
        raise UsageError(f"--tensor-type {' '.join(overrides)}: {said_no[1]}")
    if done.returncode or types.keys() != model.tensors.keys():
        raise MoneEdgeError(f"llama-quantize cannot make {outtype} of this model: {_reason(said)}")
    if "will require an imatrix" in said:
        raise MoneEdgeError(
            f"{outtype} needs an importance matrix; leave --imatrix at auto with statistics, "
            "or name a file"
        )
    return types


def novice_types(model: ModelFile, outtype: str) -> dict[str, str]:
    """The ggml types of the matrices of low-rank novices: that of an unquantised file, else Q8_0,
    F16 where a row is no whole number of its blocks."""
    found = {n: t.shape[-1] for n, t in model.tensors.items() if NOVICE_MATRIX.fullmatch(n)}
    if outtype in UNQUANTISED:
        return dict.fromkeys(found, outtype)
    return {name: "F16" if width % NOVICE_BLOCK else "Q8_0" for name, width in found.items()}


def pad_novices(model: ModelFile) -> ModelFile:
    """Low-rank novices with `stored_rank` components, zeros behind those that were fitted."""
    tensors = dict(model.tensors)
    for name, stack in model.tensors.items():
        part = NOVICE_MATRIX.fullmatch(name)
        if part and stack.dtype == "F32":
            axis = -2 if part[1] == "down" else -1
            if zeros := stored_rank(stack.shape[axis]) - stack.shape[axis]:
                tensors[name] = _pad(stack, axis, zeros)
    return replace(model, tensors=tensors)


def _pad(stack: LazyTensor, axis: int, zeros: int) -> LazyTensor:
    shape, widths = list(stack.shape), [(0, 0), (0, 0)]
    shape[axis] += zeros
    widths[axis] = (0, zeros)

    def padded(read: Chunk) -> Array:
        values = read()
        return np.pad(values, [(0, 0)] * (values.ndim - 2) + widths)

    chunks = tuple(functools.partial(padded, chunk) for chunk in stack.chunks)
    return replace(stack, shape=tuple(shape), chunks=chunks)


def require_loadable(model: ModelFile, name: str) -> None:
    """Let llama.cpp itself compare metadata and shapes, before a weight is read.

    Raises:
        MoneEdgeError: it would refuse a file with this header.
        RuntimeMissing: the patched llama.cpp is not built.
    """
    with tempfile.TemporaryDirectory(prefix="mone-edge-") as folder:
        header = Path(folder) / "header.gguf"
        _write_header_only(model, header)
        try:
            probe.require_loadable(header)
        except RuntimeMissing:
            raise
        except MoneEdgeError as error:
            why = str(error).replace(str(header), "the result")
            raise MoneEdgeError(f"{name}: config.json and weights do not agree: {why}") from error


def _require_matches(overrides: tuple[str, ...], model: ModelFile) -> None:
    for override in overrides:
        try:
            pattern = re.compile(override.rpartition("=")[0].lower())
        except re.error:
            continue  # llama-quantize has its own dialect, and says what is wrong
        if not any(pattern.search(name) for name in model.tensors):
            raise UsageError(f"--tensor-type {override}: no tensor is called like this")


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fail|invalid|unknown", line, re.I)]
    return (telling or lines or ["it said nothing"])[0]


def _write_header_only(model: ModelFile, path: Path) -> None:
    """The model's header, followed by a hole of the size of its data (no disk is used).

    Raises:
        MoneEdgeError: a number in the metadata has no place in a GGUF.
    """
    try:
        _write_header(model, path)
    except (struct.error, ValueError, TypeError) as error:
        raise MoneEdgeError(f"config.json holds a number that no GGUF can: {error}") from error
    except OSError as error:  # the hole counts where file sizes are limited
        raise MoneEdgeError(
            f"cannot write {path}: {error.strerror}; set TMPDIR to a folder that takes large files"
        ) from error


def _write_header(model: ModelFile, path: Path) -> None:
    gguf, _ = packages()
    writer = gguf.GGUFWriter(path, model.arch)
    writer.kv_data[0] = dict(model.metadata)
    sizes = {name: tensor_bytes(tensor, tensor.dtype) for name, tensor in model.tensors.items()}
    for name, tensor in model.tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), sizes[name], kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.flush()
    align = writer.data_alignment
    data = sum(-(-size // align) * align for size in sizes.values())
    end = writer.fout[0].tell()
    writer.close()
    os.truncate(path, -(-end // align) * align + data)


@functools.cache
def _ggml() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime.ggml_library()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="quantize")


def row_bytes(dtype: str, columns: int) -> int:
    """Bytes of one row of `columns` values in a ggml type."""
    gguf, _ = packages()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    return int(columns // block * size)


def tensor_bytes(tensor: LazyTensor, dtype: str) -> int:
    """Bytes of a tensor in a ggml type."""
    columns = tensor.shape[-1]
    return tensor.elements // columns * row_bytes(dtype, columns)


def quantize_rows(
    values: Array, dtype: str, importance: Array | None, threads: int
) -> NDArray[np.uint8]:
    """Quantise a matrix with ggml's own code, rows in parallel.

    Args:
        values: [rows, columns] float32.
        importance: [columns] mean of the squared input of each column, or None.

    Returns:
        The bytes, the same as llama-quantize's for any number of threads.
    """
    return _begin(values, dtype, importance, threads)()


def _begin(
    values: Array, dtype: str, importance: Array | None, threads: int
) -> Callable[[], NDArray[np.uint8]]:
    """Start `quantize_rows`; what is returned waits for its end."""
    gguf, _ = packages()
    kind = gguf.GGMLQuantizationType[dtype]
    if dtype in UNQUANTISED:
        plain = np.ascontiguousarray(gguf.quants.quantize(values, kind))
        return lambda: plain.reshape(-1).view(np.uint8)
    rows, columns = values.shape
    size = row_bytes(dtype, columns)
    out = np.empty(rows * size, dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    pointer = None if weights is None else weights.ctypes.data
    step = max(1, ROW_BYTES // (4 * columns))

    def quantize(first: int) -> None:
        count = min(step, rows - first)
        source, target = values.ctypes.data + 4 * first * columns, out.ctypes.data + first * size
        _ggml().ggml_quantize_chunk(int(kind), source, target, 0, count, columns, pointer)

    work = [_pool(threads).submit(quantize, first) for first in range(0, rows, step)]

    def finish() -> NDArray[np.uint8]:
        for part in work:
            part.result()
        return out

    return finish


def to_float(values: NDArray[Any], dtype: str, columns: int, threads: int) -> Array:
    """Dequantise with ggml's own code, rows in parallel.

    Args:
        values: stored values of a ggml type, whole rows in the last dimension.

    Returns:
        float32 [..., columns].

    Raises:
        MoneEdgeError: ggml cannot turn the type into floats.
    """
    gguf, _ = packages()
    get_traits = _ggml().ggml_get_type_traits
    get_traits.restype = ctypes.POINTER(_TypeTraits)
    decode = get_traits(int(gguf.GGMLQuantizationType[dtype])).contents.to_float
    if not decode:
        raise MoneEdgeError(f"{dtype} is not a type that ggml can turn into floats")
    stored, size = (
        np.ascontiguousarray(values).reshape(-1).view(np.uint8),
        row_bytes(dtype, columns),
    )
    rows = stored.nbytes // size
    out = np.empty((rows, columns), dtype=np.float32)
    step = max(1, ROW_BYTES // (4 * columns))

    def dequantise(first: int) -> None:
        count = min(step, rows - first)
        source, target = stored.ctypes.data + first * size, out.ctypes.data + 4 * first * columns
        decode(source, target, count * columns)

    list(_pool(threads).map(dequantise, range(0, rows, step)))
    return out.reshape(*values.shape[:-1], columns)


def read_ahead(loads: Iterable[Chunk]) -> Generator[Array, None, None]:
    """Values in order, each read by another thread while those before it are worked on."""
    pending = iter(loads)
    with ThreadPoolExecutor(1, "read", initializer=_leave_the_cores) as reader:
        waiting = deque(reader.submit(load) for load in islice(pending, READ_AHEAD))
        try:
            while waiting:
                values = waiting.popleft().result()
                waiting.extend(reader.submit(load) for load in islice(pending, 1))
                yield values
        finally:
            reader.shutdown(cancel_futures=True)


def _leave_the_cores() -> None:
    """Keep torch's own threads from spinning on the cores that quantise."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def quantized_chunks(
    name: str,
    tensor: LazyTensor,
    chunks: Iterable[Array],
    dtype: str,
    imatrix: Imatrix | None,
    threads: int,
) -> Iterator[NDArray[np.uint8]]:
    """A tensor's bytes in a ggml type, a bounded piece at a time (one expert of a stack).

    The next pieces are worked on while the caller writes one. A tensor that has the type already
    passes through, bit for bit.

    Args:
        chunks: the values of the tensor's chunks.

    Raises:
        MoneEdgeError: a value is infinite or not a number.
    """
    importance = (imatrix or {}).get(name)
    begun: deque[Callable[[], NDArray[np.uint8]]] = deque()
    for index, values in enumerate(chunks):
        if tensor.dtype == "F32":
            _require_sane(name, values, dtype)
        if dtype == tensor.dtype:
            yield values.reshape(-1).view(np.uint8)
            continue
        floats = values
        if tensor.dtype != "F32":
            floats = to_float(values, tensor.dtype, tensor.shape[-1], threads)
            _require_sane(name, floats, dtype)
        for piece, row in _matrices(floats, tensor.shape, index, importance):
            begun.append(_begin(piece.astype(np.float32, copy=False), dtype, row, threads))
            if len(begun) > IN_WORK:
                yield begun.popleft()()
    yield from (finish() for finish in begun)


def _require_sane(name: str, values: Array, dtype: str) -> None:
    """Refuse what is damaged: nothing trained is beyond the range of half precision, which the
    scales of quantised blocks have too."""
    largest = float(max(values.max(initial=0), -values.min(initial=0)))  # NaN stays NaN
    if not np.isfinite(largest):
        raise MoneEdgeError(
            f"{name} holds values that are infinite or not numbers; the model is damaged"
        )
    if largest > F16_MAX and dtype not in ("F32", "BF16"):
        raise MoneEdgeError(
            f"{name} holds {largest:.3g}, and {dtype} reaches {F16_MAX:.0f}; the model is "
            "damaged, or needs --outtype BF16"
        )


def _matrices(
    values: Array, shape: tuple[int, ...], index: int, importance: Array | None
) -> Iterator[tuple[Array, Array | None]]:
    """The matrices of a tensor's chunk, each with the importance of its columns."""
    if importance is None or importance.ndim == 1:
        yield values.reshape(-1, shape[-1]), importance
    else:  # experts, one or all of them
        experts = values.reshape(-1, *shape[-2:])
        first = index * len(experts)
        yield from zip(experts, importance[first : first + len(experts)], strict=True)
