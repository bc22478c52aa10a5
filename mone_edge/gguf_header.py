"""The header of a GGUF file, every number of it checked: metadata, and where each tensor lies.

In: a path. Out: a `Header`. Nothing in the file is believed: a damaged, truncated or hostile one
gives one clear line. Reads no weights; knows nothing about models.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mone_edge.errors import MoneEdgeError
from mone_edge.safetensors_header import TensorRef

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
MAX_ITEMS = 1 << 24  # of an array: many times the largest vocabulary
LEAST_TENSOR_BYTES = 24  # of its entry in the header: name length, dimensions, type, offset


@dataclass(frozen=True)
class Entry:
    """A metadata value; text that is not UTF-8 (some tokenizers' tokens) stays bytes."""

    kind: int  # GGUFValueType
    value: Any
    item_kind: int | None = None  # of an array


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    file: Path
    metadata: dict[str, Entry]
    tensors: dict[str, TensorRef]  # in the file's order

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value; `{arch}` in the key is the architecture."""
        entry = self.metadata.get(key.format(arch=self.arch))
        return default if entry is None else entry.value

    def count(self, key: str) -> int:
        """A metadata value that must be a whole number, 0 where it is absent or an array.

        Raises:
            MoneEdgeError: it is something else.
        """
        value = self.value(key, 0)
        if isinstance(value, list):
            return max((n for n in value if isinstance(n, int)), default=0)
        if not isinstance(value, int) or value < 0:
            raise MoneEdgeError(f"{self.file}: {key.format(arch=self.arch)} is {value!r}")
        return int(value)

    @property
    def arch(self) -> str:
        entry = self.metadata.get("general.architecture")
        return str(entry.value) if entry else "?"


def read_header(file: Path) -> Header:
    """Read and check the header of one GGUF file.

    Raises:
        MoneEdgeError: it cannot be read, is not a GGUF, is damaged, or is shorter than it says.
    """
    try:
        with file.open("rb") as handle:
            if handle.read(4) != MAGIC:
                raise MoneEdgeError(f"{file} is not a GGUF file")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(file, data)
    except OSError as error:
        raise MoneEdgeError(f"cannot read {file}: {error.strerror or error}") from error
    except _Damaged as error:
        raise MoneEdgeError(f"{file} is a damaged GGUF: {error}") from error


class _Damaged(Exception):
    """What is wrong with the header."""


class _Cursor:
    """A position in the file; every read is checked against its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, len(MAGIC), len(data)

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        width = struct.calcsize(f"<{code}")
        self.require(count * width)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += count * width
        return values

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def text(self) -> str | bytes:
        length = self.number("Q")
        self.require(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw

    def name(self) -> str:
        text = self.text()
        if not isinstance(text, str):
            raise _Damaged(f"a name in its header is not text: {text[:40]!r}")
        return text

    def require(self, count: int) -> None:
        if count > self.size - self.at:
            raise _Damaged(
                f"its header asks for {count} bytes at byte {self.at} of {self.size} (truncated?)"
            )


def _parse(file: Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(data)
    version = cursor.number("I")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise _Damaged(f"version {version}, this mone-edge reads {known} (little-endian)")
    tensor_count, entry_count = cursor.numbers("Q", 2)
    cursor.require(tensor_count * LEAST_TENSOR_BYTES)
    metadata: dict[str, Entry] = {}
    for _ in range(entry_count):
        key = cursor.name()
        if key in metadata:
            raise _Damaged(f"it holds {key} twice")
        metadata[key] = _entry(cursor, key)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", Entry(4, DEFAULT_ALIGNMENT)).value
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return Header(file, metadata, _place(file, infos, start, alignment, len(data)))


def _entry(cursor: _Cursor, key: str) -> Entry:
    kind = cursor.number("I")
    if kind == STRING:
        return Entry(kind, cursor.text())
    if kind != ARRAY:
        return Entry(kind, cursor.number(_number_code(kind, key)))
    item_kind, count = cursor.number("I"), cursor.number("Q")
    if count > MAX_ITEMS:
        raise _Damaged(f"{key} has {count} items")
    if item_kind == STRING:
        cursor.require(8 * count)
        return Entry(kind, [cursor.text() for _ in range(count)], item_kind)
    return Entry(kind, list(cursor.numbers(_number_code(item_kind, key), count)), item_kind)


def _number_code(kind: int, key: str) -> str:
    if kind not in NUMBERS:
        raise _Damaged(f"{key} has type {kind}, which no GGUF knows")
    return NUMBERS[kind]


@dataclass(frozen=True)
class _Info:
    """A tensor's entry as the header has it."""

    name: str
    shape: tuple[int, ...]  # NumPy's order
    kind: int
    offset: int


def _tensor_info(cursor: _Cursor) -> _Info:
    name, dimensions = cursor.name(), cursor.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _Damaged(f"{name} has {dimensions} dimensions")
    shape = cursor.numbers("Q", dimensions)[::-1]
    return _Info(name, shape, cursor.number("I"), cursor.number("Q"))


def _place(
    file: Path, infos: list[_Info], start: int, alignment: int, total: int
) -> dict[str, TensorRef]:
    """Where each tensor's bytes are."""
    found: dict[str, TensorRef] = {}
    for info in infos:
        if info.name in found:
            raise _Damaged(f"it holds {info.name} twice")
        dtype, size = _type_and_size(info)
        if info.offset % alignment:
            raise _Damaged(f"{info.name} is not aligned to {alignment} bytes")
        end = start + info.offset + size
        if end > total:
            raise MoneEdgeError(
                f"{file} is truncated: it has {total} bytes, its header promises {info.name} up to "
                f"byte {end}; fetch it again"
            )
        found[info.name] = TensorRef(file, dtype, info.shape, start + info.offset, size)
    return found


def _type_and_size(info: _Info) -> tuple[str, int]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(info.kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise _Damaged(f"{info.name} has the unknown type {info.kind}") from None
    columns = info.shape[-1]
    if 0 in info.shape or columns % block:
        raise _Damaged(f"{info.name} has shape {info.shape}, its type has blocks of {block}")
    return kind.name, math.prod(info.shape) // block * block_bytes
