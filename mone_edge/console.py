"""The one sink for what a person or a script reads: results on stdout, all else on stderr."""

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True)
class Console:
    """How this command talks. Commands get one as their first argument (`common_options`)."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    silent: bool = False  # another process of the same run talks

    def result(self, document: Any, text: str = "") -> None:
        """The command's result: one JSON document with `--json`, else `text`."""
        if self.silent:
            return
        if self.as_json:
            click.echo(json.dumps(document, indent=2, allow_nan=False))
        elif text:
            click.echo(text)

    def info(self, message: str) -> None:
        """Something good to know, on stderr; silent with `-q`."""
        if not self.quiet and not self.silent:
            click.echo(message, err=True)

    def warn(self, message: str) -> None:
        """Something the user should know before trusting the result; shown with `-q` too."""
        if not self.silent:
            click.echo(f"warning: {message}", err=True)

    @contextmanager
    def progress(self, label: str, unit: str = "it") -> Iterator[Callable[[int, int], None]]:
        """A bar on a terminal: yields `update(done, total)`."""
        if self.quiet or self.silent or not sys.stderr.isatty():
            yield lambda done, total: None
            return
        from tqdm import tqdm

        with tqdm(desc=label, unit=unit, unit_scale=unit == "B", leave=False) as bar:

            def update(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield update


def is_follower() -> bool:
    """Whether torchrun started this process as another than the first, which does the talking."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0"


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options every command has; hands the command a Console as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Errors and warnings only.")
    @click.option("-v", "--verbose", is_flag=True, help="Say more.")
    @functools.wraps(command)
    def with_console(*, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> Any:
        logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr)
        return command(Console(as_json, quiet, verbose, is_follower()), **options)

    return with_console


force_option = click.option("--force", is_flag=True, help="Replace files that exist.")
offline_option = click.option("--offline", is_flag=True, help="Use what is in the cache only.")


def table(headers: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table, first column left and the others right aligned."""
    cells = [list(headers), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row: list[str]) -> str:
        first, *rest = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]) + " |"
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def human_bytes(count: float) -> str:
    """Bytes as a person reads them, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
