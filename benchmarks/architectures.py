"""The table of docs/architectures.md: `python -m benchmarks.architectures [NAME...]`.

Of every MoE architecture that transformers and llama.cpp share, a tiny random model goes through
all stages: statistics, an uneven plan, a pruned checkpoint, GGUFs whole and pruned, by the direct
road, by the pruned checkpoint, and from the GGUF. A cell is what was measured, or the reason why
not. Each model has a process of its own, because llama.cpp aborts on what it does not expect.
The table and `docs/architectures.json` are written anew; with names, their rows only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mone_edge import calibration, convert, novices
from mone_edge.checkpoint import prune_checkpoint
from mone_edge.collect import gguf as collect_gguf
from mone_edge.collect.loading import load_model
from mone_edge.collect.torch_model import collect
from mone_edge.collect.work import Work
from mone_edge.conversion import packages
from mone_edge.errors import MoneEdgeError
from mone_edge.llama import GgufModel
from mone_edge.low_rank import LowRankNovices
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Recipe
from mone_edge.source import Checkpoint, Source, resolve
from mone_edge.stats import ExpertStats
from tests import architectures, tiny

DOCS = Path(__file__).parent.parent / "docs"
TOLERANCE = 1e-3  # of the range of the logits
SAMPLES, LENGTH = 8, 64
SECONDS = 300  # a model may take

Logits = np.ndarray[Any, Any]


class Trial:
    """One architecture on its way; every result is made once, when a stage first asks for it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    @cached_property
    def source(self) -> Checkpoint:
        found = resolve(str(architectures.make(self.name, self.folder / "model")))
        assert isinstance(found, Checkpoint)
        return found

    @cached_property
    def batches(self) -> calibration.Batches:
        text = self.folder / "text.txt"
        text.write_text(tiny.TEXT * 2, encoding="utf-8")
        tokenizer = calibration.load_tokenizer(self.source.path)
        return calibration.load([str(text)], tokenizer, samples=SAMPLES, seq_len=LENGTH, seed=0)

    @cached_property
    def tokens(self) -> np.ndarray[Any, Any]:
        return self.batches.tokens[:2].reshape(-1)

    @cached_property
    def stats(self) -> ExpertStats:
        made = self.source
        return collect(made.path, self.batches, model=made.name, fingerprint=made.fingerprint)

    @cached_property
    def plan(self) -> PrunePlan:
        """One expert kept in the first MoE layer (fewer than top-k), five of eight in the last."""
        plan = make_plan(self.stats, prune_ratio=0.5, method="random", replacement="mean")
        first, *_, last = plan.num_experts
        return PrunePlan(
            **{**vars(plan), "kept": {**plan.kept, first: (3,), last: (0, 2, 4, 5, 7)}}
        )

    @cached_property
    def whole(self) -> Logits:
        """transformers' own logits."""
        return _logits(load_model(self.source.path, device="cpu", dtype="float32"), self.tokens)

    @cached_property
    def pruned(self) -> Logits:
        """transformers' logits with novices in place of experts."""
        model = load_model(self.source.path, device="cpu", dtype="float32")
        return _logits(novices.apply(model, self.plan, self.stats), self.tokens)

    @cached_property
    def checkpoint(self) -> Source:
        made = prune_checkpoint(self.source, self.plan, self.stats, self.folder / "pruned")
        return resolve(str(made.outfile))

    @cached_property
    def gguf(self) -> Path:
        return self.write("whole", self.source)

    @cached_property
    def pruned_gguf(self) -> Path:
        return self.write("direct", self.source, self.plan, self.stats)

    def write(
        self,
        name: str,
        source: Source,
        plan: PrunePlan | None = None,
        stats: ExpertStats | None = None,
        fitted: LowRankNovices | None = None,
    ) -> Path:
        pre = "" if source.keeps_types else "gpt-2"
        recipe = Recipe(model=source.name, imatrix="none", tokenizer_pre=pre)
        outfiles = {"F32": self.folder / f"{name}.gguf"}
        with _any_tokenizer(architectures.ARCHITECTURES[self.name].own_tokenizer):
            jobs = convert.prepare(source, recipe, outfiles, plan=plan, stats=stats, fitted=fitted)
        return convert.write(jobs, recipe)[0].outfile


@contextmanager
def _any_tokenizer(replaced: bool) -> Iterator[None]:
    """Where an architecture's conversion needs Python code of the checkpoint to read its tokenizer.

    A tiny checkpoint has no such code. Tokens are not what is compared: they are read as GPT-2's.
    """
    from mone_edge import conversion

    find = conversion._model_class

    def gpt2(*args: Any) -> Any:
        found = find(*args)
        read = {"model_arch": found.model_arch, "set_vocab": lambda self: self._set_vocab_gpt2()}
        return type(found.__name__, (found,), read)

    replace: Any = gpt2 if replaced else find
    conversion._model_class = replace
    try:
        yield
    finally:
        conversion._model_class = find


def statistics(trial: Trial) -> float:
    """Logits of the model while it is measured, against its own."""
    from mone_edge.collect.torch_model import observe_experts

    model = load_model(trial.source.path, device="cpu", dtype="float32")
    assert trial.stats.layers
    with observe_experts(model):
        return _deviation(_logits(model, trial.tokens), trial.whole)


def plan(trial: Trial) -> float:
    """What the plan changes at least: a table of deviations is nothing without it."""
    changed = _deviation(trial.pruned, trial.whole)
    if changed < 10 * TOLERANCE:
        raise RuntimeError(f"pruning changes logits by {changed:.1e} only; nothing would be tested")
    return changed


def checkpoint(trial: Trial) -> float:
    """Logits of the pruned checkpoint, reloaded, against novices put in by hand."""
    model = load_model(trial.checkpoint.path, device="cpu", dtype="float32")
    return _deviation(_logits(model, trial.tokens), trial.pruned)


def gguf(trial: Trial) -> float:
    """llama.cpp's logits against torch's, nothing pruned."""
    return _deviation(_llama_logits(trial.gguf, trial.tokens), trial.whole)


def pruned_gguf(trial: Trial) -> float:
    """llama.cpp's logits against torch's with novices."""
    return _deviation(_llama_logits(trial.pruned_gguf, trial.tokens), trial.pruned)


def no_experts(trial: Trial) -> float:
    """The same, with no expert left in the first MoE layer."""
    kept = {**trial.plan.kept, min(trial.plan.kept): ()}
    plan = replace(trial.plan, kept=kept)
    model = load_model(trial.source.path, device="cpu", dtype="float32")
    expected = _logits(novices.apply(model, plan, trial.stats), trial.tokens)
    path = trial.write("empty", trial.source, plan, trial.stats)
    return _deviation(_llama_logits(path, trial.tokens), expected)


def low_rank(trial: Trial) -> float:
    """The same as the pruned GGUF's, with novices of rank 2."""
    plan = replace(trial.plan, replacement="rank-2")
    fitted = trial.source.fit(plan, trial.batches, Work(trial.folder / "fit"), device="cpu")
    model = load_model(trial.source.path, device="cpu", dtype="float32")
    expected = _logits(novices.apply(model, plan, None, fitted), trial.tokens)
    if _deviation(expected, trial.pruned) < 10 * TOLERANCE:
        raise RuntimeError("the novices are constants; nothing would be tested")
    path = trial.write("low-rank", trial.source, plan, fitted=fitted)
    return _deviation(_llama_logits(path, trial.tokens), expected)


def via_checkpoint(trial: Trial) -> float:
    """The GGUF of the pruned checkpoint: how much of it differs from the direct road's."""
    from mone_edge.pruned_checkpoint import read_novices, read_plan

    read = read_plan(trial.checkpoint)  # type: ignore[arg-type]
    stats = read_novices(trial.checkpoint, read)  # type: ignore[arg-type]
    return _differing(trial.write("via", trial.checkpoint, read, stats), trial.pruned_gguf)


def gguf_to_gguf(trial: Trial) -> float:
    """The GGUF pruned out of the whole GGUF: how much of it differs from the direct road's."""
    whole = resolve(str(trial.gguf))
    stats = ExpertStats(_renamed(trial.stats.provenance, whole.fingerprint), trial.stats.layers, {})
    plan = _renamed(trial.plan, whole.fingerprint)
    return _differing(trial.write("sliced", whole, plan, stats), trial.pruned_gguf)


def llama_statistics(trial: Trial) -> float:
    """Statistics through llama.cpp against torch's: counts, gate sums, novices."""
    seen = collect_gguf.collect(trial.gguf, trial.batches, threads=1)
    if seen.layers.keys() != trial.stats.layers.keys():
        raise RuntimeError(f"layers {sorted(seen.layers)}, torch saw {sorted(trial.stats.layers)}")
    return max(
        _distance(getattr(seen.layers[i], name), getattr(layer, name))
        for i, layer in trial.stats.layers.items()
        for name in ("count", "gate_sum", "output_mean", "gate_sq_norm_sq_sum")
    )


Stage = Callable[[Trial], float]
STAGES: Mapping[str, tuple[str, Stage]] = {
    "statistics": ("statistics", statistics),
    "plan": ("plan", plan),
    "checkpoint": ("pruned checkpoint", checkpoint),
    "gguf": ("GGUF", gguf),
    "pruned_gguf": ("pruned GGUF", pruned_gguf),
    "no_experts": ("no expert in a layer", no_experts),
    "low_rank": ("low-rank novices", low_rank),
    "via_checkpoint": ("checkpoint to GGUF", via_checkpoint),
    "gguf_to_gguf": ("GGUF to GGUF", gguf_to_gguf),
    "llama_statistics": ("statistics by llama.cpp", llama_statistics),
}


def _logits(model: Any, tokens: Any) -> Logits:
    import torch

    with torch.inference_mode():
        out = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
    return np.asarray(out.logits[0].float().numpy())


def _llama_logits(path: Path, tokens: Any) -> Logits:
    with GgufModel(path, exact=True, threads=1) as model:
        return np.asarray(model.logits([int(t) for t in tokens]))


def _deviation(ours: Logits, oracle: Logits) -> float:
    return float(np.abs(ours - oracle).max() / (oracle.max() - oracle.min()))


def _distance(ours: Any, oracle: Any) -> float:
    return float(np.abs(ours - oracle).max() / np.abs(oracle).max())


def _renamed(made: Any, fingerprint: str) -> Any:
    return replace(made, fingerprint=fingerprint)


def _differing(ours: Path, expected: Path) -> float:
    """Share of tensors that are not the same, byte for byte."""
    one, other = _tensors(ours), _tensors(expected)
    names = one.keys() | other.keys()
    different = sorted(n for n in names if one.get(n) != other.get(n))
    if different:
        raise RuntimeError(f"{len(different)} of {len(names)} tensors differ, first {different[0]}")
    return 0.0


def _tensors(path: Path) -> dict[str, Any]:
    reader = packages()[0].GGUFReader(path)
    return {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


def run_stages(name: str, folder: Path, stages: Sequence[str] = tuple(STAGES)) -> dict[str, Any]:
    """What each stage gives: {"deviation": number} or {"refused" or "fails": reason}."""
    trial, cells = Trial(name, folder), {}
    for stage in stages:
        cells[stage] = _cell(STAGES[stage][1], trial)
    return cells


def _cell(stage: Stage, trial: Trial) -> dict[str, Any]:
    try:
        return {"deviation": stage(trial)}
    except MoneEdgeError as error:
        return {"refused": _plain(str(error), trial.folder)}
    except Exception as error:  # what an architecture breaks is what the table is about
        return {"fails": _plain(f"{type(error).__name__}: {error}", trial.folder)}


def _plain(message: str, folder: Path) -> str:
    text = " ".join(message.replace(f"{folder}/", "").split())
    return re.sub(r"0x[0-9a-f]+", "0x...", text)[:300]


def measure(name: str) -> dict[str, Any]:
    """The stages in a child process, one line of JSON each, so that an abort loses one stage."""
    command = [sys.executable, "-m", "benchmarks.architectures", "--child", name]
    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=quiet)
    cells: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            cells |= json.loads(line)
    if done.returncode and len(cells) < len(STAGES):
        stage = list(STAGES)[len(cells)]
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        cells[stage] = {"fails": f"the process ended ({done.returncode}): {last[:200]}"}
    return cells


def child(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(name, Path(folder))
        for stage, (_, function) in STAGES.items():
            print(json.dumps({stage: _cell(function, trial)}), flush=True)


def works(cell: Mapping[str, Any]) -> bool:
    """Whether a stage came within the tolerance (the plan's number is a change, not an error)."""
    return "deviation" in cell and cell["deviation"] <= TOLERANCE


def all_through(cells: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a model passed every stage but statistics by llama.cpp and low-rank novices."""
    others = ("plan", "llama_statistics", "low_rank")
    needed = [stage for stage in STAGES if stage not in others]
    return "deviation" in cells.get("plan", {}) and all(works(cells.get(s, {})) for s in needed)


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The Markdown of docs/architectures.md."""
    whole = sum(all_through(cells) for cells in results.values())
    fitted = sum(works(cells.get("low_rank", {})) for cells in results.values())
    stages = [stage for stage in STAGES if stage != "plan"]
    kinds = {name.partition(" ")[0] for name in results}  # "deepseek_v3 (groups)" is one more
    counts = {"models": len(results), "architectures": len(kinds), "whole": whole, "fitted": fitted}
    lines = [INTRODUCTION.format(**counts, tolerance=TOLERANCE)]
    lines += ["| | " + " | ".join(STAGES[stage][0] for stage in stages) + " |"]
    lines += ["|---" * (len(stages) + 1) + "|"]
    reasons: list[str] = []
    for name, cells in results.items():
        row = [_cell_text(cells.get(stage, {}), reasons) for stage in stages]
        lines.append(f"| `{name}` | " + " | ".join(row) + " |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    notes = [f"- `{name}`: {note}" for name, note in architectures.NOTES.items()]
    lines += ["", "## Notes", "", NOTE_OF_ALL, "", *notes, ""]
    return "\n".join(lines)


INTRODUCTION = """\
# Architectures

Every MoE architecture that transformers 5.24 and the pinned llama.cpp share, each as a tiny random
model that goes through all stages. Remade by

    python -m benchmarks.architectures

{whole} of these {models} models ({architectures} architectures, one of them twice) pass all
stages with constants in place of experts, but for the last, which is not counted; {fitted} with
low-rank novices. A number is the largest deviation of logits over their range (128 tokens, F32
on both sides; {tolerance:.0e} is the limit), of the statistics by llama.cpp the largest deviation
of counts, gate sums and means over the largest of them; 0 means byte for byte the same. In
brackets: the reason below.

- **statistics**: logits of the model while it is measured, against transformers' own
- **pruned checkpoint**: written by keys, reloaded by `from_pretrained`, against novices in memory;
  the plan keeps one expert of eight in the first MoE layer, fewer than top-k, and five in the last
- **GGUF**, **pruned GGUF**: llama.cpp's logits against torch's, whole and with novices
- **no expert in a layer**: as the pruned GGUF, with none of the first MoE layer's experts kept
- **low-rank novices**: as the pruned GGUF, with novices of rank 2, fitted to the checkpoint
- **checkpoint to GGUF**, **GGUF to GGUF**: the pruned checkpoint converted, the whole GGUF pruned;
  both must hold the tensors of the direct road
- **statistics by llama.cpp**: of the whole GGUF, against torch's
"""


NOTE_OF_ALL = """\
What transformers does not write when it saves a model, but checkpoints on the hub have, is put
back: keys of config.json (`scoring_func`, ...), names and orientation of weights. Attention that
selects keys selects more than there are here. longcat_flash, not in llama.cpp, is refused: its
router also selects experts that copy their input. What is said below of hy_v4, laguna,
mimo_v2_flash, minimax_m3_vl, phimoe and qwen4_exp is tested: `tests/test_architecture_causes.py`
has torch compute as llama.cpp does, and compares again."""


def _cell_text(cell: Mapping[str, Any], reasons: list[str]) -> str:
    if not cell:
        return ""
    if "deviation" in cell:
        number = "0" if cell["deviation"] == 0 else f"{cell['deviation']:.0e}"
        return number if works(cell) else f"**{number}**"
    kind, reason = next(iter(cell.items()))
    if reason not in reasons:
        reasons.append(reason)
    return f"{kind} ({reasons.index(reason) + 1})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these; the rest as before")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.names[0])
        return
    file = DOCS / "architectures.json"
    before = json.loads(file.read_text()) if options.names and file.exists() else {}
    for name in options.names or architectures.ARCHITECTURES:
        before[name] = measure(name)
        print(name, *(_text(c) for c in before[name].values()), sep=" | ", flush=True)
    results = {name: before.get(name, {}) for name in architectures.ARCHITECTURES}
    file.write_text(json.dumps(results, indent=1) + "\n")
    (DOCS / "architectures.md").write_text(table(results))


def _text(cell: Mapping[str, Any]) -> str:
    if "deviation" in cell:
        return f"{cell['deviation']:.1e}"
    return next(f"{kind}: {why}" for kind, why in cell.items())


if __name__ == "__main__":
    main()
