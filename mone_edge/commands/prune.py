"""`mone-edge prune`: carry a plan out on a GGUF, without requantising."""

from pathlib import Path

import click

from mone_edge.commands.convert import plan_fields, stats_of_plan, tell
from mone_edge.console import Console, common_options, force_option
from mone_edge.errors import UsageError


@click.command("prune")
@click.argument("model")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), required=True)
@click.option("-o", "--outfile", type=click.Path(path_type=Path), required=True)
@click.option(
    "--stats", type=click.Path(path_type=Path), help="Where they are now, if they were moved."
)
@force_option
@common_options
def command(
    console: Console, model: str, plan_file: Path, outfile: Path, stats: Path | None, force: bool
) -> None:
    """Write MODEL (a GGUF) without the experts that a plan removes, the others bit for bit.

    \b
    mone-edge stats model-Q4_K_M.gguf -o stats.safetensors
    mone-edge plan stats.safetensors --prune-ratio 0.5 -o plan.json
    mone-edge prune model-Q4_K_M.gguf --plan plan.json -o smaller.gguf
    """
    from mone_edge import convert
    from mone_edge.paths import require_writable
    from mone_edge.plan import PrunePlan
    from mone_edge.quantize import KEEP
    from mone_edge.recipe import Recipe
    from mone_edge.source import resolve

    plan = PrunePlan.load(plan_file)
    source = resolve(model)
    if not source.keeps_types:
        raise UsageError(
            f"{model} is a checkpoint; write its GGUF with: mone-edge convert {model} "
            f"--plan {plan_file}"
        )
    require_writable(outfile, force=force)
    recipe = Recipe(model=source.name, outtype=(KEEP,), imatrix="none", **plan_fields(plan))
    measured = stats_of_plan(plan, stats)
    jobs = convert.prepare(source, recipe, {KEEP: outfile}, plan=plan, stats=measured)
    with console.progress("writing", "B") as progress:
        made = convert.write(jobs, recipe, progress=progress)
    tell(console, made)
