"""The Vulkan build on whatever Vulkan device there is, such as Mesa's lavapipe on the CPU.

`make check-vulkan` builds what they need; without it they are skipped.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mone_edge import runtime
from tests.runtime import tiny_gguf as tiny
from tests.runtime.program import (
    EVERYTHING,
    Program,
    compile_program,
    relative_error,
    typical_error,
)

# one token takes the matrix-vector shaders, many the matrix-matrix ones
RUNS = [(1, 1), (5, 1), (96, 1)]
KEPT = [4, 1, tiny.N_EXPERTS]
# nothing in one layer, and all layers in another order than the router's
FEW = [0, 3, 5]
ORDERS = dict.fromkeys(range(tiny.N_LAYERS), (6, 1, 4, 3, 0, 7, 2, 5))


@pytest.fixture(scope="module")
def cpu(built_runtime: runtime.RuntimeInfo, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program on the CPU."""
    return Program(compile_program(tmp_path_factory.mktemp("cpu"), built_runtime))


@pytest.fixture(scope="module")
def vulkan(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program on the first Vulkan device; llama.cpp takes lavapipe only if it is named."""
    build = runtime.info(backend="vulkan")
    if not build.built:
        pytest.skip("not built; type: mone-edge runtime build --backend vulkan")
    program = compile_program(tmp_path_factory.mktemp("vulkan"), build)
    # matrices are multiplied in F16 wherever a device has it, also those of F32
    environment = {"GGML_VK_VISIBLE_DEVICES": "0", "GGML_VK_DISABLE_F16": "1"}
    return Program(program, environment=environment, gpu_layers=EVERYTHING)


@pytest.mark.parametrize("quant", tiny.QUANTS)
def test_skipped_experts(vulkan: Program, cpu: Program, tmp_path: Path, quant: str) -> None:
    """Exactly the logits of the whole file with zeroed experts; near those of the CPU."""
    model = tiny.random_model("qwen3moe", n_embd=256, n_ff=256)
    whole = tiny.write(tmp_path / "whole.gguf", tiny.zeroed(model, KEPT), quant)
    pruned = tiny.write(tmp_path / "pruned.gguf", tiny.pruned(model, KEPT), quant, kept=KEPT)
    values, log = vulkan.run(pruned, RUNS)
    assert "Vulkan0 model buffer" in log
    assert np.array_equal(values, vulkan.run(whole, RUNS)[0])
    assert_near(values, cpu.run(pruned, RUNS)[0], quant)


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_another_order(vulkan: Program, cpu: Program, tmp_path: Path, quant: str) -> None:
    """Exactly the logits of the whole file in the router's order."""
    model = tiny.random_model("qwen3moe", n_embd=256, n_ff=256)
    whole = tiny.write(tmp_path / "whole.gguf", tiny.zeroed(model, FEW, ORDERS), quant)
    part = tiny.pruned(tiny.stored_in_order(model, ORDERS), FEW)
    pruned = tiny.write(tmp_path / "pruned.gguf", part, quant, kept=FEW)
    values = vulkan.run(pruned, RUNS)[0]
    assert np.array_equal(values, vulkan.run(whole, RUNS)[0])
    assert_near(values, cpu.run(pruned, RUNS)[0], quant)


@pytest.mark.parametrize("disable", ["0", "1"])
@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_low_rank_novices(
    vulkan: Program, cpu: Program, tmp_path: Path, quant: str, disable: str
) -> None:
    """Both graphs: with ids that have no matrix, and the one of stock operations."""
    model = tiny.pruned(tiny.random_model("olmoe", n_embd=256, n_ff=256), FEW)
    model = tiny.with_novices(model, FEW, (4, 32, 64))
    path = tiny.write(tmp_path / "m.gguf", model, quant, kept=FEW, novice_quant=quant)
    environment = {**vulkan.environment, "LLAMA_MOE_SKIP_DISABLE": disable}
    values, log = replace(vulkan, environment=environment).run(path, RUNS)
    assert "Vulkan0 model buffer" in log
    assert_near(values, cpu.run(path, RUNS)[0], quant)


def assert_near(values: tiny.Array, reference: tiny.Array, quant: str) -> None:
    """Logits are the CPU's, which rounds activations to 8 bits for quantised weights.

    Tokens near a tie then go elsewhere. Exact at F32 for one token, which matrix-vector shaders
    multiply; those for whole matrices differ from the CPU's for any model.
    """
    assert np.isfinite(values).all()
    worst, typical = relative_error(values, reference), typical_error(values, reference)
    print(f"{quant}: worst {worst:.1e}, typical {typical:.1e} of the range")
    assert typical < 5e-3
    if quant == "F32":
        assert worst < 5e-3
        assert relative_error(values[:1], reference[:1]) < 1e-5
