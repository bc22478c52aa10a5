"""ModelFile: what a GGUF will hold, before any weight is read.

The common currency between reading a model (`conversion`), pruning it (`prune`) and writing it
(`convert`): metadata, and tensors whose values come chunk by chunk when asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Chunk = Callable[[], Array]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in NumPy's dimension order; its chunks are blocks of dimension 0, in order."""

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]  # of the experts of a layer: one for all, or one each
    dtype: str = "F32"  # ggml type in an unquantised file

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def select(self, rows: Sequence[int]) -> "LazyTensor":
        """Only these slices of dimension 0, in this order; what is left out is never read."""
        shape = (len(rows), *self.shape[1:])
        if len(self.chunks) == self.shape[0]:
            return replace(self, shape=shape, chunks=tuple(self.chunks[i] for i in rows))
        index = list(rows)
        return replace(self, shape=shape, chunks=(lambda: self.read()[index],))

    def slice(self, row: int) -> Array:
        """One slice of dimension 0, read now."""
        return np.asarray(self.select([row]).read()[0])

    def select_columns(self, columns: Sequence[int]) -> "LazyTensor":
        """Only these items of the last dimension, which has one number an item."""
        shape, index = (*self.shape[:-1], len(columns)), list(columns)
        return replace(
            self, shape=shape, chunks=(lambda: self.read().reshape(self.shape)[..., index],)
        )

    def read(self) -> Array:
        """The whole tensor; its last dimension is of stored items (bytes, of quantised types)."""
        blocks = [chunk() for chunk in self.chunks]
        if len(self.shape) > 1:
            blocks = [b.reshape(-1, *self.shape[1:-1], b.shape[-1]) for b in blocks]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def constant(values: NDArray[Any], dtype: str = "F32") -> LazyTensor:
    """A small tensor that is already there."""
    return LazyTensor(values.shape, (lambda: values,), dtype)


@dataclass(frozen=True)
class ModelFile:
    """A model of one architecture: metadata (gguf's key -> GGUFValue) and tensors by GGUF name."""

    arch: str
    metadata: dict[str, Any]
    tensors: dict[str, LazyTensor]
    # module of the checkpoint, a number for each column of its weight -> name of its tensor, empty
    # where there is none, and the numbers in the order of that tensor's columns
    weight_columns: Callable[[str, Array], tuple[str, Array]]

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value; `{arch}` in the key is filled in."""
        entry = self.metadata.get(key.format(arch=self.arch))
        return default if entry is None else entry.value

    @property
    def num_experts(self) -> int:
        return int(self.value("{arch}.expert_count", 0))

    @property
    def num_layers(self) -> int:
        return int(self.value("{arch}.block_count", 0))
