"""Nodes of a graph that llama.cpp is computing: their names, operations, sources and values.

In: the address of a `struct ggml_tensor` (of the pinned llama.cpp). Out: a `Node`. Knows nothing
about models.
"""

import ctypes
import functools
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mone_edge.errors import MoneEdgeError

MAX_SOURCES = 10
NUMPY_TYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    26: np.dtype(np.int32),
}


class GraphObserver(Protocol):
    """Sees nodes while llama.cpp computes."""

    def start(self) -> None:
        """A batch is about to be decoded; nodes of the one before are gone."""

    def wants(self, node: "Node") -> bool:
        """Whether `see` is to be called once this node is computed; asked in graph order."""

    def see(self, node: "Node") -> bool:
        """The computed node, its sources unchanged; False stops the rest of the batch."""


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor`."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


class Node:
    """One tensor of the graph, valid while its batch is computed."""

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self._library, self.address = library, address
        self._tensor = _Tensor.from_address(address)

    @property
    def name(self) -> str:
        """As `ffn_moe_topk-3`."""
        return bytes(self._tensor.name).decode("utf-8", "replace")

    @property
    def op(self) -> str:
        """As `MUL_MAT_ID`."""
        return _op_name(self._library, self._tensor.op)

    @property
    def stacked(self) -> int:
        """GGML's third dimension: matrices of a stack."""
        return int(self._tensor.ne[2])

    def source(self, index: int) -> "Node | None":
        """What the operation reads."""
        address = self._tensor.src[index]
        return Node(self._library, address) if address else None

    def values(self) -> NDArray[Any]:
        """F32, F16 or I32 values with GGML's last dimension first, leading ones cut to two axes.

        Where the memory is the host's own it is not copied: use the array before the graph goes on.

        Raises:
            MoneEdgeError: the tensor has another type.
        """
        if self._tensor.type not in NUMPY_TYPES:
            raise MoneEdgeError(f"tensor {self.name} has ggml type {self._tensor.type}")
        shape, strides = tuple(self._tensor.ne)[::-1], tuple(self._tensor.nb)[::-1]
        while len(shape) > 2 and shape[0] == 1:
            shape, strides = shape[1:], strides[1:]
        kind = NUMPY_TYPES[self._tensor.type]
        return np.ndarray(shape, kind, self._memory(), 0, strides)

    def _memory(self) -> Any:
        library = _declared(self._library)
        size = library.ggml_nbytes(self.address)
        if library.ggml_backend_buffer_is_host(self._tensor.buffer):
            return (ctypes.c_uint8 * size).from_address(self._tensor.data)
        memory = np.empty(size, np.uint8)
        library.ggml_backend_tensor_get(self.address, memory.ctypes.data, 0, size)
        return memory


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.ggml_nbytes.argtypes = [ctypes.c_void_p]
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
    library.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    copy = library.ggml_backend_tensor_get
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    copy.restype = None
    return library


@functools.cache
def _op_name(library: ctypes.CDLL, op: int) -> str:
    library.ggml_op_name.argtypes = [ctypes.c_int]
    library.ggml_op_name.restype = ctypes.c_char_p
    return str(library.ggml_op_name(op).decode())
