"""Bad options, places and texts: one clear line, the right code, nothing left, nothing touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mone_edge import runtime
from mone_edge.cli import COMMANDS, run
from mone_edge.errors import Resumable
from mone_edge.paths import cache_dir
from mone_edge.source import resolve
from tests import tiny
from tests.bad_input import refused, tree
from tests.conftest import Calibrated

Refused = Callable[..., None]
CONVERT = ("convert", "model", "--tokenizer-pre", "gpt-2", "--stats", "s.safetensors")
OUT = ("--outtype", "Q8_0", "-o", "o.gguf")
BOTH = ("--outtype", "F32", "--outtype", "keep", "-o", "o-{ftype}.gguf")


@pytest.fixture(name="workspace")
def make_workspace(
    calibrated: Callable[[str], Calibrated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder to stand in, with a model, its statistics and a text."""
    made = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(made.source.path)
    shutil.copy(made.stats_file, tmp_path / "s.safetensors")
    (tmp_path / "text.txt").write_text(tiny.TEXT, encoding="utf-8")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.fixture(name="refuses")
def make_refuses(workspace: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    def check(*arguments: Any, told: str, code: int = 1) -> None:
        refused(capfd, workspace, list(arguments), code, told)

    return check


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("runtime", "doctor")])
def test_missing_argument_and_unknown_option(command: str, refuses: Refused) -> None:
    refuses(command, code=2, told="Missing argument")
    refuses(command, "x", "--bogus", code=2, told="No such option '--bogus'")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_what_is_taken_everywhere(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, "info"] if command == "runtime" else [command]
    for _ in range(2):  # the options are added once
        assert run([*arguments, "--force", "--offline", "--json", "-q", "-v", "--help"]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        assert out.count("--force") + out.count("--offline") <= 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("bogus",), "No such command 'bogus'"),
        (("runtime", "build", "--backend", "bogus"), "bogus"),
        (("plan", "s.safetensors", "--prune-ratio", "-1"), "-1.0 is not in the range"),
        (("plan", "s.safetensors", "--prune-ratio", "nan"), "nan is not a finite number"),
        (("plan", "s.safetensors", "--prune-ratio", "abc"), "'abc' is not a valid float"),
        (("plan", "s.safetensors", "--prune-ratio", "0.99"), "at most 0.875"),
        (
            ("plan", "s.safetensors", "--prune-ratio", "0.9", "--replacement", "drop"),
            "top_k=2 among those that stay",
        ),
        (("plan", "s.safetensors", "--method", "zzz"), "no method zzz"),
        (("plan", "s.safetensors", "--scope", "zzz"), "'zzz' is not one of"),
        (("plan", "s.safetensors", "--protect", "x"), "write layers like 0,2-4,-1"),
        (("plan", "s.safetensors", "--protect", "0-99999999999999999999"), "layers of this model"),
        ((*CONVERT, *OUT, "--outtype", "Q99"), "no type Q99; there are"),
        ((*CONVERT, "-o", "o.gguf", "--outtype", "Q8_0", "--outtype", "F16"), "need {ftype}"),
        (("convert", "whole.gguf", "--prune-ratio", "0", *BOTH), "both make o-F32.gguf"),
        ((*CONVERT, *OUT, "--split-max-size", "1.5G"), "--split-max-size 1.5G"),
        ((*CONVERT, *OUT, "--tensor-type", "abc"), "malformed tensor type 'abc'"),
        ((*CONVERT, *OUT, "--tensor-type", "attn=Q99"), "invalid quantization type"),
        ((*CONVERT, *OUT, "--tensor-type", "zzz=Q8_0"), "no tensor is called like this"),
        ((*CONVERT, *OUT, "--tensor-type", "(=Q8_0"), "regular expression"),
        ((*CONVERT, *OUT, "--tokenizer-pre", "zzz"), "no pre-tokenizer zzz"),
        ((*CONVERT, "-o", "notes.md"), "ends in .gguf"),
        (("stats", "model", "--data", "text.txt", "--device", "cuda:9"), "--device cuda:9"),
        (("stats", "model", "--samples", "0"), "0 is not in the range"),
        (("stats", "model", "--data", "text.txt@" + "9" * 30), "weights are from 1e-6 to 1e6"),
        (("stats", "model", "--samples", "9" * 12), "--samples 999999999999"),
        (("stats", "model", "--seq-len", "9" * 30), "--seq-len 999999"),
        (("stats", "model", "-t", "5000"), "5000 is not in the range"),
        (("run", "x.gguf", "-p", "x", "-t", "5000"), "5000 is not in the range"),
        (("run", "x.gguf", "-p", "x", "-n", "0"), "0 is no number of tokens"),
        (("run", "x.gguf", "-p", "x", "-n", "-2"), "-2 is no number of tokens"),
        (("run", "x.gguf", "-p", "x", "--temp", "nan"), "nan is not a finite number"),
        (("eval", "model", "--ppl", "text.txt", "-c", "0"), "0 is not in the range"),
        ((*CONVERT, *OUT, "--skip-threshold", "0.9999999999"), "--skip-threshold 0.9999999999"),
        (("eval", "model"), "nothing to measure"),
        (("run", "x.gguf", "-p", "x", "-c", "99999999999"), "99999999999 is not in the range"),
        (("serve", "x.gguf", "--port", "70000"), "70000 is not in the range"),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...],
    told: str,
    workspace: Path,
    refuses: Refused,
    built_runtime: object,
) -> None:
    if "whole.gguf" in arguments:
        assert run(["plan", "s.safetensors", "-o", "p.json"]) == 0
        write_gguf_and_plan(workspace)
    refuses(*arguments, code=2, told=told)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("bogus: 1", "no option bogus"),
        ("calibration: {bogus: 1}", "no option calibration.bogus"),
        ("calibration: 3", "calibration is not a group"),
        ("prune_ratio: high", "prune_ratio cannot be 'high'"),
        ("prune_ratio: .nan", "prune_ratio is nan"),
        ("prune_ratio: 1e1", "prune_ratio is 10.0"),
        ("protect: zzz", "write layers like"),
        ("outtype: [1]", "outtype cannot hold 1"),
        ("protect: [x]", "protect cannot hold 'x'"),
        ("scope: all", "no scope all"),
        ("calibration: {seed: -1}", "calibration.seed is -1"),
        ("seed: 1\nseed: 2", "seed occurs twice"),
        ("protect_super: !!bool maybe", "is not YAML"),
        ("calibration: {seed: !!int ''}", "is not YAML"),
        ("prune_ratio: 0x" + "F" * 5000, "prune_ratio is too large a number"),
        ("a: &a [x]\nb: [*a, *a]", "aliases (*name) are not allowed"),
        ("[" * 5000, "nested too deeply"),
        ("- 1", "it holds no options"),
        ("method: !!python/object/apply:os.system [exit]", "is not YAML"),
        ("a: [", "is not YAML"),
    ],
)
def test_recipe_files(recipe: str, told: str, workspace: Path, refuses: Refused) -> None:
    (workspace / "r.yaml").write_text(recipe)
    refuses(*CONVERT, *OUT, "--recipe", "r.yaml", code=2, told=told)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("no.txt", None, "no such file"),
        ("empty.txt", b"", "0 tokens in all"),
        ("latin.txt", "Grüße ".encode("latin-1") * 99, "is not UTF-8 text: byte 2"),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("b.jsonl", b'{"text": "x"}\n[1]\n', 'line 2: no "text"'),
        ("c.jsonl", b"[" * 9999, "nested too deeply"),
        ("half.jsonl", b'{"text": "\\ud800"}', 'line 1: no "text"'),
        ("folder", None, "is a folder"),
    ],
)
def test_calibration_texts(
    name: str, content: bytes | None, told: str, workspace: Path, refuses: Refused
) -> None:
    if content is not None:
        (workspace / name).write_bytes(content)
    refuses("stats", "model", "-o", "x.safetensors", "--data", name, told=told)


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--stats", "no.safetensors"], 1, "no statistics file no.safetensors"),
        (["--novices", "no.safetensors"], 1, "no novices file no.safetensors"),
        (["--data", "no.txt"], 1, "--data no.txt: no such file"),
        (["--data", "folder"], 1, "--data folder is a folder"),
        (["--device", "cuda:9"], 2, "--device cuda:9 cannot be used"),
    ],
)
def test_inputs_are_looked_for_before_the_work(
    options: list[str], code: int, told: str, refuses: Refused, built_runtime: object
) -> None:
    whole = ("convert", "model", "--tokenizer-pre", "gpt-2", *OUT)
    refuses(*whole, *options, "--dry-run", code=code, told=told)


def test_hub_data_without_the_datasets_package(
    refuses: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuses("stats", "model", "--data", "org/set", told="pip install datasets")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", ":1: not JSON"),
        ("[]", ":1: not an object"),
        ('{"task": "t", "context": "c"}', "no choices, answer"),
        ('{"task": "t", "context": "c", "choices": ["a", "b"], "answer": 2}', "answer is 2"),
        (
            '{"task": "t", "context": "\\ud800", "choices": ["a", "b"], "answer": 0}',
            "is not a text",
        ),
        ("", "holds no task items"),
    ],
)
def test_task_files(line: str, told: str, workspace: Path, refuses: Refused) -> None:
    (workspace / "t.jsonl").write_text(line)
    refuses("eval", "model", "--tasks", "t.jsonl", told=told)


@pytest.mark.parametrize("command", [("convert",), ("stats",), ("inspect",)])
@pytest.mark.parametrize(
    "model",
    [
        "nothing",
        "./nothing",
        "x..y/z",
        "org/x.git",
        "org/x@",
        "org./x",
        "org/nothing",
        "org/x@v1",
        "~nobody-here/x",
        "a" * 300,
    ],
)
def test_models_that_are_not_there(
    command: tuple[str, ...], model: str, refuses: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses(*command, model, "--offline", told=model)


@pytest.mark.parametrize(
    ("outfile", "told"),
    [
        ("folder", "is a folder"),
        ("text.txt", "text.txt exists; add --force"),
        ("text.txt/x", "cannot write in text.txt"),
        ("/proc/none/x", "cannot write in /proc"),
        ("/dev/null", "not an ordinary file"),
        ("n" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize(
    "command", [("plan", "s.safetensors"), ("merge-stats", "s.safetensors"), CONVERT]
)
def test_output_places(
    command: tuple[str, ...], outfile: str, told: str, refuses: Refused, built_runtime: object
) -> None:
    refuses(*command, "-o", outfile, told=told)


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "s.safetensors", "-o", "s.safetensors"),
        ("merge-stats", "s.safetensors", "-o", "s.safetensors"),
        ("stats", "model", "--data", "text.txt", "-o", "text.txt"),
        ("stats", "model", "-o", "model/config.json"),
        ("plan", "s.safetensors", "-o", "new/../s.safetensors"),
        ("stats", "model", "--data", "text.txt@3", "-o", "text.txt"),
        ("plan", "s.safetensors", "--pretrained", "other", "-o", "other/config.json"),
        ("fit", "model", "--plan", "rank.json", "-o", "s.safetensors"),
        ("prune", "whole.gguf", "--plan", "g.json", "-o", "g.json"),
        ("prune", "whole.gguf", "--plan", "g.json", "-o", "s.safetensors"),
        (*CONVERT, "-o", "s.safetensors"),
        (*CONVERT, "-o", "model/model.safetensors"),
        (*CONVERT, "--method", "router-norm", "--pretrained", "other", "-o", "other/config.json"),
        (*CONVERT, "--data", "text.txt@3", "-o", "text.txt"),
        ("convert", "model", "--tokenizer-pre", "gpt-2", "--plan", "p.json", "-o", "s.safetensors"),
    ],
)
def test_force_does_not_replace_an_input(
    command: tuple[str, ...], workspace: Path, refuses: Refused, built_runtime: object
) -> None:
    for name, options in (("p", ()), ("rank", ("--replacement", "rank-2"))):
        assert run(["plan", "s.safetensors", "-o", f"{name}.json", *options]) == 0
    shutil.copytree("model", "other")
    write_gguf_and_plan(workspace)
    refuses(*command, "--force", told="is an input of this command")


def write_gguf_and_plan(workspace: Path) -> None:
    """`whole.gguf`, the model without loss, and `g.json`, a plan that says it is of that file."""
    whole = ["convert", "model", "--prune-ratio", "0", "--outtype", "F32", "-o", "whole.gguf"]
    assert run([*whole, "--tokenizer-pre", "gpt-2", "--offline"]) == 0
    plan = json.loads((workspace / "p.json").read_text())
    plan["fingerprint"] = resolve("whole.gguf").fingerprint
    (workspace / "g.json").write_text(json.dumps(plan))


def test_a_folder_that_holds_anything_else_is_not_replaced(
    workspace: Path, refuses: Refused
) -> None:
    assert run(["plan", "s.safetensors", "-o", "p.json"]) == 0
    prune = ("prune", "model", "--plan", "p.json", "-o", "made")
    assert run([*prune]) == 0
    refuses(*prune, told="made exists; add --force")
    assert run([*prune, "--force"]) == 0
    (workspace / "made" / "notes.txt").write_text("mine")
    refuses(*prune, "--force", told="made holds notes.txt, which no checkpoint made of model does")
    (workspace / "made" / "notes.txt").replace(workspace / "notes.txt")
    shutil.copy("p.json", "made/config.json.plan")
    inside = ("prune", "model", "--plan", "made/config.json.plan", "-o", "new/../made")
    refuses(*inside, "--force", told="new/../made holds made/config.json.plan, an input")
    refuses(*prune[:-1], ".", "--force", told=". holds")
    (workspace / "made" / "config.json.plan").unlink()
    (workspace / "elsewhere").mkdir()
    (workspace / "made").rename(workspace / "elsewhere" / "made")
    (workspace / "made").symlink_to("elsewhere/made")
    assert run([*prune, "--force"]) == 0
    assert (workspace / "made").is_symlink()
    assert [path.name for path in (workspace / "elsewhere").iterdir()] == ["made"]
    other = json.loads((workspace / "p.json").read_text()) | {"fingerprint": "0" * 64}
    (workspace / "other.json").write_text(json.dumps(other))
    refuses("prune", "model", "--plan", "other.json", "-o", "new/deep/out", told="the plan is of")


def test_what_stands_beside_an_output_is_not_replaced(
    workspace: Path, refuses: Refused, built_runtime: object
) -> None:
    assert run(["plan", "s.safetensors", "-o", "p.json"]) == 0
    write_gguf_and_plan(workspace)
    (workspace / "link.gguf").symlink_to("gone/x.gguf")
    refuses(*CONVERT, "-o", "link.gguf", told="link.gguf is a link to")
    both = ("--outtype", "Q8_0", "--outtype", "F16", "-o", "y.{ftype}")
    refuses(*CONVERT, *both, code=2, told="two files would have y.recipe.yaml")
    (workspace / "x.md").write_text("mine")
    refuses("prune", "whole.gguf", "--plan", "g.json", "-o", "x.gguf", told="x.md exists; add")
    (workspace / "o.md").write_text("mine")
    refuses(*CONVERT, *OUT, told="o.md exists; add --force")
    (workspace / "o-00001-of-00002.gguf").write_text("mine")
    refuses(*CONVERT, *OUT, "--split-max-size", "90K", told="o-00001-of-00002.gguf exists")
    refuses(*CONVERT, "-o", "new/../x.gguf", told="new/../x.md exists")


def test_options_that_the_plan_overrides_are_told_of(
    workspace: Path, capfd: pytest.CaptureFixture[str], built_runtime: object
) -> None:
    assert run(["plan", "s.safetensors", "--prune-ratio", "0.5", "-o", "p.json"]) == 0
    whole = ("convert", "model", "--tokenizer-pre", "gpt-2", "--plan", "p.json", "--dry-run")
    capfd.readouterr()
    assert run([*whole, "--prune-ratio", "0.5"]) == 0
    assert capfd.readouterr().err == ""
    assert run([*whole, "--prune-ratio", "0.25"]) == 0
    assert "--prune-ratio is what the plan says" in capfd.readouterr().err


def test_a_cache_folder_of_nobody_is_a_folder(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, place in (("~nobody-here/x", "~nobody-here/x"), ("rel", "rel")):
        monkeypatch.setenv("MONE_EDGE_CACHE", name)
        assert cache_dir() == workspace / place


def test_folders_made_for_nothing_go_again(refuses: Refused) -> None:
    refuses("plan", "nothing", "-o", "new/deep/p.json", told="no statistics file nothing")


def test_a_runtime_that_is_not_in_this_environment(
    refuses: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "installed_library", lambda: None)
    hint = "not installed; type: mone-edge runtime build"
    refuses(*CONVERT, *OUT, told=f"mone-edge: the patched llama-cpp-python is {hint}")


def test_full_disk(
    workspace: Path, refuses: Refused, monkeypatch: pytest.MonkeyPatch, built_runtime: object
) -> None:
    refuses("plan", "s.safetensors", "-o", "/dev/full/p.json", told="cannot write in /dev/full")

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    refuses("plan", "s.safetensors", "-o", "new/p.json", told="No space left on device")
    refuses(*CONVERT, *OUT, told="No space left on device")
    monkeypatch.setattr("mone_edge.quantize.quantize_rows", no_space)
    refuses(*CONVERT, *OUT, told="No space left on device")
    usage = shutil.disk_usage(workspace)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refuses(*CONVERT, *OUT, told="GB free, the result needs")


def test_full_disk_while_statistics_are_written(
    refuses: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def no_space(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", no_space)
    refuses("merge-stats", "s.safetensors", "-o", "new/x", told="No space left on device")


def test_json_mode_says_nothing_on_stdout_when_it_fails(refuses: Refused) -> None:
    refuses("inspect", "nothing", "--json", told="no model nothing")
    refuses("plan", "nothing", "--json", told="no statistics file")


@pytest.mark.parametrize(
    ("stopped", "told"),
    [
        (KeyboardInterrupt(), "again with: mone-edge plan s.safetensors"),
        (Resumable(), "go on with: mone-edge plan s.safetensors"),
        (Resumable("--resume"), "go on with: mone-edge plan s.safetensors --resume"),
    ],
)
def test_what_goes_on_after_an_interrupt(
    stopped: BaseException,
    told: str,
    workspace: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise stopped

    monkeypatch.setattr("mone_edge.stats.ExpertStats.load", stop)
    assert run(["plan", "s.safetensors"]) == 130
    assert capfd.readouterr().err == f"mone-edge: interrupted; {told}\n"
    assert not (workspace / "plan.json").exists()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stage", ["collect", "save"])
def test_an_interrupt_leaves_nothing(
    stage: str, signal_number: signal.Signals, workspace: Path, built_runtime: object
) -> None:
    pause = {
        "collect": "import mone_edge.collect.torch_model as m; m.collect_loaded = pause",
        "save": "import safetensors.numpy as m; m.save_file = pause",
    }[stage]
    script = f"""
import signal, sys, time, pathlib
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs behind
signal.signal(signal.SIGHUP, signal.SIG_DFL)
def pause(*a, **k):
    pathlib.Path("../ready").touch()
    time.sleep(60)
{pause}
from mone_edge.cli import main
main()
"""
    (workspace.parent / "ready").unlink(missing_ok=True)
    before = tree(workspace)
    command = [sys.executable, "-c", script, "stats", "model", "--data", "text.txt", "-o", "n/x y"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as child:
        while not (workspace.parent / "ready").exists() and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal_number)
        _, err = child.communicate(timeout=240)  # a hang; a busy core takes its time
    assert child.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith("warning: ")] == [
        "mone-edge: interrupted; again with: mone-edge stats model --data text.txt -o 'n/x y'"
    ]
    assert tree(workspace) == before
