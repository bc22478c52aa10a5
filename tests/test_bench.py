"""Benchmarks: what is counted is right; how fast this machine is, no test can know."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mone_edge import bench, convert, runtime
from mone_edge.bench import BenchResult, Run, SlotCounter, count_slots
from mone_edge.cli import run as run_cli
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Recipe
from tests import tiny
from tests.conftest import Calibrated

MIB = 1 << 20
SHORT = tiny.TEXT[:700]  # fits into one chunk of tokens


@pytest.fixture(scope="module")
def pruned(
    built_runtime: runtime.RuntimeInfo,
    calibrated: Callable[[str], Calibrated],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, PrunePlan]:
    """A tiny GGUF whole, the same with 1 and 5 of 8 experts kept, and the plan."""
    home = tmp_path_factory.mktemp("bench")
    model = calibrated("olmoe")
    plan = make_plan(model.stats, prune_ratio=0.5)
    first, last = plan.num_experts
    plan = PrunePlan(**{**vars(plan), "kept": {first: (3,), last: (0, 2, 4, 5, 7)}})
    for name, chosen in (("whole", None), ("pruned", plan)):
        recipe = Recipe(model=model.source.name, imatrix="none", tokenizer_pre="gpt-2")
        outfile = {"F32": home / f"{name}.gguf"}
        jobs = convert.prepare(model.source, recipe, outfile, plan=chosen, stats=model.stats)
        convert.write(jobs, recipe)
    return home / "whole.gguf", home / "pruned.gguf", plan


def hits_in_torch(model: Calibrated, plan: PrunePlan, text: str) -> float:
    """The same share, from the router of the torch model with novices."""
    import torch
    from transformers import AutoTokenizer

    from mone_edge import novices
    from mone_edge.collect.loading import load_model

    network = novices.apply(
        load_model(model.source.path, device="cpu", dtype="float32"), plan, model.stats
    )
    ids = AutoTokenizer.from_pretrained(model.source.path)(text)["input_ids"]
    with torch.inference_mode():
        output = network(torch.tensor([ids]), output_router_logits=True)
    hits = slots = 0
    for layer, logits in zip(plan.num_experts, output.router_logits, strict=True):
        chosen = logits.topk(plan.top_k, dim=-1).indices
        hits += int(torch.isin(chosen, torch.tensor(plan.pruned(layer))).sum())
        slots += chosen.numel()
    return hits / slots


def test_novice_hits_are_those_of_the_torch_router(
    pruned: tuple[Path, Path, PrunePlan], calibrated: Callable[[str], Calibrated]
) -> None:
    whole, small, plan = pruned
    oracle = hits_in_torch(calibrated("olmoe"), plan, SHORT)
    assert 0.2 < oracle < 1
    assert count_slots(small, SHORT, threads=1).hit_ratio == pytest.approx(oracle, abs=5e-3)
    assert count_slots(whole, SHORT, threads=1).hit_ratio == 0


def test_counter_counts_slots_and_hits() -> None:
    counter = SlotCounter()
    counter.kept = {0: 3, 1: 2}
    assert counter.wants("ffn_moe_topk-1")
    assert not counter.wants("ffn_moe_probs-1")
    counter.see("ffn_moe_topk-0", np.array([[0, 1], [2, 3]]))
    counter.see("ffn_moe_topk-1", np.array([[2, 1], [7, 0]]))
    assert (counter.hits, counter.slots, counter.hit_ratio) == (3, 8, 3 / 8)
    counter.see("ffn_moe_slots-1", np.array([[1, 0], [3, 1]]))  # the last ids as they are stored
    assert (counter.hits, counter.slots) == (2, 8)
    assert counter.wants("ffn_moe_run-1")
    assert not counter.wants("ffn_moe_run_ids-1")
    assert not counter.wants("ffn_moe_topk-1 (copy)")
    counter.see("ffn_moe_run-1", np.array([[[1.0], [0.0]], [[1.0], [1.0]]]))
    assert (counter.skipped, counter.skipped_ratio) == (1, 1 / 8)


def test_files_are_measured_in_turns(
    pruned: tuple[Path, Path, PrunePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, small, _ = pruned
    order: list[Path] = []
    real = bench.run_llama_bench

    def noted(path: Path, options: list[str]) -> Run:
        order.append(path)
        return real(path, options)

    monkeypatch.setattr(bench, "run_llama_bench", noted)
    results = bench.bench(
        [whole, small],
        prompt_tokens=16,
        generated_tokens=4,
        repetitions=2,
        threads=1,
        text=tiny.TEXT[:200],
    )
    assert order == [whole, small, whole, small]
    assert [(Path(r.model), r.test) for r in results] == [
        (path, test) for path in (whole, small) for test in ("pp16", "tg4")
    ]
    for result in results:
        assert len(result.samples) == 2
        assert result.tokens_per_second == pytest.approx(np.mean(result.samples))
        assert result.stddev == pytest.approx(np.std(result.samples, ddof=1))
        assert result.file_bytes == Path(result.model).stat().st_size
        assert MIB < result.peak_rss_bytes < 500 * MIB
    assert (results[0].novice_hit_ratio, results[2].novice_hit_ratio > 0) == (0, True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_childs_and_not_ours(tmp_path: Path) -> None:
    ours = np.ones(300 * MIB, np.uint8)
    code = "import time; b = bytearray(100 << 20); b[::4096] = b'x' * 25600; time.sleep(0.2)"
    with (tmp_path / "out").open("w+b") as out, (tmp_path / "err").open("w+b") as err:
        status, peak = bench._run_measured([sys.executable, "-c", code], out, err)
    assert (status, len(ours)) == (0, 300 * MIB)
    assert 100 * MIB < peak < 150 * MIB


def result(**changes: object) -> BenchResult:
    fields = {
        "model": "a/m.gguf", "test": "pp512", "tokens_per_second": 12.349, "stddev": 0.5,
        "median": 12.3, "samples": (12.0, 12.69), "file_bytes": 5 * MIB, "peak_rss_bytes": 9 * MIB,
        "novice_hit_ratio": 0.25, "skipped_ratio": 0.125, "model_type": "olmoe Q4_0",
        "parameters": 7_000_000, "backend": "CPU", "threads": 2,
    }  # fmt: skip
    return BenchResult(**(fields | changes))  # type: ignore[arg-type]


def test_outputs_hold_the_contracts_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "bench", lambda *_, **__: [result(), result(test="tg128")])
    assert run_cli(["bench", "m.gguf", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["test"] for row in document] == ["pp512", "tg128"]
    contract = ("model", "tokens_per_second", "stddev", "file_bytes", "peak_rss_bytes")
    assert all(key in document[0] for key in (*contract, "novice_hit_ratio"))
    assert run_cli(["bench", "m.gguf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    assert run_cli(["bench", "m.gguf", "-o", "csv"]) == 0
    header, first, _ = capsys.readouterr().out.splitlines()
    assert dict(zip(header.split(","), first.split(","), strict=True))["novice_hit_ratio"] == "0.25"
    assert run_cli(["bench", "m.gguf"]) == 0
    table = capsys.readouterr().out
    assert "| m.gguf |" in table
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert cells[7:12] == ["pp512", "12.35 ± 0.50", "9.0 MiB", "25.0%", "12.5%"]


def test_wrong_input_is_refused(
    pruned: tuple[Path, Path, PrunePlan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="both 0"):
        bench.bench([pruned[0]], prompt_tokens=0, generated_tokens=0)
    with pytest.raises(MoneEdgeError, match="text to count novice hits on is empty"):
        bench.bench([pruned[0]], text="\n")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(pruned[0].read_bytes()[:-5000])
    with pytest.raises(MoneEdgeError, match=r"cannot load .*cut.gguf: .* file bounds"):
        bench.bench([cut], repetitions=1)
    assert run_cli(["bench", str(tmp_path / "none.gguf")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_help_is_fast() -> None:
    """`--help` must not import the heavy packages (time itself is not measured here)."""
    for name in ("bench", "eval", "run", "serve"):
        code = (
            "import sys; from mone_edge.cli import run; run([sys.argv[1], '--help']);"
            "heavy = {'torch', 'numpy', 'transformers', 'llama_cpp', 'gguf'} & set(sys.modules);"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code, name], check=True, capture_output=True)
