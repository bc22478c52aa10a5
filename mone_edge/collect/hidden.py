"""Hidden states between two layers, in a file: written and read by rows, never all in memory."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mone_edge.errors import MoneEdgeError

SPARE_BYTES = 64 << 20  # left free on the disk


@dataclass
class HiddenStates:
    """One file of `rows` sequences, each of `shape` (tokens, width)."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    _file: BinaryIO | None = field(default=None, repr=False)

    @property
    def row_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def require_space(self, rows: int) -> None:
        """Refuse a disk that cannot hold the file.

        Raises:
            MoneEdgeError: with what is needed and what is free.
        """
        needed = rows * self.row_bytes + SPARE_BYTES
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise MoneEdgeError(
                f"{self.path.parent} has {free / 1e9:.2f} GB free, hidden states need "
                f"{needed / 1e9:.2f} GB; name another place with --outfile, or fewer --samples"
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Open a new file for `write`."""
        with self.path.open("wb") as self._file:
            yield
        self._file = None

    def write(self, values: Tensor) -> None:
        """Append rows: [B, *shape].

        Raises:
            MoneEdgeError: the disk refuses them.
        """
        assert self._file is not None
        try:
            self._file.write(values.cpu().contiguous().view(torch.uint8).numpy().data)
        except OSError as error:
            raise MoneEdgeError(f"cannot write {self.path}: {error.strerror or error}") from error

    def read(self, start: int, count: int) -> Tensor:
        """Rows `start` to `start + count`: [count, *shape].

        Raises:
            MoneEdgeError: the file is shorter than that.
        """
        size = count * self.row_bytes
        with self.path.open("rb") as file:
            file.seek(start * self.row_bytes)
            data = np.fromfile(file, np.uint8, size)
        if len(data) != size:
            raise MoneEdgeError(f"{self.path} is damaged; remove {self.path.parent}, start again")
        return torch.from_numpy(data).view(self.dtype).reshape(count, *self.shape)

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Some rows, in their order: [len(rows), *shape]."""
        stored = np.memmap(self.path, np.uint8, "r").reshape(-1, self.row_bytes)
        return torch.from_numpy(stored[rows]).view(self.dtype).reshape(len(rows), *self.shape)
