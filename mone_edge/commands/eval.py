"""`mone-edge eval`: perplexity, KL divergence and task accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mone_edge.commands.options import MAX_CONTEXT, threads_option
from mone_edge.console import Console, common_options, human_bytes, offline_option, table

if TYPE_CHECKING:
    from mone_edge.evaluate import EvalResult


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL|GGUF...")
@click.option("--ppl", "text", type=click.Path(path_type=Path), help="Text file for perplexity.")
@click.option("--kld-base", metavar="GGUF", help="Model to diverge from, on the text of --ppl.")
@click.option(
    "--tasks",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl ...",
    help="Files of task items; several may follow.",
)
@click.option(
    "--lm-eval",
    "harness",
    multiple=True,
    metavar="TASK",
    help="Task of lm-evaluation-harness, by name; may be repeated.",
)
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before its questions.")
@click.option("--limit", type=click.IntRange(1), help="First N items of each task only.")
@click.option(
    "-c", "--ctx-size", default=512, show_default=True, type=click.IntRange(4, MAX_CONTEXT),
    help="Tokens per chunk of text.",
)  # fmt: skip
@click.option("--chunks", type=click.IntRange(1), help="First N chunks of the text only.")
@threads_option()
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True)
@offline_option
@common_options
def command(
    console: Console,
    models: tuple[str, ...],
    text: Path | None,
    kld_base: str | None,
    tasks: tuple[Path, ...],
    harness: tuple[str, ...],
    num_fewshot: int | None,
    limit: int | None,
    ctx_size: int,
    chunks: int | None,
    threads: int | None,
    output: str,
    offline: bool,
) -> None:
    """Perplexity, KL divergence from a base, and accuracy on tasks.

    Perplexity and divergence are those of llama.cpp's llama-perplexity.

    \b
    mone-edge eval small.gguf --ppl text.txt --kld-base full.gguf
    mone-edge eval full.gguf small.gguf --tasks copa.jsonl piqa.jsonl --limit 100
    mone-edge eval small.gguf --lm-eval arc_easy --lm-eval winogrande --num-fewshot 5
    """
    from mone_edge.evaluate import evaluate

    if tasks:  # click gives an option one value; the files after it land among the models
        tasks += tuple(Path(name) for name in models if name.endswith(".jsonl"))
        models = tuple(name for name in models if not name.endswith(".jsonl"))
    with console.progress("eval") as update:
        results = evaluate(
            models,
            text=text,
            kld_base=kld_base,
            tasks=tasks,
            harness=harness,
            num_fewshot=num_fewshot,
            limit=limit,
            n_ctx=ctx_size,
            max_chunks=chunks,
            threads=threads,
            offline=offline,
            progress=lambda _what, done, total: update(done, total),
        )
    for result in results:
        cut = sum(score.truncated for score in result.tasks.values())
        if cut:
            console.warn(f"{result.model}: {cut} contexts were cut to the model's context length")
    documents = [result.to_json() for result in results]
    if output == "json":
        console = Console(as_json=True)
    console.result(documents if len(documents) > 1 else documents[0], to_markdown(results))


def to_markdown(results: Sequence["EvalResult"]) -> str:
    """One row a model, one column a measure."""
    rows = [_cells(result) for result in results]
    return table(rows[0], (row.values() for row in rows))


def _cells(result: "EvalResult") -> dict[str, str]:
    cells = {"model": Path(result.model).name, "size": human_bytes(result.file_bytes)}
    if text := result.text:
        cells["ppl"] = f"{text.ppl:.4f} ± {text.ppl_stderr:.4f}"
    if far := result.divergence:
        cells["KLD mean"] = f"{far.kld_mean:.5f} ± {far.kld_stderr:.5f}"
        cells["KLD 99%"] = f"{far.kld_p99:.5f}"
        cells["same top"] = f"{far.same_top_p:.2%} ± {far.same_top_p_stderr:.2%}"
    for name, score in result.tasks.items():
        cells[name] = f"{score.acc:.1%} ± {score.acc_stderr:.1%}"
        cells[f"{name} norm"] = f"{score.acc_norm:.1%}"
    if result.tasks:
        cells["average"] = f"{result.to_json()['tasks']['average']:.2%}"
    return cells
