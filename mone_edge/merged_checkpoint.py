"""Tensors of a checkpoint whose experts are merged: read, made one a group, written in their type.

In: the tensors of a checkpoint and a plan with groups. Out: entries to write, which read the
members of a group when they are written. Knows nothing about folders or configs.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from mone_edge import merging
from mone_edge.errors import MoneEdgeError
from mone_edge.model_file import Array
from mone_edge.plan import PrunePlan
from mone_edge.safetensors_file import Entry
from mone_edge.safetensors_header import TensorRef
from mone_edge.source import EXPERT_KEY

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DOWN = "down_proj"  # what transformers calls the matrix that reads neurons


@dataclass(frozen=True)
class MergedLayer:
    """The tensors of one MoE block, with an expert a group."""

    plan: PrunePlan
    layer: int
    tensors: Mapping[str, TensorRef]  # of the checkpoint
    names: Mapping[str, str]  # key -> the parameter it is loaded into

    @cached_property
    def merger(self) -> merging.LayerMerger:
        return merging.layer_merger(self.plan, self.layer, self._neurons)

    def expert(self, key: str) -> list[Entry]:
        """A tensor of one expert, merged with the others of its group; none of another member."""
        match = EXPERT_KEY.fullmatch(key)
        assert match is not None
        kept, expert = self.plan.kept[self.layer], int(match["id"])
        if expert not in kept:
            return []
        number, ref = kept.index(expert), self.tensors[key]
        place = 0 if not self._is_down(key) else 1 if len(ref.shape) > 1 else None

        def read(member: int) -> Array:
            other = f"{match['prefix']}{member}.{match['part']}"
            if other not in self.tensors or self.tensors[other].shape != ref.shape:
                raise MoneEdgeError(f"the checkpoint is damaged: {other} is not like {key}")
            return _floats(other, self.tensors[other])

        _require_floats(key, ref)
        name = f"{match['prefix']}{number}.{match['part']}"
        return [_entry(name, ref, ref.shape, lambda: [self.merger.expert(number, read, place)])]

    def rows(self, key: str, total: int, rows: int = 1) -> Entry:
        """A tensor [total * rows, ...] or [1, total] of all experts.

        Raises:
            MoneEdgeError: its neurons should be put in order, and cannot be told apart; or it has
                not one row (or column) for each expert.
        """
        ref, groups = self.tensors[key], len(self.plan.groups[self.layer])
        _require_floats(key, ref)
        if ref.shape == (1, total):
            return _entry(
                key, ref, (1, groups), lambda: [self.merger.rows(_floats(key, ref).reshape(-1))]
            )
        if ref.shape[:1] != (total * rows,):
            raise MoneEdgeError(
                f"{key} has shape {list(ref.shape)}, not one row for each of {total} experts; this "
                "checkpoint cannot be merged by keys: convert it to a GGUF with --plan instead"
            )

        def merged() -> Iterator[Array]:
            for number in range(groups):
                yield self.merger.expert(number, lambda i: _floats(key, ref, i, total))

        return _entry(key, ref, (groups * rows, *ref.shape[1:]), merged)

    def stack(self, key: str, total: int, rows: int) -> Entry:
        """`rows` of a tensor inside the experts.

        Raises:
            MoneEdgeError: see there.
        """
        if self.merger.read is not None:
            raise MoneEdgeError(
                f"{key} holds all experts of a layer, and --method {self.plan.method} puts the "
                "neurons of each in order; convert to a GGUF with --plan instead, or use another "
                "--method"
            )
        return self.rows(key, total, rows)

    def _is_down(self, key: str) -> bool:
        return DOWN in self.names[key].rpartition(".")[2]

    @cached_property
    def _matrices(self) -> dict[int, list[str]]:
        """Keys of the matrices of each expert."""
        found: dict[int, list[str]] = {}
        for key in self.tensors:
            match, block = (
                EXPERT_KEY.fullmatch(key),
                re.search(r"\b(?:layers|blocks)\.(\d+)\.", key),
            )
            if (
                match
                and block
                and int(block[1]) == self.layer
                and len(self.tensors[key].shape) == 2
            ):
                found.setdefault(int(match["id"]), []).append(key)
        return found

    def _neurons(self, expert: int) -> list[Array]:
        keys = self._matrices[expert]
        downs = [key for key in keys if self._is_down(key)]
        if len(downs) != 1:
            raise MoneEdgeError(
                f"layer {self.layer} has {len(downs)} down projections an expert; --method "
                f"{self.plan.method} needs one"
            )
        inputs = (_floats(key, self.tensors[key]) for key in keys if key not in downs)
        return merging.neurons(_floats(downs[0], self.tensors[downs[0]]), inputs)


def _require_floats(key: str, ref: TensorRef) -> None:
    if ref.dtype not in DTYPES:
        raise MoneEdgeError(
            f"{key} is of type {ref.dtype}, and only floats ({', '.join(DTYPES)}) can be merged; "
            "merge the experts of the model before it was quantised"
        )


def _floats(key: str, ref: TensorRef, part: int = 0, parts: int = 1) -> Array:
    """The values of one of `parts` equal blocks of rows, in float32."""
    _require_floats(key, ref)
    size = ref.size // parts
    data = np.fromfile(ref.file, np.uint8, size, offset=ref.offset + part * size)
    if len(data) != size:
        raise MoneEdgeError(f"{ref.file} is damaged: {key} is cut short")
    shape = (ref.shape[0] // parts, *ref.shape[1:])
    values: Array = torch.from_numpy(data).view(DTYPES[ref.dtype]).float().reshape(shape).numpy()
    return values


def _entry(
    key: str,
    ref: TensorRef,
    shape: tuple[int, ...],
    blocks: Callable[[], "Iterator[Array] | list[Array]"],
) -> Entry:
    """Blocks of values below each other, in the type that the tensor had."""
    size = ref.size * int(np.prod(shape)) // int(np.prod(ref.shape))

    def pieces() -> Iterator[bytes]:
        for values in blocks():
            rounded = torch.from_numpy(values).to(DTYPES[ref.dtype]).contiguous()
            yield rounded.reshape(-1).view(torch.uint8).numpy().tobytes()

    return Entry(key, ref.dtype, shape, size, pieces)
