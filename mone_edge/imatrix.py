"""Importance matrices: from our statistics, and in llama.cpp's file form.

In: statistics or a file. Out: the mean squared input of every weight column, by GGUF tensor name.
Knows nothing about quantising.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mone_edge.conversion import packages
from mone_edge.errors import MoneEdgeError
from mone_edge.gguf_header import read_header
from mone_edge.model_file import Array, ModelFile
from mone_edge.paths import is_file
from mone_edge.safetensors_header import TensorRef
from mone_edge.source import is_gguf
from mone_edge.stats import ExpertStats

Imatrix = Mapping[str, Array]  # GGUF tensor name -> [columns] or [experts, columns] mean x^2

CHUNK_TOKENS = 512  # as llama-imatrix records it


def imatrix_from_stats(model: ModelFile, stats: ExpertStats) -> dict[str, Array]:
    """The importance matrix that calibration measured: mean squared input of every weight column.

    An expert that no token reached weighs all columns alike, as in llama-quantize.
    """
    found: dict[str, Array] = {}
    for module, linear in stats.linears.items():
        mean = _mean(linear.input_sq_sum, np.array(linear.count))
        name, columns = model.weight_columns(module, mean)
        if name in model.tensors and model.tensors[name].shape[-1] == len(columns):
            found[name] = columns
    for layer, measured in stats.layers.items():
        inputs = _mean(measured.input_sq_sum, measured.count[:, None])
        inner = _mean(measured.inner_sq_sum, measured.count[:, None])
        found |= {
            f"blk.{layer}.ffn_{part}_exps.weight": inputs for part in ("gate", "up", "gate_up")
        }
        found[f"blk.{layer}.ffn_down_exps.weight"] = inner
    return {name: values for name, values in found.items() if name in model.tensors}


def _mean(total: NDArray[np.float64], count: NDArray[np.int64]) -> Array:
    ones = np.ones_like(total)
    return np.divide(total, count, out=ones, where=count > 0).astype(np.float32)


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Write llama.cpp's importance-matrix file (GGUF)."""
    gguf, _ = packages()
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["mone-edge statistics"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", CHUNK_TOKENS)
    for name, values in sorted(imatrix.items()):
        rows = np.atleast_2d(values)
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(rows))
        writer.add_tensor(f"{name}.counts", np.ones((len(rows), 1), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: Path) -> dict[str, Array]:
    """Read llama.cpp's importance-matrix file (GGUF): mean squared inputs by tensor name.

    Raises:
        MoneEdgeError: the file is missing, damaged or of the old `.dat` form.
    """
    if not is_gguf(path):
        what = "is not in GGUF form" if is_file(path) else "is not a file"
        raise MoneEdgeError(
            f"--imatrix {path} {what}; an old .dat file becomes one with: "
            f"llama-imatrix --in-file {path} -o imatrix.gguf"
        )
    refs = read_header(path).tensors
    tensors = {name: _floats(ref) for name, ref in refs.items() if ref.dtype == "F32"}
    found: dict[str, Array] = {}
    for name, total in tensors.items():
        if (
            name.endswith(".in_sum2")
            and (stem := name.removesuffix(".in_sum2")) + ".counts" in tensors
        ):
            counts = tensors[f"{stem}.counts"].reshape(-1)
            if not counts.size or total.size % counts.size:
                raise MoneEdgeError(f"{path} is damaged: {name} does not fit its counts")
            if not (np.isfinite(total).all() and np.isfinite(counts).all()):
                raise MoneEdgeError(f"{path} is damaged: {name} is not finite")
            rows = total.reshape(len(counts), -1).astype(np.float64)
            mean = _mean(rows, counts[:, None].astype(np.int64))
            found[stem] = mean if len(counts) > 1 else mean[0]
    if not found:
        raise MoneEdgeError(f"{path} holds no importance matrix (no tensors ending in .in_sum2)")
    return found


def _floats(ref: TensorRef) -> Array:
    return np.fromfile(ref.file, np.float32, ref.size // 4, offset=ref.offset)


def require_fit(imatrix: Imatrix, model: ModelFile, name: str) -> None:
    """Refuse another model's importance matrix: ggml would read beyond its end.

    Raises:
        MoneEdgeError: a row has not the columns of its tensor, or no tensor is in it.
    """
    shared = imatrix.keys() & model.tensors.keys()
    for tensor in sorted(shared):
        wanted, got = model.tensors[tensor].shape, imatrix[tensor].shape
        rows = (wanted[0], wanted[-1]) if len(wanted) == 3 else wanted[-1:]
        if got not in (wanted[-1:], rows):
            raise MoneEdgeError(
                f"--imatrix {name} is of another model: {tensor} is "
                f"{' x '.join(map(str, wanted))} here, its row there {' x '.join(map(str, got))}"
            )
    if not shared:
        raise MoneEdgeError(f"--imatrix {name} is of another model: it has no tensor of this one")
