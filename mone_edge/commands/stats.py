"""`mone-edge stats`: measure every expert of a model on calibration text."""

from pathlib import Path

import click

from mone_edge.commands.options import calibration_options
from mone_edge.console import Console, common_options, force_option, offline_option


@click.command("stats")
@click.argument("model")
@click.option(
    "-o", "--outfile", type=click.Path(path_type=Path), default=Path("stats.safetensors"),
    show_default=True,
)  # fmt: skip
@calibration_options
@force_option
@offline_option
@common_options
def command(
    console: Console,
    model: str,
    outfile: Path,
    data: tuple[str, ...],
    samples: int,
    seq_len: int,
    seed: int,
    device: str,
    force: bool,
    offline: bool,
) -> None:
    """Measure how often each expert of MODEL is used and how much its output varies.

    The file serves every criterion, ratio and type: calibrate once, plan and convert often.

    \b
    mone-edge stats demo -o demo.safetensors --samples 32 --seq-len 512
    """
    from mone_edge import pipeline
    from mone_edge.paths import expand, require_writable
    from mone_edge.recipe import Calibration
    from mone_edge.source import resolve

    source = resolve(model, offline=offline)
    require_writable(outfile, force=force, inputs=[*source.files, *map(expand, data)])
    calibration = Calibration(data, samples, seq_len, seed)
    with console.progress("calibrating", "seq") as progress:
        stats = pipeline.calibrate(
            source,
            calibration,
            device=device,
            offline=offline,
            progress=progress,
            warn=console.warn,
        )
    stats.save(outfile)
    document = {
        "outfile": str(outfile),
        "tokens": stats.tokens,
        "layers": len(stats.layers),
        "unseen_experts": stats.unseen(),
    }
    console.result(document, f"{outfile}: {len(stats.layers)} MoE layers, {stats.tokens} tokens")
