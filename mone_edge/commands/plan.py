"""`mone-edge plan`: decide which experts go, from statistics."""

from pathlib import Path

import click

from mone_edge.commands.options import plan_options
from mone_edge.commands.places import input_files
from mone_edge.console import Console, common_options, force_option, offline_option, table


@click.command("plan")
@click.argument("stats", type=click.Path(path_type=Path))
@click.option(
    "-o", "--outfile", type=click.Path(path_type=Path), default=Path("plan.json"), show_default=True
)
@plan_options
@click.option(
    "--seed", type=click.IntRange(0), default=42, show_default=True, help="Of random and dek."
)
@force_option
@offline_option
@common_options
def command(
    console: Console,
    stats: Path,
    outfile: Path,
    prune_ratio: float,
    method: str,
    scope: str,
    replacement: str | None,
    protect: str,
    protect_super: bool,
    pretrained: str,
    seed: int,
    force: bool,
    offline: bool,
) -> None:
    """Decide from a STATS file which experts go and what replaces them.

    \b
    mone-edge plan stats.safetensors --prune-ratio 0.5 -o plan.json
    mone-edge plan tuned.safetensors --method router-norm --pretrained ./OLMoE-1B-7B -o plan.json
    """
    from mone_edge import pipeline
    from mone_edge.paths import require_writable
    from mone_edge.plan import make_plan, parse_layers
    from mone_edge.recipe import NOVICE_ERROR
    from mone_edge.routers import norm_changes
    from mone_edge.source import resolve
    from mone_edge.stats import ExpertStats, file_sha256

    measured = ExpertStats.load(stats)
    tuned = pipeline.measured_model(measured, offline=offline) if pretrained else None
    before = resolve(pretrained, offline=offline) if pretrained else None
    read = input_files(*filter(None, (tuned, before)))
    require_writable(outfile, force=force, inputs=[stats, *read])
    change = norm_changes(tuned, before) if tuned and before else None
    plan = make_plan(
        measured,
        prune_ratio=prune_ratio,
        method=method,
        scope=scope,
        replacement=replacement,
        seed=seed,
        protect=parse_layers(protect, list(measured.layers)),
        protect_super=protect_super,
        pretrained=pretrained,
        router_change=change,
        stats_path=str(stats.resolve()),
        stats_sha256=file_sha256(stats),
    )
    plan.save(outfile)
    kept = [len(ids) for ids in plan.kept.values()]
    document = {
        "outfile": str(outfile),
        "prune_ratio": round(plan.removed_fraction, 6),
        "experts_kept": kept,
    }
    rows = [(layer, f"{len(ids)}/{plan.num_experts[layer]}") for layer, ids in plan.kept.items()]
    done = "are merged into others" if plan.groups else "go"
    if plan.method == NOVICE_ERROR and plan.prune_ratio:
        done += "; which, `mone-edge fit` says"
    console.result(document, f"{outfile}: {plan.removed_fraction:.1%} of the experts {done}")
    if console.verbose and not console.as_json:
        console.info(table(("layer", "kept"), rows))
