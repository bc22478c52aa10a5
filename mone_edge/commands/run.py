"""`mone-edge run`: text from a GGUF, streamed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mone_edge.commands.options import MAX_CONTEXT, FiniteRange, threads_option
from mone_edge.console import Console, common_options
from mone_edge.errors import UsageError

if TYPE_CHECKING:
    from mone_edge.generate import Generator, Message


def _count(_ctx: click.Context, _param: click.Parameter, value: int) -> int:
    if value == 0 or value < -1:
        raise click.BadParameter(f"{value} is no number of tokens; -1: to the end of the context")
    return value


@click.command("run")
@click.argument("model", metavar="GGUF", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="What to continue, or with --chat to answer; - reads stdin.")
@click.option(
    "-n", "--n-predict", default=128, show_default=True, callback=_count,
    help="Tokens; -1: to the end of the context.",
)  # fmt: skip
@click.option(
    "-c", "--ctx-size", default=4096, show_default=True, type=click.IntRange(8, MAX_CONTEXT)
)
@threads_option()
@click.option("--temp", default=0.8, show_default=True, type=FiniteRange(0), help="0: greedy.")
@click.option("--seed", default=42, show_default=True, type=click.IntRange(0))
@click.option("--chat", is_flag=True, help="Use the model's chat template; without -p, talk.")
@common_options
def command(
    console: Console,
    model: Path,
    prompt: str | None,
    n_predict: int,
    ctx_size: int,
    threads: int | None,
    temp: float,
    seed: int,
    chat: bool,
) -> None:
    """Generate text with a GGUF: text on stdout, speed on stderr.

    \b
    mone-edge run model.gguf -p "Once upon a time" --temp 0
    mone-edge run model.gguf --chat
    """
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    talk = chat and prompt is None and sys.stdin.isatty() and not console.as_json
    if not prompt and not talk:
        raise UsageError("no prompt: give -p TEXT, or --chat on a terminal to talk")
    from mone_edge.generate import Generator

    with Generator(model, n_ctx=ctx_size, threads=threads, seed=seed) as generator:
        if talk:
            _talk(console, generator, n_predict, temp)
            return
        assert prompt
        if chat:
            message = {"role": "user", "content": prompt}
            pieces = generator.chat([message], n_predict, temp)
        else:
            pieces = generator.complete(prompt, n_predict, temp)
        text = _stream(pieces, show=not console.as_json)
        speed = generator.speed()
        console.result({"model": str(model), "text": text, **vars(speed)})
        console.info(str(speed))


def _stream(pieces: Iterator[str], *, show: bool) -> str:
    """Write pieces as they come; all of them together."""
    parts = []
    for piece in pieces:
        parts.append(piece)
        if show:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    if show:
        click.echo()
    return "".join(parts)


def _talk(console: Console, generator: "Generator", n_predict: int, temp: float) -> None:
    """A conversation on the terminal, until end of input."""
    generator.require_chat_template()
    console.info("end with Ctrl-D")
    messages: list[Message] = []
    while True:
        try:
            question = input("> ")
        except EOFError:
            return
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        answer = _stream(generator.chat(messages, n_predict, temp), show=True)
        messages.append({"role": "assistant", "content": answer})
        console.info(str(generator.speed()))
