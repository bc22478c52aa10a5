"""`mone-edge merge-stats`: the exact sum of statistics of one model."""

from pathlib import Path

import click

from mone_edge.console import Console, common_options, force_option


@click.command("merge-stats")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--outfile", type=click.Path(path_type=Path), required=True)
@force_option
@common_options
def command(console: Console, files: tuple[Path, ...], outfile: Path, force: bool) -> None:
    """Add up statistics FILES that were measured on different text.

    \b
    mone-edge merge-stats a.safetensors b.safetensors -o both.safetensors
    """
    from mone_edge.paths import require_writable
    from mone_edge.stats import ExpertStats, merge_all

    require_writable(outfile, force=force, inputs=files)
    merged = merge_all(ExpertStats.load(file) for file in files)
    if again := merged.repeated_data():
        console.warn(f"{again} of the parts read the same text as another: it counts twice")
    merged.save(outfile)
    document = {"outfile": str(outfile), "tokens": merged.tokens, "parts": len(files)}
    console.result(document, f"{outfile}: {merged.tokens} tokens from {len(files)} files")
