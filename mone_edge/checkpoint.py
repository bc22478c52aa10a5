"""A checkpoint and a plan -> the pruned checkpoint, a folder that transformers loads.

In: a `Source`, a `PrunePlan`, the statistics its novices come from. Out: a folder. It is a copy
by keys: no model is in memory, a pruned expert is never read, and what is kept is kept byte for
byte, under the name it had. Importing this module also makes `from_pretrained` load the result.

"mean", "gate2-mean", "zero": keys of pruned experts are left out, the others keep their expert's
id, routers are untouched; a pruned expert leaves `<expert>.approx_value`, its novice [D] in
float32, and config.json names the pruned ids (`approximate_experts`) and the plan
(`quantization_config`). "rank": `approx_value` is the bias of the fitted novice, beside it are
`<expert>.approx_down` [r, H] and `<expert>.approx_up` [D, r].
"drop": keys of kept experts are numbered 0 to K-1, routers are cut to K rows, config.json says K:
an ordinary checkpoint, which needs nothing of ours. "merge": the same of merged experts, whose
tensors and router rows are computed as they are written (`merged_checkpoint`).
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mone_edge import novices
from mone_edge import pruned_model as pruned_model  # registers the loader with transformers
from mone_edge.collect.experts import experts_modules, num_experts, output_width
from mone_edge.collect.streaming import module_names, on_meta
from mone_edge.config import EXPERT_COUNT_KEYS, NESTED_KEY
from mone_edge.errors import MoneEdgeError
from mone_edge.low_rank import LowRankNovices
from mone_edge.merged_checkpoint import MergedLayer
from mone_edge.paths import (
    existing_folder,
    exists,
    parent_folder,
    real,
    require_writable_folder,
)
from mone_edge.plan import PrunePlan
from mone_edge.recipe import MEASURED, low_rank
from mone_edge.safetensors_file import SHARD_BYTES, Entry, is_written, write_shards
from mone_edge.safetensors_header import TensorRef, item_bytes
from mone_edge.source import (
    CUT,
    EXPERT_KEY,
    PRUNED_METHOD,
    Checkpoint,
)
from mone_edge.stats import ExpertStats

FORMAT_VERSION = 1
COPY_BYTES = 16 << 20  # read and written at once
SPARE_BYTES = 64 << 20  # left free on the disk
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """A pruned checkpoint that was made."""

    outfile: Path
    bytes: int  # of its tensors
    prune_ratio: float  # of experts, as removed
    experts_kept: tuple[int, ...]  # of each MoE layer
    seconds: float


@dataclass(frozen=True)
class _Block:
    """What the model on meta says of one MoE block."""

    layer: int
    experts: str  # module name
    total: int
    width: int  # of an expert's output
    routed: frozenset[str]  # parameters outside the experts with one row or column per expert
    stacked: frozenset[str]  # parameters with several rows per expert


def prune_checkpoint(
    source: Checkpoint,
    plan: PrunePlan,
    stats: ExpertStats | None,
    folder: Path,
    *,
    fitted: LowRankNovices | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Written:
    """Write the pruned checkpoint, whole or not at all.

    Args:
        stats: needed where novices come from them (`recipe.MEASURED`).
        fitted: needed where novices are of low rank.
        folder: must not exist, unless `force`; then a checkpoint folder is replaced.

    Raises:
        MoneEdgeError: the plan or the statistics are of another model, the architecture cannot be
            pruned by keys, or the folder cannot be written.
    """
    started = time.monotonic()
    require_target(source, folder, force=force)
    if source.is_pruned:
        raise MoneEdgeError(f"{source.name} is pruned already; prune the model it was made from")
    if plan.fingerprint != source.fingerprint:
        raise MoneEdgeError(
            f"the plan is of {plan.model} ({plan.fingerprint[:12]}), "
            f"not of {source.name} ({source.fingerprint[:12]})"
        )
    if empty := [layer for layer, ids in plan.kept.items() if not ids]:
        raise MoneEdgeError(
            f"the plan leaves layer {empty[0]} no expert, which transformers cannot load; "
            "convert the model to a GGUF with --plan instead"
        )
    if plan.replacement in MEASURED and stats is None:
        raise MoneEdgeError("novices come from statistics: give them with --stats")
    entries = _entries(source, plan, stats, fitted)
    config = _config(source, plan, fitted)
    place = real(folder)  # not a link to it, and with a name
    _require_space(existing_folder(place), sum(entry.size for entry in entries))
    scratch = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        with parent_folder(place):
            try:
                scratch.mkdir()
                _copy_files(source.path, scratch)
                text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
                (scratch / "config.json").write_text(text, encoding="utf-8")
                write_shards(scratch, entries, shard_bytes=shard_bytes, progress=progress)
                _publish(scratch, place, force)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise MoneEdgeError(f"cannot write {folder}: {error.strerror or error}") from error
    return Written(
        folder,
        sum(entry.size for entry in entries),
        round(plan.removed_fraction, 6),
        tuple(len(ids) for _, ids in sorted(plan.kept.items())),
        round(time.monotonic() - started, 3),
    )


def require_target(
    source: Checkpoint, folder: Path, *, force: bool, inputs: Iterable[Path] = ()
) -> None:
    """Refuse a folder that must not be written.

    Args:
        inputs: other files that the command reads; a folder that holds one stays, whatever `force`.

    Raises:
        MoneEdgeError: it is the model itself, a file, there already, holds an input, or holds
            anything else than a checkpoint of this model would.
    """
    if exists(real(folder)):
        _require_replaceable(source, folder, force, inputs)
    require_writable_folder(existing_folder(real(folder)))


def _require_replaceable(
    source: Checkpoint, folder: Path, force: bool, inputs: Iterable[Path]
) -> None:
    there = real(folder)
    if there == real(source.path):
        raise MoneEdgeError(f"{folder} is the model itself; name another --outfile")
    held = next((p for p in (source.path, *inputs) if real(p).is_relative_to(there)), None)
    if held is not None:
        raise MoneEdgeError(f"{folder} holds {held}, an input; name another --outfile")
    if not force:
        raise MoneEdgeError(
            f"{folder} exists; add --force to replace it, or name another --outfile"
        )
    if not (there / "config.json").is_file():
        raise MoneEdgeError(f"{folder} is not a checkpoint folder and is left alone")
    known = {"config.json", *(file.name for file in _kept_files(source.path))}
    for path in sorted(there.iterdir()):
        ours = path.name in (*known, ".DS_Store") or is_written(path.name)
        if path.is_dir() or not ours:
            raise MoneEdgeError(
                f"{folder} holds {path.name}, which no checkpoint made of {source.name} does, and "
                "is left alone; name another --outfile"
            )


def _entries(
    source: Checkpoint, plan: PrunePlan, stats: ExpertStats | None, fitted: LowRankNovices | None
) -> list[Entry]:
    """Every tensor of the pruned checkpoint, in the order of the source's files."""
    model = on_meta(source)
    blocks = _blocks(model, plan)
    names = module_names(model, source.tensors)
    merged = {i: MergedLayer(plan, i, source.tensors, names) for i in plan.groups}
    entries: list[Entry] = []
    prefixes: dict[int, str] = {}
    order = sorted(source.tensors.items(), key=lambda item: (item[1].file, item[1].offset))
    for key, ref in order:
        block = next((b for b in blocks if names[key].startswith(f"{b.experts}.")), None)
        if block is not None:
            prefixes.setdefault(block.layer, _expert_prefix(key, block))
            stacked = names[key] in block.stacked
            layer = merged.get(block.layer)
            entries += _expert_entry(key, ref, block, plan, layer, stacked=stacked)
            continue
        owner = next((b for b in blocks if names[key] in b.routed), None)
        if owner is not None and owner.layer in merged:
            entries.append(merged[owner.layer].rows(key, owner.total))
        elif owner is not None and plan.replacement == "drop":
            entries.append(_rows(key, ref, owner.total, plan.kept[owner.layer]))
        else:
            entries.append(_copied(key, ref))
    missing = [b.experts for b in blocks if b.layer not in prefixes]
    if missing:
        raise MoneEdgeError(f"{source.name} holds no weights for {missing[0]}")
    if not plan.cuts:
        for block in blocks:
            entries += _novices(prefixes[block.layer], block, plan, stats, fitted)
    return entries


def _blocks(model: Any, plan: PrunePlan) -> list[_Block]:
    modules = experts_modules(model)
    found = {layer: num_experts(module) for layer, (_, module) in modules.items()}
    novices.require_shape(plan, found, "the model has")
    return [_block(model, plan, layer, *named) for layer, named in sorted(modules.items())]


def _block(model: Any, plan: PrunePlan, layer: int, name: str, experts: Any) -> _Block:
    total = num_experts(experts)
    parent = name.rpartition(".")[0]
    routed: set[str] = set()
    for key, module in model.get_submodule(parent).named_modules():
        full = f"{parent}.{key}" if key else parent
        if "shared" in key or full == name or full.startswith(f"{name}."):
            continue
        if plan.cuts and getattr(module, "n_group", None) not in (None, 0, 1):
            raise MoneEdgeError(novices.grouped_routing(name, plan))
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        routed |= {
            f"{full}.{key}"
            for key, value in own
            if (value.ndim and len(value) == total) or tuple(value.shape) == (1, total)
        }
    stacked = frozenset(f"{name}.{key}" for key in getattr(experts, "stacked", ()))
    return _Block(layer, name, total, output_width(experts), frozenset(routed), stacked)


def _expert_prefix(key: str, block: _Block) -> str:
    """`model.layers.0.mlp.experts.` of an expert's key, or of a tensor of all experts."""
    match = EXPERT_KEY.fullmatch(key)
    head, found, _ = key.partition(".experts.")
    return match["prefix"] if match else f"{head}{found}" if found else f"{block.experts}."


def _expert_entry(
    key: str,
    ref: TensorRef,
    block: _Block,
    plan: PrunePlan,
    merged: MergedLayer | None,
    *,
    stacked: bool,
) -> list[Entry]:
    """One expert's tensor, or none if it is pruned; the kept rows of a tensor of all experts."""
    kept = plan.kept[block.layer]
    match = EXPERT_KEY.fullmatch(key)
    rows = ref.shape[0] // block.total if stacked else 1
    if merged is not None:
        return merged.expert(key) if match else [merged.stack(key, block.total, rows)]
    if match is None:
        return [_rows(key, ref, block.total, kept, rows)]
    expert = int(match["id"])
    if expert not in kept:
        return []
    new = kept.index(expert) if plan.replacement == "drop" else expert
    return [_copied(f"{match['prefix']}{new}.{match['part']}", ref)]


def _copied(key: str, ref: TensorRef) -> Entry:
    return Entry(key, ref.dtype, ref.shape, ref.size, lambda: _read(ref, 0, ref.size))


def _rows(key: str, ref: TensorRef, total: int, kept: Sequence[int], rows: int = 1) -> Entry:
    """The kept rows of [total * rows, ...], or the kept columns of [1, total]."""
    if ref.shape[:1] == (total * rows,):
        shape, step = (len(kept) * rows, *ref.shape[1:]), ref.size // total
    elif ref.shape == (1, total):
        shape, step = (1, len(kept)), item_bytes(ref.dtype)
    else:
        raise MoneEdgeError(
            f"{key} has shape {list(ref.shape)}, not one row for each of {total} experts; this "
            "checkpoint cannot be pruned by keys: convert it to a GGUF with --plan instead"
        )
    if len(kept) == total:
        return _copied(key, ref)

    def pieces() -> Iterator[bytes]:
        for row in kept:
            yield from _read(ref, row * step, step)

    return Entry(key, ref.dtype, shape, len(kept) * step, pieces)


def _read(ref: TensorRef, start: int, size: int) -> Iterator[bytes]:
    with ref.file.open("rb") as file:
        file.seek(ref.offset + start)
        while size > 0 and (data := file.read(min(size, COPY_BYTES))):
            size -= len(data)
            yield data


def _novices(
    prefix: str,
    block: _Block,
    plan: PrunePlan,
    stats: ExpertStats | None,
    fitted: LowRankNovices | None,
) -> Iterator[Entry]:
    pruned = plan.pruned(block.layer)
    if not pruned:
        return
    stacks = {novices.APPROX_VALUE: np.zeros((len(pruned), block.width), dtype=np.float32)}
    if plan.replacement != "zero":
        rows = novices.vectors(plan, stats, block.layer, fitted)
        stacks[novices.APPROX_VALUE] = rows[len(plan.kept[block.layer]) :]
    if found := novices.matrices(plan, fitted, block.layer):
        stacks |= {novices.APPROX_DOWN: found.down, novices.APPROX_UP: found.up}
    for part, stack in stacks.items():
        for expert, values in zip(pruned, stack, strict=True):
            pieces = functools.partial(_once, values)
            yield Entry(f"{prefix}{expert}.{part}", "F32", values.shape, values.nbytes, pieces)


def _once(values: Any) -> Iterator[bytes]:
    yield values.astype("<f4").tobytes()


def _config(source: Checkpoint, plan: PrunePlan, fitted: LowRankNovices | None) -> dict[str, Any]:
    """config.json of the pruned checkpoint."""
    config: dict[str, Any] = json.loads(json.dumps(source.config))
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    quantised = "quantization_config" in config or "quantization_config" in text
    if quantised and plan.replacement != "drop":
        raise MoneEdgeError(f"{source.name} is quantised; prune the model it was made from")
    if not plan.cuts:
        document = plan.document() | {"stats_path": ""}
        config["quantization_config"] = {
            "quant_method": PRUNED_METHOD,
            "version": FORMAT_VERSION,
            "plan": {k: _by_layer(v) for k, v in document.items()},
        }
        if low_rank(plan.replacement):
            layers = novices.require_fitted(plan, fitted).layers
            config["quantization_config"]["novice_rank"] = {str(i): layers[i].width for i in layers}
        text["approximate_experts"] = {str(i): list(plan.pruned(i)) for i in sorted(plan.kept)}
        return config
    counts = {len(ids) for ids in plan.kept.values()}
    if len(counts) != 1 or len(set(plan.num_experts.values())) != 1:
        raise MoneEdgeError(
            f"the plan leaves {min(counts)} to {max(counts)} experts a layer, and config.json has "
            "one count for all; use --scope layer without --protect, or --replacement mean"
        )
    total = next(iter(plan.num_experts.values()))
    for place in (text, text.get(NESTED_KEY) or {}):
        place |= {key: min(counts) for key in EXPERT_COUNT_KEYS if place.get(key) == total}
    config[CUT] = {"method": plan.method, "experts": total, "experts_kept": min(counts)}
    return config


def _by_layer(value: Any) -> Any:
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise MoneEdgeError(
            f"{folder} has {free / 1e9:.2f} GB free, the result needs "
            f"{(needed + SPARE_BYTES) / 1e9:.2f} GB; name another place with --outfile"
        )


def _copy_files(source: Path, target: Path) -> None:
    for file in _kept_files(source):
        shutil.copyfile(file, target / file.name)


def _kept_files(source: Path) -> Iterator[Path]:
    """Tokenizer, generation config, licence: all files that hold no weights."""
    for file in sorted(source.iterdir()):
        weights = file.name.endswith((*WEIGHT_FILES, ".index.json"))
        if file.is_file() and not weights and file.name != "config.json" and file.name[0] != ".":
            yield file


def _publish(scratch: Path, folder: Path, force: bool) -> None:
    """Move the finished folder to its name; an old one stays until then."""
    if folder.exists() and not force:
        raise MoneEdgeError(f"{folder} has come into being meanwhile; name another --outfile")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.replace(old)
    scratch.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
