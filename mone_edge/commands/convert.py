"""`mone-edge convert`: the whole job, from a checkpoint or GGUF to a smaller GGUF."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mone_edge.commands.deciding import Means, decide, fitted_novices, require_inputs
from mone_edge.commands.judging import Judgement, measured_keys, measured_text
from mone_edge.commands.options import (
    FiniteRange,
    calibration_options,
    chosen_calibration,
    plan_options,
    threads_option,
)
from mone_edge.commands.places import input_files, require_places
from mone_edge.console import Console, common_options, force_option, human_bytes, offline_option
from mone_edge.errors import CheckFailed, MoneEdgeError, Stopped, UsageError

if TYPE_CHECKING:
    from mone_edge.convert import Converted, Job
    from mone_edge.evaluate import EvalResult
    from mone_edge.plan import PrunePlan
    from mone_edge.recipe import Calibration, Recipe
    from mone_edge.source import Checkpoint, Source
    from mone_edge.stats import Provenance

PLAN_FIELDS = (
    "prune_ratio", "method", "scope", "replacement", "protect", "protect_super", "pretrained",
)  # fmt: skip
SIZE = re.compile(r"(\d+)([KMG]?)", re.I)


@click.command("convert")
@click.argument("model")
@click.option(
    "-o", "--outfile", metavar="FILE",
    help="[default: {name}-MoNE{ratio}-{ftype}.gguf]; {ftype} is filled in.",
)  # fmt: skip
@plan_options
@click.option(
    "--outtype", multiple=True, default=("Q4_K_M",), show_default=True, metavar="TYPE",
    help="File type, by llama.cpp's name; may be repeated. A GGUF keeps its types by default.",
)  # fmt: skip
@click.option(
    "--stats", type=click.Path(path_type=Path), help="Statistics, instead of calibrating."
)
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan to carry out.")
@click.option("--novices", type=click.Path(path_type=Path), help="Of the plan, from `fit`.")
@calibration_options
@click.option("--recipe", type=click.Path(path_type=Path), help="Options from a YAML file.")
@click.option(
    "--skip-threshold", type=FiniteRange(0, 1, max_open=True), default=0.0, metavar="BETA",
    help="Run no expert of a gate weight up to this share of the token's largest; 0: all run.",
)  # fmt: skip
@click.option("--imatrix", default="auto", show_default=True, metavar="auto|none|FILE")
@click.option("--tensor-type", multiple=True, metavar="RE=TYPE", help="As llama-quantize's.")
@click.option("--split-max-size", default="0", metavar="N[K|M|G]", help="Bytes of each part.")
@click.option("--tokenizer-pre", default="", metavar="NAME", help="Pre-tokenizer's name.")
@click.option(
    "--ppl", "text", type=click.Path(path_type=Path), metavar="FILE",
    help="Say what it cost on this text: perplexity, and KL divergence from MODEL.",
)  # fmt: skip
@click.option("--chunks", type=click.IntRange(1), help="First N chunks of 512 tokens of it only.")
@click.option(
    "--max-kld", type=FiniteRange(0), metavar="NATS",
    help="Exit with 3 if the KL divergence is above. [text: --ppl, else the package's]",
)  # fmt: skip
@threads_option()
@click.option("--dry-run", is_flag=True, help="Check all, say sizes, write nothing.")
@force_option
@offline_option
@common_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    console: Console,
    model: str,
    outfile: str | None,
    stats: Path | None,
    plan_file: Path | None,
    novices: Path | None,
    recipe: Path | None,
    device: str,
    split_max_size: str,
    text: Path | None,
    chunks: int | None,
    max_kld: float | None,
    threads: int | None,
    dry_run: bool,
    force: bool,
    offline: bool,
    **options: Any,
) -> None:
    """Make MODEL smaller: calibrate, prune, quantise, write one GGUF for llama.cpp.

    MODEL is a hub id (org/name[@revision]), a checkpoint folder, a GGUF, or demo. Of a GGUF the
    kept experts stay as they are, bit for bit, unless --outtype asks for another type.

    \b
    mone-edge convert demo --prune-ratio 0.5 --outtype Q8_0
    mone-edge convert ./OLMoE-1B-7B --stats stats.safetensors --outtype Q4_K_M --outtype Q8_0
    mone-edge convert OLMoE-1B-7B-Q4_K_M.gguf --prune-ratio 0.25
    mone-edge convert demo --prune-ratio 0.25 --ppl text.txt --chunks 16 --max-kld 0.3
    """
    from mone_edge import convert, pipeline
    from mone_edge import recipe as recipes
    from mone_edge.paths import expand
    from mone_edge.plan import PrunePlan, parse_layers
    from mone_edge.routers import norm_changes
    from mone_edge.source import Checkpoint, resolve
    from mone_edge.stats import ExpertStats

    split_max_bytes = _bytes(split_max_size)
    judgement = Judgement(text, chunks, max_kld)
    inputs = [path for path in (stats, plan_file, novices, text) if path]
    plan = PrunePlan.load(plan_file) if plan_file else None
    provenance = ExpertStats.load(stats).provenance if stats else None
    measured_on = provenance.calibration if provenance else None
    source = resolve(model, offline=offline)
    inside = None
    if isinstance(source, Checkpoint) and source.is_pruned:
        plan = inside = _plan_inside(ctx, source, plan_file)
    measured_on = (plan and plan.calibration) or measured_on
    saved = recipes.load(recipe) if recipe else {}
    chosen = _recipe(ctx, source, options, saved, measured_on)
    chosen = dataclasses.replace(chosen, outtype=_file_types(source, chosen.outtype))
    if isinstance(source, Checkpoint) and source.cut and not plan:
        asked = _given(ctx, "prune_ratio") or saved.get("prune_ratio") is not None
        if asked and chosen.prune_ratio:
            console.warn(f"{model} is pruned already: {source.cut}; --prune-ratio is of those")
        else:
            console.info(f"{model} is pruned already: {source.cut}; --prune-ratio removes more")
            chosen = dataclasses.replace(chosen, prune_ratio=0.0)
    for warning in (_quantised_twice(source, chosen.outtype), _skipping_lost(source, chosen)):
        if warning:
            console.warn(warning)
    if inside and stats is None and chosen.imatrix == "auto":
        console.info(f"{model} is pruned already; quantising without an importance matrix")
        chosen = dataclasses.replace(chosen, imatrix="none")
    if plan:
        fields = plan_fields(plan)
        for name in (n for n in PLAN_FIELDS if _given(ctx, n) and options[n] != fields[n]):
            console.warn(
                f"--{name.replace('_', '-')} is what the plan says; what is given is unused"
            )
        chosen = dataclasses.replace(chosen, **fields)
    outfiles = _outfiles(source, chosen, outfile)
    pretrained = None
    if chosen.pretrained and not plan:
        pretrained = resolve(chosen.pretrained, offline=offline)
    read = (source, pretrained) if pretrained else (source,)
    inputs += input_files(*read, plan=plan, data=chosen.calibration.data)
    inputs += [expand(chosen.imatrix), *_recipe_to_keep(recipe, chosen)]
    split = split_max_bytes > 0
    require_places(outfiles.values(), inputs, force=force, split=split, recipe=recipe)
    if provenance and (novices or not recipes.low_rank(chosen.replacement)):
        chosen = _as_measured(ctx, console, chosen, provenance)
    how = Means(device, threads, offline)
    measured_before = not chosen.prune_ratio or bool(plan or stats)
    require_inputs(source, chosen, novices, how, measured=measured_before)
    whole = source.open(tokenizer_pre=chosen.tokenizer_pre)
    protect = _value(ctx, options, saved, "protect")
    if isinstance(protect, str) and not plan:
        layers = parse_layers(protect, convert.moe_layers(whole))
        chosen = dataclasses.replace(chosen, protect=layers)
    change = norm_changes(source, pretrained) if pretrained else None
    rehearsal = pipeline.rehearse(source, whole, chosen, outfiles, plan, change)
    convert.require_space(rehearsal)
    if judgement.wanted:
        judgement.require(source, rehearsal)
    if dry_run:
        _tell_estimate(console, rehearsal)
        return
    measured, decided = decide(console, source, chosen, plan, stats, how, change)
    decided, fitted = fitted_novices(console, source, chosen, decided, novices, how)
    jobs = convert.prepare(
        source, chosen, outfiles, whole=whole, plan=decided, stats=measured, fitted=fitted
    )
    with console.progress("writing", "B") as progress:
        made = convert.write(
            jobs,
            chosen,
            given=arguments(stats=stats, plan=plan_file, novices=novices),
            split_max_bytes=split_max_bytes,
            threads=threads,
            force=force,
            progress=progress,
        )
    if not judgement.wanted:
        tell(console, made)
        return
    try:
        costs = judgement.measure(console, source, made, threads)
    except MoneEdgeError as error:
        tell(console, made)
        raise CheckFailed(f"made, but not measured: {error}") from error
    except KeyboardInterrupt as error:
        tell(console, made)
        raise Stopped(f"made, but not measured; {judgement.later(source, made)}") from error
    tell(console, made, costs)
    judgement.require_good(costs)


def _value(ctx: click.Context, options: dict[str, Any], saved: dict[str, Any], name: str) -> Any:
    """An option of the command line, else of the recipe file, else its default."""
    return options[name] if _given(ctx, name) or saved.get(name) is None else saved[name]


def _recipe(
    ctx: click.Context,
    source: "Source",
    options: dict[str, Any],
    saved: dict[str, Any],
    measured: "Calibration | None",
) -> "Recipe":
    """The options and the recipe file as one recipe; of the layers to protect only numbers, for
    which they are is known once the model is open.

    Args:
        saved: what the recipe file says.
        measured: what the statistics that are used read; goes before the calibration's defaults.
    """
    from mone_edge import recipe as recipes
    from mone_edge.quantize import KEEP

    calibration = chosen_calibration(ctx, measured, saved.get("calibration"))
    names = [f.name for f in dataclasses.fields(recipes.Recipe) if f.name in options]
    fields = {name: _value(ctx, options, saved, name) for name in names}
    for name in ("outtype", "tensor_type"):
        given = fields[name]
        fields[name] = (given,) if isinstance(given, str) else tuple(given)
    protect = fields["protect"]
    fields["protect"] = () if isinstance(protect, str) else tuple(protect)
    if source.keeps_types and not _given(ctx, "outtype"):
        fields["outtype"] = tuple(saved.get("outtype") or (KEEP,))
    if saved.get("method") not in (None, fields["method"]) and not _given(ctx, "replacement"):
        fields["replacement"] = None  # the recipe's belongs to its method
    fields["replacement"] = fields["replacement"] or recipes.default_replacement(fields["method"])
    return recipes.Recipe(model=source.name, calibration=calibration, **fields)


def _as_measured(
    ctx: click.Context, console: Console, chosen: "Recipe", made: "Provenance"
) -> "Recipe":
    """The recipe with the text that its statistics are of, where none is read now."""
    calibration = dataclasses.replace(
        chosen.calibration, data=made.data, samples=made.samples, seq_len=made.seq_len
    )
    for name in ("data", "samples", "seq_len"):
        if _given(ctx, name) and getattr(calibration, name) != getattr(chosen.calibration, name):
            option = name.replace("_", "-")
            console.warn(f"--{option} is what the statistics say; what is given is unused")
    return dataclasses.replace(chosen, calibration=calibration)


def _given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def arguments(**files: Path | None) -> list[str]:
    """The options that name these files."""
    return [part for name, file in files.items() if file for part in (f"--{name}", str(file))]


def _plan_inside(ctx: click.Context, source: "Checkpoint", plan_file: Path | None) -> "PrunePlan":
    """The plan of a pruned checkpoint; no other can be carried out on it."""
    from mone_edge import pruned_checkpoint

    given = [name for name in PLAN_FIELDS if _given(ctx, name)]
    if plan_file or given:
        option = "plan" if plan_file else given[0].replace("_", "-")
        raise UsageError(
            f"{source.name} is pruned already, so --{option} cannot be carried out; convert the "
            "model it was made from"
        )
    return pruned_checkpoint.read_plan(source)


def _file_types(source: "Source", names: tuple[str, ...]) -> tuple[str, ...]:
    """Canonical names.

    Raises:
        UsageError: there is no such type, or a checkpoint is to keep types that it does not have.
    """
    from mone_edge.quantize import KEEP, file_type

    if KEEP in names and not source.keeps_types:
        raise UsageError(f"--outtype {KEEP} is for GGUFs; {source.name} is a checkpoint")
    return tuple(name if name == KEEP else file_type(name) for name in names)


def _quantised_twice(source: "Source", outtypes: tuple[str, ...]) -> str:
    """A warning, empty where every weight is quantised once."""
    from mone_edge.conversion import UNQUANTISED
    from mone_edge.quantize import KEEP

    lossy = [name for name in outtypes if name not in (KEEP, *UNQUANTISED)]
    stored = {ref.dtype for ref in source.tensors.values()} - UNQUANTISED.keys()
    if not source.keeps_types or not lossy or not stored:
        return ""
    return (
        f"{source.name} is quantised ({source.file_type}); --outtype {lossy[0]} quantises it a "
        "second time, which loses more than once from the original"
    )


def _skipping_lost(source: "Source", recipe: "Recipe") -> str:
    """A warning where the input skips experts and the result will not; else empty."""
    from mone_edge.skipping import threshold_of

    has = threshold_of(source.path) if source.keeps_types else 0.0
    if not has or recipe.skip_threshold:
        return ""
    return (
        f"{source.name} skips experts up to {has:.3g} of the largest gate weight; the result runs "
        f"them all, but with --skip-threshold {has:.3g}"
    )


def _outfiles(source: "Source", recipe: "Recipe", template: str | None) -> dict[str, Path]:
    from mone_edge.paths import expand
    from mone_edge.quantize import KEEP

    template = template or f"{source.label}-MoNE{recipe.prune_ratio:g}-{{ftype}}.gguf"
    if len(recipe.outtype) > 1 and "{ftype}" not in template:
        raise UsageError(f"{len(recipe.outtype)} types need {{ftype}} in --outfile {template}")
    names = {t: source.file_type if t == KEEP else t for t in recipe.outtype}
    outfiles = {t: expand(template.replace("{ftype}", name)) for t, name in names.items()}
    for outtype, path in outfiles.items():
        same = [other for other in outfiles if outfiles[other] == path]
        if len(same) > 1:
            raise UsageError(f"--outtype {same[0]} and --outtype {outtype} both make {path}")
    return outfiles


def _recipe_to_keep(file: Path | None, recipe: "Recipe") -> list[Path]:
    """The recipe file that was given, unless this run would write the very same."""
    if file is None:
        return []
    written = [recipe.of_type(outtype).to_yaml().encode() for outtype in recipe.outtype]
    return [] if file.read_bytes() in written else [file]


def _bytes(text: str) -> int:
    match = SIZE.fullmatch(text)
    if not match:
        raise UsageError(f"--split-max-size {text} is not a number with K, M or G behind it")
    factor: int = 1000 ** ("", "K", "M", "G").index(match[2].upper())
    return int(match[1]) * factor


def plan_fields(plan: "PrunePlan") -> dict[str, Any]:
    """The fields of a recipe that a plan decides."""
    return {name: getattr(plan, name) for name in PLAN_FIELDS}


def _tell_estimate(console: Console, jobs: "list[Job]") -> None:
    from mone_edge import convert

    working = convert.working_bytes(jobs)
    documents = [
        {
            "outfile": str(job.outfile),
            "bytes": job.data_bytes,
            "experts_kept": list(convert.experts_kept(job.model)),
            "working_bytes": working,
            "dry_run": True,
        }
        for job in jobs
    ]
    lines = [f"would write {job.outfile}: {human_bytes(job.data_bytes)}" for job in jobs]
    lines.append(f"memory to write it: {human_bytes(working)} beyond the program itself")
    console.result(documents[0] if len(documents) == 1 else documents, "\n".join(lines))


def tell(console: Console, made: "list[Converted]", costs: "Sequence[EvalResult]" = ()) -> None:
    """The result of `convert.write`, and what was measured of each file, if it was."""
    measured: list[EvalResult | None] = [*costs] or [None] * len(made)
    both = list(zip(made, measured, strict=True))
    documents = [
        {
            "outfile": str(file.outfile),
            "files": [str(part) for part in file.files],
            "outtype": file.outtype,
            "bytes": file.bytes,
            "prune_ratio": file.prune_ratio,
            "experts_kept": list(file.experts_kept),
            "seconds": file.seconds,
            "peak_rss_bytes": file.peak_rss_bytes,
            **(measured_keys(cost) if cost else {}),
        }
        for file, cost in both
    ]
    lines = []
    for file, cost in both:
        lines.append(
            f"{file.outfile}: {human_bytes(file.bytes)}, {file.prune_ratio:.1%} of the experts "
            f"removed, written in {file.seconds:.1f} s"
        )
        lines += [measured_text(cost)] if cost else []
    console.result(documents[0] if len(documents) == 1 else documents, "\n".join(lines))
