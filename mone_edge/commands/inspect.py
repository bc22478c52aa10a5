"""`mone-edge inspect`: what is in a model, statistics file or plan, from headers only."""

from typing import Any

import click

from mone_edge.console import Console, common_options, offline_option


@click.command("inspect")
@click.argument("target", metavar="MODEL|STATS|PLAN")
@offline_option
@common_options
def command(console: Console, target: str, offline: bool) -> None:
    """Show what is in a checkpoint, GGUF, statistics file or plan.

    \b
    mone-edge inspect demo
    mone-edge inspect model.gguf --json
    """
    from mone_edge.inspection import inspect

    document = inspect(target, offline=offline)
    console.result(document, "\n".join(_lines(document)))


def _lines(document: dict[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in document.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif value is not None:
            text = str(value)
            lines.append(f"{indent}{key}: {text if len(text) <= 200 else text[:197] + '...'}")
    return lines
