"""`mone-edge doctor`: what is missing on this machine, and the command that mends it."""

import dataclasses
from typing import TYPE_CHECKING

import click

from mone_edge.console import Console, common_options

if TYPE_CHECKING:
    from mone_edge.doctor import Finding


@click.command("doctor")
@common_options
def command(console: Console) -> int:
    """Tell what is missing on this machine, and the command that mends it."""
    from mone_edge.doctor import examine

    findings = examine()
    lines = [
        f"{_verdict(f):<7}  {f.name}: {f.detail}" + ("" if f.ok else f"  ->  {f.fix}")
        for f in findings
    ]
    document = {
        "ok": all(f.ok or f.optional for f in findings),
        "findings": [dataclasses.asdict(f) for f in findings],
    }
    console.result(document, "\n".join(lines))
    return 0 if document["ok"] else 1


def _verdict(finding: "Finding") -> str:
    if finding.ok:
        return "ok"
    return "absent" if finding.optional else "MISSING"
