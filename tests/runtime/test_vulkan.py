"""The Vulkan build on whatever Vulkan device there is, such as Mesa's lavapipe on the CPU.

`make check-vulkan` builds what they need; without it they are skipped.
"""

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

# one token and a few take the matrix-vector shaders, many the matrix-matrix ones
RUNS = [(1, 1), (5, 1), (96, 1)]
KEPT = [4, 1, tiny.N_EXPERTS]


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
    assert np.isfinite(values).all()
    assert np.array_equal(values, vulkan.run(whole, RUNS)[0])
    reference = cpu.run(pruned, RUNS)[0]
    worst, typical = relative_error(values, reference), typical_error(values, reference)
    print(f"{quant}: worst {worst:.1e}, typical {typical:.1e} of the range")
    # the CPU rounds activations to 8 bits for quantised weights: tokens near a tie go elsewhere
    assert typical < 5e-3
    assert quant != "F32" or worst < 1e-3
