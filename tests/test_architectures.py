"""A handful of the matrix of architectures, all stages, and that its table is of all of them."""

import json
from pathlib import Path

import pytest

from benchmarks import architectures as benchmark
from tests import architectures

REPRESENTATIVE = {
    "gpt_oss": "fused, transposed, with biases",
    "dbrx": "undecorated, all experts in one matrix",
    "llama4": "undecorated, gate weights before the experts",
    "deepseek_v3 (groups)": "routing within groups, a correction bias",
    "nemotron_h": "no gate projection, a hybrid",
    "step3p7": "undecorated, pictures, names of its own",
}


@pytest.mark.usefixtures("built_runtime")
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_every_stage_works(name: str, tmp_path: Path) -> None:
    cells = benchmark.run_stages(name, tmp_path)
    assert "deviation" in cells.pop("plan")
    bad = {stage: cell for stage, cell in cells.items() if not benchmark.works(cell)}
    assert not bad


@pytest.mark.usefixtures("built_runtime")
def test_a_conversion_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """qwen4_exp has names of its own for tensors that minimax_m3_vl has too."""
    for name in ("qwen4_exp", "minimax_m3_vl"):
        trial = benchmark.Trial(name, tmp_path / name)
        trial.folder.mkdir()
        assert trial.gguf.exists()


def test_the_committed_table_is_of_all_architectures() -> None:
    results = json.loads((benchmark.DOCS / "architectures.json").read_text(encoding="utf-8"))
    assert results.keys() == architectures.ARCHITECTURES.keys()
    text = (benchmark.DOCS / "architectures.md").read_text(encoding="utf-8")
    assert text == benchmark.table(results)
    assert sum(map(benchmark.all_through, results.values())) >= 44
