"""`mone-edge stats`: measure every expert of a model on calibration text."""

from pathlib import Path

import click

from mone_edge.commands.options import calibration_options, threads_option
from mone_edge.commands.places import input_files
from mone_edge.console import Console, common_options, force_option, offline_option


@click.command("stats")
@click.argument("model")
@click.option(
    "-o", "--outfile", type=click.Path(path_type=Path), default=Path("stats.safetensors"),
    show_default=True,
)  # fmt: skip
@calibration_options
@click.option(
    "--sequential", is_flag=True, help="One layer's weights in memory at a time: larger models."
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@threads_option()
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
    sequential: bool,
    resume: bool,
    threads: int | None,
    force: bool,
    offline: bool,
) -> None:
    """Measure how often each expert of MODEL is used and how much its output varies.

    The file serves every criterion, ratio and type: calibrate once, plan and convert often.

    \b
    mone-edge stats demo -o demo.safetensors --samples 32 --seq-len 512
    mone-edge stats ./Qwen3-30B-A3B --sequential       # larger than the memory
    mone-edge stats ./Qwen3-30B-A3B --sequential --resume
    torchrun --nproc-per-node=2 -m mone_edge stats ./OLMoE-1B-7B
    mone-edge stats model-Q4_K_M.gguf
    """
    from mone_edge import pipeline
    from mone_edge.collect.work import Work, discard, unfinished, work_path
    from mone_edge.paths import require_writable
    from mone_edge.recipe import Calibration
    from mone_edge.source import resolve

    source = resolve(model, offline=offline)
    require_writable(outfile, force=force, inputs=input_files(source, data=data))
    work = Work(work_path(outfile), resume=resume, restart=force)
    if resume and not work.started:
        console.info(f"{work.path} holds no unfinished work: starting at the beginning")
    with unfinished(work):
        with console.progress("calibrating", "seq") as progress:
            stats = pipeline.calibrate(
                source,
                Calibration(data, samples, seq_len, seed),
                device=device,
                threads=threads,
                offline=offline,
                sequential=sequential,
                work=work,
                progress=progress,
                warn=console.warn,
            )
        if stats is None:  # the first process of the torchrun has them
            return
        stats.save(outfile)
    discard(work.path)
    document = {
        "outfile": str(outfile),
        "tokens": stats.tokens,
        "layers": len(stats.layers),
        "unseen_experts": stats.unseen(),
    }
    console.result(document, f"{outfile}: {len(stats.layers)} MoE layers, {stats.tokens} tokens")
