"""How fast GGUFs run on this machine, and what memory they take.

In: GGUF files. Out: a `BenchResult` for each file and test, measured by llama.cpp's `llama-bench`
(so the numbers mean what its users expect), with the peak memory of its process, the file's size
and the share of routed slots that hit a novice. Knows nothing about quality.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mone_edge import skipping
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.evaluate import file_bytes, read_text
from mone_edge.gguf_header import read_header
from mone_edge.llama import GgufModel, check_gguf
from mone_edge.probe import require_loadable
from mone_edge.scoring import Progress, silent

# llama.cpp's names of the chosen expert ids of a block, as the router counts and, where the file
# has its experts in another order, then as it stores them; and of which are run (1 or 0) where
# some may be skipped; a copy or a view has more behind its name
ROUTED, RUN = re.compile(r"ffn_moe_(topk|slots)-(\d+)"), re.compile(r"ffn_moe_run-\d+")
HIT_RATIO_TOKENS = 2048
CHUNK_TOKENS = 256  # bounds the logits of a large vocabulary, which are not needed
MAX_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class BenchResult:
    """One test of one file. `tokens_per_second` and `stddev` are over the repetitions."""

    model: str
    test: str  # pp512: prefill of 512 tokens; tg128: decoding of 128
    tokens_per_second: float  # mean
    stddev: float
    median: float
    samples: tuple[float, ...]  # tokens per second of each repetition
    file_bytes: int
    peak_rss_bytes: int  # of the llama-bench process, weights mapped from the file included
    novice_hit_ratio: float  # share of routed slots that hit a novice, 0 for an unpruned file
    skipped_ratio: float  # share of routed slots that `skipping` leaves out, 0 without a threshold
    model_type: str
    parameters: int
    backend: str
    threads: int


@dataclass(frozen=True)
class Run:
    """What one `llama-bench` process told."""

    entries: Sequence[Mapping[str, Any]]  # its JSON output
    peak_rss_bytes: int


def bench(
    paths: Sequence[Path],
    *,
    prompt_tokens: int = 512,
    generated_tokens: int = 128,
    repetitions: int = 5,
    threads: int | None = None,
    text: str | None = None,
    progress: Progress = silent,
) -> list[BenchResult]:
    """Measure files side by side.

    With several files the repetitions alternate among them, one process each, so that what else
    the machine does (and its temperature) weighs on all alike.

    Args:
        prompt_tokens: length of the prefill test, 0 for none.
        generated_tokens: length of the decoding test, 0 for none.
        threads: None leaves it to llama-bench.
        text: on which novice hits are counted; None takes the evaluation text of the package.

    Raises:
        MoneEdgeError: a file cannot be run.
        RuntimeMissing: the patched llama.cpp is not built.
    """
    if prompt_tokens <= 0 and generated_tokens <= 0:
        raise UsageError("nothing to measure: -p and -n are both 0")
    if text is not None and not text.strip():
        raise MoneEdgeError("the text to count novice hits on is empty; give another with --text")
    for path in paths:
        check_gguf(path)
        require_loadable(path)
    alone = len(paths) == 1
    rounds = 1 if alone else repetitions
    options = ["-p", str(prompt_tokens), "-n", str(generated_tokens)]
    options += ["-r", str(repetitions if alone else 1)]
    options += ["-t", str(threads)] if threads else []
    runs: list[list[Run]] = [[] for _ in paths]
    for turn in range(rounds):
        for number, path in enumerate(paths):
            runs[number].append(run_llama_bench(path, options))
            progress("bench", turn * len(paths) + number + 1, rounds * len(paths))
    results = []
    for path, own in zip(paths, runs, strict=True):
        results += summarise(path, own, count_slots(path, text, threads=threads))
    return results


def run_llama_bench(path: Path, options: Sequence[str]) -> Run:
    """Run the patched tree's `llama-bench` on one file.

    Raises:
        MoneEdgeError: it failed; with the last line it wrote.
    """
    from mone_edge import runtime

    command = [str(runtime.tool("llama-bench")), "-m", str(path), "-o", "json", *options]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        status, peak = _run_measured(command, out, err)
        output, complaints = _content(out), _content(err)
    try:
        entries = json.loads(output) if status == 0 else []
    except ValueError:
        entries = []
    if not entries:
        last = (complaints.strip() or "it wrote nothing").splitlines()[-1]
        raise MoneEdgeError(f"llama-bench failed on {path} (status {status}): {last}")
    return Run(entries, peak)


def _run_measured(command: Sequence[str], out: IO[bytes], err: IO[bytes]) -> tuple[int, int]:
    """Exit status and peak resident bytes of a process.

    Linux: VmHWM, sampled, because `ru_maxrss` of a child starts at the memory of its parent; the
    pause grows with the run, so the last look is never earlier than 90 % of it. Elsewhere
    `ru_maxrss` of the children so far.
    """
    peak = 0
    start = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    try:
        while process.poll() is None:
            peak = max(peak, _high_water_bytes(process.pid))
            time.sleep(min(MAX_POLL_SECONDS, (time.monotonic() - start) / 10))
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    return process.returncode, peak or _children_peak_bytes()


def _high_water_bytes(pid: int) -> int:
    """Peak resident bytes of a living process as Linux tells it; 0 where it does not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else 0


def _children_peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def summarise(path: Path, runs: Sequence[Run], slots: "SlotCounter") -> list[BenchResult]:
    """Put the repetitions of a file together, test by test."""
    tests: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        for entry in run.entries:
            tests.setdefault(_test_name(entry), []).append(entry)
    peak = max(run.peak_rss_bytes for run in runs)
    return [_result(path, test, entries, peak, slots) for test, entries in tests.items()]


def _test_name(entry: Mapping[str, Any]) -> str:
    if not entry["n_gen"]:
        return f"pp{entry['n_prompt']}"
    return f"pp{entry['n_prompt']}+" * bool(entry["n_prompt"]) + f"tg{entry['n_gen']}"


def _result(
    path: Path, test: str, entries: Sequence[Mapping[str, Any]], peak: int, slots: "SlotCounter"
) -> BenchResult:
    samples = tuple(float(speed) for entry in entries for speed in entry["samples_ts"])
    first = entries[0]
    return BenchResult(
        model=str(path),
        test=test,
        tokens_per_second=statistics.fmean(samples),
        stddev=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        median=statistics.median(samples),
        samples=samples,
        file_bytes=file_bytes(path),
        peak_rss_bytes=peak,
        novice_hit_ratio=slots.hit_ratio,
        skipped_ratio=slots.skipped_ratio,
        model_type=str(first["model_type"]),
        parameters=int(first["model_n_params"]),
        backend=str(first["backends"]),
        threads=int(first["n_threads"]),
    )


class SlotCounter:
    """A `TensorWatcher` that counts routed slots (token, layer, one of top_k), those whose expert
    has no weights, and those that are skipped for a small gate weight."""

    def __init__(self) -> None:
        self.kept: Mapping[int, int] = {}  # experts with weights, by block
        self.slots = 0
        self.hits = 0
        self.skipped = 0
        self._as_routed: dict[int, int] = {}  # hits of a block's last tokens by the router's ids

    def wants(self, name: str) -> bool:
        return bool(ROUTED.fullmatch(name) or RUN.fullmatch(name))

    def see(self, name: str, values: NDArray[Any]) -> None:
        if match := ROUTED.fullmatch(name):
            block = int(match[2])
            hits = int(np.count_nonzero(values >= self.kept[block]))  # of [tokens, top_k]
            if match[1] == "topk":
                self.slots += values.size
                self.hits += hits
                self._as_routed[block] = hits
            else:
                self.hits += hits - self._as_routed[block]
        else:
            self.skipped += int(np.count_nonzero(values == 0))

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.slots if self.slots else 0.0

    @property
    def skipped_ratio(self) -> float:
        return self.skipped / self.slots if self.slots else 0.0


def count_slots(path: Path, text: str | None = None, *, threads: int | None = None) -> SlotCounter:
    """What becomes of routed slots on a text; nothing is counted where all experts are run.

    Args:
        text: its first 2048 tokens are read, in chunks of 256; None takes the evaluation text of
            the package.

    Raises:
        MoneEdgeError: llama.cpp cannot run the file.
    """
    counter = SlotCounter()
    with GgufModel(path, n_ctx=CHUNK_TOKENS, threads=threads, watcher=counter) as model:
        counter.kept = {layer: model.kept_experts(layer) for layer in range(model.layers)}
        pruned = read_header(path).value("{arch}.expert_kept_count")
        if not pruned and not skipping.threshold_of(path):
            return counter
        ids = model.token_ids(_default_text() if text is None else text)[:HIT_RATIO_TOKENS]
        for start in range(0, len(ids), CHUNK_TOKENS):
            # All logits are asked for: a position without output does not reach the last layer.
            model.logits(ids[start : start + CHUNK_TOKENS])
    return counter


def _default_text() -> str:
    from mone_edge import demo

    return read_text(demo.evaluation_text())
