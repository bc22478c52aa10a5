"""Plans: counts, floors, ties, refusals, the file."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from mone_edge import joint
from mone_edge.criteria import CRITERIA, error_matrix
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.plan import PrunePlan, make_plan, parse_layers
from mone_edge.recipe import MERGING, Calibration
from mone_edge.selection import Choice, LayerChoice
from mone_edge.stats import ExpertStats
from tests.test_stats import make_stats

RATIOS = (0, 0.1, 0.125, 0.25, 0.3, 0.5, 0.625, 0.75)


def scores(stats: ExpertStats, method: str, layer: int) -> np.ndarray:
    return CRITERIA[method](stats.layers[layer], np.random.default_rng([42, layer]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("method", ["mone", "reap", "random"])
def test_properties(seed: int, ratio: float, scope: str, method: str) -> None:
    stats = make_stats(layers=3, experts=8, seed=seed)
    plan = make_plan(stats, prune_ratio=ratio, scope=scope, method=method)
    assert plan == make_plan(stats, prune_ratio=ratio, scope=scope, method=method)
    pruned = [len(plan.pruned(layer)) for layer in plan.kept]
    if scope == "layer":
        assert pruned == [math.floor(8 * ratio + 0.5)] * 3
    else:
        assert sum(pruned) == math.floor(24 * ratio + 0.5)
    assert plan.removed_fraction == pytest.approx(sum(pruned) / 24)
    for layer, kept in plan.kept.items():
        assert len(kept) >= 1
        assert list(kept) == sorted(kept)
        assert sorted(plan.order(layer)) == list(range(8))
        assert plan.order(layer)[: len(kept)] == kept
        if pruned[layer]:
            values = scores(stats, method, layer)
            assert values[list(plan.pruned(layer))].max() <= values[list(kept)].min()


def test_a_higher_ratio_prunes_a_superset() -> None:
    stats = make_stats(layers=3, experts=8, seed=9)
    for scope in ("layer", "model"):
        plans = [
            make_plan(stats, prune_ratio=ratio, scope=scope, method="mone") for ratio in RATIOS
        ]
        for less, more in itertools.pairwise(plans):
            for layer in less.kept:
                assert set(less.pruned(layer)) <= set(more.pruned(layer))


def test_model_scope_keeps_the_floor_and_passes_on() -> None:
    stats = make_stats(layers=2, experts=8)
    quiet = dataclasses.replace(stats.layers[0], gate_sum=stats.layers[0].gate_sum * 1e-9)
    stats = ExpertStats(stats.provenance, {0: quiet, 1: stats.layers[1]})
    plan = make_plan(stats, prune_ratio=0.5, scope="model", method="routing-score")
    assert [len(ids) for ids in plan.kept.values()] == [1, 7]
    best = int(np.argmax(scores(stats, "routing-score", 0)))
    assert plan.kept[0] == (best,)


def test_equal_scores_lose_the_higher_id() -> None:
    stats = make_stats(layers=2, experts=8)
    even = {i: dataclasses.replace(s, gate_sum=np.ones(8)) for i, s in stats.layers.items()}
    stats = ExpertStats(stats.provenance, even)
    plan = make_plan(stats, prune_ratio=0.25, method="routing-score")
    assert plan.kept == {0: (0, 1, 2, 3, 4, 5), 1: (0, 1, 2, 3, 4, 5)}
    plan = make_plan(stats, prune_ratio=0.25, method="routing-score", scope="model")
    assert plan.kept == {0: (0, 1, 2, 3, 4, 5), 1: (0, 1, 2, 3, 4, 5)}
    plan = make_plan(stats, prune_ratio=0.19, method="routing-score", scope="model")
    assert plan.kept == {0: (0, 1, 2, 3, 4, 5, 6), 1: (0, 1, 2, 3, 4, 5)}


def lost(stats: ExpertStats, plan: PrunePlan) -> float:
    """What the statistics predict that the plan's layers lose together."""
    matrices = {i: error_matrix(layer, plan.replacement) for i, layer in stats.layers.items()}
    return sum(joint.error(matrix, plan.pruned(i)) for i, matrix in matrices.items())


@pytest.mark.parametrize("ratio", RATIOS)
def test_joint_loses_least(ratio: float) -> None:
    stats = make_stats(layers=3, experts=8, seed=3)
    for scope in ("layer", "model", "error"):
        best = make_plan(stats, prune_ratio=ratio, method="joint", scope=scope)
        others = [
            make_plan(stats, prune_ratio=ratio, method=method, scope=scope)
            for method in ("mone", "replacement-error", "random")
        ]
        assert lost(stats, best) <= min(lost(stats, other) for other in others) + 1e-9
        counts = [len(plan.kept[layer]) for plan in (best, others[0]) for layer in plan.kept]
        assert sum(counts[:3]) == sum(counts[3:])


@pytest.mark.parametrize("method", ["mone", "joint"])
@pytest.mark.parametrize("quiet", [False, True])
def test_error_scope_divides_the_count_best(method: str, quiet: bool) -> None:
    """Against every division of 8 experts among 2 layers, none of which may lose more than 6.

    Args:
        quiet: what the first layer adds to is as small as makes its errors the larger ones.
    """
    stats = make_stats(layers=2, experts=8, seed=4)
    louder = stats.layers[1].gate_sq_sum * 9
    scaled = {name: 9 * getattr(stats.layers[1], name) for name in ("pair_error", "pair_gate")}
    scaled |= {
        "gate_sq_sum": louder,
        "gate_sq_norm_sq_sum": 9 * stats.layers[1].gate_sq_norm_sq_sum,
    }
    inverse = np.array([100.0 if quiet else 1.0])
    first = dataclasses.replace(stats.layers[0], stream_inverse=inverse)
    second = dataclasses.replace(stats.layers[1], stream_inverse=np.ones(1), **scaled)
    layers = {0: first, 1: second}
    stats = ExpertStats(stats.provenance, layers)
    plan = make_plan(stats, prune_ratio=0.5, method=method, scope="error", replacement="mean")
    choice = Choice(method, "mean", 42, 1, {})
    errors = [LayerChoice(i, layer, choice).errors(7) for i, layer in layers.items()]
    ours = errors[0][len(plan.pruned(0))] + errors[1][len(plan.pruned(1))]
    assert ours == pytest.approx(min(errors[0][n] + errors[1][8 - n] for n in range(2, 7)))
    assert (len(plan.kept[0]) > len(plan.kept[1])) == quiet


@pytest.mark.parametrize("inverse", [None, np.zeros(1)])
def test_error_scope_needs_what_errors_are_added_to(inverse: np.ndarray | None) -> None:
    stats = make_stats(layers=2, experts=8)
    layers = {
        i: dataclasses.replace(layer, stream_inverse=inverse) for i, layer in stats.layers.items()
    }
    with pytest.raises(UsageError, match="use --scope layer, or measure the model again"):
        make_plan(ExpertStats(stats.provenance, layers), method="joint", scope="error")


def test_super_experts_stay() -> None:
    stats = make_stats(layers=2, experts=8)
    for method in ("mone", "joint", "random"):
        for scope in ("layer", "model", "error"):
            going = make_plan(stats, prune_ratio=0.5, method=method, scope=scope)
            layer, victim = next((i, going.pruned(i)[0]) for i in going.kept if going.pruned(i))
            maxima = np.ones(8)
            maxima[victim] = 100.0
            loud = dataclasses.replace(stats.layers[layer], output_max=maxima)
            quiet = {
                i: dataclasses.replace(s, output_max=np.ones(8)) for i, s in stats.layers.items()
            }
            spared = ExpertStats(stats.provenance, quiet | {layer: loud})
            plan = make_plan(
                spared, prune_ratio=0.5, method=method, scope=scope, protect_super=True
            )
            assert victim in plan.kept[layer]
            assert sum(map(len, plan.kept.values())) == 8


def test_protected_layers_stay_whole() -> None:
    stats = make_stats(layers=3, experts=8)
    for scope, counts in (("layer", [8, 4, 8]), ("model", [8, 4, 8])):
        plan = make_plan(stats, prune_ratio=0.5, scope=scope, protect=(0, 2))
        assert [len(ids) for ids in plan.kept.values()] == counts
        assert plan.protect == (0, 2)
    everything = make_plan(stats, prune_ratio=0.5, scope="model", protect=(0, 1, 2))
    assert everything.removed_fraction == 0


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan, math.inf])
def test_impossible_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="--prune-ratio"):
        make_plan(make_stats(), prune_ratio=ratio)


def test_too_few_experts_are_refused_with_the_ratio_that_works() -> None:
    stats = make_stats(experts=8, top_k=3)
    with pytest.raises(UsageError, match=r"top_k=3 .* at most 0\.625, or use --replacement"):
        make_plan(stats, prune_ratio=0.75, replacement="drop")
    assert len(make_plan(stats, prune_ratio=0.625, replacement="drop").kept[0]) == 3
    assert len(make_plan(stats, prune_ratio=0.75).kept[0]) == 2
    with pytest.raises(UsageError, match=r"at most 0\.875"):
        make_plan(stats, prune_ratio=0.99)
    assert len(make_plan(stats, prune_ratio=0.875).kept[0]) == 1
    with pytest.raises(UsageError, match=r"at most 0\.875"):
        make_plan(stats, prune_ratio=0.99, scope="model")
    assert make_plan(stats, prune_ratio=0.875, scope="model").removed_fraction == 0.875


@pytest.mark.parametrize("experts", [6, 7, 12, 60, 64])
@pytest.mark.parametrize("ratio", [0.95, 0.99, 0.999])
def test_the_ratio_in_the_refusal_works(experts: int, ratio: float) -> None:
    stats = make_stats(experts=experts, top_k=4)
    for replacement, scope in (("drop", "layer"), ("mean", "layer"), ("mean", "model")):
        try:
            make_plan(stats, prune_ratio=ratio, replacement=replacement, scope=scope)
        except UsageError as error:
            works = float(str(error).split("at most ")[1].split(",")[0])
            plan = make_plan(stats, prune_ratio=works, replacement=replacement, scope=scope)
            assert plan.removed_fraction > 0


@pytest.mark.parametrize("choice", ["method", "scope", "replacement"])
def test_unknown_names_are_refused_with_the_known(choice: str) -> None:
    with pytest.raises(UsageError, match=f"--{choice} best: choose one of"):
        make_plan(make_stats(), **{choice: "best"})


def test_uneven_drop_is_refused() -> None:
    with pytest.raises(UsageError, match="--scope model"):
        make_plan(make_stats(), replacement="drop", scope="model")
    with pytest.raises(UsageError, match="--protect"):
        make_plan(make_stats(), replacement="drop", protect=(0,))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("method", MERGING)
def test_groups_divide_the_experts(method: str, ratio: float) -> None:
    stats = make_stats(layers=3, experts=8, seed=2)
    plan = make_plan(stats, prune_ratio=ratio, method=method)
    assert plan == make_plan(stats, prune_ratio=ratio, method=method)
    assert (plan.replacement, plan.scope, plan.cuts) == ("merge", "layer", True)
    for index, layer in stats.layers.items():
        groups, weights = plan.groups[index], plan.merge_weights[index]
        assert len(groups) == 8 - math.floor(8 * ratio + 0.5)
        assert plan.kept[index] == tuple(ids[0] for ids in groups)
        assert sorted(i for ids in groups for i in ids) == list(range(8))
        for ids, shares in zip(groups, weights, strict=True):
            counts = layer.count[list(ids)]
            assert counts[0] == counts.max()
            wanted = np.ones(len(ids)) if method == "dek" else counts
            np.testing.assert_allclose(shares, wanted / wanted.sum(), rtol=1e-12)


@pytest.mark.parametrize("method", MERGING)
def test_super_experts_are_merged_with_none(method: str) -> None:
    stats = make_stats(layers=2, experts=8)
    assert stats.layers[1].output_max is not None
    stats.layers[1].output_max[3] = 1e6
    plan = make_plan(stats, prune_ratio=0.5, method=method, protect_super=True)
    assert (3,) in plan.groups[1]
    assert [len(groups) for groups in plan.groups.values()] == [4, 4]


def test_groups_of_an_expert_that_no_token_reached_weigh_alike() -> None:
    stats = make_stats(layers=1, experts=4)
    stats.layers[0].count[:] = 0
    plan = make_plan(stats, prune_ratio=0.5, method="hc-smoe")
    assert all(len(set(shares)) == 1 for shares in plan.merge_weights[0])


def test_merging_plan_round_trip(tmp_path: Path) -> None:
    plan = make_plan(make_stats(layers=3), method="hc-smoe")
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == plan


def test_plans_of_earlier_versions_are_read(tmp_path: Path) -> None:
    plan = make_plan(make_stats())
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["version"] == 3 and not document.keys() & {"groups", "merge_weights"}
    del document["calibration"]
    (tmp_path / "plan.json").write_text(json.dumps(document | {"version": 1}))
    assert PrunePlan.load(tmp_path / "plan.json") == dataclasses.replace(plan, calibration=None)


def test_a_plan_knows_what_the_statistics_read() -> None:
    stats = make_stats()
    assert make_plan(stats).calibration == Calibration(("text.txt",), 4, 16, 0)
    assert make_plan(stats.merge(make_stats(seed=1))).calibration is None
    document = make_plan(stats).document()
    for wrong in ({"samples": 0}, {"data": "text.txt"}, {"seed": True}, {"steps": 1}, [1], 3):
        with pytest.raises(MoneEdgeError, match=r"x\.json: .*calibration"):
            PrunePlan.parse(document | {"calibration": wrong}, "x.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("groups", {}),
        ("groups", {"0": [[0, 1]], "1": [[0, 1]]}),
        ("groups", {"0": "many", "1": 8}),
        ("groups", {"0": [[]], "1": [[]]}),
        ("groups", {"0": [[1.0, 2]], "1": [[1, 2]]}),
        ("merge_weights", {"0": [[0.5, 0.6]], "1": [[1]]}),
        ("merge_weights", {"0": [["a"]], "1": [[1]]}),
        ("kept", {"0": [0, 1, 2, 3, 4, 5], "1": [0, 1, 2, 3, 4, 5]}),
        ("method", "mone"),
        ("replacement", "drop"),
        ("version", 4),
    ],
)
def test_damaged_groups_get_one_line(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "plan.json"
    make_plan(make_stats(seed=1), method="dek").save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refused(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("0", (0,)),
        ("0,2-4,-1", (0, 2, 3, 4, 7)),
        ("-2--1", (6, 7)),
        (" 3 , 3 ", (3,)),
        ("5--1", (5, 6, 7)),
    ],
)
def test_layers_are_parsed(text: str, expected: tuple[int, ...]) -> None:
    assert parse_layers(text, range(8)) == expected


def test_layers_are_those_of_the_model() -> None:
    assert parse_layers("-1", (1, 3, 5)) == (5,)
    assert parse_layers("1-5", (1, 3, 5)) == (1, 3, 5)


@pytest.mark.parametrize("text", ["x", "8", "-9", "2-1", "1-", "-", "1-2-3", "1;2", "0-99", "1.5"])
def test_bad_layers_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--protect"):
        parse_layers(text, range(8))


def test_a_layer_the_model_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="--protect 5"):
        make_plan(make_stats(layers=2), protect=(5,))


def test_what_the_fit_chooses_is_another_plan() -> None:
    """Both go by the same scores, but of "novice-error" the fit says which experts go."""
    stats = make_stats(layers=2, experts=8)
    chosen, open_ = (
        make_plan(stats, prune_ratio=0.5, replacement="rank-2", method=method)
        for method in ("replacement-error", "novice-error")
    )
    assert chosen.kept == open_.kept
    assert chosen.sha256() != open_.sha256()


def test_file_round_trip(tmp_path: Path) -> None:
    plan = make_plan(make_stats(layers=3), protect=(1,), stats_path="s", stats_sha256="ab")
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == plan


def refused(path: Path) -> str:
    with pytest.raises(MoneEdgeError) as error:
        PrunePlan.load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing_and_foreign_files_get_one_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert "mone-edge plan STATS" in refused(path)
    for text in ("", "{", "[]", "null", "{}", '{"format": "x", "version": 1}', "\x00\xff"):
        path.write_bytes(text.encode("latin-1"))
        refused(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 4),
        ("kept", {"0": [0, 1]}),
        ("kept", {"0": [8], "1": [0]}),
        ("kept", {"0": [1, 0], "1": [0]}),
        ("kept", {"0": [0, 8], "1": [0]}),
        ("kept", {"0": [0, 0], "1": [0]}),
        ("kept", [1, 2]),
        ("num_experts", {"0": "many", "1": 8}),
        ("scope", "town"),
        ("replacement", "prayer"),
        ("top_k", "2"),
        ("surprise", 1),
    ],
)
def test_damaged_plans_get_one_line(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "plan.json"
    make_plan(make_stats()).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refused(path)
