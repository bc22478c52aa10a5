"""`make demo`: the main job on the demo model, command by command, ending with one table.

Runs the same commands a user types and prints each before it runs. Leaves all files in one
folder; a second run measures again and re-uses statistics and what is built.

    python -m mone_edge.demo.tour [--folder demo-run]
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mone_edge.console import human_bytes, table

RATIOS = (0.0, 0.25, 0.5)
OUTTYPE = "Q8_0"
CALIBRATION = ("--samples", "48", "--seq-len", "512")
EVALUATION = ("--chunks", "16")
BENCHMARK = ("-p", "512", "-n", "64", "-r", "3")
PROMPT = "Why is the sky blue?"


@dataclass(frozen=True)
class Row:
    """What was measured of one file."""

    name: str
    bench: list[dict[str, Any]]
    quality: dict[str, Any]
    answer: str

    def cells(self) -> list[str]:
        speed = {entry["test"][:2]: entry["tokens_per_second"] for entry in self.bench}
        first, quality = self.bench[0], self.quality
        return [
            self.name,
            human_bytes(first["file_bytes"]),
            human_bytes(first["peak_rss_bytes"]),
            f"{speed['pp']:.0f}",
            f"{speed['tg']:.1f}",
            f"{first['novice_hit_ratio']:.1%}",
            f"{quality['ppl']:.2f} ± {quality['ppl_stderr']:.2f}",
            f"{quality['kld_mean']:.4f}" if "kld_mean" in quality else "0",
        ]


HEADERS = (
    "experts removed",
    "file",
    "peak memory",
    "prefill t/s",
    "decode t/s",
    "novice hits",
    "perplexity",
    "KL divergence",
)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo-run"))
def main(folder: Path) -> None:
    """Convert, run, measure and compare the demo model at three prune ratios."""
    from mone_edge import demo

    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    click.echo("SmolLM2-135M-Instruct as a Mixture of Experts (mone_edge/demo/README.md)")
    _mone_edge("inspect", "demo", show=True)
    files = [folder / f"demo-MoNE{ratio:g}-{OUTTYPE}.gguf" for ratio in RATIOS]
    for ratio, file in zip(RATIOS, files, strict=True):
        _mone_edge(
            "convert", "demo", "--prune-ratio", f"{ratio:g}", "--outtype", OUTTYPE, *CALIBRATION,
            "-o", str(file), "--force", show=True,
        )  # fmt: skip
    benches = json.loads(_mone_edge("bench", *map(str, files), *BENCHMARK, "--json"))
    text = str(demo.evaluation_text())
    rows = []
    for ratio, file in zip(RATIOS, files, strict=True):
        base = ("--kld-base", str(files[0])) if file != files[0] else ()
        quality = _mone_edge("eval", str(file), "--ppl", text, *base, *EVALUATION, "--json")
        answer = _mone_edge("run", str(file), "--chat", "-p", PROMPT, "-n", "48", "--temp", "0")
        bench = [entry for entry in benches if Path(entry["model"]).name == file.name]
        rows.append(Row(f"{ratio:.0%}", bench, json.loads(quality), answer.strip()))
    click.echo(f"\n{PROMPT}")
    for row in rows:
        click.echo(f"\n[{row.name} removed] {row.answer}")
    result = table(HEADERS, (row.cells() for row in rows))
    (folder / "table.md").write_text(result + "\n", encoding="utf-8")
    for name, document in (("bench", benches), ("eval", [row.quality for row in rows])):
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    _mone_edge("report", str(folder), "--force")
    click.echo(f"\n{result}\n\nFiles, recipes, model cards and report.html: {folder.resolve()}")
    click.echo(
        f"Done in {time.monotonic() - started:.0f} s. Talk to one: mone-edge run --chat {files[1]}"
    )


def _mone_edge(*arguments: str, show: bool = False) -> str:
    """Run one command as a user would; its result on stdout is returned, and shown if asked."""
    click.echo(f"\n$ mone-edge {shlex.join(arguments)}")
    command = [sys.executable, "-m", "mone_edge", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    if show:
        click.echo(done.stdout.rstrip())
    return done.stdout


if __name__ == "__main__":
    main()
