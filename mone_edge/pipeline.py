"""The stages joined: model -> statistics -> plan -> GGUF, as `convert` runs them.

In: a `Source` and a `Recipe`. Out: what each stage makes. Statistics are kept in the cache by
what they were measured on, so that another ratio, method or type needs no new calibration.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from mone_edge import __version__, convert, demo, novices, quantize
from mone_edge import calibration as text
from mone_edge.calibration import Batches
from mone_edge.collect.work import Work
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.fit import Limits
from mone_edge.low_rank import LayerNovices, LowRankNovices, empty_novices
from mone_edge.model_file import ModelFile
from mone_edge.paths import cache_dir, expand, is_file
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import MEASURED, Calibration, Recipe, low_rank
from mone_edge.source import Source, resolve
from mone_edge.stats import VERSION as STATS_VERSION
from mone_edge.stats import ExpertStats, Float, LayerStats, Provenance, empty_layer, file_sha256

EXPERT_PARTS = ("gate", "up", "down", "gate_up")

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


def calibrate(
    source: Source,
    calibration: Calibration,
    *,
    device: str = "auto",
    threads: int | None = None,
    offline: bool = False,
    sequential: bool = False,
    work: Work | None = None,
    progress: Progress | None = None,
    warn: Say = lambda message: None,
) -> ExpertStats | None:
    """Measure every expert on calibration text: a checkpoint by torch (under torchrun, each process
    its share), a GGUF by llama.cpp.

    Args:
        sequential: keep one layer's weights in memory; needs `work`.
        work: where what is finished is kept until the caller has saved the statistics.

    Returns:
        The statistics; None in processes of a torchrun other than the first.
    """
    if source.is_pruned:
        raise MoneEdgeError(f"{source.name} is pruned already: measure the model it was made from")
    source.require_device(device)
    batches = _read(source, calibration, offline, warn)
    stats = source.collect(
        batches,
        device=device,
        threads=threads,
        sequential=sequential,
        work=work,
        progress=progress,
    )
    if stats is None:
        return None
    if unseen := stats.unseen():
        experts = sum(layer.num_experts for layer in stats.layers.values())
        warn(
            f"{unseen} of {experts} experts saw none of the {stats.tokens} calibration tokens; "
            "they count as redundant: calibrate on more or other text (--samples, --data)"
        )
    return stats


def _read(source: Source, calibration: Calibration, offline: bool, warn: Say) -> Batches:
    batches = text.load(
        calibration.data,
        source.tokenizer(),
        samples=calibration.samples,
        seq_len=calibration.seq_len,
        seed=calibration.seed,
        offline=offline,
    )
    if batches.short:
        warn(batches.short)
    return batches


def fit(
    source: Source,
    plan: PrunePlan,
    calibration: Calibration,
    work: Work,
    *,
    device: str = "auto",
    threads: int | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    warn: Say = lambda message: None,
) -> LowRankNovices:
    """Fit low-rank novices to what a plan's experts do on calibration text.

    Raises:
        MoneEdgeError: the plan has constant novices, or is of another model.
    """
    from mone_edge.collect.distributed import world

    if world().size > 1:
        raise UsageError("fit is one process; start it without torchrun")
    if source.is_pruned:
        raise MoneEdgeError(f"{source.name} is pruned already: fit to the model it was made from")
    if not low_rank(plan.replacement):
        raise MoneEdgeError(
            f"the plan says --replacement {plan.replacement}, which needs no fit; make it with "
            "--replacement rank (or rank-16)"
        )
    if plan.fingerprint != source.fingerprint:
        raise MoneEdgeError(
            f"the plan is of {plan.model} ({plan.fingerprint[:12]}), "
            f"not of {source.name} ({source.fingerprint[:12]})"
        )
    source.require_device(device)
    if plan.calibration is None and not calibration.data:
        warn(
            "the plan does not tell which text its statistics read (merged, or of an older "
            "version): fitting to the text that comes with the package; name other text with --data"
        )
    batches = _read(source, calibration, offline, warn)
    fitted = source.fit(plan, batches, work, device=device, threads=threads, progress=progress)
    if said := fitted.shortfall():
        warn(said)
    return fitted


def cached_stats(source: Source, calibration: Calibration) -> Path:
    """Where the statistics of this model on this text are kept."""
    return _cached("stats", source, calibration)


def cached_novices(source: Source, plan: PrunePlan, calibration: Calibration) -> Path:
    """Where the low-rank novices of this plan, fitted on this text, are kept."""
    return _cached("novices", source, calibration, plan.sha256())


def _cached(kind: str, source: Source, calibration: Calibration, more: str = "") -> Path:
    """A place in the cache for what is made from a model and text."""
    digest = hashlib.sha256(
        f"{__version__} {STATS_VERSION} {source.fingerprint} {source.settings_sha256()} "
        f"{calibration}{more}".encode()
    )
    for spec in calibration.data or (str(demo.calibration_text()),):
        place = expand(text.split_weight(spec)[0])
        if is_file(place):
            digest.update(file_sha256(place).encode())
    return cache_dir() / kind / f"{source.label}-{digest.hexdigest()[:16]}.safetensors"


def measured_model(stats: ExpertStats, *, offline: bool) -> Source:
    """The model that statistics are of, as it was named when they were made.

    Raises:
        MoneEdgeError: it is not there, or it is another one by now.
    """
    made = stats.provenance
    source = resolve(made.model, offline=offline)
    if source.base_fingerprint != made.fingerprint:
        raise MoneEdgeError(
            f"{made.model} ({source.base_fingerprint[:12]}) is not the model that the statistics "
            f"are of ({made.fingerprint[:12]})"
        )
    return source


def plan_from_stats(
    recipe: Recipe,
    stats: ExpertStats,
    path: Path,
    router_change: Mapping[int, Float] | None = None,
) -> PrunePlan:
    """The plan that a recipe asks for, with the statistics file it rests on recorded."""
    return make_plan(
        stats,
        prune_ratio=recipe.prune_ratio,
        method=recipe.method,
        scope=recipe.scope,
        replacement=recipe.replacement,
        seed=recipe.calibration.seed,
        protect=recipe.protect,
        protect_super=recipe.protect_super,
        pretrained=recipe.pretrained,
        router_change=router_change,
        stats_path=str(path.resolve()),
        stats_sha256=file_sha256(path),
    )


def stats_of_plan(plan: PrunePlan, given: Path | None) -> ExpertStats | None:
    """The statistics that a plan was made from: the file given, else the one it names.

    Raises:
        MoneEdgeError: its novices need them and the file is not there, or is another one.
    """
    path = given or (Path(plan.stats_path) if plan.stats_path else None)
    if path is None or not path.is_file():
        if plan.replacement not in MEASURED:
            return None
        raise MoneEdgeError(
            f"the plan's novices come from {path or 'a statistics file'}, which is not there; "
            "name it with --stats"
        )
    if plan.stats_sha256 and file_sha256(path) != plan.stats_sha256:
        raise MoneEdgeError(f"{path} is not the statistics file that the plan was made from")
    return ExpertStats.load(path)


def novices_of_plan(plan: PrunePlan, given: Path | None) -> tuple[PrunePlan, LowRankNovices | None]:
    """The plan as the fit decided it, and the fitted novices that it needs, None if it needs none.

    Raises:
        MoneEdgeError: none are given where they are needed, or some where they are not.
    """
    if not low_rank(plan.replacement):
        if given:
            raise MoneEdgeError(
                f"--novices {given}: the plan says --replacement {plan.replacement}, which has "
                "no fitted novices"
            )
        return plan, None
    fitted = LowRankNovices.load(given) if given else None
    plan = fitted.decide(plan) if fitted else plan
    return plan, novices.require_fitted(plan, fitted)


def rehearse(
    source: Source,
    model: ModelFile,
    recipe: Recipe,
    outfiles: dict[str, Path],
    plan: PrunePlan | None = None,
    router_change: Mapping[int, Float] | None = None,
) -> list[convert.Job]:
    """All that `convert` does before it reads weights, on statistics of the right shape.

    Sizes are those of the real run (with `--scope model` and no plan yet, of the same number of
    experts), and what cannot work is refused here, before minutes of calibration.

    Args:
        model: the source, opened.
    """
    stats = _shape_of_stats(source, model)
    if plan is None and recipe.prune_ratio:
        plan = make_plan(
            stats,
            prune_ratio=recipe.prune_ratio,
            method=recipe.method,
            scope=recipe.scope,
            replacement=recipe.replacement,
            protect=recipe.protect,
            protect_super=recipe.protect_super,
            router_change=router_change,
        )
    fitted = _shape_of_novices(plan, stats, model) if plan and low_rank(plan.replacement) else None
    measured = stats if plan else None
    jobs = convert.prepare(
        source, recipe, outfiles, whole=model, plan=plan, stats=measured, fitted=fitted
    )
    try:
        quantize.require_loadable(jobs[0].model, source.name)
    except MoneEdgeError:
        source.tokenizer()  # says more, where that is what is missing
        raise
    return jobs


def _shape_of_novices(plan: PrunePlan, stats: ExpertStats, model: ModelFile) -> LowRankNovices:
    """Novices of zeros, of the largest rank that a fit may choose."""
    layers: dict[int, LayerNovices] = {}
    for layer, measured in stats.layers.items():
        if not (pruned := len(plan.pruned(layer))):
            continue
        width = measured.output_mean.shape[1]
        names = (convert.EXPERT_TENSOR.format(layer=layer, part=p) for p in EXPERT_PARTS)
        weights = sum(model.tensors[name].elements for name in names if name in model.tensors)
        limits = Limits(plan.replacement, width, width, weights // measured.num_experts)
        layers[layer] = empty_novices(pruned, width, width, limits.largest)
    ids = {layer: plan.pruned(layer) for layer in plan.kept}
    return LowRankNovices(stats.provenance, plan.replacement, ids, layers)


def _shape_of_stats(source: Source, model: ModelFile) -> ExpertStats:
    layers: dict[int, LayerStats] = {}
    for layer in convert.moe_layers(model):
        down = model.tensors[convert.EXPERT_TENSOR.format(layer=layer, part="down")]
        layers[layer] = empty_layer(*down.shape, top_k=source.top_k)
    return ExpertStats(
        Provenance(source.name, source.base_fingerprint, source.architecture), layers
    )
