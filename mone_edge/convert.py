"""A model and a plan -> quantised GGUFs, in one pass over the weights.

In: a `Source`, a `Recipe`, optionally a `PrunePlan` and `ExpertStats`. Out: GGUF files, each with
its recipe and a model card beside it. All checks that can fail run before a weight is read; no
intermediate file is written; a pruned expert is never read. Calibrates and plans nothing.
"""

import filecmp
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mone_edge import __version__, card, merging, prune, quantize, skipping
from mone_edge import imatrix as imatrices
from mone_edge.conversion import UNQUANTISED, packages
from mone_edge.errors import MoneEdgeError
from mone_edge.imatrix import Imatrix
from mone_edge.low_rank import LowRankNovices
from mone_edge.model_file import Array, LazyTensor, ModelFile
from mone_edge.paths import existing_folder, expand, is_file, parent_folder
from mone_edge.plan import PrunePlan
from mone_edge.quantize import KEEP
from mone_edge.recipe import Recipe
from mone_edge.source import Source
from mone_edge.stats import ExpertStats

Progress = Callable[[int, int], None]
EXPERT_TENSOR = "blk.{layer}.ffn_{part}_exps.weight"
SPARE_BYTES = 64 << 20  # left free on the disk, for what else is being written


@dataclass(frozen=True)
class Converted:
    """One file that `convert` made (or would make)."""

    outfile: Path
    files: tuple[Path, ...]  # more than one where it was split
    outtype: str
    bytes: int
    card: Path
    prune_ratio: float  # of experts, as removed
    experts_kept: tuple[int, ...]  # of each MoE layer
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Job:
    """All that is known before the first weight is read: one output file type each."""

    outfile: Path
    outtype: str
    model: ModelFile  # pruned, with the metadata of this file type
    types: dict[str, str]  # ggml type of each tensor
    imatrix: Imatrix | None
    plan: PrunePlan | None

    @property
    def data_bytes(self) -> int:
        return sum(quantize.tensor_bytes(t, self.types[n]) for n, t in self.model.tensors.items())


def prepare(
    source: Source,
    recipe: Recipe,
    outfiles: dict[str, Path],
    *,
    whole: ModelFile | None = None,
    plan: PrunePlan | None = None,
    stats: ExpertStats | None = None,
    fitted: LowRankNovices | None = None,
) -> list[Job]:
    """Everything that can be refused, refused; everything that can be decided, decided.

    Args:
        outfiles: file type (canonical name) -> path.
        whole: the source, where it has been opened already (a tokenizer takes seconds).
        plan: None leaves every expert.
        stats: for novices and, with `--imatrix auto`, the importance matrix.
        fitted: the novices of a plan with replacement "rank".

    Raises:
        MoneEdgeError: plan or statistics are of another model, llama.cpp cannot hold the result,
            or an output file would replace the input.
    """
    for made in (stats.provenance if stats else None, plan):
        if made is not None and made.fingerprint != source.base_fingerprint:
            kind = "the plan is" if isinstance(made, PrunePlan) else "the statistics are"
            raise MoneEdgeError(
                f"{kind} of {made.model} ({made.fingerprint[:12]}), "
                f"not of {source.name} ({source.base_fingerprint[:12]})"
            )
    if plan and plan.groups and source.keeps_types:
        raise MoneEdgeError(
            f"{source.name} is a GGUF, and merging its experts would quantise them a second time; "
            f"merge those of the checkpoint it was made from, or choose a --method other than "
            f"{plan.method}"
        )
    _require_other_files(source, outfiles)
    whole = whole or source.open(tokenizer_pre=recipe.tokenizer_pre)
    imatrix = _imatrix(whole, recipe, stats)
    model = prune.apply_plan(whole, plan, stats, fitted) if plan else whole
    model = skipping.set_threshold(model, recipe.skip_threshold)
    if plan and imatrix:
        counted = stats if recipe.imatrix == "auto" else None
        imatrix = _kept_rows(imatrix, plan, counted)
    jobs = []
    for outtype, outfile in outfiles.items():
        own, marked = recipe.of_type(outtype), model
        if plan or recipe.skip_threshold:
            marked = _with_provenance(model, source, own, pruned=plan is not None)
        jobs.append(replace(_job(source, own, marked, outtype, outfile, imatrix), plan=plan))
    return jobs


def _require_other_files(source: Source, outfiles: dict[str, Path]) -> None:
    """The input is never written to, nor is a part of it (`--split-max-size` names parts)."""
    for outfile in outfiles.values():
        stem, suffix = re.escape(outfile.stem), re.escape(outfile.suffix)
        parts = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?{suffix}")
        for file in source.files:
            same_folder = file.parent.resolve() == outfile.parent.resolve()
            if (same_folder and parts.fullmatch(file.name)) or (
                outfile.exists() and outfile.samefile(file)
            ):
                raise MoneEdgeError(f"{outfile} is the input itself; name another --outfile")


def _imatrix(model: ModelFile, recipe: Recipe, stats: ExpertStats | None) -> dict[str, Any] | None:
    if recipe.imatrix == "auto":
        return imatrices.imatrix_from_stats(model, stats) if stats else None
    if recipe.imatrix == "none":
        return None
    imatrix = imatrices.read_imatrix(expand(recipe.imatrix))
    imatrices.require_fit(imatrix, model, recipe.imatrix)
    return imatrix


def _kept_rows(
    imatrix: dict[str, Any], plan: PrunePlan, stats: ExpertStats | None
) -> dict[str, Any]:
    kept = dict(imatrix)
    for layer, ids in plan.kept.items():
        for part in ("gate", "up", "down", "gate_up"):
            name = EXPERT_TENSOR.format(layer=layer, part=part)
            if name not in kept or kept[name].ndim != 2:
                continue
            if plan.groups:
                counts = stats.layers[layer].count if stats else None
                inner = part == "down"
                kept[name] = merging.importance(kept[name], plan, layer, counts, inner=inner)
            else:
                kept[name] = kept[name][list(ids)]
    return kept


def _with_provenance(
    model: ModelFile, source: Source, recipe: Recipe, *, pruned: bool
) -> ModelFile:
    gguf, _ = packages()
    value, text = gguf.gguf_writer.GGUFValue, gguf.GGUFValueType.STRING
    metadata = model.metadata | {
        "mone.recipe": value(recipe.to_yaml(), text),
        "mone.tool": value(f"mone-edge {__version__}", text),
        "mone.base_fingerprint": value(source.base_fingerprint, text),
    }
    if pruned:
        metadata.pop("general.size_label", None)  # counts the experts that are gone
    return replace(model, metadata=metadata)


def _job(
    source: Source,
    recipe: Recipe,
    model: ModelFile,
    outtype: str,
    outfile: Path,
    imatrix: Imatrix | None,
) -> Job:
    if outtype in UNQUANTISED and not source.keeps_types:
        plain = source.open(dtype=outtype, tokenizer_pre=recipe.tokenizer_pre)
        types = {
            name: plain.tensors[name].dtype if name in plain.tensors else tensor.dtype
            for name, tensor in model.tensors.items()
        }
    else:
        model = quantize.pad_novices(model)
        types = quantize.tensor_types(
            model,
            outtype,
            overrides=recipe.tensor_type,
            imatrix=imatrix,
            requantise=source.keeps_types,
        )
    types |= quantize.novice_types(model, outtype)
    if outtype != KEEP:
        model = _with_file_type(model, outtype)
    used = None if outtype in (KEEP, *UNQUANTISED) else imatrix
    return Job(outfile, outtype, model, types, used, None)


def _with_file_type(model: ModelFile, outtype: str) -> ModelFile:
    gguf, _ = packages()
    enum = UNQUANTISED.get(outtype, f"MOSTLY_{outtype}")
    number = gguf.gguf_writer.GGUFValue(int(gguf.LlamaFileType[enum]), gguf.GGUFValueType.UINT32)
    return replace(model, metadata=model.metadata | {"general.file_type": number})


def require_space(jobs: Sequence[Job]) -> None:
    """Refuse a disk that cannot hold the results.

    Raises:
        MoneEdgeError: with what is needed and what is free.
    """
    disks: dict[int, list[Job]] = {}
    for job in jobs:
        disks.setdefault(existing_folder(job.outfile).stat().st_dev, []).append(job)
    for there in disks.values():
        folder = existing_folder(there[0].outfile)
        needed = sum(job.data_bytes for job in there) + SPARE_BYTES
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise MoneEdgeError(
                f"{folder} has {free / 1e9:.2f} GB free, the result needs {needed / 1e9:.2f} GB; "
                "name another place with --outfile, or a smaller --outtype"
            )


def working_bytes(jobs: Sequence[Job]) -> int:
    """Memory that writing needs beyond the program itself: the largest chunk as floats, its
    quantised copy (at most as large) and what is read ahead; of a chunk that is only copied, its
    bytes."""
    return max(
        quantize.tensor_bytes(t, t.dtype) // len(t.chunks)
        if job.outtype == KEEP
        else (8 + 4 * min(quantize.AHEAD, len(t.chunks) - 1)) * t.elements // len(t.chunks)
        for job in jobs
        for t in job.model.tensors.values()
    )


def write(
    jobs: Sequence[Job],
    recipe: Recipe,
    *,
    given: Sequence[str] = (),
    split_max_bytes: int = 0,
    threads: int | None = None,
    force: bool = True,
    progress: Progress | None = None,
) -> list[Converted]:
    """Write every job's file, all from one read of the weights.

    Nothing appears under its final name before all of it is there.

    Args:
        force: replace what is there; else what has got a result's name since the command began,
            by another run perhaps, stays and the results go.
        given: arguments besides the recipe that make the same again, for the model card.

    Raises:
        MoneEdgeError: the disk is full, a weight is not finite, or a file cannot be written.
    """
    started, count = time.monotonic(), threads or os.cpu_count() or 1
    report = progress or (lambda done, total: None)
    require_space(jobs)
    if split_max_bytes:
        given = [*given, "--split-max-size", str(split_max_bytes)]
    folders = " and ".join(sorted({str(job.outfile.parent) for job in jobs}))
    try:
        with ExitStack() as stack:
            places = [_scratch(job, stack) for job in jobs]
            _write_together(jobs, places, split_max_bytes, count, report)
            for job, place in zip(jobs, places, strict=True):
                _write_beside(job, place, recipe.of_type(job.outtype), given)
            if not force:
                _require_still_free(jobs, places)
            made = [_publish(job, place) for job, place in zip(jobs, places, strict=True)]
    except OSError as error:
        raise MoneEdgeError(f"cannot write in {folders}: {error.strerror or error}") from error
    seconds = time.monotonic() - started
    return [_result(job, files, seconds) for job, files in zip(jobs, made, strict=True)]


def _scratch(job: Job, stack: ExitStack) -> Path:
    """An empty folder beside a result, which goes with `stack`."""
    folder = stack.enter_context(parent_folder(job.outfile))
    scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".mone-edge-")
    return Path(stack.enter_context(scratch))


def _write_beside(job: Job, place: Path, recipe: Recipe, given: Sequence[str]) -> None:
    parts = sorted(place.iterdir())
    recipe_file, card_file = beside(place / job.outfile.name)
    size = sum(part.stat().st_size for part in parts)
    recipe.save(recipe_file)
    weighed = job.imatrix is not None and recipe.imatrix == "auto"
    card.write(card_file, job.outfile, parts[0], job.plan, recipe, size, given, weighed=weighed)


def beside(outfile: Path) -> tuple[Path, Path]:
    """The recipe and the model card that are written with a file, split or not."""
    return outfile.with_suffix(".recipe.yaml"), outfile.with_suffix(".md")


def _write_together(
    jobs: Sequence[Job],
    places: Sequence[Path],
    split_max_bytes: int,
    threads: int,
    report: Progress,
) -> None:
    """Tensor by tensor, each into every file, so that the weights are read from disk once."""
    with ExitStack() as stack:
        writers = []
        for job, place in zip(jobs, places, strict=True):
            writer = _open_writer(job, place / job.outfile.name, split_max_bytes)
            stack.callback(writer.close)
            writers.append(writer)
        total, done = sum(job.data_bytes for job in jobs), 0
        tensors = jobs[0].model.tensors
        loads = (load for tensor in tensors.values() for _ in jobs for load in tensor.chunks)
        values = stack.enter_context(closing(quantize.read_ahead(loads)))
        for name, tensor in tensors.items():
            for job, writer in zip(jobs, writers, strict=True):
                chunks = islice(values, len(tensor.chunks))
                pieces = StreamedTensor(name, tensor, chunks, job.types[name], job.imatrix, threads)
                writer.write_tensor_data(pieces)
                done += pieces.nbytes
                report(done, total)


@dataclass(frozen=True)
class StreamedTensor:
    """What gguf's writer sees as an array: it knows its size, and puts itself into a file."""

    name: str
    tensor: LazyTensor
    values: Iterator[Array]  # of its chunks
    dtype: str
    imatrix: Imatrix | None
    threads: int

    @property
    def nbytes(self) -> int:
        return quantize.tensor_bytes(self.tensor, self.dtype)

    def tofile(self, file: BinaryIO) -> None:
        written = 0
        chunks = quantize.quantized_chunks(
            self.name, self.tensor, self.values, self.dtype, self.imatrix, self.threads
        )
        for data in chunks:
            written += file.write(data.data)
        if written != self.nbytes:
            raise MoneEdgeError(
                f"{self.name} has {written} bytes where its header says {self.nbytes}: "
                "the model's tensors do not match its configuration"
            )


def _open_writer(job: Job, path: Path, split_max_bytes: int) -> Any:
    gguf, _ = packages()
    writer = gguf.GGUFWriter(path, job.model.arch, split_max_size=split_max_bytes)
    writer.kv_data[0] = dict(job.model.metadata)
    for name, tensor in job.model.tensors.items():
        size, kind = quantize.tensor_bytes(tensor, job.types[name]), job.types[name]
        writer.add_tensor_info(
            name, tensor.shape, np.dtype(np.float32), size, gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _require_still_free(jobs: Sequence[Job], places: Sequence[Path]) -> None:
    """Nothing may be called like a result, but the recipe that it was made from."""
    for job, place in zip(jobs, places, strict=True):
        for file in sorted(place.iterdir()):
            target = job.outfile.parent / file.name
            same = file == beside(place / job.outfile.name)[0] and is_file(target)
            if os.path.lexists(target) and not (same and filecmp.cmp(file, target, shallow=False)):
                raise MoneEdgeError(
                    f"{target} has come into being meanwhile and is left alone; name another file"
                )


def _publish(job: Job, place: Path) -> tuple[Path, ...]:
    """Move finished files to where they belong."""
    targets = []
    for file in sorted(place.iterdir()):
        target = job.outfile.parent / file.name
        file.replace(target)
        targets += [] if target in beside(job.outfile) else [target]
    return tuple(targets)


def _result(job: Job, files: tuple[Path, ...], seconds: float) -> Converted:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Converted(
        outfile=files[0],
        files=files,
        card=beside(job.outfile)[1],
        outtype=job.outtype,
        bytes=sum(file.stat().st_size for file in files),
        prune_ratio=round(job.plan.removed_fraction, 6) if job.plan else 0.0,
        experts_kept=experts_kept(job.model),
        seconds=round(seconds, 3),
        peak_rss_bytes=peak if sys.platform == "darwin" else 1024 * peak,
    )


def experts_kept(model: ModelFile) -> tuple[int, ...]:
    """Experts that the file stores, for each MoE layer."""
    counts = []
    for layer in range(model.num_layers):
        down = model.tensors.get(EXPERT_TENSOR.format(layer=layer, part="down"))
        if down is not None:
            counts.append(down.shape[0])
        elif f"blk.{layer}.ffn_gate_inp.weight" in model.tensors:
            counts.append(0)
    return tuple(counts)


def moe_layers(model: ModelFile) -> list[int]:
    """Indices of the blocks that have experts, less those at the end that predict further tokens:
    no statistics are of them."""
    layers = model.num_layers - int(model.value("{arch}.nextn_predict_layers", 0))
    names = (EXPERT_TENSOR.format(layer=i, part="down") for i in range(layers))
    return [layer for layer, name in enumerate(names) if name in model.tensors]
