"""Skipped experts: torch with the same rule against the patched llama.cpp, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mone_edge import bench, calibration, convert, novices, skipping
from mone_edge.cli import run
from mone_edge.collect.gguf import collect as collect_gguf
from mone_edge.collect.loading import load_model
from mone_edge.collect.torch_model import collect
from mone_edge.errors import UsageError
from mone_edge.gguf_header import read_header
from mone_edge.plan import PrunePlan
from mone_edge.recipe import Recipe
from mone_edge.source import Source, resolve
from mone_edge.stats import SAMPLED, ExpertStats
from tests import architectures, tiny
from tests.bad_input import refused
from tests.conftest import Calibrated
from tests.test_oracle import VISIBLE, assert_same, llama_logits, uneven_plan
from tests.test_stats import assert_layers_close

BETA = 0.6
# Whether a model normalises the weights of the experts that it selects.
NORMALISED = {
    "qwen3_moe": True,
    "olmoe": False,
    "mixtral": True,
    "gpt_oss": True,  # a softmax over the selected ones; biases of its own
    "deepseek_v3 (groups)": True,  # chosen by other numbers than weighted; the order is kept
}


@dataclass(frozen=True)
class Case:
    """A tiny model with four of eight experts a token, and a plan that prunes it unevenly."""

    name: str
    source: Source
    stats: ExpertStats
    plan: PrunePlan
    text: calibration.Batches

    @property
    def tokens(self) -> np.ndarray:
        """[n]"""
        return self.text.tokens[:2].reshape(-1)


@pytest.fixture(scope="module", params=NORMALISED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, folder = request.param, tmp_path_factory.mktemp("skipping")
    if name in architectures.ARCHITECTURES:
        architectures.make(name, folder / "model", num_experts_per_tok=4)
    else:
        tiny.make_checkpoint(name, folder / "model", top_k=4)
    source = resolve(str(folder / "model"))
    (folder / "text.txt").write_text(tiny.TEXT * 2, encoding="utf-8")
    tokenizer = calibration.load_tokenizer(source.path)
    text = calibration.load([str(folder / "text.txt")], tokenizer, samples=8, seq_len=64, seed=0)
    stats = collect(source.path, text, model=source.name, fingerprint=source.fingerprint)
    return Case(name, source, stats, uneven_plan(stats, "mean"), text)


def torch_logits(case: Case, plan: PrunePlan | None, threshold: float) -> np.ndarray:
    import torch

    model = load_model(case.source.path, device="cpu", dtype="float32")
    if plan:
        novices.apply(model, plan, case.stats)
    if threshold:
        skipping.apply(model, threshold, normalised=NORMALISED[case.name])
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(case.tokens)[None]).logits[0].numpy())


def write(case: Case, plan: PrunePlan | None, path: Path, threshold: float = BETA) -> Path:
    recipe = Recipe(
        case.source.name, imatrix="none", tokenizer_pre="gpt-2", skip_threshold=threshold
    )
    jobs = convert.prepare(case.source, recipe, {"F32": path}, plan=plan, stats=case.stats)
    return convert.write(jobs, recipe)[0].outfile


@pytest.mark.usefixtures("built_runtime")
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_logits_agree_with_torch(
    case: Case, pruned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ids without a matrix are left out, and where devices cannot."""
    plan = case.plan if pruned else None
    gguf = write(case, plan, tmp_path / "m.gguf")
    oracle = torch_logits(case, plan, BETA)
    assert_same(llama_logits(gguf, case.tokens), oracle)
    monkeypatch.setenv("LLAMA_MOE_SKIP_DISABLE", "1")
    assert_same(llama_logits(gguf, case.tokens), oracle)
    everything = torch_logits(case, plan, 0)
    assert np.abs(oracle - everything).max() > VISIBLE * (oracle.max() - oracle.min())


@pytest.mark.usefixtures("built_runtime")
def test_statistics_of_a_file_that_skips_are_of_all_experts(case: Case, tmp_path: Path) -> None:
    if "groups" in case.name:
        pytest.skip("the statistics of one architecture more are no other test")
    found, wanted = (
        collect_gguf(write(case, None, tmp_path / f"{beta}.gguf", beta), case.text)
        for beta in (BETA, 0)
    )
    for layer, stats in wanted.layers.items():
        assert_layers_close(found.layers[layer], stats, rtol=0, but=SAMPLED)


@pytest.mark.usefixtures("built_runtime")
def test_skipped_slots_are_counted(tmp_path: Path) -> None:
    """Against the weights of the torch model; on the text in one chunk."""
    import torch

    source = resolve(str(tiny.make_checkpoint("olmoe", tmp_path / "m", top_k=4)))
    recipe = Recipe(source.name, imatrix="none", tokenizer_pre="gpt-2", skip_threshold=BETA)
    convert.write(convert.prepare(source, recipe, {"F32": tmp_path / "m.gguf"}), recipe)
    text = tiny.TEXT[:700]
    ids = torch.tensor([calibration.load_tokenizer(source.path).ids(text)])
    model = load_model(source.path, device="cpu", dtype="float32")
    skipping.apply(model, BETA, normalised=False)
    with torch.inference_mode():
        routers = model(ids, output_router_logits=True).router_logits
    skipped = slots = 0
    for logits in routers:
        weights = logits.softmax(-1).topk(4, dim=-1).values
        skipped += int((weights <= BETA * weights[:, :1]).sum())
        slots += weights.numel()
    assert 0.2 < skipped / slots < 0.8
    found = bench.count_slots(tmp_path / "m.gguf", text, threads=1)
    assert found.skipped_ratio == pytest.approx(skipped / slots, abs=5e-3)
    assert found.hit_ratio == 0


@pytest.mark.parametrize("normalised", [True, False])
def test_the_rule(normalised: bool) -> None:
    """By hand, and NAEE's own for two experts a token."""
    import torch

    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.0, 0.0, 0.0]])
    left = skipping.run_weights(weights[:2], 0.5, normalised=normalised)
    rest = torch.tensor([[0.5, 0.3, 0.0], [0.0, 0.6, 0.0]])
    torch.testing.assert_close(left, rest / rest.sum(-1, keepdim=True) if normalised else rest)
    pair = torch.tensor([[0.7, 0.3], [0.55, 0.45]])
    naee = torch.where(pair[:, 1:] < 0.5 * pair[:, :1], torch.tensor([1.0, 0.0]), pair)
    torch.testing.assert_close(skipping.run_weights(pair, 0.5, normalised=True), naee)


@pytest.mark.usefixtures("built_runtime")
def test_the_file_says_so(
    calibrated: Callable[[str], Calibrated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Written, inspected, carried on by prune and dropped, with a warning, by convert."""
    made = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    options = ["--outtype", "F16", "--tokenizer-pre", "gpt-2", "--stats", str(made.stats_file)]
    whole = ["convert", str(made.source.path), *options, "--prune-ratio", "0"]
    assert run([*whole, "--skip-threshold", "0.25", "-o", "skips.gguf"]) == 0
    assert run([*whole, "-o", "runs.gguf"]) == 0
    skips, runs = (read_header(Path(f"{name}.gguf")).metadata for name in ("skips", "runs"))
    entry = skips.pop("olmoe.expert_skip_threshold")
    assert (entry.kind, entry.value) == (6, 0.25)
    assert skips.keys() - runs.keys() == {"mone.recipe", "mone.tool", "mone.base_fingerprint"}
    assert "skip_threshold: 0.25" in skips["mone.recipe"].value
    assert "runs no expert of a gate weight up to 0.25" in Path("skips.md").read_text()
    capfd.readouterr()
    assert run(["inspect", "skips.gguf", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["skip_threshold"] == 0.25
    assert run(["inspect", "runs.gguf"]) == 0
    assert "skip_threshold" not in capfd.readouterr().out
    assert run(["convert", "skips.gguf", "--prune-ratio", "0", "-o", "again.gguf"]) == 0
    assert "the result runs them all, but with --skip-threshold 0.25" in capfd.readouterr().err
    assert skipping.threshold_of(Path("again.gguf")) == 0
    few = ["--samples", "2", "--seq-len", "64"]
    assert run(["stats", "skips.gguf", *few, "-o", "s.safetensors"]) == 0
    assert run(["plan", "s.safetensors", "--prune-ratio", "0.5", "-o", "p.json"]) == 0
    assert run(["prune", "skips.gguf", "--plan", "p.json", "-o", "pruned.gguf"]) == 0
    assert skipping.threshold_of(Path("pruned.gguf")) == 0.25


@pytest.mark.usefixtures("built_runtime")
def test_what_cannot_be_is_refused(
    calibrated: Callable[[str], Calibrated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    tiny.make_checkpoint("olmoe", tmp_path / "one", top_k=1)
    (tmp_path / "r.yaml").write_text("skip_threshold: 1.5\n")
    command: list[Any] = ["convert", made.source.path, "--tokenizer-pre", "gpt-2", "-o", "o.gguf"]
    command += ["--outtype", "F16", "--prune-ratio", "0"]
    for more, told in (
        (["--skip-threshold", "1"], "1.0 is not in the range"),
        (["--skip-threshold", "-0.1"], "-0.1 is not in the range"),
        (["--skip-threshold", "nan"], "nan is not a finite number"),
        (["--recipe", "r.yaml"], "skip_threshold is 1.5, not 0 <= threshold < 1"),
    ):
        refused(capfd, tmp_path, [*command, *more], 2, told)
    command[1] = "one"
    refused(capfd, tmp_path, [*command, "--skip-threshold", "0.5"], 2, "has one expert")
    for arch in skipping.UNSUPPORTED:
        with pytest.raises(UsageError, match="cannot be skipped"):
            skipping.set_threshold(_model(arch), 0.5)


def _model(arch: str) -> Any:
    from mone_edge.model_file import ModelFile

    return ModelFile(arch, {}, {}, lambda name: name)
