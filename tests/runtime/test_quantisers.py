"""K types, quantised in lanes: the bytes of llama.cpp's own code, which works block by block."""

import ctypes
import platform

import numpy as np
import pytest
from numpy.typing import NDArray

from mone_edge import runtime
from mone_edge.quantize import quantize_rows
from tests.runtime.pristine import TYPES, compile_quantisers, quantise

COLUMNS, ROWS = 4096, 24
KINDS = ("normal", "bfloat16", "skewed", "sparse", "flat", "zero", "positive", "negative")
IMPORTANCES = ("none", "random", "half zero")

# elsewhere a compiler may fuse multiplications and additions, in the one as in the other
pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="bytes are the same on x86-64 only"
)


@pytest.fixture(scope="module")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, built_runtime: runtime.RuntimeInfo
) -> ctypes.CDLL:
    return compile_quantisers(tmp_path_factory.mktemp("quants"), built_runtime.root / "lib")


def weights(kind: str, rng: np.random.Generator) -> NDArray[np.float32]:
    x = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    if kind == "bfloat16":
        x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    elif kind == "skewed":
        x = (x**3 * rng.choice([1e-6, 1, 1e4], x.shape)).astype(np.float32)
    elif kind == "sparse":
        x *= rng.random(x.shape) < 0.05
    elif kind == "flat":
        x = np.repeat(x[:, ::16], 16, axis=1)
    elif kind == "zero":
        x[:] = 0
    elif kind in ("positive", "negative"):
        x = (1 + np.abs(x)) * (1 if kind == "positive" else -1)
    return np.ascontiguousarray(x, np.float32)


def importance(kind: str, rng: np.random.Generator) -> NDArray[np.float32] | None:
    values = rng.random(COLUMNS) ** 4
    if kind == "half zero":
        values *= rng.random(COLUMNS) < 0.5
    return None if kind == "none" else values.astype(np.float32)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_bytes_are_those_of_unpatched_llama_cpp(pristine: ctypes.CDLL, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for how in IMPORTANCES:
            x, columns = weights(kind, rng), importance(how, rng)
            ours = quantize_rows(x, dtype, columns, 1)
            assert np.array_equal(ours, quantise(pristine, x, dtype, columns)), (dtype, kind, how)
