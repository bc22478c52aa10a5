"""ExpertStats: exact merging, the file, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mone_edge import cli
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.plan import make_plan
from mone_edge.recipe import MERGING
from mone_edge.stats import (
    ARRAYS,
    FORMAT,
    OPTIONAL,
    SAMPLED,
    STREAM,
    ExpertStats,
    LayerStats,
    LinearStats,
    Provenance,
    file_sha256,
    merge_all,
)


def random_routing(
    tokens: int, experts: int, top_k: int, width: int, seed: int, rare: dict[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [T, K], gates [T, K], raw outputs [T, K, D]; `rare` experts get exactly n tokens."""
    rng = np.random.default_rng(seed)
    rare = rare or {}
    common = [e for e in range(experts) if e not in rare]
    ids = np.array([rng.choice(common, top_k, replace=False) for _ in range(tokens)])
    rows = iter(range(tokens))
    for expert, count in rare.items():
        for _ in range(count):
            ids[next(rows), 0] = expert
    outputs = rng.normal(size=(tokens, top_k, width)) + 3 * rng.normal(size=(experts, width))[ids]
    return ids.reshape(-1, top_k), rng.random((tokens, top_k)), outputs


def layer_from_outputs(
    ids: np.ndarray, gates: np.ndarray, outputs: np.ndarray, experts: int
) -> LayerStats:
    """Statistics from raw outputs by the definitions; inputs are the outputs plus and minus 1."""
    picked = [(gates[ids == e], outputs[ids == e]) for e in range(experts)]
    zero = np.zeros(outputs.shape[-1])

    def each(value):  # type: ignore[no-untyped-def]
        return np.array([value(g, f) if len(g) else zero for g, f in picked])

    def total(value):  # type: ignore[no-untyped-def]
        return np.array([float(value(g, np.linalg.norm(f, axis=1)).sum()) for g, f in picked])

    dense, residuals = (np.zeros((len(ids), experts, d)) for d in (1, outputs.shape[-1]))
    np.put_along_axis(dense, ids[:, :, None], gates[:, :, None], axis=1)
    means = each(lambda g, f: f.mean(0))
    centred = gates[:, :, None] * (outputs - means[ids])
    np.put_along_axis(residuals, ids[:, :, None], centred, axis=1)
    return LayerStats(
        tokens=len(ids),
        top_k=ids.shape[1],
        count=np.array([len(g) for g, _ in picked]),
        gate_sum=total(lambda g, norm: g),
        gate_sq_sum=total(lambda g, norm: g**2),
        output_mean=means,
        output_m2=each(lambda g, f: ((f - f.mean(0)) ** 2).sum(0)),
        gate_sq_mean=each(lambda g, f: (g**2) @ f / (g**2).sum()),
        norm_sum=total(lambda g, norm: norm),
        norm_sq_sum=total(lambda g, norm: norm**2),
        gate_norm_sum=total(lambda g, norm: g * norm),
        gate_sq_norm_sq_sum=total(lambda g, norm: g**2 * norm**2),
        input_sq_sum=each(lambda g, f: ((f + 1) ** 2).sum(0)),
        inner_sq_sum=each(lambda g, f: ((f - 1) ** 2).sum(0)),
        output_max=np.array([np.abs(f).max(initial=0) for _, f in picked]),
        pair_gate=dense[:, :, 0].T @ dense[:, :, 0],
        pair_error=np.einsum("tid,tjd->ij", residuals, residuals),
        stream_inverse=np.array([len(ids) / 4]),
        **sampled(experts, outputs.shape[-1], len(ids)),
    )


def sampled(experts: int, width: int, seed: int) -> dict[str, Any]:
    """What all experts and the router make of 12 tokens that were not among those routed."""
    rng = np.random.default_rng(seed)
    outputs, logits = rng.normal(size=(experts, 12, width)), rng.normal(size=(12, experts))
    centred = outputs - outputs.mean(1, keepdims=True)
    cross = np.einsum("itd,jte->ijde", centred, centred)
    return {
        "sampled": 12,
        "sample_sum": outputs.sum(1),
        "sample_kernel": np.square(cross).sum((2, 3)) / 12,
        "sample_logits": logits.T @ logits,
    }


def make_stats(
    layers: int = 2, experts: int = 8, top_k: int = 2, tokens: int = 64, seed: int = 0
) -> ExpertStats:
    """Random but consistent statistics of a small model."""
    provenance = Provenance("tiny", "f" * 64, "olmoe", ("text.txt",), (f"sha-{seed}",), 4, 16, seed)
    routings = [random_routing(tokens, experts, top_k, 6, seed * 100 + i) for i in range(layers)]
    linear = LinearStats(tokens, np.arange(6, dtype=np.float64) + seed)
    return ExpertStats(
        provenance,
        {i: layer_from_outputs(*routing, experts) for i, routing in enumerate(routings)},
        {"lm_head": linear},
    )


def assert_layers_close(
    actual: LayerStats, expected: LayerStats, rtol: float, but: tuple[str, ...] = ()
) -> None:
    assert (actual.tokens, actual.top_k) == (expected.tokens, expected.top_k)
    for name in set(ARRAYS) - set(but):
        want = getattr(expected, name)
        atol = rtol * np.abs(want).max()
        np.testing.assert_allclose(getattr(actual, name), want, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("cuts", [(100,), (1, 2, 150), (0, 199), tuple(range(1, 200))])
def test_merged_parts_equal_the_whole(cuts: tuple[int, ...]) -> None:
    ids, gates, outputs = random_routing(200, 8, 2, 6, seed=3, rare={6: 1, 7: 0})
    whole = layer_from_outputs(ids, gates, outputs, 8)
    parts = [
        layer_from_outputs(i, g, f, 8)
        for i, g, f in zip(*(np.split(a, cuts) for a in (ids, gates, outputs)), strict=True)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert_layers_close(merged, whole, 1e-12, but=("pair_error", *SAMPLED))
    assert merged.sampled == 12 * len(parts)
    for name in SAMPLED:  # of parts, which are sampled each
        total = sum(getattr(part, name) for part in parts)
        np.testing.assert_allclose(getattr(merged, name), total, rtol=1e-12)


def test_pair_errors_merge_to_first_order() -> None:
    """Where the means of the parts differ, the products must move with them."""
    rng = np.random.default_rng(5)
    ids, gates, outputs = random_routing(600, 8, 3, 6, seed=5)
    outputs = outputs + np.repeat(rng.normal(size=(2, 1, 6)), 300, axis=0)
    outputs += 2 * rng.normal(size=(600, 1, 6))  # what a token's experts have in common
    whole = layer_from_outputs(ids, gates, outputs, 8).pair_error
    halves = [layer_from_outputs(*(a[s] for a in (ids, gates, outputs)), 8)
              for s in (slice(300), slice(300, 600))]  # fmt: skip
    merged = halves[0].merge(halves[1]).pair_error
    assert whole is not None and merged is not None
    added = sum(half.pair_error for half in halves if half.pair_error is not None)
    error, without = (np.linalg.norm(a - whole) / np.linalg.norm(whole) for a in (merged, added))
    assert error < 0.02 < 3 * error < without


@pytest.mark.parametrize(("version", "lacking"), [(1, OPTIONAL), (2, (*SAMPLED, STREAM))])
def test_files_of_older_versions_are_read(
    version: int, lacking: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    stats = make_stats()
    stats.save(path)
    kept = {k: v for k, v in load_file(path).items() if k.rpartition(".")[2] not in lacking}
    kept |= {k: v[:2] for k, v in kept.items() if k.endswith(".scalars")}
    document = {"version": version, "provenance": dataclasses.asdict(stats.provenance)}
    save_file(kept, path, {FORMAT: json.dumps(document)})
    old = ExpertStats.load(path)
    assert old.layers[0].sampled == 0
    assert_layers_close(old.layers[0], stats.layers[0], 0, but=lacking)
    merged = old.merge(stats)
    merged.save(path)
    again = ExpertStats.load(path).layers[0]
    for layer in (old.layers[0], merged.layers[0], again):
        assert {name for name in OPTIONAL if getattr(layer, name) is None} == set(lacking)
    for method in MERGING:
        with pytest.raises(UsageError, match="an older mone-edge .* measure the checkpoint again"):
            make_plan(merged, method=method)


def test_merging_keeps_digits_far_from_zero() -> None:
    ids, gates, outputs = random_routing(400, 4, 2, 6, seed=4)
    outputs = outputs + 1e6
    halves = [
        layer_from_outputs(ids[s], gates[s], outputs[s], 4) for s in (slice(200), slice(200, 400))
    ]
    merged = halves[0].merge(halves[1])
    whole = layer_from_outputs(ids, gates, outputs, 4)
    np.testing.assert_allclose(merged.output_m2, whole.output_m2, rtol=1e-9)


def test_merging_is_symmetric() -> None:
    one, two = make_stats(seed=1), make_stats(seed=2)
    assert_layers_close(one.merge(two).layers[0], two.merge(one).layers[0], 1e-12)


def test_file_round_trip(tmp_path: Path) -> None:
    stats = make_stats()
    stats.save(tmp_path / "s.safetensors")
    again = ExpertStats.load(tmp_path / "s.safetensors")
    assert again.provenance == stats.provenance
    assert list(again.layers) == list(stats.layers)
    assert_layers_close(again.layers[1], stats.layers[1], 0)
    assert again.layers[0].count.dtype == np.int64
    np.testing.assert_array_equal(
        again.linears["lm_head"].input_sq_sum, stats.linears["lm_head"].input_sq_sum
    )
    assert again.linears["lm_head"].count == 64
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_equal_statistics_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_stats().save(tmp_path / name)
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b")


def test_others_may_read_what_the_umask_lets_them_read(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    make_stats().save(tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_merge_all_adds_everything() -> None:
    merged = merge_all(make_stats(seed=s) for s in range(3))
    assert merged.tokens == 3 * 64
    assert merged.provenance.samples == 12
    assert merged.provenance.data_sha256 == ("sha-0", "sha-1", "sha-2")
    assert merged.provenance.data == ("text.txt",)
    assert merged.linears["lm_head"].count == 3 * 64


def test_unseen_experts_are_counted() -> None:
    routing = random_routing(50, 8, 2, 6, seed=0, rare={1: 0, 2: 0, 3: 1})
    layer = layer_from_outputs(*routing, 8)
    assert ExpertStats(Provenance("m", "f", "olmoe"), {0: layer, 4: layer}).unseen() == 4


def test_merging_foreign_statistics_is_refused() -> None:
    one = make_stats()
    other = dataclasses.replace(
        one, provenance=dataclasses.replace(one.provenance, fingerprint="0" * 64, model="else")
    )
    with pytest.raises(MoneEdgeError, match="different models"):
        one.merge(other)
    wider = ExpertStats(one.provenance, make_stats(experts=4).layers)
    with pytest.raises(MoneEdgeError, match="differ in shape"):
        one.merge(wider)
    with pytest.raises(MoneEdgeError, match="different models"):
        one.merge(make_stats(layers=3))


def test_the_same_data_twice_is_told() -> None:
    assert make_stats().merge(make_stats()).repeated_data() == 1
    assert make_stats(seed=1).merge(make_stats(seed=2)).repeated_data() == 0


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(MoneEdgeError, match="nothing to merge"):
        merge_all([])


def refused(path: Path) -> str:
    with pytest.raises(MoneEdgeError) as error:
        ExpertStats.load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing_and_foreign_files_get_one_line(tmp_path: Path) -> None:
    assert "mone-edge stats MODEL" in refused(tmp_path / "none.safetensors")
    text = tmp_path / "text.txt"
    text.write_text("hello")
    assert "is not a statistics file" in refused(text)
    (tmp_path / "plan.json").write_text('{"format": "mone-edge-plan", "version": 1}')
    assert "is not a statistics file" in refused(tmp_path / "plan.json")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": np.zeros(2)}, foreign)
    assert "not a mone-edge statistics file" in refused(foreign)


def test_damaged_files_get_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    make_stats().save(path)
    whole = path.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path, {FORMAT: '{"version": 1, "provenance": {}}'})
    refused(path)
    save_file(tensors, path, {FORMAT: '{"version": 99}'})
    assert "version 99" in refused(path)
    for document in ("{", "[]", "{}", "null"):
        save_file(tensors, path, {FORMAT: document})
        refused(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer.0.output_mean", None),
        ("layer.0.count", np.zeros(3, dtype=np.int64)),
        ("layer.0.output_mean", np.zeros((8, 7))),
        ("layer.0.pair_error", np.zeros((8, 6))),
        ("layer.0.sample_kernel", np.zeros((8, 6))),
        ("layer.0.sample_sum", np.zeros((8, 7))),
        ("layer.0.gate_sum", np.full(8, np.nan)),
        ("layer.0.scalars", np.zeros(0, dtype=np.int64)),
        ("layer.x.scalars", np.zeros(2, dtype=np.int64)),
        ("linear.lm_head", np.zeros(0)),
    ],
)
def test_inconsistent_tensors_get_one_line(
    tmp_path: Path, name: str, value: np.ndarray | None
) -> None:
    path = tmp_path / "s.safetensors"
    stats = make_stats()
    stats.save(path)
    tensors = load_file(path)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    document = {"version": 2, "provenance": dataclasses.asdict(stats.provenance)}
    save_file(tensors, path, {FORMAT: json.dumps(document)})
    refused(path)


def test_merging_the_same_text_twice_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_stats().save(tmp_path / "a")
    merged = str(tmp_path / "m")
    assert cli.run(["merge-stats", str(tmp_path / "a"), str(tmp_path / "a"), "-o", merged]) == 0
    assert "1 of the parts read the same text" in capsys.readouterr().err
    make_stats(seed=2).save(tmp_path / "b")
    again = ["merge-stats", str(tmp_path / "a"), str(tmp_path / "b"), "-o", merged, "--force"]
    assert cli.run(again) == 0
    assert "same text" not in capsys.readouterr().err
