"""K types, quantised in lanes: the bytes of llama.cpp's own code, which works block by block."""

import ctypes
import platform
import subprocess
import tarfile

import numpy as np
import pytest
from numpy.typing import NDArray

from mone_edge import runtime
from mone_edge.quantize import quantize_rows
from mone_edge.runtime.fetch import fetch_sdist
from mone_edge.runtime.upstream import read_upstream

COLUMNS, ROWS = 4096, 24
QUANTISERS = "ggml/src/ggml-quants.c"
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
    """llama.cpp's quantisers without any patch."""
    folder, upstream = tmp_path_factory.mktemp("quants"), read_upstream()
    with tarfile.open(fetch_sdist(upstream, offline=False)) as tar:
        top = tar.getnames()[0].partition("/")[0]
        code = tar.extractfile(f"{top}/{upstream.tree}/{QUANTISERS}")
        assert code
        (folder / "quants.c").write_bytes(code.read())
    tree, lib = runtime.source_tree() / "ggml", built_runtime.root / "lib"
    subprocess.run(
        ["cc", "-O1", "-DNDEBUG", "-w", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-o",
         str(folder / "quants.so"), str(folder / "quants.c"), f"-I{tree / 'src'}",
         f"-I{tree / 'include'}", f"-L{lib}", "-lggml-base", f"-Wl,-rpath,{lib}"],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "quants.so"))


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


@pytest.mark.parametrize("dtype", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_the_bytes_are_those_of_unpatched_llama_cpp(pristine: ctypes.CDLL, dtype: str) -> None:
    quantise = getattr(pristine, f"quantize_{dtype.replace('Q', 'q', 1)}")
    quantise.restype = ctypes.c_size_t
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for how in IMPORTANCES:
            x, column = weights(kind, rng), importance(how, rng)
            ours = quantize_rows(x, dtype, column, 1)
            theirs = np.empty_like(ours)
            pointer = None if column is None else column.ctypes.data_as(ctypes.c_void_p)
            size = quantise(
                x.ctypes.data_as(ctypes.c_void_p), theirs.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_int64(ROWS), ctypes.c_int64(COLUMNS), pointer,
            )  # fmt: skip
            assert size == ours.nbytes
            assert np.array_equal(ours, theirs), (dtype, kind, how)
