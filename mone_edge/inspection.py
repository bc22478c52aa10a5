"""What is in a file or folder, from headers only: checkpoint, GGUF, statistics, plan or novices.

In: a path or MODEL. Out: a plain document for `mone-edge inspect` and scripts.
"""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

from mone_edge import low_rank, skipping, source, stats
from mone_edge.errors import MoneEdgeError
from mone_edge.gguf_file import parts
from mone_edge.paths import expand, is_file
from mone_edge.plan import FORMAT as PLAN_FORMAT
from mone_edge.plan import PrunePlan
from mone_edge.safetensors_header import is_safetensors

QUIET_KEYS = (
    "tokenizer.",
    "mone.recipe",
    "mone.expert_order.",
    "mone.expert_group.",
    "general.tags",
)


def inspect(target: str, *, offline: bool = False) -> dict[str, Any]:
    """Describe what `target` is.

    Raises:
        MoneEdgeError: it is missing, damaged, or nothing this project knows.
    """
    path = expand(target)
    if not is_file(path):
        return _checkpoint(source.resolve(target, offline=offline))
    if source.is_gguf(path):
        return _gguf(path)
    if is_safetensors(path):
        return _novices(path) if low_rank.is_novices(path) else _stats(path)
    with path.open("rb") as file:
        if PLAN_FORMAT.encode() in file.read(512):
            return _plan(path)
    raise MoneEdgeError(f"{path} is not a GGUF, a statistics file, a plan or novices")


def _checkpoint(found: source.Source) -> dict[str, Any]:
    parameters = sum(math.prod(ref.shape) for ref in found.tensors.values())
    return {
        "kind": "checkpoint",
        "path": str(found.path),
        "architecture": found.architecture,
        "layers": found.num_layers,
        "experts": found.num_experts,
        "top_k": found.top_k,
        "parameters": parameters,
        "tensors": len(found.tensors),
        "types": dict(Counter(ref.dtype for ref in found.tensors.values())),
        "bytes": found.size,
        "fingerprint": found.fingerprint,
    }


def _gguf(path: Path) -> dict[str, Any]:
    header, *more = parts(path)
    tensors = [ref for part in (header, *more) for ref in part.tensors.values()]
    return {
        "kind": "gguf",
        "path": str(path),
        "architecture": header.arch,
        "layers": _text(header.value("{arch}.block_count")),
        "experts": _text(header.value("{arch}.expert_count", 0)),
        "top_k": _text(header.value("{arch}.expert_used_count", 0)),
        "experts_kept": _text(header.value("{arch}.expert_kept_count")),
        "skip_threshold": _text(header.value(skipping.KEY)),
        "parameters": sum(math.prod(ref.shape) for ref in tensors),
        "tensors": len(tensors),
        "types": dict(Counter(ref.dtype for ref in tensors)),
        "bytes": sum(file.stat().st_size for file in {path, *(ref.file for ref in tensors)}),
        "metadata": {
            key: _text(entry.value)
            for key, entry in header.metadata.items()
            if not key.startswith(QUIET_KEYS)
            and not (isinstance(entry.value, list) and len(entry.value) > 256)
        },
    }


def _text(value: Any) -> Any:
    """What is not UTF-8 in a GGUF, readable."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinities
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _stats(path: Path) -> dict[str, Any]:
    found = stats.ExpertStats.load(path)
    origin = found.provenance
    return {
        "kind": "statistics",
        "path": str(path),
        "model": origin.model,
        "architecture": origin.architecture,
        "fingerprint": origin.fingerprint,
        "data": list(origin.data),
        "samples": origin.samples,
        "seq_len": origin.seq_len,
        "seed": origin.seed,
        "tokens": found.tokens,
        "unseen_experts": found.unseen(),
        "layers": {
            str(index): {
                "experts": layer.num_experts,
                "top_k": layer.top_k,
                "least_tokens": int(layer.count.min()),
                "most_tokens": int(layer.count.max()),
            }
            for index, layer in found.layers.items()
        },
    }


def _novices(path: Path) -> dict[str, Any]:
    found = low_rank.LowRankNovices.load(path)
    origin = found.provenance
    return {
        "kind": "novices",
        "path": str(path),
        "model": origin.model,
        "fingerprint": origin.fingerprint,
        "replacement": found.replacement,
        "data": list(origin.data),
        "samples": origin.samples,
        "seq_len": origin.seq_len,
        "seed": origin.seed,
        **found.summary(),
        "layers": {
            str(index): {
                "novices": len(layer.rank),
                "rank": layer.width,
                "least_tokens": int(layer.tokens.min()),
                "held_out_error": round(float(layer.error.mean()), 4),
            }
            for index, layer in found.layers.items()
        },
    }


def _plan(path: Path) -> dict[str, Any]:
    plan = PrunePlan.load(path)
    return {
        "kind": "plan",
        "path": str(path),
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "method": plan.method,
        "scope": plan.scope,
        "replacement": plan.replacement,
        "prune_ratio": plan.prune_ratio,
        "removed_fraction": round(plan.removed_fraction, 6),
        "stats": plan.stats_path,
        "calibration": dataclasses.asdict(plan.calibration) if plan.calibration else {},
        "experts_kept": {
            str(layer): f"{len(ids)}/{plan.num_experts[layer]}" for layer, ids in plan.kept.items()
        },
    }
