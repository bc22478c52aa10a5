"""`mone-edge prune`: carry out a plan, in the format and at the precision the model has."""

import dataclasses
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mone_edge.commands.convert import arguments, plan_fields, tell
from mone_edge.commands.places import input_files, require_places
from mone_edge.console import Console, common_options, force_option, human_bytes, offline_option

if TYPE_CHECKING:
    from mone_edge.low_rank import LowRankNovices
    from mone_edge.plan import PrunePlan
    from mone_edge.source import Checkpoint, Source


@click.command("prune")
@click.argument("model")
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), required=True, help="From `plan`."
)
@click.option(
    "--stats", type=click.Path(path_type=Path), help="Where the novices are. [default: the plan's]"
)
@click.option(
    "--novices", type=click.Path(path_type=Path), help="From `fit`, for --replacement rank."
)
@click.option("-o", "--outfile", type=click.Path(path_type=Path), required=True)
@force_option
@offline_option
@common_options
def command(
    console: Console,
    model: str,
    plan_file: Path,
    stats: Path | None,
    novices: Path | None,
    outfile: Path,
    force: bool,
    offline: bool,
) -> None:
    """Write MODEL without the experts that a plan removes; those it keeps stay bit for bit.

    A checkpoint becomes a smaller checkpoint folder, which transformers loads after
    `import mone_edge.checkpoint` (plans with --replacement drop or merge need not even that). A
    GGUF becomes a smaller GGUF.

    \b
    mone-edge prune ./OLMoE-1B-7B --plan plan.json -o OLMoE-pruned
    mone-edge prune model-Q4_K_M.gguf --plan plan.json -o smaller.gguf
    """
    from mone_edge import pipeline
    from mone_edge.plan import PrunePlan
    from mone_edge.source import Checkpoint, resolve

    plan = PrunePlan.load(plan_file)
    plan, fitted = pipeline.novices_of_plan(plan, novices)
    source = resolve(model, offline=offline)
    given = {"plan": plan_file, "stats": stats, "novices": novices}
    inputs = [*filter(None, given.values()), *input_files(source, plan=plan)]
    if isinstance(source, Checkpoint):
        from mone_edge import checkpoint

        checkpoint.require_target(source, outfile, force=force, inputs=inputs)
        _prune_checkpoint(console, source, plan, stats, fitted, outfile, force)
    else:
        require_places([outfile], inputs, force=force)
        _prune_gguf(console, source, plan, stats, fitted, outfile, force, arguments(**given))


def _prune_checkpoint(
    console: Console,
    source: "Checkpoint",
    plan: "PrunePlan",
    stats: Path | None,
    fitted: "LowRankNovices | None",
    outfile: Path,
    force: bool,
) -> None:
    from mone_edge import checkpoint, pipeline

    measured = None if plan.cuts else pipeline.stats_of_plan(plan, stats)
    with console.progress("writing", "B") as progress:
        made = checkpoint.prune_checkpoint(
            source, plan, measured, outfile, fitted=fitted, force=force, progress=progress
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    document = dataclasses.asdict(made) | {
        "outfile": str(made.outfile),
        "experts_kept": list(made.experts_kept),
        "peak_rss_bytes": peak if sys.platform == "darwin" else 1024 * peak,
    }
    console.result(
        document,
        f"{made.outfile}: {human_bytes(made.bytes)}, {made.prune_ratio:.1%} of the experts "
        f"removed, written in {made.seconds:.1f} s",
    )


def _prune_gguf(
    console: Console,
    source: "Source",
    plan: "PrunePlan",
    stats: Path | None,
    fitted: "LowRankNovices | None",
    outfile: Path,
    force: bool,
    given: list[str],
) -> None:
    from mone_edge import convert, pipeline, skipping
    from mone_edge.quantize import KEEP
    from mone_edge.recipe import Calibration, Recipe

    recipe = Recipe(
        model=source.name,
        outtype=(KEEP,),
        skip_threshold=skipping.threshold_of(source.path),
        imatrix="none",
        calibration=plan.calibration or Calibration(),
        **plan_fields(plan),
    )
    measured = pipeline.stats_of_plan(plan, stats)
    jobs = convert.prepare(
        source, recipe, {KEEP: outfile}, plan=plan, stats=measured, fitted=fitted
    )
    with console.progress("writing", "B") as progress:
        made = convert.write(jobs, recipe, given=given, force=force, progress=progress)
    tell(console, made)
