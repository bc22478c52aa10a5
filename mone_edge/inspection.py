"""What is in a file or folder, from headers only: checkpoint, GGUF, statistics or plan.

In: a path or MODEL. Out: a plain document for `mone-edge inspect` and scripts.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from mone_edge import gguf_reader, source, stats
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import expand, is_file
from mone_edge.plan import FORMAT as PLAN_FORMAT
from mone_edge.plan import PrunePlan

QUIET_KEYS = ("tokenizer.", "mone.recipe", "mone.expert_order.", "general.tags")


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
    if path.suffix == ".safetensors":
        return _stats(path)
    with path.open("rb") as file:
        if PLAN_FORMAT.encode() in file.read(512):
            return _plan(path)
    raise MoneEdgeError(f"{path} is not a GGUF, a statistics file or a plan")


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
    reader, values = gguf_reader.read(path)
    quiet = gguf_reader.array_keys(reader)
    end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    if end > path.stat().st_size:
        raise MoneEdgeError(
            f"{path} is truncated: it has {path.stat().st_size} bytes, its header promises {end}"
        )
    arch = str(values.get("general.architecture", "?"))
    kept = values.get(f"{arch}.expert_kept_count")
    return {
        "kind": "gguf",
        "path": str(path),
        "architecture": arch,
        "layers": values.get(f"{arch}.block_count"),
        "experts": values.get(f"{arch}.expert_count", 0),
        "top_k": values.get(f"{arch}.expert_used_count", 0),
        "experts_kept": kept,
        "parameters": sum(int(t.n_elements) for t in reader.tensors),
        "tensors": len(reader.tensors),
        "types": dict(Counter(t.tensor_type.name for t in reader.tensors)),
        "bytes": path.stat().st_size,
        "metadata": {
            key: _printable(value)
            for key, value in values.items()
            if not key.startswith(QUIET_KEYS) and not (key in quiet and len(value) > 256)
        },
    }


def _printable(value: Any) -> Any:
    """A value that JSON can hold: infinities and NaN become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
        "experts_kept": {
            str(layer): f"{len(ids)}/{plan.num_experts[layer]}" for layer, ids in plan.kept.items()
        },
    }
