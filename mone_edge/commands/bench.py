"""`mone-edge bench`: llama-bench's table, with memory, size and novice hits."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mone_edge.commands.options import threads_option
from mone_edge.console import Console, common_options, human_bytes, table

if TYPE_CHECKING:
    from mone_edge.bench import BenchResult

HEADERS = (
    "model",
    "type",
    "size",
    "params",
    "backend",
    "threads",
    "test",
    "t/s",
    "peak RSS",
    "novice hits",
    "skipped",
)


@click.command("bench")
@click.argument(
    "models", nargs=-1, required=True, metavar="GGUF...", type=click.Path(path_type=Path)
)
@click.option("-p", "--n-prompt", default=512, show_default=True, type=click.IntRange(0))
@click.option("-n", "--n-gen", default=128, show_default=True, type=click.IntRange(0))
@click.option("-r", "--repetitions", default=5, show_default=True, type=click.IntRange(1))
@threads_option("Default: llama-bench's choice.")
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path),
    help="Text to count novice hits on; default: text that comes with the package.",
)
@click.option(
    "-o", "--output", type=click.Choice(["md", "json", "csv"]), default="md", show_default=True
)
@common_options
def command(
    console: Console,
    models: tuple[Path, ...],
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    threads: int | None,
    text_file: Path | None,
    output: str,
) -> None:
    """Speed, peak memory, size, novice hits and skipped slots of GGUFs on this machine.

    \b
    mone-edge bench model-F16.gguf model-MoNE0.25-Q4_K_M.gguf -t 2
    """
    from mone_edge.bench import bench
    from mone_edge.evaluate import read_text

    with console.progress("bench", "run") as update:
        results = bench(
            models,
            prompt_tokens=n_prompt,
            generated_tokens=n_gen,
            repetitions=repetitions,
            threads=threads,
            text=read_text(text_file) if text_file else None,
            progress=lambda _what, done, total: update(done, total),
        )
    document = [asdict(result) for result in results]
    if output == "json":
        console = Console(as_json=True)
    console.result(document, to_csv(document) if output == "csv" else to_markdown(results))


def to_markdown(results: Sequence["BenchResult"]) -> str:
    """llama-bench's table, with peak memory, novice hits and skipped slots."""
    return table(HEADERS, (_cells(result) for result in results))


def _cells(result: "BenchResult") -> tuple[str, ...]:
    billions = result.parameters / 1e9
    return (
        Path(result.model).name,
        result.model_type,
        human_bytes(result.file_bytes),
        f"{billions:.2f} B" if billions >= 1 else f"{billions * 1000:.2f} M",
        result.backend,
        str(result.threads),
        result.test,
        f"{result.tokens_per_second:.2f} ± {result.stddev:.2f}",
        human_bytes(result.peak_rss_bytes),
        f"{result.novice_hit_ratio:.1%}",
        f"{result.skipped_ratio:.1%}",
    )


def to_csv(document: Sequence[dict[str, Any]]) -> str:
    """One line a result, headed by the names of the JSON keys (without the single samples)."""
    rows = [{key: value for key, value in row.items() if key != "samples"} for row in document]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
