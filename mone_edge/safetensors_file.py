"""Safetensors shards written piece by piece, from bytes that are never all in memory.

In: names, types, shapes, and for each tensor an iterator of bytes. Out: a folder with one file, or
shards and their index. Knows nothing about models.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mone_edge.errors import MoneEdgeError

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    size: int  # bytes
    pieces: Callable[[], Iterator[bytes]]


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write all tensors, in this order, into as few shards as hold `shard_bytes` each.

    Raises:
        MoneEdgeError: a tensor's bytes are not as many as its entry says.
    """
    shards = list(_shards(entries, shard_bytes))
    total, done = sum(entry.size for entry in entries), 0
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for entry in shard:
                written = sum(file.write(piece) for piece in entry.pieces())
                if written != entry.size:
                    raise MoneEdgeError(f"{entry.name} has {written} bytes, not {entry.size}")
                done += written
                progress(done, total)
    if len(shards) > 1:
        weight_map = {e.name: n for n, shard in zip(names, shards, strict=True) for e in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def is_written(name: str) -> bool:
    """Whether `write_shards` gives files such names."""
    return name == INDEX or SHARD.fullmatch(name) is not None


def _shards(entries: Iterable[Entry], limit: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.size > limit:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.size
    yield shard


def _shard_name(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _header(entries: Iterable[Entry]) -> bytes:
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        document[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
