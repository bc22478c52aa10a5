"""`mone-edge doctor`: what is missing on this machine, and the command that mends it."""

import dataclasses

import click

from mone_edge.console import Console, common_options


@click.command("doctor")
@common_options
def command(console: Console) -> int:
    """Tell what is missing on this machine, and the command that mends it."""
    from mone_edge.doctor import examine

    findings = examine()
    lines = [
        f"{'ok     ' if f.ok else 'MISSING'}  {f.name}: {f.detail}"
        + ("" if f.ok else f"  ->  {f.fix}")
        for f in findings
    ]
    document = {
        "ok": all(f.ok for f in findings),
        "findings": [dataclasses.asdict(f) for f in findings],
    }
    console.result(document, "\n".join(lines))
    return 0 if document["ok"] else 1
