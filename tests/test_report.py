"""The page of a folder of results: it shows what the files hold, and nothing that they do not."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mone_edge import convert, report, runtime
from mone_edge.cli import run
from mone_edge.errors import MoneEdgeError
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Recipe
from tests.bad_input import refused
from tests.conftest import Calibrated

pytestmark = pytest.mark.usefixtures("built_runtime")
EVAL = {"ppl": 41.25, "ppl_stderr": 1.5, "kld_mean": 0.125, "kld_stderr": 0.004, "same_top_p": 0.75}
BENCH = {"stddev": 2.0, "file_bytes": 3 << 20, "peak_rss_bytes": 5 << 20, "novice_hit_ratio": 0.375}


@pytest.fixture(scope="module")
def written(
    calibrated: Callable[[str], Calibrated], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PrunePlan]:
    """A folder with a GGUF of 3 and 5 of 8 experts, its statistics and its plan."""
    folder = tmp_path_factory.mktemp("run")
    model = calibrated("olmoe")
    plan = make_plan(model.stats, prune_ratio=0.5, method="mone", replacement="mean")
    first, last = plan.num_experts
    plan = PrunePlan(**{**vars(plan), "kept": {first: (0, 3, 6), last: (0, 2, 4, 5, 7)}})
    recipe = Recipe(model=model.source.name, imatrix="none", tokenizer_pre="gpt-2")
    outfiles = {"F32": folder / "small.gguf"}
    convert.write(
        convert.prepare(model.source, recipe, outfiles, plan=plan, stats=model.stats), recipe
    )
    shutil.copy(model.stats_file, folder / "stats.safetensors")
    plan.save(folder / "plan.json")
    return folder, plan


@pytest.fixture
def folder(written: tuple[Path, PrunePlan], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[0], tmp_path / "run"))


@pytest.mark.parametrize(("method", "replacement"), [("reap", "drop"), ("hc-smoe", "merge")])
def test_files_of_any_llama_cpp_tell_what_is_gone(
    method: str, replacement: str, calibrated: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    model = calibrated("olmoe")
    plan = make_plan(model.stats, prune_ratio=0.25, method=method, replacement=replacement)
    recipe = Recipe(model=model.source.name, imatrix="none", tokenizer_pre="gpt-2")
    outfiles = {"F32": tmp_path / "m.gguf"}
    convert.write(
        convert.prepare(model.source, recipe, outfiles, plan=plan, stats=model.stats), recipe
    )
    (found,) = report.gather(tmp_path).models
    assert (found.experts, found.kept, found.removed) == (8, (6, 6), 0.25)


def put(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


def columns(table: report.Table, model: str) -> dict[str, str]:
    row = next(row for row in table.rows if row[0] == model)
    return dict(zip(table.headers, row, strict=True))


def test_measurements_stand_beside_the_file_they_are_of(folder: Path) -> None:
    put(folder / "eval.json", {"model": "elsewhere/small.gguf", **EVAL})
    speeds = {"pp512": 400.5, "tg128": 50.25}
    rows = [
        {"model": "/else/small.gguf", "test": test, "tokens_per_second": speed, **BENCH}
        for test, speed in speeds.items()
    ]
    rows.append({**rows[0], "model": "whole.gguf", "tokens_per_second": 300, "file_bytes": 9 << 20})
    put(folder / "bench.json", rows)
    (table,) = report.tables(report.gather(folder))
    assert [row[0] for row in table.rows] == ["whole.gguf", "small.gguf"]  # the largest first
    size = (folder / "small.gguf").stat().st_size
    assert columns(table, "small.gguf") == {
        "model": "small.gguf",
        "file": f"{size / 1024:.1f} KiB",
        "experts removed": "50.0%",
        "kept a layer": "3 to 5",
        "method": "mone",
        "replacement": "mean",
        "perplexity": "41.25 ± 1.50",
        "KL divergence": "0.1250 ± 0.0040",
        "same top token": "75.0%",
        "pp512 t/s": "400.5 ± 2.0",
        "tg128 t/s": "50.2 ± 2.0",
        "peak memory": "5.0 MiB",
        "novice hits": "37.5%",
    }
    whole = columns(table, "whole.gguf")
    assert (whole["file"], whole["tg128 t/s"], whole["perplexity"]) == ("9.0 MiB", "-", "-")


def test_task_accuracies_have_their_own_table(folder: Path) -> None:
    tasks = {"copa": {"acc": 0.625, "acc_stderr": 0.05, "acc_norm": 0.5}, "average": 0.625}
    put(folder / "a.json", [{"model": "small.gguf", "tasks": tasks}])
    models, accuracies = report.tables(report.gather(folder))
    assert "perplexity" not in models.headers
    assert accuracies.headers == ("model", "copa", "average")
    assert accuracies.rows == (("small.gguf", "62.5% ± 5.0%", "62.5%"),)


def test_the_page_draws_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder / "eval.json", {"model": "small.gguf", **EVAL})
    assert run(["report", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    page = Path(told["html"]).read_text(encoding="utf-8")
    assert told["html"] == str(folder / "report.html")
    assert told["bytes"] == len(page.encode())
    assert told["statistics"] == ["stats.safetensors"]
    assert told["plans"] == ["plan.json"]
    assert told["models"][0]["kld_mean"] == 0.125
    assert page.count("<svg") == 3  # divergence and size, uneven layers, load of experts
    assert "and what plan.json removes" in page
    assert "http" not in page.replace("http://www.w3.org/", "")  # it loads nothing


def test_the_same_results_give_the_same_page(folder: Path, tmp_path: Path) -> None:
    put(folder / "eval.json", {"model": "small.gguf", **EVAL})
    pages = [tmp_path / "one.html", tmp_path / "two.html"]
    for page in pages:
        assert run(["report", str(folder), "-o", str(page), "-q"]) == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_names_are_text_and_nothing_else(folder: Path) -> None:
    hostile = "\N{CJK UNIFIED IDEOGRAPH-6A21}\ud800<script>alert(1)<br>$\\frac{$.gguf"
    put(folder / "eval.json", {"model": f"x/{hostile}", "file_bytes": 7, **EVAL})
    put(
        folder / "bench.json",
        {"model": hostile, "test": "<b>", "tokens_per_second": 3, "stddev": "x"},
    )
    results = report.gather(folder)
    report.write(results, folder / "page.html")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "<b>" not in page
    assert "\N{CJK UNIFIED IDEOGRAPH-6A21}?&lt;script&gt;alert(1)&lt;br&gt;$\\frac{$.gguf" in page


def test_values_that_are_no_numbers_are_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = '{"t": {"acc": NaN, "acc_norm": 0.25}, "\\ud800": {"acc": 0.5}, "u": "x"}'
    (tmp_path / "e.json").write_text(f'[{{"model": "m.gguf", "ppl": 3.0, "tasks": {scores}}}]')
    assert run(["report", str(tmp_path), "--json"]) == 0
    assert "NaN" not in capfd.readouterr().out


def test_the_parts_of_a_split_file_are_one_model(folder: Path, tmp_path: Path) -> None:
    (whole,) = report.gather(folder).models
    split = tmp_path / "split"
    split.mkdir()
    tool = str(runtime.tool("llama-gguf-split"))
    options = ["--split", "--split-max-tensors", "8"]
    source = str(folder / "small.gguf")
    subprocess.run([tool, *options, source, str(split / "x")], check=True, capture_output=True)
    parts = sorted(split.iterdir())
    second = parts[1].read_bytes()
    assert run(["report", str(split), "--html", str(parts[1]), "--force"]) == 1
    assert parts[1].read_bytes() == second
    assert len(parts) > 2
    (found,) = report.gather(split).models
    assert found.name == parts[0].name
    assert found.file_bytes == sum(part.stat().st_size for part in parts)
    assert (found.kept, found.experts) == (whole.kept, whole.experts) == ((3, 5), 8)


def test_what_cannot_be_read_is_told_and_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "damaged.json").write_text("{", encoding="utf-8")
    (folder / "cut.gguf").write_bytes((folder / "small.gguf").read_bytes()[:100])
    put(folder / "other.json", {"name": "somebody else's", "ppl": "many"})
    put(folder / "odd.json", [{"model": "small.gguf", "ppl": True, "kld_mean": 10**400}, 7, "x"])
    assert run(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert [line.split(":")[1].strip() for line in err.splitlines()] == [
        "left out cut.gguf",
        "left out damaged.json",
    ]
    assert "perplexity" not in out


def test_a_folder_without_results(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    refused(capfd, tmp_path, ["report", tmp_path], 1, "holds no GGUF, statistics, plan, or JSON")
    refused(capfd, tmp_path, ["report", tmp_path / "no"], 1, "No such file or directory")
    refused(capfd, tmp_path, ["report", tmp_path / "notes.txt"], 1, "cannot read the folder")
    with pytest.raises(MoneEdgeError):
        report.gather(tmp_path)


def test_nothing_is_replaced_unasked(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folder), "-q"]) == 0
    refused(capfd, folder, ["report", folder], 1, "add --force")
    into = folder / "plan.json"
    refused(capfd, folder, ["report", folder, "--html", into, "--force"], 1, "an input")
    assert run(["report", str(folder), "--force", "-q"]) == 0


def test_the_load_is_a_multiple_of_an_equal_share(
    folder: Path, calibrated: Callable[[str], Calibrated], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(report.plots, "expert_load", lambda *args: drawn.append(args) or "")
    report.figures(report.gather(folder))
    ((loads, removed),) = drawn
    layers = calibrated("olmoe").stats.layers
    for layer, load in loads.items():
        count = layers[layer].count
        assert load.mean() == pytest.approx(1)
        assert (load / load.sum()).tolist() == pytest.approx((count / count.sum()).tolist())
    assert list(removed.values()) == [(1, 2, 4, 5, 7), (1, 3, 6)]
