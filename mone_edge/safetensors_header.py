"""Where the tensors of a checkpoint lie: its shards and their headers, every number checked.

In: a checkpoint folder. Out: a `TensorRef` for each tensor. Reads no tensor.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mone_edge.documents import parse_json, reason
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import is_file

MAX_HEADER_BYTES = 100_000_000  # what safetensors itself accepts
MAX_AXES = 8  # of a tensor
ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}  # safetensors' types


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies."""

    file: Path
    dtype: str  # safetensors' or ggml's name, as "BF16"
    shape: tuple[int, ...]  # NumPy's order
    offset: int  # bytes from the start of the file
    size: int  # bytes


def require_safetensors(file: Path, kind: str) -> None:
    """Refuse what is a file of another kind, rather than call it damaged.

    Args:
        kind: what it should be, as "statistics file".

    Raises:
        MoneEdgeError: it does not begin as safetensors does, or cannot be read.
    """
    try:
        if is_safetensors(file):
            return
    except OSError as error:
        raise MoneEdgeError(f"cannot read {file}: {error.strerror}") from error
    raise MoneEdgeError(f"{file} is not a {kind}: it does not begin as a safetensors file does")


def is_safetensors(file: Path) -> bool:
    """Whether a file begins as safetensors does: the header's length, then the header, JSON.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        start = opened.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES


def item_bytes(dtype: str) -> int:
    """Bytes of one value, from safetensors' name of the type ("BF16", "F8_E4M3")."""
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return max(1, int(digits or 8) // 8)


def weight_bytes(folder: Path) -> int:
    """Bytes of the files that `shards` finds, with its errors."""
    return sum(file.stat().st_size for file in shards(folder))


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        MoneEdgeError: some are missing, or there are pickles only.
    """
    index = folder / "model.safetensors.index.json"
    if is_file(index):
        try:
            names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise MoneEdgeError(f"{index} is damaged: {reason(error)}") from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise MoneEdgeError(f"{index} names files outside its folder")
        missing = [name for name in names if not is_file(folder / name)]
        if missing:
            raise MoneEdgeError(
                f"{folder} lacks {len(missing)} of {len(names)} shards, first {missing[0]}; "
                "fetch the model again"
            )
        return [folder / name for name in names]
    shards = sorted(folder.glob("model*.safetensors"))
    if shards:
        return shards
    if pickles := sorted(folder.glob("*.bin")):
        raise MoneEdgeError(
            f"{folder} holds {pickles[0].name} but no safetensors; pickle files can run code and "
            "are never opened: convert the checkpoint to safetensors first "
            "(save_pretrained on a machine you trust with it)"
        )
    raise MoneEdgeError(f"{folder} holds no model*.safetensors")


def read_header(file: Path) -> dict[str, TensorRef]:
    """The tensors of one shard, with the file's length checked against its header."""
    try:
        total = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if total < 8 or length > min(total - 8, MAX_HEADER_BYTES):
                raise MoneEdgeError(f"{file} is truncated or not safetensors: {total} bytes")
            header = parse_json(handle.read(length))
        header.pop("__metadata__", None)
        refs = {name: _reference(file, 8 + length, entry) for name, entry in header.items()}
    except OSError as error:
        raise MoneEdgeError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise MoneEdgeError(
            f"{file} has a damaged header: {reason(error)}; fetch it again"
        ) from error
    end = max((ref.offset + ref.size for ref in refs.values()), default=0)
    if end > total:
        raise MoneEdgeError(
            f"{file} is truncated: its header promises {end} bytes, it has {total}; fetch it again"
        )
    return refs


def _reference(file: Path, data_start: int, entry: Any) -> TensorRef:
    """One entry of a header; ValueError and the like where it contradicts itself."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(shape) > MAX_AXES:
        raise ValueError(f"{len(shape)} axes")
    numbers = (*shape, begin, end)
    if any(type(number) is not int or number < 0 for number in numbers) or begin > end:
        raise ValueError(f"shape {shape}, offsets {begin} to {end}")
    if dtype not in ITEM_BITS:
        raise ValueError(f"unknown type {dtype}")
    if end - begin != math.prod(shape) * ITEM_BITS[dtype] // 8:
        raise ValueError(f"{end - begin} bytes for {dtype} {shape}")
    return TensorRef(file, dtype, tuple(shape), data_start + begin, end - begin)
