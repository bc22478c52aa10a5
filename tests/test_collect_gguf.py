"""Statistics through llama.cpp against those of torch, and the road from a GGUF to less of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from mone_edge import calibration, pipeline
from mone_edge import imatrix as imatrices
from mone_edge.calibration import Batches
from mone_edge.cli import run
from mone_edge.collect import torch_model
from mone_edge.collect.gguf import GgufTokenizer, collect
from mone_edge.plan import make_plan
from mone_edge.source import resolve
from mone_edge.stats import ARRAYS, SAMPLED, ExpertStats
from tests import tiny
from tests.conftest import Calibrated
from tests.test_gguf_file import write

pytestmark = pytest.mark.usefixtures("built_runtime")
Calibrate = Callable[[str], Calibrated]
RELATIVE = 1e-4  # of the largest value of an array


@pytest.fixture(scope="module")
def floats(
    calibrated: Calibrate, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The F32 GGUF of a calibrated checkpoint."""
    folder = tmp_path_factory.mktemp("floats")

    def make(model_type: str) -> Path:
        path = folder / f"{model_type}-F32.gguf"
        return path if path.exists() else write(calibrated(model_type).source, path, "F32")

    return make


def batches(tokens: np.ndarray) -> Batches:
    return Batches(tokens, ("text",), "0" * 64, 0, *tokens.shape, tokens.size)


def assert_close(ours: np.ndarray, theirs: np.ndarray, name: str, limit: float = RELATIVE) -> None:
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < limit, f"{name}: {error:.2g}"


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_statistics_are_torchs(
    model_type: str, calibrated: Calibrate, floats: Callable[[str], Path]
) -> None:
    model = calibrated(model_type)
    ours = collect(floats(model_type), batches(model.tokens), threads=1)
    assert ours.layers.keys() == model.stats.layers.keys()
    for index, layer in ours.layers.items():
        layer.check()
        theirs = model.stats.layers[index]
        assert (layer.tokens, layer.top_k) == (theirs.tokens, theirs.top_k)
        assert np.array_equal(layer.count, theirs.count)
        for name in set(ARRAYS) - set(SAMPLED):  # llama.cpp runs routed experts only
            limit = RELATIVE if name != "pair_error" else 0.05  # merged over other batches
            assert_close(getattr(layer, name), getattr(theirs, name), f"{index}.{name}", limit)


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_importance_matrix_is_torchs(
    model_type: str, calibrated: Calibrate, floats: Callable[[str], Path]
) -> None:
    """Also that of the head, whose input is read without computing it."""
    model = calibrated(model_type)
    ours = imatrices.imatrix_from_stats(
        resolve(str(floats(model_type))).open(),
        collect(floats(model_type), batches(model.tokens), threads=1),
    )
    theirs = imatrices.imatrix_from_stats(
        model.source.open(tokenizer_pre="gpt-2"), model.stats
    )  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert "output.weight" in ours
    for name, values in theirs.items():
        assert_close(ours[name], values, name)


@pytest.mark.parametrize("length", [513, 640])
def test_a_sequence_longer_than_a_batch(
    length: int, calibrated: Calibrate, floats: Callable[[str], Path]
) -> None:
    """They go through llama.cpp in two batches (of which none has a single token), and merge."""
    model = calibrated("olmoe")
    tokens = model.tokens.reshape(1, -1)[:, :length]
    ours = collect(floats("olmoe"), batches(tokens), threads=1)
    theirs = torch_model.collect(model.source.path, batches(tokens))
    for index, layer in ours.layers.items():
        for name in set(ARRAYS) - {"pair_error", *SAMPLED}:
            assert_close(getattr(layer, name), getattr(theirs.layers[index], name), name)


def test_pair_errors_of_one_batch_are_torchs(
    calibrated: Calibrate, floats: Callable[[str], Path]
) -> None:
    model = calibrated("olmoe")
    tokens = model.tokens.reshape(1, -1)[:, :256]
    ours = collect(floats("olmoe"), batches(tokens), threads=1)
    theirs = torch_model.collect(model.source.path, batches(tokens))
    for index, layer in ours.layers.items():
        assert layer.pair_error is not None
        assert_close(layer.pair_error, theirs.layers[index].pair_error, "pair_error")


def test_tokens_are_the_checkpoints(calibrated: Calibrate, floats: Callable[[str], Path]) -> None:
    model = calibrated("qwen2_moe")
    theirs = calibration.load_tokenizer(model.source.path)
    ours = GgufTokenizer(floats("qwen2_moe"))
    text = f"{tiny.TEXT}</s> 1,200 cups\n\n  of tea"
    assert ours.ids(text) == theirs.ids(text)
    assert ours.eos_id == theirs.eos_id
    messages = [{"role": "user", "content": "Who crosses the bridge?"}]
    assert ours.chat(messages) == theirs.chat(messages)


def test_nothing_here_imports_torch(floats: Callable[[str], Path]) -> None:
    code = (
        "import sys; from mone_edge.source import resolve; from mone_edge import pipeline\n"
        "from mone_edge.recipe import Calibration\n"
        f"pipeline.calibrate(resolve({str(floats('olmoe'))!r}), Calibration((), 1, 32))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_convert_calibrates_plans_and_slices(
    floats: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pipeline, "cache_dir", lambda: tmp_path / "cache")
    text, model = tmp_path / "text.txt", str(floats("qwen3_moe"))
    text.write_text(tiny.TEXT * 2, encoding="utf-8")
    common = ["--data", str(text), "--samples", "8", "--seq-len", "64"]
    out = str(tmp_path / "{ftype}.gguf")
    how = ["--prune-ratio", "0.5", "--method", "mone"]
    assert run(["convert", model, *common, *how, "-o", out, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert Path(document["outfile"]).name == "F32.gguf"
    assert document["experts_kept"] == [4, 4]
    (kept,) = (tmp_path / "cache" / "stats").iterdir()
    stats = ExpertStats.load(kept)
    assert stats.provenance.fingerprint == resolve(model).fingerprint
    plan = make_plan(stats, prune_ratio=0.5, method="mone")
    pruned = {t.name: t.data for t in gguf.GGUFReader(document["outfile"]).tensors}
    expected = stats.layers[1].output_mean[list(plan.pruned(1))]
    assert np.array_equal(pruned["blk.1.ffn_down_exps.bias"][4:], expected.astype(np.float32))


def test_stats_command(
    floats: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stats.safetensors"
    arguments = ["stats", str(floats("olmoe")), "--samples", "2", "--seq-len", "32", "-o", str(out)]
    assert run([*arguments, "--device", "cuda"]) == 2
    assert "on the CPU" in capsys.readouterr().err
    assert not out.exists()
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 64
    assert ExpertStats.load(out).provenance.architecture == "olmoe"
