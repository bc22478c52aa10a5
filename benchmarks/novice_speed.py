"""Speed, memory and size at OLMoE's proportions: `python -m benchmarks.novice_speed FOLDER`.

Makes a random `olmoe` checkpoint (16 layers, width 1024, 64 experts of 512, top-8: half of
OLMoE-1B-7B's widths) and converts it whole, with half of its experts as novices, and with half of
them dropped (router rows removed). A token of the random model goes to novices for
about half of its slots. Then `mone-edge bench`, whose repetitions alternate among the files, prints
the table. Not a test: some minutes, and the numbers are the machine's.
"""

import subprocess
import sys
from pathlib import Path

import click

from tests.tiny import TEXT, make_checkpoint

SHAPE = {"layers": 16, "experts": 64, "top_k": 8, "hidden": 1024, "inner": 512}
VARIANTS = {"whole": ("0", "mean"), "novices": ("0.5", "mean"), "dropped": ("0.5", "drop")}


def mone_edge(*arguments: str) -> None:
    """Run a command of the product; its output goes to the terminal."""
    subprocess.run([sys.executable, "-m", "mone_edge", *arguments], check=True)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("outtype", default="Q4_0")
def main(folder: Path, outtype: str) -> None:
    """Make what is missing, then measure."""
    model, text, stats = folder / "olmoe-half", folder / "text.txt", folder / "stats.safetensors"
    if not (model / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
        make_checkpoint("olmoe", model, dtype="bfloat16", **SHAPE, **heads)
        text.write_text(TEXT * 8, encoding="utf-8")
    if not stats.exists():
        data = ("--data", str(text), "--samples", "4", "--seq-len", "256")
        mone_edge("stats", str(model), "-o", str(stats), *data)
    files = {name: folder / f"{name}-{outtype}.gguf" for name in VARIANTS}
    for name, (ratio, replacement) in VARIANTS.items():
        if not files[name].exists():
            mone_edge(
                *("convert", str(model), "--stats", str(stats), "--tokenizer-pre", "gpt-2"),
                *("--prune-ratio", ratio, "--replacement", replacement, "--method", "random"),
                *("--outtype", outtype, "-o", str(files[name])),
            )
    mone_edge("bench", *map(str, files.values()), "-p", "256", "-n", "64", "-r", "5")


if __name__ == "__main__":
    main()
