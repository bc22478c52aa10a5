"""Low-rank novices fitted through llama.cpp against those that torch fits to the same inputs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from mone_edge import convert
from mone_edge.collect import gguf_fitting
from mone_edge.collect.fitting import fit_checkpoint
from mone_edge.collect.gguf_fitting import fit_gguf
from mone_edge.collect.torch_model import collect
from mone_edge.collect.work import Work
from mone_edge.errors import MoneEdgeError
from mone_edge.gguf_file import GgufSource
from mone_edge.low_rank import LowRankNovices
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Recipe
from mone_edge.source import Checkpoint, resolve
from tests import architectures
from tests.conftest import Calibrated
from tests.test_fit import batches, fitted_novices
from tests.test_gguf_file import write
from tests.tiny import MODEL_TYPES

pytestmark = pytest.mark.usefixtures("built_runtime")
Make = Callable[[str], Calibrated]


def gguf_of(model: Calibrated, plan: PrunePlan, folder: Path) -> tuple[GgufSource, PrunePlan]:
    source = resolve(str(write(model.source, folder / "m-F32.gguf", "F32")))
    assert isinstance(source, GgufSource)
    return source, dataclasses.replace(plan, fingerprint=source.fingerprint)


def fitted(source: GgufSource, plan: PrunePlan, model: Calibrated, work: Work) -> LowRankNovices:
    return fit_gguf(source, plan, batches(model.tokens), work, threads=1)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_novices_are_torchs(kind: str, calibrated: Make, tmp_path: Path) -> None:
    """For each layer alone, since torch fits a layer in a model whose earlier ones are pruned."""
    model = calibrated(kind)
    plan = make_plan(model.stats, prune_ratio=0.5, replacement="rank-4")
    source, same = gguf_of(model, plan, tmp_path)
    ours = fitted(source, same, model, Work(tmp_path / "w"))
    ours.require_match(same)
    for layer in plan.kept:
        everything = {i: tuple(range(plan.num_experts[i])) for i in plan.kept}
        alone = dataclasses.replace(plan, kept=everything | {layer: plan.kept[layer]})
        theirs = fitted_novices(model, alone, tmp_path / f"torch{layer}").layers[layer]
        found = ours.layers[layer]
        assert np.array_equal(found.tokens, theirs.tokens)
        assert np.array_equal(found.rank, theirs.rank)
        np.testing.assert_allclose(found.error, theirs.error, rtol=1e-2)
        for a, b in ((found.bias, theirs.bias), (found.up @ found.down, theirs.up @ theirs.down)):
            np.testing.assert_allclose(a, b, atol=1e-2 * np.abs(b).max())


def test_scales_of_experts_are_taken_once(tmp_path: Path) -> None:
    """gemma4's are part of the gate weight in torch, and of the output in llama.cpp."""
    source = resolve(str(architectures.make("gemma4", tmp_path / "m")))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name in tensors:
        if name.endswith("per_expert_scale"):
            tensors[name] = np.linspace(0.4, 1.6, tensors[name].size, dtype=np.float32)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    source = resolve(str(tmp_path / "m"))
    assert isinstance(source, Checkpoint)
    read = batches(np.random.default_rng(0).integers(3, 400, (12, 64)))
    stats = collect(source.path, read, fingerprint=source.fingerprint, device="cpu")
    plan = make_plan(stats, prune_ratio=0.5, method="mone", replacement="rank-4")
    first = min(plan.kept)  # later layers' inputs differ: torch prunes those before
    everything = {i: tuple(range(plan.num_experts[i])) for i in plan.kept}
    plan = dataclasses.replace(plan, kept=everything | {first: plan.kept[first]})
    recipe = Recipe(model="m", imatrix="none")
    convert.write(convert.prepare(source, recipe, {"F32": tmp_path / "w.gguf"}), recipe)
    whole = resolve(str(tmp_path / "w.gguf"))
    assert isinstance(whole, GgufSource)
    same = dataclasses.replace(plan, fingerprint=whole.fingerprint)
    biases = []
    for model, chosen, fitted_to in (
        (source, plan, fit_checkpoint(source, plan, read, Work(tmp_path / "t"), device="cpu")),
        (whole, same, fit_gguf(whole, same, read, Work(tmp_path / "g"), threads=1)),
    ):
        outfiles = {"F32": tmp_path / "pruned.gguf"}
        jobs = convert.prepare(model, recipe, outfiles, plan=chosen, fitted=fitted_to)
        convert.write(jobs, recipe)
        read_back = {t.name: np.array(t.data) for t in GGUFReader(outfiles["F32"]).tensors}
        bias = read_back[f"blk.{first}.ffn_down_exps.bias"]
        biases.append(bias[len(chosen.kept[first]) :])
    assert np.abs(biases[0]).max() > 0
    np.testing.assert_allclose(biases[1], biases[0], atol=1e-2 * np.abs(biases[0]).max())


def test_a_pass_for_each_layer_gives_the_same(
    calibrated: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little memory, and a run that was stopped after its first pass."""
    model = calibrated("olmoe")
    source, plan = gguf_of(
        model, make_plan(model.stats, prune_ratio=0.5, replacement="rank-4"), tmp_path
    )
    fitted(source, plan, model, Work(tmp_path / "v")).save(tmp_path / "whole")
    monkeypatch.setattr(gguf_fitting, "WAITING_BYTES", 0)  # every batch is added at once
    early = fitted(source, plan, model, Work(tmp_path / "u"))
    late = LowRankNovices.load(tmp_path / "whole")
    for layer, found in early.layers.items():
        assert np.array_equal(found.tokens, late.layers[layer].tokens)
        np.testing.assert_allclose(found.bias, late.layers[layer].bias, rtol=1e-3, atol=1e-3)
    monkeypatch.undo()
    monkeypatch.setattr(gguf_fitting, "memory_bytes", lambda: 1 << 10)
    with pytest.raises(MoneEdgeError, match="block 0: fitting 4 experts at once takes"):
        fitted(source, plan, model, Work(tmp_path / "y"))
    monkeypatch.undo()
    monkeypatch.setattr(gguf_fitting, "MOMENT_BYTES", 1)

    def stop(done: int, total: int) -> None:
        assert (done, total) == (1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_gguf(
            source, plan, batches(model.tokens), Work(tmp_path / "w"), threads=1, on_progress=stop
        )
    fitted(source, plan, model, Work(tmp_path / "w", resume=True)).save(tmp_path / "parts")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    other = dataclasses.replace(plan, num_experts={0: 8}, kept={0: (1, 2)})
    with pytest.raises(MoneEdgeError, match="MoE layers"):
        fitted(source, other, model, Work(tmp_path / "x"))
