"""One layer in memory at a time: the same statistics, also after having been killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mone_edge import cli, pipeline
from mone_edge.calibration import Batches
from mone_edge.collect import partial
from mone_edge.collect.hidden import HiddenStates
from mone_edge.collect.sequential import collect_sequential
from mone_edge.collect.streaming import OUTSIDE, StreamedModel
from mone_edge.collect.torch_model import collect
from mone_edge.collect.work import Work, discard, open_work, unfinished, work_path
from mone_edge.commands.deciding import Means, measure
from mone_edge.console import Console
from mone_edge.errors import MoneEdgeError
from mone_edge.recipe import Calibration, Recipe
from mone_edge.source import Checkpoint, Source, resolve
from mone_edge.stats import ExpertStats
from tests.bad_input import tree
from tests.tiny import MODEL_TYPES, TEXT, VOCAB, make_checkpoint

LAYERS, SAMPLES, SEQ_LEN = 3, 5, 32


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("seq")
    return {
        kind: resolve(str(make_checkpoint(kind, root / kind, layers=LAYERS)))
        for kind in MODEL_TYPES
    }


def batches(seed: int = 0) -> Batches:
    tokens = np.random.default_rng(seed).integers(2, VOCAB, (SAMPLES, SEQ_LEN))
    return Batches(tokens, ("random",), f"{seed:064}", seed, SAMPLES, SEQ_LEN, tokens.size)


def in_memory(source: Source, dtype: str = "auto") -> ExpertStats:
    return collect(
        source.path, batches(), model=source.name, fingerprint=source.fingerprint,
        device="cpu", dtype=dtype, batch_tokens=2 * SEQ_LEN,
    )  # fmt: skip


def sequential(source: Source, work: Work, **options: object) -> ExpertStats:
    return collect_sequential(
        source, batches(), work, device="cpu", batch_tokens=2 * SEQ_LEN, **options
    )


def saved(stats: ExpertStats, path: Path) -> bytes:
    stats.save(path)
    return path.read_bytes()


def test_weights_wider_than_the_config_says_stay_wide(tmp_path: Path) -> None:
    folder = make_checkpoint("olmoe", tmp_path / "model", layers=LAYERS)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    source = resolve(str(folder))
    ours = sequential(source, Work(tmp_path / "work"))
    assert saved(ours, tmp_path / "a") == saved(in_memory(source), tmp_path / "b")


def stop_after(calls: int) -> object:
    left = iter(range(calls))

    def progress(done: int, total: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_statistics_are_those_of_the_whole_model_to_the_last_bit(
    sources: dict[str, Source], kind: str, dtype: str, tmp_path: Path
) -> None:
    stats = sequential(sources[kind], Work(tmp_path / "w"), dtype=dtype)
    expected = in_memory(sources[kind], dtype)
    assert saved(stats, tmp_path / "a") == saved(expected, tmp_path / "b")


def test_tied_embeddings_and_dense_layers(tmp_path: Path) -> None:
    folder = make_checkpoint(
        "qwen3_moe", tmp_path / "m", layers=LAYERS, tie_word_embeddings=True, mlp_only_layers=[1]
    )
    stats = sequential(resolve(str(folder)), Work(tmp_path / "w"))
    assert list(stats.layers) == [0, 2]
    assert saved(stats, tmp_path / "a") == saved(in_memory(resolve(str(folder))), tmp_path / "b")


def test_one_layer_is_resident(sources: dict[str, Source], tmp_path: Path) -> None:
    source, seen = sources["olmoe"], []
    original = StreamedModel.load

    def load(self: StreamedModel, part: str) -> None:
        original(self, part)
        weights = dict(self.model.named_parameters())
        seen.append({self.part_of(name) for name, w in weights.items() if not w.is_meta})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamedModel, "load", load)
        sequential(source, Work(tmp_path / "w"))
    layers = [f"model.layers.{i}" for i in range(LAYERS)]
    assert seen == [{OUTSIDE}, *({OUTSIDE, layer} for layer in layers)]


@pytest.mark.parametrize("calls", [0, 2, 3, 4, 6, 8])
def test_an_interrupted_run_goes_on(sources: dict[str, Source], calls: int, tmp_path: Path) -> None:
    source, work = sources["mixtral"], tmp_path / "w"
    with pytest.raises(KeyboardInterrupt):
        sequential(source, Work(work), on_progress=stop_after(calls))
    done = calls // 3  # three micro-batches a layer
    assert Work(work).started == (done > 0)
    steps: list[tuple[int, int]] = []
    stats = sequential(
        source, Work(work, resume=True), on_progress=lambda *step: steps.append(step)
    )
    assert steps[0] == (done * SAMPLES + 2, LAYERS * SAMPLES)
    assert saved(stats, tmp_path / "a") == saved(in_memory(source), tmp_path / "b")


def test_unfinished_work_is_not_thrown_away_silently(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    source, work = sources["olmoe"], tmp_path / "w"
    with pytest.raises(KeyboardInterrupt):
        sequential(source, Work(work), on_progress=stop_after(4))
    with pytest.raises(MoneEdgeError, match="holds unfinished work .* --resume"):
        sequential(source, Work(work))
    with pytest.raises(MoneEdgeError, match="work of another run: its model is"):
        sequential(sources["mixtral"], Work(work, resume=True))
    other = Work(work, resume=True)
    with pytest.raises(MoneEdgeError, match="its calibration text is 000"):
        collect_sequential(source, batches(1), other, device="cpu", batch_tokens=2 * SEQ_LEN)
    again = dataclasses.replace(batches(), seed=7)
    with pytest.raises(MoneEdgeError, match="its seed is 0, not 7"):
        collect_sequential(
            source, again, Work(work, resume=True), device="cpu", batch_tokens=2 * SEQ_LEN
        )
    steps: list[tuple[int, int]] = []
    sequential(source, Work(work, restart=True), on_progress=lambda *step: steps.append(step))
    assert steps[0] == (2, LAYERS * SAMPLES)


def start(work: Work) -> None:
    with unfinished(work), open_work(work, {}):
        pass


def test_foreign_folders_and_second_processes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "letters.txt").write_text("mine")
    with (
        pytest.raises(MoneEdgeError, match="is not a work folder"),
        open_work(Work(tmp_path / "w", restart=True), {}),
    ):
        pass
    with open_work(Work(tmp_path / "v"), {"a": 1}) as folder:
        folder.save(layers=1)
        with (
            pytest.raises(MoneEdgeError, match="another process"),
            open_work(Work(tmp_path / "v", resume=True), {"a": 1}),
        ):
            pass
    before = tree(tmp_path)
    with pytest.raises(MoneEdgeError, match="is not a work folder"):
        start(Work(tmp_path / "w"))
    with open_work(Work(tmp_path / "u"), {}):  # before its first step is finished
        with pytest.raises(MoneEdgeError, match="another process"):
            start(Work(tmp_path / "u"))
        assert (tmp_path / "u" / "lock").exists()
    discard(tmp_path / "u")
    assert tree(tmp_path) == before
    (tmp_path / "v" / "notes.txt").write_text("mine")
    discard(tmp_path / "v")
    assert [p.name for p in (tmp_path / "v").iterdir()] == ["notes.txt"]
    (tmp_path / "v" / "notes.txt").unlink()
    (tmp_path / "v" / "state.json").write_text("{")
    with pytest.raises(MoneEdgeError, match="is damaged"), open_work(Work(tmp_path / "v"), {}):
        pass


def test_in_memory_runs_go_on_too(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(partial, "SAVE_SHARE", 1e9)
    source, work = sources["qwen2_moe"], tmp_path / "w"
    options = {"fingerprint": source.fingerprint, "device": "cpu", "batch_tokens": 2 * SEQ_LEN}
    with pytest.raises(KeyboardInterrupt):
        collect(source.path, batches(), work=Work(work), on_progress=stop_after(1), **options)
    assert json.loads((work / "state.json").read_text())["state"] == {"rows": 4}
    steps: list[tuple[int, int]] = []
    stats = collect(
        source.path, batches(), model=source.name, work=Work(work, resume=True),
        on_progress=lambda *step: steps.append(step), **options,
    )  # fmt: skip
    assert steps == [(5, 5)]
    assert saved(stats, tmp_path / "a") == saved(in_memory(source), tmp_path / "b")


def test_missing_weights_and_small_memories_get_one_line(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["olmoe"]
    gone = "model.layers.1.mlp.gate.weight"
    fewer = Checkpoint(source.name, source.path, source.config)
    fewer.__dict__["tensors"] = {k: v for k, v in source.tensors.items() if k != gone}
    with pytest.raises(MoneEdgeError, match=f"1 weights are missing .*first: {gone}"):
        sequential(fewer, Work(tmp_path / "w"))
    for module in ("layerwise", "loading"):
        monkeypatch.setattr(f"mone_edge.collect.{module}.memory_bytes", lambda device: 100_000)
    with pytest.raises(MoneEdgeError, match="one layer and the embeddings need"):
        sequential(source, Work(tmp_path / "v"))
    with pytest.raises(MoneEdgeError, match="--sequential"):
        collect(source.path, batches(), device="cpu")
    assert not source.fits("cpu")


def test_a_short_hidden_file_is_noticed(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path / "hidden.1.bin", (4, 8), torch.bfloat16)
    values = torch.randn(3, 4, 8).bfloat16()
    with hidden.writing():
        hidden.write(values)
    assert torch.equal(hidden.read(1, 2), values[1:])
    with pytest.raises(MoneEdgeError, match="is damaged"):
        hidden.read(2, 2)
    with pytest.raises(MoneEdgeError, match="GB free, hidden states need"):
        hidden.require_space(10**15)


def test_a_killed_command_resumes_to_the_same_file(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "stats.safetensors"
    text.write_text(TEXT * 60, encoding="utf-8")
    arguments = [
        "stats", str(sources["olmoe"].path), "-o", str(out), "--sequential",
        "--data", str(text), "--samples", "400", "--seq-len", "64", "--device", "cpu",
    ]  # fmt: skip
    command = [sys.executable, "-m", "mone_edge", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while process.poll() is None and not Work(work_path(out)).started:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    assert cli.run(arguments) == 1
    assert cli.run([*arguments, "--resume"]) == 0
    assert not work_path(out).exists()
    killed = out.read_bytes()
    assert cli.run([*arguments, "--force"]) == 0
    assert out.read_bytes() == killed


def test_convert_measures_large_models_layer_by_layer(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "stats.safetensors"
    text.write_text(TEXT, encoding="utf-8")
    recipe = Recipe("m", calibration=Calibration((str(text),), 4, 32))
    monkeypatch.setattr(Checkpoint, "fits", lambda self, device: False)
    monkeypatch.setattr("mone_edge.collect.torch_model.collect", None)  # it must not be called
    how = Means("cpu", None, False)
    measured = measure(Console(quiet=True), sources["qwen3_moe"], recipe, out, how)
    assert measured.tokens == 128 and out.is_file() and not work_path(out).exists()


def test_ctrl_c_names_the_command_that_resumes(
    sources: dict[str, Source],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*args: object, work: Work, **options: object) -> None:
        sequential(sources["olmoe"], work, on_progress=stop_after(4))

    monkeypatch.setattr(pipeline, "calibrate", stop)
    out = tmp_path / "s.safetensors"
    code = cli.run(["stats", str(sources["olmoe"].path), "-o", str(out), "--sequential"])
    assert code == 130
    assert capsys.readouterr().err.strip().endswith(f"-o {out} --sequential --resume")
    assert Work(work_path(out)).started and not out.exists()
