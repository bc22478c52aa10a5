"""`convert --ppl` and `--max-kld`: the cost that is told is the one that `eval` measures."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mone_edge.cli import run
from mone_edge.commands import judging
from mone_edge.errors import MoneEdgeError
from mone_edge.evaluate import evaluate
from tests import tiny
from tests.bad_input import refused
from tests.conftest import Calibrated

pytestmark = pytest.mark.usefixtures("built_runtime")
MEASURES = ("ppl", "ppl_stderr", "kld_mean", "kld_p99", "same_top_p", "ppl_base", "tokens")


@pytest.fixture
def command(
    calibrated: Callable[[str], Calibrated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """`convert` of a tiny model on its statistics, in a folder with a text to measure on."""
    made = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 4, encoding="utf-8")
    options = ["--stats", str(made.stats_file), "--tokenizer-pre", "gpt-2", "--imatrix", "none"]
    return ["convert", str(made.source.path), *options]


def result(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, Any, str]:
    capfd.readouterr()
    code = run([*arguments, "--json"])
    out, err = capfd.readouterr()
    return code, json.loads(out), err


def test_the_cost_is_what_eval_measures(
    command: list[str],
    calibrated: Callable[[str], Calibrated],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = ["--prune-ratio", "0.5", "--outtype", "F32", "--outtype", "Q8_0"]
    options += ["-o", "x-{ftype}.gguf", "--ppl", "text.txt", "--chunks", "1"]
    code, documents, err = result(capfd, [*command, *options])
    assert (code, err) == (0, "")
    for document in documents:
        (measured,) = evaluate(
            [document["outfile"]],
            text=tmp_path / "text.txt",
            kld_base=calibrated("olmoe").source.path,
            max_chunks=1,
        )
        expected = measured.to_json()
        assert {k: document[k] for k in MEASURES} == {k: expected[k] for k in MEASURES}
        assert document["kld_mean"] > 0.01  # half of the experts are gone
        card = Path(document["outfile"]).with_suffix(".md").read_text(encoding="utf-8")
        assert f"{document['tokens']:,} tokens of text.txt" in card
        assert f"{document['kld_mean']:.4f}" in card


def test_an_unpruned_file_costs_nothing(
    command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--prune-ratio", "0", "--outtype", "F32", "-o", "x.gguf", "--ppl", "text.txt"]
    code, document, _ = result(capfd, [*command, *options, "--chunks", "1", "--max-kld", "1e-6"])
    assert code == 0
    assert abs(document["kld_mean"]) < 1e-6
    assert document["ppl"] == pytest.approx(document["ppl_base"], rel=1e-4)


def test_a_file_that_is_not_good_enough_is_made_and_exits_with_3(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--prune-ratio", "0.5", "--outtype", "F32", "-o", "x.gguf", "--ppl", "text.txt"]
    code, document, err = result(capfd, [*command, *options, "--chunks", "1", "--max-kld", "0.01"])
    assert code == 3
    assert document["bytes"] == (tmp_path / "x.gguf").stat().st_size
    (line,) = err.splitlines()
    assert "x.gguf is made, and its KL divergence is" in line
    assert "above --max-kld 0.01" in line


def test_a_file_that_cannot_be_measured_is_told_of_and_exits_with_3(
    command: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MoneEdgeError("the machine is on fire")

    monkeypatch.setattr("mone_edge.evaluate.evaluate", fails)
    options = ["--prune-ratio", "0", "--outtype", "F32", "-o", "x.gguf", "--ppl", "text.txt"]
    code, document, err = result(capfd, [*command, *options])
    assert code == 3
    assert document["bytes"] == (tmp_path / "x.gguf").stat().st_size
    assert "made, but not measured: the machine is on fire" in err


def test_a_file_that_an_interrupt_keeps_from_being_measured_is_told_of(
    command: list[str],
    calibrated: Callable[[str], Calibrated],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options = ["--prune-ratio", "0", "--outtype", "F32", "-o", "my x.gguf", "--ppl", "text.txt"]
    with monkeypatch.context() as patch:
        patch.setattr("mone_edge.evaluate.evaluate", interrupted)
        code, document, err = result(capfd, [*command, *options, "--chunks", "1"])
    assert (code, document["outfile"]) == (130, "my x.gguf")
    (line,) = err.splitlines()
    told, _, again = line.partition("measure with: mone-edge ")
    assert told == "mone-edge: interrupted; made, but not measured; "
    assert str(calibrated("olmoe").source.path) in again
    assert run(shlex.split(again)) == 0


def test_what_cannot_be_measured_is_refused_before_the_work(
    command: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = [*command, "--outtype", "F32", "-o", "x.gguf"]
    refused(capfd, tmp_path, [*whole, "--ppl", "no.txt"], 1, "cannot read no.txt")
    (tmp_path / "short.txt").write_text("Too short.", encoding="utf-8")
    refused(capfd, tmp_path, [*whole, "--ppl", "short.txt", "--dry-run"], 1, "at least 1024 with")
    refused(capfd, tmp_path, [*whole, "--chunks", "2"], 2, "--chunks limits the text of --ppl")
    refused(capfd, tmp_path, [*whole, "--max-kld", "-1"], 2, "-1.0 is not in the range")
    refused(capfd, tmp_path, [*whole, "--max-kld", "nan"], 2, "nan is not a finite number")
    onto = [*command, "-o", "text.txt", "--ppl", "text.txt", "--force"]
    refused(capfd, tmp_path, onto, 1, "an input of this command")
    monkeypatch.setattr(judging, "memory_bytes", lambda: 1 << 20)
    refused(capfd, tmp_path, [*whole, "--ppl", "text.txt"], 1, "this machine has 1.0 MiB")
