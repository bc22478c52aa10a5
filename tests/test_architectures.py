"""A handful of the matrix of architectures, all stages, and that its table is of all of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import architectures as benchmark
from mone_edge.bench import count_slots
from mone_edge.imatrix import imatrix_from_stats
from mone_edge.llama import GgufModel
from mone_edge.source import resolve
from tests import architectures, tiny

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
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen3_5_moe", "columns of a delta net's output in another order"),
        ("qwen3_vl_moe", "pictures, modules with a prefix of their own"),
    ],
)
def test_importance_is_what_llama_cpp_measures(name: str, why: str, tmp_path: Path) -> None:
    trial = benchmark.Trial(name, tmp_path)
    ours = imatrix_from_stats(trial.source.open(tokenizer_pre="gpt-2"), trial.stats)
    whole = resolve(str(trial.gguf))
    theirs = imatrix_from_stats(whole.open(), whole.collect(trial.batches))
    assert ours.keys() == theirs.keys()
    for tensor, values in theirs.items():
        np.testing.assert_allclose(ours[tensor], values, rtol=1e-2, atol=1e-3 * values.max())


@pytest.mark.usefixtures("built_runtime")
def test_a_conversion_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """qwen4_exp has names of its own for tensors that minimax_m3_vl has too."""
    for name in ("qwen4_exp", "minimax_m3_vl"):
        trial = benchmark.Trial(name, tmp_path / name)
        trial.folder.mkdir()
        assert trial.gguf.exists()


@pytest.mark.usefixtures("built_runtime")
@pytest.mark.parametrize("kept", [(1, 4, 6), ()])
def test_novice_hits_where_the_router_keeps_its_order(
    kept: tuple[int, ...], tmp_path: Path
) -> None:
    """In the first MoE layer only, so that it is the whole model that decides them."""
    trial = benchmark.Trial("deepseek_v3 (groups)", tmp_path)
    first, last = trial.plan.num_experts
    plan = replace(trial.plan, kept={first: kept, last: tuple(range(trial.plan.num_experts[last]))})
    path = trial.write("pruned", trial.source, plan, trial.stats)
    text = tiny.TEXT[:700]
    with GgufModel(path) as model:
        tokens = np.array([model.token_ids(text)])
    counts = trial.source.collect(replace(trial.batches, tokens=tokens)).layers[first].count
    oracle = counts[list(plan.pruned(first))].sum() / (2 * counts.sum())
    assert 0.1 < oracle <= 0.5
    assert count_slots(path, text, threads=1).hit_ratio == pytest.approx(oracle, abs=5e-3)


def test_the_committed_table_is_of_all_architectures() -> None:
    results = json.loads((benchmark.DOCS / "architectures.json").read_text(encoding="utf-8"))
    assert results.keys() == architectures.ARCHITECTURES.keys()
    text = (benchmark.DOCS / "architectures.md").read_text(encoding="utf-8")
    assert text == benchmark.table(results)
    assert sum(map(benchmark.all_through, results.values())) >= 44
