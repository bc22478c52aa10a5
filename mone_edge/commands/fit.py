"""`mone-edge fit`: low-rank novices for the experts that a plan removes."""

from pathlib import Path
from typing import Any

import click

from mone_edge.commands.options import calibration_options, chosen_calibration, threads_option
from mone_edge.commands.places import input_files
from mone_edge.console import Console, common_options, force_option, offline_option


@click.command("fit")
@click.argument("model")
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), required=True,
    help="From `plan --replacement rank` (or rank-16).",
)  # fmt: skip
@click.option(
    "-o", "--outfile", type=click.Path(path_type=Path), default=Path("novices.safetensors"),
    show_default=True,
)  # fmt: skip
@calibration_options
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@threads_option()
@force_option
@offline_option
@common_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    console: Console,
    model: str,
    plan_file: Path,
    outfile: Path,
    device: str,
    resume: bool,
    threads: int | None,
    force: bool,
    offline: bool,
    **_calibration: Any,  # chosen_calibration reads it
) -> None:
    """Fit a small linear map in place of each expert that a plan removes from MODEL.

    Goes through the model layer by layer, with one layer's weights in memory. Reads the text that
    the plan's statistics read, unless --data, --samples, --seq-len or --seed say otherwise.

    \b
    mone-edge plan stats.safetensors --prune-ratio 0.5 --replacement rank-16 -o plan.json
    mone-edge fit ./OLMoE-1B-7B --plan plan.json -o novices.safetensors
    mone-edge convert ./OLMoE-1B-7B --plan plan.json --novices novices.safetensors
    """
    from mone_edge import pipeline
    from mone_edge.collect.work import Work, discard, unfinished, work_path
    from mone_edge.paths import require_writable
    from mone_edge.plan import PrunePlan
    from mone_edge.source import resolve

    plan = PrunePlan.load(plan_file)
    source = resolve(model, offline=offline)
    calibration = chosen_calibration(ctx, plan.calibration)
    inputs = [plan_file, *input_files(source, plan=plan, data=calibration.data)]
    require_writable(outfile, force=force, inputs=inputs)
    work = Work(work_path(outfile), resume=resume, restart=force)
    if resume and not work.started:
        console.info(f"{work.path} holds no unfinished work: starting at the beginning")
    with unfinished(work):
        with console.progress("fitting", "layer") as progress:
            fitted = pipeline.fit(
                source,
                plan,
                calibration,
                work,
                device=device,
                threads=threads,
                offline=offline,
                progress=progress,
                warn=console.warn,
            )
        fitted.save(outfile)
    discard(work.path)
    document = {"outfile": str(outfile), **fitted.summary()}
    console.result(
        document,
        f"{outfile}: novices of {document['novices']} experts, ranks {document['ranks']}, "
        f"held-out error {document['held_out_error']:.1%} of that of constants",
    )
