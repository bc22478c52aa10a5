"""What `convert` needs before it writes: statistics, a plan, fitted novices.

Each is the user's where given, else from the cache, else made now and cached. An interrupted run
goes on when the same command runs again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mone_edge.console import Console
from mone_edge.errors import UsageError

if TYPE_CHECKING:
    from mone_edge.low_rank import LowRankNovices
    from mone_edge.plan import PrunePlan
    from mone_edge.recipe import Recipe
    from mone_edge.source import Source
    from mone_edge.stats import ExpertStats, Float


@dataclass(frozen=True)
class Means:
    """What a calibration may use."""

    device: str
    threads: int | None
    offline: bool


def require_inputs(
    source: "Source",
    recipe: "Recipe",
    novices: Path | None,
    how: Means,
    *,
    measured: bool,
) -> None:
    """Refuse now what the stages below would refuse, the later ones after hours of work.

    Args:
        measured: statistics are there, or none are needed.

    Raises:
        MoneEdgeError: a file that was given is missing or damaged.
        UsageError: there is no such device.
    """
    from mone_edge import calibration
    from mone_edge.low_rank import LowRankNovices
    from mone_edge.recipe import low_rank

    if novices:
        LowRankNovices.load(novices)
    if not measured or (low_rank(recipe.replacement) and not novices):
        calibration.require(recipe.calibration.data)
        if how.device != "auto":
            source.require_device(how.device)


def decide(
    console: Console,
    source: "Source",
    recipe: "Recipe",
    plan: "PrunePlan | None",
    stats: Path | None,
    how: Means,
    change: "Mapping[int, Float] | None" = None,
) -> "tuple[ExpertStats | None, PrunePlan | None]":
    """Statistics and plan: the user's where given, else from the cache or measured now.

    `change` is what the method router-norm ranks by (`routers.norm_changes`).
    """
    from mone_edge import pipeline, pruned_checkpoint
    from mone_edge.source import Checkpoint
    from mone_edge.stats import ExpertStats

    if plan and isinstance(source, Checkpoint) and source.is_pruned and stats is None:
        return pruned_checkpoint.read_novices(source, plan), plan
    if plan:
        return pipeline.stats_of_plan(plan, stats), plan
    if stats:
        measured = ExpertStats.load(stats)
    elif recipe.prune_ratio == 0:
        return None, None
    else:
        stats = pipeline.cached_stats(source, recipe.calibration)
        if stats.is_file():
            console.info(f"statistics from {stats}")
            measured = ExpertStats.load(stats)
        else:
            stats.parent.mkdir(parents=True, exist_ok=True)
            measured = measure(console, source, recipe, stats, how)
    if not recipe.prune_ratio:
        return measured, None
    return measured, pipeline.plan_from_stats(recipe, measured, stats, change)


def measure(
    console: Console,
    source: "Source",
    recipe: "Recipe",
    outfile: Path,
    how: Means,
) -> "ExpertStats":
    """Measure and save; an interrupted run goes on when the same command runs again."""
    from mone_edge import pipeline
    from mone_edge.collect.distributed import world
    from mone_edge.collect.work import Work, discard, unfinished, work_path

    if world().size > 1:
        raise UsageError(
            "convert is one process: torchrun -m mone_edge stats MODEL, then convert --stats"
        )
    work = Work(work_path(outfile), resume=True, restart=True)
    sequential = not source.fits(how.device)
    if sequential:
        console.info("the model is larger than the memory: calibrating one layer at a time")
    with unfinished(work):
        with console.progress("calibrating", "seq") as progress:
            stats = pipeline.calibrate(
                source,
                recipe.calibration,
                device=how.device,
                threads=how.threads,
                offline=how.offline,
                sequential=sequential,
                work=work,
                progress=progress,
                warn=console.warn,
            )
        assert stats is not None
        stats.save(outfile)
    discard(work.path)
    return stats


def fitted_novices(
    console: Console,
    source: "Source",
    recipe: "Recipe",
    plan: "PrunePlan | None",
    novices: Path | None,
    how: Means,
) -> "tuple[PrunePlan | None, LowRankNovices | None]":
    """Low-rank novices, where the plan has them: given, in the checkpoint, cached or fitted now.

    The plan is the one that was given, or what the fit made of it ("novice-error").
    """
    from mone_edge import pipeline, pruned_checkpoint
    from mone_edge.collect.work import Work, discard, unfinished, work_path
    from mone_edge.recipe import low_rank
    from mone_edge.source import Checkpoint

    if plan is None or novices or not low_rank(plan.replacement):
        return pipeline.novices_of_plan(plan, novices) if plan else (None, None)
    if isinstance(source, Checkpoint) and source.is_pruned:
        return plan, pruned_checkpoint.read_fitted(source, plan)
    outfile = pipeline.cached_novices(source, plan, recipe.calibration)
    if outfile.is_file():
        console.info(f"novices from {outfile}")
        return pipeline.novices_of_plan(plan, outfile)
    outfile.parent.mkdir(parents=True, exist_ok=True)
    work = Work(work_path(outfile), resume=True, restart=True)
    with unfinished(work):
        with console.progress("fitting", "layer") as progress:
            fitted = pipeline.fit(
                source,
                plan,
                recipe.calibration,
                work,
                device=how.device,
                threads=how.threads,
                offline=how.offline,
                progress=progress,
                warn=console.warn,
            )
        fitted.save(outfile)
    discard(work.path)
    return pipeline.novices_of_plan(plan, outfile)
