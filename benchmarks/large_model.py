"""A model of OLMoE-1B-7B's shape (13.8 GB), converted and measured: docs/conversion.md's table.

    python -m benchmarks.large_model make FOLDER          a random checkpoint in bfloat16 shards
    python -m benchmarks.large_model stats FOLDER         its statistics, layer by layer
    python -m benchmarks.large_model convert FOLDER [ROUNDS [LLAMA_QUANTIZE]]
    python -m benchmarks.large_model compare FOLDER       the unpruned files, tensor by tensor

`convert` runs llama.cpp's `convert_hf_to_gguf.py` + `llama-quantize` and `mone-edge convert` in
alternation, to Q4_K_M, at 0 %, 25 % and 50 % pruned, and prints one JSON line a run: wall and CPU
seconds, peak resident memory, bytes read from disk and written, and the disk that was taken for
intermediate files; then a Markdown table of medians. LLAMA_QUANTIZE is a program to use in place of
the runtime's, which patch 0017 has made faster: that of an unpatched llama.cpp. Peak resident
memory counts the page cache of mapped files, so the anonymous part is given too. Not a test: tens
of minutes and 35 GB of disk.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from mone_edge import demo, runtime

LAYERS, WIDTH, INNER, EXPERTS, TOP_K, VOCAB = 16, 2048, 1024, 64, 8, 50304
OUTTYPE = "Q4_K_M"
RATIOS = ("0", "0.25", "0.5")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Run:
    """What one command took; several commands in a row add up, peaks excepted."""

    name: str
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    read_bytes: int  # from the disk, not from the page cache
    written_bytes: int
    temporary_bytes: int  # of files that are not the result
    outfile_bytes: int


def make(folder: Path) -> Path:
    """A random `olmoe` checkpoint at the widths of OLMoE-1B-7B, written layer by layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import OlmoeConfig

    model = folder / "olmoe-7b"
    if (model / "config.json").exists():
        return model
    model.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    parts = LAYERS + 1
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        generator = torch.Generator().manual_seed(part)
        tensors = {
            name: (
                torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator)
            )
            .mul_(1 if len(shape) == 1 else shape[-1] ** -0.5)
            .to(torch.bfloat16)
            for name, shape in (_layer(part) if part < LAYERS else _ends()).items()
        }
        save_file(tensors, model / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    document = {"metadata": {}, "weight_map": index}
    (model / "model.safetensors.index.json").write_text(json.dumps(document))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo.model_dir() / file, model / file)
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        architectures=["OlmoeForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(model)
    return model


def _ends() -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }


def _layer(layer: int) -> dict[str, tuple[int, ...]]:
    block = f"model.layers.{layer}"
    attention: dict[str, tuple[int, ...]] = {
        f"{block}.self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkvo"
    }
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    experts = {
        f"{block}.mlp.experts.{e}.{part}_proj.weight": shape
        for e in range(EXPERTS)
        for part, shape in (
            ("gate", (INNER, WIDTH)),
            ("up", (INNER, WIDTH)),
            ("down", (WIDTH, INNER)),
        )
    }
    return (
        attention
        | {f"{block}.{norm}.weight": (WIDTH,) for norm in norms}
        | {f"{block}.mlp.gate.weight": (EXPERTS, WIDTH)}
        | experts
    )


def stats(folder: Path) -> Path:
    """Statistics on a few tokens: enough for a plan and for the memory that it takes."""
    file = folder / "stats.safetensors"
    if not file.exists():
        sizes = ("--samples", "8", "--seq-len", "512", "--sequential", "--resume")
        _print(_measured("stats --sequential", [*_mone("stats", make(folder), "-o", file), *sizes]))
    return file


def convert(folder: Path, rounds: int, quantizer: str) -> None:
    """The pairs, in alternation, each from the disk."""
    model, measured = make(folder), stats(folder)
    runs: list[Run] = []
    for _ in range(rounds):
        _forget(model)
        runs.append(_print(_theirs(model, folder, quantizer)))
        for ratio in RATIOS:
            _forget(model)
            runs.append(_print(_ours(model, folder, measured, ratio)))
    _table(runs)


def _forget(folder: Path) -> None:
    """Take a checkpoint out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(folder: Path) -> None:
    """Whether both roads made the same tensors of the unpruned model."""
    from gguf import GGUFReader

    theirs, ours = (
        {t.name: (t.tensor_type, tuple(t.shape), t.data) for t in GGUFReader(folder / name).tensors}
        for name in ("theirs.gguf", f"ours-{RATIOS[0]}.gguf")
    )
    same = theirs.keys() == ours.keys() and all(
        theirs[n][:2] == ours[n][:2] and (theirs[n][2] == ours[n][2]).all() for n in theirs
    )
    print(f"{len(theirs)} tensors: {'the same, byte for byte' if same else 'DIFFERENT'}")


def _theirs(model: Path, folder: Path, quantizer: str) -> Run:
    floats, out = folder / "theirs-bf16.gguf", folder / "theirs.gguf"
    script = runtime.source_tree() / "convert_hf_to_gguf.py"
    first = _measured(
        "convert_hf_to_gguf",
        [sys.executable, str(script), str(model), "--outtype", "bf16", "--outfile", str(floats)],
    )
    program = quantizer or str(runtime.tool("llama-quantize"))
    second = _measured("llama-quantize", [program, str(floats), str(out), OUTTYPE])
    both = Run(
        "llama.cpp",
        first.wall_seconds + second.wall_seconds,
        first.cpu_seconds + second.cpu_seconds,
        max(first.peak_rss_bytes, second.peak_rss_bytes),
        max(first.peak_anonymous_bytes, second.peak_anonymous_bytes),
        first.read_bytes + second.read_bytes,
        first.written_bytes + second.written_bytes,
        floats.stat().st_size,
        out.stat().st_size,
    )
    _print(first), _print(second)
    floats.unlink()
    return both


def _ours(model: Path, folder: Path, measured: Path, ratio: str) -> Run:
    out = folder / f"ours-{ratio}.gguf"
    options = ("--prune-ratio", ratio, "--outtype", OUTTYPE, "--imatrix", "none", "--force")
    command = _mone("convert", model, "--stats", measured, "-o", out)
    return _measured(f"mone-edge {ratio}", [*command, *options], out)


def _mone(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mone_edge", *map(str, arguments)]


def _measured(name: str, command: list[str], outfile: Path | None = None) -> Run:
    """Run a command to its end, watching its memory and its traffic."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seen = {"anonymous": 0, "read_bytes": 0, "wchar": 0}
    errors: list[bytes] = []
    told = process.stderr
    assert told
    reader = threading.Thread(target=lambda: errors.append(told.read()))
    reader.start()
    while True:
        _look(process.pid, seen)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(POLL_SECONDS)
    wall = time.monotonic() - started
    reader.join()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors[0].decode(errors='replace')[-2000:]}")
    return Run(
        name,
        round(wall, 2),
        round(usage.ru_utime + usage.ru_stime, 2),
        1024 * usage.ru_maxrss,
        seen["anonymous"],
        seen["read_bytes"],
        seen["wchar"],
        0,
        outfile.stat().st_size if outfile else 0,
    )


def _look(pid: int, seen: dict[str, int]) -> None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        traffic = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return
    if found := re.search(r"RssAnon:\s+(\d+) kB", status):
        seen["anonymous"] = max(seen["anonymous"], 1024 * int(found[1]))
    for key in ("read_bytes", "wchar"):
        if found := re.search(rf"^{key}: (\d+)", traffic, re.MULTILINE):
            seen[key] = int(found[1])


def _print(run: Run) -> Run:
    print(json.dumps(asdict(run)), flush=True)
    return run


def _table(runs: list[Run]) -> None:
    base = statistics.median(r.wall_seconds for r in runs if r.name == "llama.cpp")
    print(
        "\n| | wall | ratio | CPU | peak memory | of it not page cache | read from disk "
        "| intermediate | file |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in dict.fromkeys(r.name for r in runs):
        mine = [r for r in runs if r.name == name]
        wall = statistics.median(r.wall_seconds for r in mine)
        cpu = statistics.median(r.cpu_seconds for r in mine)
        rss, anonymous = (
            max(getattr(r, key) for r in mine) / 2**30
            for key in ("peak_rss_bytes", "peak_anonymous_bytes")
        )
        print(
            f"| {name} | {wall:.0f} s | {wall / base:.2f} | {cpu:.0f} s | {rss:.2f} GiB | "
            f"{anonymous:.2f} GiB | {mine[0].read_bytes / 1e9:.1f} GB | "
            f"{mine[0].temporary_bytes / 1e9:.1f} GB | "
            f"{mine[0].outfile_bytes / 1e9:.2f} GB |"
        )


@click.command(help=__doc__)
@click.argument("action", type=click.Choice(["make", "stats", "convert", "compare"]))
@click.argument("place", metavar="FOLDER", type=click.Path(path_type=Path))
@click.argument("rounds", default=3)
@click.argument("quantizer", metavar="LLAMA_QUANTIZE", default="")
def main(action: str, place: Path, rounds: int, quantizer: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    if action == "make":
        make(place)
    elif action == "stats":
        stats(place)
    elif action == "convert":
        convert(place, rounds, quantizer)
    else:
        compare(place)


if __name__ == "__main__":
    main()
