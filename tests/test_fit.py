"""Low-rank novices: the fit against the model run by hand, and every place they go to."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mone_edge import checkpoint, fit, novices, prune, pruned_checkpoint
from mone_edge.calibration import Batches
from mone_edge.cli import run
from mone_edge.collect.experts import experts_modules, run_expert
from mone_edge.collect.fitting import fit_checkpoint
from mone_edge.collect.loading import load_model
from mone_edge.collect.torch_model import collect
from mone_edge.collect.work import Work
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.low_rank import LayerNovices, LowRankNovices
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.regression import LowRank, Moments
from mone_edge.source import Checkpoint, resolve
from tests import architectures
from tests.conftest import Calibrated
from tests.test_oracle import uneven_plan
from tests.test_regression import ridge_by_rows
from tests.tiny import MODEL_TYPES, make_checkpoint

Make = Callable[[str], Calibrated]
RANK = 4


def batches(tokens: np.ndarray) -> Batches:
    return Batches(tokens, ("text",), "0" * 64, 0, *tokens.shape, tokens.size)


def fitted_novices(
    model: Calibrated, plan: PrunePlan, folder: Path, **options: Any
) -> LowRankNovices:
    assert isinstance(model.source, Checkpoint)
    options = {"device": "cpu", "batch_tokens": 256} | options
    return fit_checkpoint(model.source, plan, batches(model.tokens), Work(folder), **options)


def logits(model: Any, tokens: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens)).logits


class Observed:
    """What the experts of one layer get while a model reads the calibration tokens."""

    def __init__(self, module: Any, model: Any, tokens: np.ndarray) -> None:
        handle = module.register_forward_pre_hook(self.keep)
        logits(model, tokens)
        handle.remove()

    def keep(self, _: Any, args: Any) -> None:
        self.inputs, self.ids, self.weights = args


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_novices_are_the_regressions_of_what_the_pruned_model_gives_them(
    calibrated: Make, kind: str, tmp_path: Path
) -> None:
    """Layer 0 by hand, then layer 1 by hand in the model whose layer 0 has its novices."""
    model = calibrated(kind)
    plan = make_plan(model.stats, prune_ratio=0.5, replacement=f"rank-{RANK}")
    found = fitted_novices(model, plan, tmp_path / "w")
    found.require_match(plan)
    network = load_model(model.source.path, device="cpu", dtype="float32")
    modules = experts_modules(network)
    judges = fit.held_out(model.tokens.size)
    assert 0.15 < judges.mean() < 0.25
    for layer, (_, module) in modules.items():
        seen = Observed(module, network, model.tokens)
        for row, expert in enumerate(plan.pruned(layer)):
            token, slot = torch.nonzero(seen.ids == expert, as_tuple=True)
            x = seen.inputs[token]
            with torch.inference_mode():
                y = run_expert(module, expert, x)[1].numpy()
            rows = (x.numpy(), y, seen.weights[token, slot].numpy() ** 2)
            fits = found.layers[layer]
            assert fits.tokens[row] == len(token)
            check_novice(rows, judges[token], fits, row)
        first = {i: m for i, m in found.layers.items() if i <= layer}
        partly = dataclasses.replace(
            plan, kept={i: plan.kept[i] if i in first else tuple(range(8)) for i in plan.kept}
        )
        pruned = {i: partly.pruned(i) for i in partly.kept}
        fitted = LowRankNovices(found.provenance, plan.replacement, pruned, first)
        novices.apply(network, partly, None, fitted)


def check_novice(rows: Any, judges: np.ndarray, fits: Any, row: int) -> None:
    rank, ridge = int(fits.rank[row]), float(fits.ridge[row])
    predicted = rows[0] @ fits.down[row].T @ fits.up[row].T + fits.bias[row]
    mean_x, mean_y, solution = ridge_by_rows(rows, ridge, rank)
    expected = mean_y + (rows[0] - mean_x) @ solution
    np.testing.assert_allclose(predicted, expected, atol=1e-3 * np.abs(expected).max())
    train, judge = (tuple(c[chosen] for c in rows) for chosen in (~judges, judges))
    errors = []
    if not rank:
        assert fits.error[row] == 1
        return
    for r in (rank, 0):
        mean_x, mean_y, solution = ridge_by_rows(train, ridge, r)
        missed = judge[1] - mean_y - (judge[0] - mean_x) @ solution
        errors.append((judge[2] * (missed**2).sum(1)).sum())
    np.testing.assert_allclose(fits.error[row], errors[0] / errors[1], rtol=1e-2)
    assert not fits.down[row, rank:].any() and not fits.up[row, :, rank:].any()


def test_it_predicts_better_than_constants(calibrated: Make, tmp_path: Path) -> None:
    model = calibrated("olmoe")
    means = make_plan(model.stats, prune_ratio=0.5, replacement="gate2-mean")
    plan = dataclasses.replace(means, replacement="rank-16")
    whole = load_model(model.source.path, device="cpu", dtype="float32")
    truth = logits(whole, model.tokens)
    constant = logits(novices.apply(whole, means, model.stats), model.tokens)
    network = load_model(model.source.path, device="cpu", dtype="float32")
    found = fitted_novices(model, plan, tmp_path / "w")
    close = logits(novices.apply(network, plan, None, found), model.tokens)
    assert (close - truth).square().mean() < 0.8 * (constant - truth).square().mean()


def test_an_interrupted_fit_goes_on(calibrated: Make, tmp_path: Path) -> None:
    model = calibrated("mixtral")
    plan = make_plan(model.stats, prune_ratio=0.5, replacement=f"rank-{RANK}")
    fitted_novices(model, plan, tmp_path / "v").save(tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        assert total == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted_novices(model, plan, tmp_path / "w", on_progress=stop)
    steps: list[int] = []
    assert isinstance(model.source, Checkpoint)
    again = fit_checkpoint(
        model.source, plan, batches(model.tokens), Work(tmp_path / "w", resume=True),
        device="cpu", batch_tokens=256, on_progress=lambda done, total: steps.append(done),
    )  # fmt: skip
    again.save(tmp_path / "resumed")
    assert steps == [2]
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    other = dataclasses.replace(plan, kept=plan.kept | {0: (0, 1, 2, 3)}, replacement="rank-2")
    with pytest.raises(MoneEdgeError, match="its plan is"):
        fit_checkpoint(
            model.source, other, batches(model.tokens), Work(tmp_path / "w", resume=True),
            device="cpu", batch_tokens=256,
        )  # fmt: skip


def test_layers_left_whole_and_dense_ones_pass(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "m", layers=4, mlp_only_layers=[1])
    source = resolve(str(folder))
    tokens = np.random.default_rng(3).integers(2, 512, (4, 64))
    stats = source.collect(batches(tokens), device="cpu")
    assert stats is not None and isinstance(source, Checkpoint)
    plan = make_plan(stats, prune_ratio=0.5, replacement="rank-2", protect=(0, 3))
    found = fit_checkpoint(source, plan, batches(tokens), Work(tmp_path / "w"), device="cpu")
    assert list(found.layers) == [2] and found.pruned[0] == ()
    network = novices.apply(load_model(folder, device="cpu"), plan, None, found)
    made = checkpoint.prune_checkpoint(source, plan, None, tmp_path / "p", fitted=found)
    loaded = load_model(made.outfile, device="cpu", dtype="float32")
    assert torch.equal(logits(loaded, tokens), logits(network, tokens))


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_pruned_checkpoint_holds_them(calibrated: Make, kind: str, tmp_path: Path) -> None:
    model = calibrated(kind)
    assert isinstance(model.source, Checkpoint)
    plan = uneven_plan(model.stats, f"rank-{RANK}")
    found = fitted_novices(model, plan, tmp_path / "w")
    checkpoint.prune_checkpoint(model.source, plan, None, tmp_path / "p", fitted=found)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="float32")
    network = load_model(model.source.path, device="cpu", dtype="float32")
    novices.apply(network, plan, None, found)
    assert torch.equal(logits(loaded, model.tokens[:2]), logits(network, model.tokens[:2]))
    source = resolve(str(tmp_path / "p"))
    assert isinstance(source, Checkpoint)
    read = pruned_checkpoint.read_fitted(source, pruned_checkpoint.read_plan(source))
    assert read is not None
    for layer, novice in found.layers.items():
        for name in ("bias", "down", "up"):
            assert np.array_equal(getattr(read.layers[layer], name), getattr(novice, name))
    (tmp_path / "p/config.json").write_text(
        (tmp_path / "p/config.json").read_text().replace('"novice_rank"', '"other"')
    )
    with pytest.raises(MoneEdgeError, match="novice_rank"):
        load_model(tmp_path / "p", device="cpu")


def test_a_gguf_holds_them(calibrated: Make, tmp_path: Path) -> None:
    model = calibrated("olmoe")
    plan = uneven_plan(model.stats, f"rank-{RANK}")
    found = fitted_novices(model, plan, tmp_path / "w")
    pruned = prune.apply_plan(model.source.open(tokenizer_pre="gpt-2"), plan, None, found)
    for layer, novice in found.layers.items():
        for part, stack in (("down", novice.down), ("up", novice.up)):
            tensor = pruned.tensors[f"blk.{layer}.ffn_novice_{part}.weight"]
            assert tensor.shape == stack.shape and len(tensor.chunks) == len(plan.pruned(layer))
            assert np.array_equal(tensor.read(), stack)
        bias = pruned.tensors[f"blk.{layer}.ffn_down_exps.bias"].read()
        assert np.array_equal(bias[len(plan.kept[layer]) :], novice.bias)
        assert not bias[: len(plan.kept[layer])].any()


def moments(rows: int, relation: float, seed: int) -> tuple[Moments, Moments]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 64)).astype(np.float32)
    mixing = np.random.default_rng(9).standard_normal((64, 8)) @ np.random.default_rng(
        8
    ).standard_normal((8, 64))
    y = (relation * x @ mixing + rng.standard_normal((rows, 64))).astype(np.float32)
    sums = Moments.near(x, y), Moments.near(x, y)
    for into, part in zip(sums, np.split(np.arange(rows), [rows * 4 // 5]), strict=True):
        into.add(x[part], y[part], np.ones(len(part)))
    return sums


def layer_novices(pairs: list[tuple[Moments, Moments]], limits: fit.Limits) -> LayerNovices:
    """Novices of a layer whose experts all go."""
    plan = PrunePlan(
        model="", fingerprint="", method="mone", scope="layer", replacement=limits.replacement,
        prune_ratio=0.5, top_k=1, num_experts={0: len(pairs)}, kept={0: ()},
    )  # fmt: skip
    return fit.plan_novices(plan, 0, pairs, limits)[1]


def test_ranks_follow_what_held_out_tokens_say() -> None:
    limits = fit.Limits("rank", 64, 64, 100_000)
    assert limits.largest == 64
    clear, noise, few = moments(4000, 1.0, 0), moments(400, 0.0, 1), moments(4, 1.0, 2)
    nothing = Moments(np.zeros(64), np.zeros(64))
    layer = layer_novices([clear, noise, few, (nothing, nothing)], limits)
    assert layer.width == 8 and layer.rank.tolist()[0] == 8 and not layer.rank[2:].any()
    assert layer.error[0] < 0.05 and layer.error[3] == 1 and layer.tokens.tolist()[2:] == [4, 0]
    assert not layer.bias[3].any()
    assert (
        layer_novices([noise, few], dataclasses.replace(limits, replacement="rank-2")).error.max()
        <= 1
    )
    constants = layer_novices(
        [(nothing, nothing)], dataclasses.replace(limits, replacement="rank-9")
    )
    assert constants.width == 0 and constants.up.shape == (1, 64, 0)
    assert fit.Limits("rank", 64, 64, 3 * 64 * 16).largest == 4
    assert fit.Limits("rank-99", 64, 48, 1).largest == 48


def test_novice_error_has_those_go_whose_novices_leave_least(calibrated: Make) -> None:
    """As many as the plan says; in units of the output, not in shares of what a constant leaves."""
    limits = fit.Limits("rank-2", 64, 64, 100_000)
    pairs = [moments(2000, relation, seed) for seed, relation in enumerate((3.0, 0.0, 2.0, 0.1))]
    plan = dataclasses.replace(
        uneven_plan(calibrated("olmoe").stats, "rank-2"),
        method="novice-error",
        num_experts={0: 4},
        kept={0: (1, 2)},
    )
    shares = layer_novices(pairs, limits).error
    assert set(np.argsort(shares)[:2]) == {0, 2}
    ids, layer = fit.plan_novices(plan, 0, pairs, limits)
    assert ids == (1, 3) and len(layer.bias) == 2
    np.testing.assert_array_equal(layer.error, shares[[1, 3]])


def test_a_plan_takes_the_experts_that_the_fit_chose(calibrated: Make, tmp_path: Path) -> None:
    model = calibrated("qwen2_moe")
    plan = make_plan(
        model.stats, prune_ratio=0.5, method="novice-error", replacement="rank-4", scope="model"
    )
    fitted = fitted_novices(model, plan, tmp_path / "w")
    decided = fitted.decide(plan)
    assert [len(ids) for ids in decided.kept.values()] == [len(ids) for ids in plan.kept.values()]
    assert decided.kept != plan.kept
    fitted.require_match(decided)
    again = fitted_novices(model, dataclasses.replace(decided, method="mone"), tmp_path / "a")
    for layer, novice in fitted.layers.items():
        np.testing.assert_array_equal(again.layers[layer].down, novice.down)
    less = {**plan.kept, 0: plan.kept[0][:1]}
    with pytest.raises(MoneEdgeError, match="novices are of another plan: in layer 0"):
        fitted.decide(dataclasses.replace(plan, kept=less))
    with pytest.raises(UsageError, match="low-rank novices leave"):
        make_plan(model.stats, method="novice-error", replacement="mean")
    with pytest.raises(UsageError, match="--protect-super"):
        make_plan(model.stats, method="novice-error", replacement="rank", protect_super=True)


def test_an_open_rank_counts_experts_that_lie_in_a_submodule(tmp_path: Path) -> None:
    """dbrx's stacks are not parameters of the experts module itself."""
    source = resolve(str(architectures.make("dbrx", tmp_path / "m")))
    assert isinstance(source, Checkpoint)
    read = batches(np.random.default_rng(0).integers(3, 400, (12, 64)))
    stats = collect(source.path, read, fingerprint=source.fingerprint, device="cpu")
    plan = make_plan(stats, prune_ratio=0.5, replacement="rank")
    found = fit_checkpoint(source, plan, read, Work(tmp_path / "w"), device="cpu")
    assert found.summary()["novices"] == sum(len(plan.pruned(i)) for i in plan.kept)


def test_files_of_novices(calibrated: Make, tmp_path: Path) -> None:
    model = calibrated("olmoe")
    plan = make_plan(model.stats, prune_ratio=0.25, replacement="rank-2")
    found = fitted_novices(model, plan, tmp_path / "w")
    path = tmp_path / "n.safetensors"
    found.save(path)
    read = LowRankNovices.load(path)
    assert read.summary() == found.summary() and read.pruned == found.pruned
    for layer in found.layers:
        for field in dataclasses.fields(found.layers[layer]):
            ours, theirs = (getattr(n.layers[layer], field.name) for n in (found, read))
            assert np.array_equal(ours, theirs)
    with pytest.raises(MoneEdgeError, match="fitted as rank-2, the plan says rank-3"):
        read.require_match(dataclasses.replace(plan, replacement="rank-3"))
    with pytest.raises(MoneEdgeError, match="the novices are of another plan"):
        read.require_match(dataclasses.replace(plan, kept=plan.kept | {0: tuple(range(8))}))
    with pytest.raises(MoneEdgeError, match="the plan is for"):
        read.require_match(dataclasses.replace(plan, fingerprint="other"))
    data = path.read_bytes()
    for broken in (data[:-10], data[:50], b"", data.replace(b"rank-2", b"rank-2", 1)[:9]):
        path.write_bytes(broken)
        with pytest.raises(MoneEdgeError, match=r"damaged|truncated|is not a novices file"):
            LowRankNovices.load(path)
    with pytest.raises(MoneEdgeError, match="holds no novices"):
        LowRankNovices.load(model.stats_file)
    with pytest.raises(MoneEdgeError, match="no novices .*mone-edge fit"):
        LowRankNovices.load(tmp_path / "gone")


def test_the_command(
    calibrated: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    model = calibrated("olmoe")
    monkeypatch.chdir(tmp_path)
    shutil.copy(model.stats_file.with_name("text.txt"), "text.txt")
    options = ["--data", "text.txt", "--samples", "8", "--seq-len", "64", "--device", "cpu"]
    assert run(["plan", str(model.stats_file), "--replacement", "rank-4", "-q"]) == 0
    capsys.readouterr()
    assert run(["fit", str(model.source.path), "--plan", "plan.json", *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["novices"] == 4 and said["ranks"].endswith("4") and 0 < said["held_out_error"] < 1
    assert not list(tmp_path.glob("*.work"))
    assert run(["inspect", "novices.safetensors", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "novices" and shown["layers"]["0"]["novices"] == 2
    assert shown["held_out_error"] == said["held_out_error"]
    prune_it = ["prune", str(model.source.path), "--plan", "plan.json", "-o", "p", "-q"]
    assert run(prune_it) == 1
    assert "needs fitted novices" in capsys.readouterr().err
    assert run([*prune_it, "--novices", "novices.safetensors"]) == 0
    kept = LowRankNovices.load(Path("novices.safetensors"))
    source = resolve("p")
    assert isinstance(source, Checkpoint)
    read = pruned_checkpoint.read_fitted(source, pruned_checkpoint.read_plan(source))
    assert read is not None and np.array_equal(read.layers[0].up, kept.layers[0].up)
    assert run(["plan", str(model.stats_file), "-o", "means.json", "-q"]) == 0
    stats, again = str(model.stats_file), ["fit", str(model.source.path), "--samples", "8"]
    assert run(["merge-stats", stats, stats, "-o", "twice", "-q"]) == 0
    assert run(["plan", "twice", "--replacement", "rank-4", "-o", "twice.json", "-q"]) == 0
    again += ["--seq-len", "64", "--plan", "twice.json", "-o"]
    capsys.readouterr()
    assert run([*again, "x"]) == 0
    assert "does not tell which text" in capsys.readouterr().err
    assert run([*again, "y", "--data", "text.txt"]) == 0
    assert "does not tell" not in capsys.readouterr().err
    for command, told in (
        (["fit", str(model.source.path), "--plan", "means.json", "-o", "z"], "needs no fit"),
        ([*prune_it[:2], "--plan", "means.json", "-o", "q", "--novices", "novices.safetensors"],
         "has no fitted novices"),
    ):  # fmt: skip
        assert run(command) == 1
        assert told in capsys.readouterr().err


def curve(*errors: float) -> LowRank:
    """A fit that leaves these shares of its error at ranks 0, 4, 8 and 32."""
    values = np.interp(np.arange(33), [0, 4, 8, 32], errors)
    sides = np.zeros(256), np.zeros(256), np.zeros((32, 256)), np.zeros((256, 32))
    return LowRank(*sides, values, 0.1, total=100.0)


@pytest.mark.parametrize(
    ("errors", "rank"),
    [
        ((1.0, 0.97, 0.95, 0.9), 0),  # whole experts for the same bytes take away more
        ((1.0, 0.3, 0.29, 0.25), 4),
        ((1.0, 0.5, 0.3, 0.27), 8),
        ((1.0, 0.9, 0.6, 0.1), 32),
    ],
)
def test_an_open_rank_is_worth_its_bytes(errors: tuple[float, ...], rank: int) -> None:
    # experts of 128 neurons between 256 and 256: rank 8 takes 11 % of one, rank 32 takes 31 %
    limits = fit.Limits("rank", 256, 256, 3 * 256 * 128)
    assert limits.largest == 32
    assert limits.choose([curve(*errors)] * 16) == rank
    assert fit.Limits("rank-8", 256, 256, 3 * 256 * 128).choose([curve(*errors)]) == 8
