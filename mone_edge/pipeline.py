"""The stages joined: model -> statistics -> plan -> GGUF, as `convert` runs them.

In: a `Source` and a `Recipe`. Out: what each stage makes. Statistics are kept in the cache by
what they were measured on, so that another ratio, method or type needs no new calibration.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from mone_edge import __version__, convert, demo, quantize
from mone_edge import calibration as text
from mone_edge.collect.work import Work
from mone_edge.errors import MoneEdgeError
from mone_edge.model_file import ModelFile
from mone_edge.paths import cache_dir, expand, is_file
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import MEASURED, Calibration, Recipe
from mone_edge.source import Source
from mone_edge.stats import VERSION as STATS_VERSION
from mone_edge.stats import ExpertStats, LayerStats, Provenance, empty_layer, file_sha256

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


def cached_stats(source: Source, calibration: Calibration) -> Path:
    """Where the statistics of this model on this text are kept."""
    digest = hashlib.sha256(
        f"{__version__} {STATS_VERSION} {source.fingerprint} {calibration}".encode()
    )
    for spec in calibration.data or (str(demo.calibration_text()),):
        place = expand(text.split_weight(spec)[0])
        if is_file(place):
            digest.update(file_sha256(place).encode())
    return cache_dir() / "stats" / f"{source.label}-{digest.hexdigest()[:16]}.safetensors"


def plan_from_stats(recipe: Recipe, stats: ExpertStats, path: Path) -> PrunePlan:
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


def rehearse(
    source: Source, recipe: Recipe, outfiles: dict[str, Path], plan: PrunePlan | None = None
) -> list[convert.Job]:
    """All that `convert` does before it reads weights, on statistics of the right shape.

    Sizes are those of the real run (with `--scope model` and no plan yet, of the same number of
    experts), and what cannot work is refused here, before minutes of calibration.
    """
    model = source.open(tokenizer_pre=recipe.tokenizer_pre)
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
        )
    jobs = convert.prepare(source, recipe, outfiles, plan=plan, stats=stats if plan else None)
    quantize.require_loadable(jobs[0].model, source.name)
    return jobs


def _shape_of_stats(source: Source, model: ModelFile) -> ExpertStats:
    layers: dict[int, LayerStats] = {}
    for layer in range(model.num_layers):
        down = model.tensors.get(convert.EXPERT_TENSOR.format(layer=layer, part="down"))
        if down is not None:
            layers[layer] = empty_layer(*down.shape, top_k=source.top_k)
    return ExpertStats(
        Provenance(source.name, source.base_fingerprint, source.architecture), layers
    )
