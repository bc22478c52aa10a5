"""PyTorch and llama.cpp in one process: both configure the tiles of a CPU with AMX."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mone_edge import convert
from mone_edge.llama import GgufModel
from mone_edge.recipe import Recipe
from tests.conftest import Calibrated


@pytest.mark.usefixtures("built_runtime")
def test_both_compute_the_same_by_turns(
    calibrated: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    """On a CPU without AMX there is nothing to see."""
    model = calibrated("olmoe")
    recipe = Recipe(str(model.source.path), prune_ratio=0, imatrix="none", tokenizer_pre="gpt-2")
    outfile = {"Q8_0": tmp_path / "m.gguf"}
    convert.write(convert.prepare(model.source, recipe, outfile), recipe)
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    product, tokens = matrix @ matrix, model.tokens[0].tolist()
    with GgufModel(outfile["Q8_0"], threads=2) as gguf:
        logits = gguf.logits(tokens)
        for _ in range(3):
            assert torch.equal(matrix @ matrix, product)
            assert np.array_equal(gguf.logits(tokens), logits)
