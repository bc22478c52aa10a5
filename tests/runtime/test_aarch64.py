"""The aarch64 builds under an emulator: the logits of this machine, and of zeroed experts.

`make check-aarch64` builds what they need; without it they are skipped.
"""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mone_edge import runtime
from tests.runtime import tiny_gguf as tiny
from tests.runtime.program import Program, compile_program, relative_error

EMULATOR = "qemu-aarch64-static"
COMPILER = "aarch64-linux-gnu-gcc"
SYSROOT = "/usr/aarch64-linux-gnu"
# the oldest processor that each build is for, as far as the emulator has one
TARGETS = {"aarch64-linux": "neoverse-n1", "aarch64-linux-i8mm": "max"}
RUNS = [(1, 1), (5, 2), (96, 2)]
# at least two: a single matrix is not repacked, and another kernel may add in another order
KEPT = [4, 2, tiny.N_EXPERTS]
# nothing in one layer, and all layers in another order than the router's
FEW = [0, 3, 5]
ORDERS = dict.fromkeys(range(tiny.N_LAYERS), (6, 1, 4, 3, 0, 7, 2, 5))
QUANTIZED = {"Q4_K": "Q4_K_S"}
REPACKED = {"Q4_0", "Q8_0", "Q4_K"}

Files = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Make (once) the whole file with zeroed experts and the pruned one, of a type."""
    folder, made = tmp_path_factory.mktemp("models"), dict[str, tuple[Path, Path]]()

    def make(quant: str) -> tuple[Path, Path]:
        if quant not in made:
            model = tiny.random_model("qwen3moe", n_embd=256, n_ff=256)
            whole = write(folder / f"whole-{quant}.gguf", tiny.zeroed(model, KEPT), quant, None)
            pruned = write(folder / f"pruned-{quant}.gguf", tiny.pruned(model, KEPT), quant, KEPT)
            made[quant] = whole, pruned
        return made[quant]

    return make


def write(path: Path, model: tiny.Model, quant: str, kept: list[int] | None) -> Path:
    """Write a file of any type; gguf-py has no K-quants, llama-quantize does."""
    if quant not in QUANTIZED:
        return tiny.write(path, model, quant, kept=kept)
    plain = tiny.write(path.with_suffix(".f32"), model, kept=kept)
    command = [runtime.tool("llama-quantize"), plain, path, QUANTIZED[quant], "1"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def native(built_runtime: runtime.RuntimeInfo, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program on this machine."""
    return Program(compile_program(tmp_path_factory.mktemp("native"), built_runtime))


@pytest.fixture(scope="module", params=TARGETS)
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program of a cross build, under the emulator."""
    target = str(request.param)
    for name in (EMULATOR, COMPILER):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} here; `mone-edge doctor` names the package")
    build = runtime.info(target=target)
    if not build.built:
        pytest.skip(f"not built; type: mone-edge runtime build --target {target}")
    program = compile_program(tmp_path_factory.mktemp(target), build, COMPILER)
    return Program(program, (EMULATOR, "-cpu", TARGETS[target], "-L", SYSROOT))


def assert_near(values: tiny.Array, reference: tiny.Array, quant: str) -> None:
    """Logits are those of this machine: at F32 up to the order of additions.

    In the other types activations are rounded too, and a token near a tie is routed otherwise.
    """
    error = relative_error(values, reference)
    print(f"{quant}: {error:.1e} of the range")
    assert error < (1e-5 if quant == "F32" else 0.03)


@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0", "Q4_0", "Q4_K"])
def test_skipped_experts(emulated: Program, native: Program, files: Files, quant: str) -> None:
    """Exactly the whole file's logits."""
    whole, pruned = files(quant)
    values, log = emulated.run(pruned, RUNS)
    assert np.isfinite(values).all()
    assert np.array_equal(values, emulated.run(whole, RUNS)[0])
    assert ("CPU_REPACK model buffer" in log) == (quant in REPACKED)
    assert_near(values, native.run(pruned, RUNS)[0], quant)


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_another_order(emulated: Program, native: Program, tmp_path: Path, quant: str) -> None:
    """Exactly the logits of the whole file in the router's order."""
    model = tiny.random_model("qwen3moe")
    whole = tiny.write(tmp_path / "whole.gguf", tiny.zeroed(model, FEW, ORDERS), quant)
    part = tiny.pruned(tiny.stored_in_order(model, ORDERS), FEW)
    pruned = tiny.write(tmp_path / "pruned.gguf", part, quant, kept=FEW)
    values = emulated.run(pruned, RUNS)[0]
    assert np.array_equal(values, emulated.run(whole, RUNS)[0])
    assert_near(values, native.run(pruned, RUNS)[0], quant)


@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_low_rank_novices(emulated: Program, native: Program, tmp_path: Path, quant: str) -> None:
    """Both graphs: with ids that have no matrix, and without."""
    model = tiny.with_novices(tiny.pruned(tiny.random_model("olmoe"), FEW), FEW, (4, 32, 64))
    path = tiny.write(tmp_path / "m.gguf", model, quant, kept=FEW, novice_quant=quant)
    reference = native.run(path, RUNS)[0]
    for disable in ("0", "1"):
        program = replace(emulated, environment={"LLAMA_MOE_SKIP_DISABLE": disable})
        assert_near(program.run(path, RUNS)[0], reference, quant)
