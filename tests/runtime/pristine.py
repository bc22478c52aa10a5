"""llama.cpp's quantisers without our patches, compiled from the pinned source distribution.

In: a folder to compile in, a built runtime to link with. Out: the library, and calls of it.
"""

import ctypes
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mone_edge import runtime
from mone_edge.quantize import row_bytes
from mone_edge.runtime.fetch import fetch_sdist
from mone_edge.runtime.upstream import read_upstream

CODE = "ggml/src/ggml-quants.c"
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Nothing else is visible: ggml's own calls of functions of the same names must not end here.
EXPORTS = "{ global: pristine_*; local: *; };"


def compile_quantisers(folder: Path, lib: Path, optimise: str = "-O1") -> ctypes.CDLL:
    """Compile the one file; what it calls is taken from the libraries in `lib`.

    Returns:
        A library with `pristine_Q4_K` and the like, llama.cpp's `quantize_q4_K`.
    """
    upstream, tree = read_upstream(), runtime.source_tree() / "ggml"
    with tarfile.open(fetch_sdist(upstream, offline=False)) as tar:
        top = tar.getnames()[0].partition("/")[0]
        code = tar.extractfile(f"{top}/{upstream.tree}/{CODE}")
        assert code
        (folder / "quants.c").write_bytes(code.read())
    (folder / "exports").write_text(EXPORTS)
    renamed = [f"-Dquantize_{name.replace('Q', 'q')}=pristine_{name}" for name in TYPES]
    subprocess.run(
        ["cc", optimise, "-DNDEBUG", "-w", "-fPIC", "-shared", *renamed, "-o",
         str(folder / "quants.so"), str(folder / "quants.c"), f"-I{tree / 'src'}",
         f"-I{tree / 'include'}", f"-L{lib}", "-lggml-base", f"-Wl,-rpath,{lib}",
         f"-Wl,--version-script={folder / 'exports'}"],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "quants.so"))


def quantise(
    library: ctypes.CDLL, x: NDArray[np.float32], dtype: str, importance: Any
) -> NDArray[np.uint8]:
    """The bytes of a matrix [rows, columns] in a K type."""
    function = getattr(library, f"pristine_{dtype}")
    function.restype = ctypes.c_size_t
    rows, columns = x.shape
    out = np.empty(rows * row_bytes(dtype, columns), np.uint8)
    pointer = None if importance is None else importance.ctypes.data_as(ctypes.c_void_p)
    size = function(
        x.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(rows), ctypes.c_int64(columns), pointer,
    )  # fmt: skip
    assert size == out.nbytes
    return out
