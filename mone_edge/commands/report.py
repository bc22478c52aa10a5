"""`mone-edge report`: a folder of results as one HTML page."""

from pathlib import Path

import click

from mone_edge.console import Console, common_options, force_option, table


@click.command("report")
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option(
    "-o", "--html", type=click.Path(path_type=Path), metavar="FILE",
    help="The page. [default: RUN_DIR/report.html]",
)  # fmt: skip
@force_option
@common_options
def command(console: Console, run_dir: Path, html: Path | None, force: bool) -> None:
    """Tables and plots of what RUN_DIR holds, as one HTML page.

    Of GGUFs (headers only), statistics, plans, and the --json of eval and bench.

    \b
    mone-edge eval *.gguf --ppl text.txt --kld-base full.gguf --json > results/eval.json
    mone-edge bench *.gguf --json > results/bench.json
    mone-edge report results
    """
    from mone_edge import report
    from mone_edge.paths import require_writable

    results = report.gather(run_dir)
    html = html or run_dir / "report.html"
    inputs = (path for path in run_dir.iterdir() if path.suffix in report.SUFFIXES)
    require_writable(html, force=force, inputs=inputs)
    for name, why in results.ignored.items():
        console.warn(f"left out {name}: {why}")
    report.write(results, html)
    texts = [table(t.headers, t.rows) for t in report.tables(results)]
    console.result(report.to_json(results, html), "\n\n".join([*texts, f"Page: {html}"]))
