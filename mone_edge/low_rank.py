"""LowRankNovices: novices fitted to the outputs of pruned experts, in one safetensors file.

In: what `fit` found for each pruned expert. Out: a file, and from it the numbers that `prune`,
`checkpoint` and the torch model put in an expert's place: `bias + up @ down @ x` for an input `x`.
Knows nothing about models or regression.

The file is mapped, not read: a layer takes memory when it is used.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mone_edge.documents import parse_json, reason, require_keys
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import atomic_write, require_file
from mone_edge.plan import PrunePlan
from mone_edge.recipe import NOVICE_ERROR
from mone_edge.safetensors_header import TensorRef, read_header, require_safetensors
from mone_edge.stats import Provenance

FORMAT = "mone-edge-novices"
VERSION = 1
NOVICE_BLOCK = 32  # of Q8_0
EXPERT_BITS = 4.5  # of an expert's weight in a Q4_K_M file

Values = NDArray[np.float32]


@dataclass(frozen=True)
class LayerNovices:
    """The novices of one layer's P pruned experts, ids ascending; rank r, widths H in and D out.

    An expert of a smaller rank than r has zeros in its last components.
    """

    bias: Values  # [P, D]
    down: Values  # [P, r, H]
    up: Values  # [P, D, r]
    rank: NDArray[np.int64]  # [P] components that are in use; 0 is a constant
    tokens: NDArray[np.int64]  # [P] that were fitted to and judged by
    ridge: NDArray[np.float64]  # [P] as a share of each input's variance
    error: NDArray[np.float64]  # [P] held-out error, as a share of the constant's

    @property
    def width(self) -> int:
        """Components that are stored for each expert."""
        return int(self.down.shape[1])

    def check(self) -> None:
        """Raise ValueError where the arrays contradict each other or are not finite."""
        count, width = self.bias.shape
        shapes = {"down": (count, self.width, self.down.shape[2]), "up": (count, width, self.width)}
        for name in ARRAYS:
            values = getattr(self, name)
            if values.shape != shapes.get(name, self.bias.shape if name == "bias" else (count,)):
                raise ValueError(f"{name} has shape {values.shape}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite")


ARRAYS = tuple(f.name for f in dataclasses.fields(LayerNovices))
DTYPES = dict.fromkeys(("bias", "down", "up"), ("F32", "<f4")) | {
    "rank": ("I64", "<i8"),
    "tokens": ("I64", "<i8"),
    "ridge": ("F64", "<f8"),
    "error": ("F64", "<f8"),
}


@dataclass(frozen=True)
class LowRankNovices:
    """The novices of all layers of a plan, by block index; a layer left whole has none."""

    provenance: Provenance
    replacement: str
    pruned: Mapping[int, tuple[int, ...]]  # ids of the experts, as in the plan
    layers: Mapping[int, LayerNovices]

    def require_match(self, plan: PrunePlan) -> None:
        """Refuse novices that were fitted for another plan.

        Raises:
            MoneEdgeError: another model, replacement, or other experts are pruned.
        """
        made = self.provenance
        if made.fingerprint != plan.fingerprint:
            raise MoneEdgeError(
                f"the novices are of {made.model} ({made.fingerprint[:12]}), the plan is for "
                f"{plan.model} ({plan.fingerprint[:12]})"
            )
        if self.replacement != plan.replacement:
            raise MoneEdgeError(
                f"the novices were fitted as {self.replacement}, the plan says {plan.replacement}"
            )
        for layer in plan.kept:
            if self.pruned.get(layer, ()) != plan.pruned(layer):
                raise MoneEdgeError(
                    f"the novices are of another plan: in layer {layer} they stand for "
                    f"{len(self.pruned.get(layer, ()))} experts, other than the "
                    f"{len(plan.pruned(layer))} that it prunes; fit them again: mone-edge fit"
                )

    def decide(self, plan: PrunePlan) -> PrunePlan:
        """The plan, with the experts that the fit chose if that was left to it ("novice-error").

        Raises:
            MoneEdgeError: the plan removes another number of a layer's experts.
        """
        if plan.method != NOVICE_ERROR:
            return plan
        kept: dict[int, tuple[int, ...]] = {}
        for layer, experts in plan.num_experts.items():
            gone = set(self.pruned.get(layer, ()))
            kept[layer] = tuple(i for i in range(experts) if i not in gone)
            if len(kept[layer]) != len(plan.kept[layer]) or not gone <= set(range(experts)):
                raise MoneEdgeError(
                    f"the novices are of another plan: in layer {layer} they stand for {len(gone)} "
                    f"experts, the plan prunes {len(plan.pruned(layer))} of {experts}; fit them "
                    "again: mone-edge fit"
                )
        return dataclasses.replace(plan, kept=kept)

    def summary(self) -> dict[str, Any]:
        """How the fit went: `novices`, `constants` among them, `ranks` (stored, least to most),
        `held_out_error` (mean over the novices, as a share of the constants')."""
        layers = list(self.layers.values())
        widths = sorted({layer.width for layer in layers})
        ranks = [int(rank) for layer in layers for rank in layer.rank]
        errors = [float(error) for layer in layers for error in layer.error]
        return {
            "novices": len(ranks),
            "constants": ranks.count(0),
            "ranks": "-".join(map(str, dict.fromkeys([*widths[:1], *widths[-1:]]))) or "0",
            "held_out_error": sum(errors) / max(1, len(errors)),
        }

    def shortfall(self) -> str:
        """Which novices stayed constants, in numbers; empty where none did."""
        tokens = [
            int(seen)
            for layer in self.layers.values()
            for seen, rank in zip(layer.tokens, layer.rank, strict=True)
            if not rank
        ]
        if not tokens:
            return ""
        span = " to ".join(map(str, dict.fromkeys((min(tokens), max(tokens)))))
        return (
            f"{len(tokens)} of {self.summary()['novices']} novices stay constants: on the "
            f"{span} tokens that their experts saw, nothing more predicted "
            "those held out; more text may help (--samples, --data)"
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors = {
            f"layer.{index}.{name}": np.ascontiguousarray(getattr(layer, name), DTYPES[name][1])
            for index, layer in self.layers.items()
            for name in ARRAYS
        }
        document = {
            "version": VERSION,
            "provenance": dataclasses.asdict(self.provenance),
            "replacement": self.replacement,
            "pruned": {str(layer): list(ids) for layer, ids in self.pruned.items()},
        }
        # One entry only: safetensors writes several in random order.
        with atomic_write(path) as temporary:
            try:
                save_file(tensors, temporary, {FORMAT: json.dumps(document)})
            except SafetensorError as error:  # what it makes of a full disk
                raise OSError(str(error)) from error

    @classmethod
    def load(cls, path: Path) -> "LowRankNovices":
        """Map a file of novices.

        Raises:
            MoneEdgeError: it is missing, damaged, or something else.
        """
        from safetensors import SafetensorError, safe_open

        require_file(path, "novices file", "fit MODEL --plan PLAN")
        require_safetensors(path, "novices file")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise MoneEdgeError(f"{path} is damaged: {reason(error)}") from error
        if FORMAT not in metadata:
            raise MoneEdgeError(f"{path} holds no novices of mone-edge")
        try:
            return _assemble(parse_json(metadata[FORMAT]), read_header(path))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise MoneEdgeError(f"{path} is damaged: {reason(error)}") from error


def stored_rank(rank: int) -> int:
    """Components of a low-rank novice in a quantised file: from half a block of Q8_0 on, whole
    blocks. Rank 16 takes 39 % more room that way than with rows of 16 in F16 (`ffn_novice_up`), but
    llama.cpp multiplies what is left of an F16 row beside multiples of 32 or 64 value by value."""
    return rank + -rank % NOVICE_BLOCK if rank >= NOVICE_BLOCK // 2 else rank


def stored_bits(rank: int, inputs: int, outputs: int) -> float:
    """What the matrices of one low-rank novice take in a quantised file: rows of whole blocks as
    Q8_0, others as F16."""
    rank = stored_rank(rank)
    down, up = (16 if row % NOVICE_BLOCK else 8.5 for row in (inputs, rank))
    return rank * (inputs * down + outputs * up)


def empty_novices(pruned: int, inputs: int, outputs: int, rank: int) -> LayerNovices:
    """Zeros, in no memory to speak of: what a layer's novices will look like."""
    shapes = {
        "bias": (pruned, outputs),
        "down": (pruned, rank, inputs),
        "up": (pruned, outputs, rank),
    }
    return LayerNovices(
        **{
            name: np.broadcast_to(np.zeros((), kind), shapes.get(name, (pruned,)))
            for name, (_, kind) in DTYPES.items()
        }
    )


def joined(
    provenance: Provenance, plan: PrunePlan, parts: Iterable[LowRankNovices]
) -> LowRankNovices:
    """The novices of a plan's layers as one, checked; a layer left whole has no part."""
    pruned: dict[int, tuple[int, ...]] = dict.fromkeys(plan.kept, ())
    layers: dict[int, LayerNovices] = {}
    for part in parts:
        pruned |= part.pruned
        layers |= part.layers
    for layer in layers.values():
        layer.check()
    return LowRankNovices(provenance, plan.replacement, pruned, layers)


def is_novices(path: Path) -> bool:
    """Whether a file says that it holds novices."""
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(1 << 10)


def _assemble(document: dict[str, Any], refs: Mapping[str, TensorRef]) -> LowRankNovices:
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']}, this mone-edge reads {VERSION}")
    made: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in document["provenance"].items()
    }
    require_keys(made, Provenance)
    pruned = {int(layer): tuple(map(int, ids)) for layer, ids in document["pruned"].items()}
    layers = {}
    for index in sorted({int(name.split(".")[1]) for name in refs}):
        arrays = {n: _mapped(refs[f"layer.{index}.{n}"], *DTYPES[n]) for n in ARRAYS}
        layers[index] = LayerNovices(**arrays)
        layers[index].check()
        if len(layers[index].bias) != len(pruned[index]):
            raise ValueError(f"layer {index} has novices of other experts")
    if {layer for layer, ids in pruned.items() if ids} != layers.keys():
        raise ValueError("a layer's novices are missing")
    return LowRankNovices(Provenance(**made), str(document["replacement"]), pruned, layers)


def _mapped(ref: TensorRef, name: str, kind: str) -> NDArray[Any]:
    if ref.dtype != name:
        raise ValueError(f"a tensor of type {ref.dtype}, not {name}")
    if not ref.size:
        return np.zeros(ref.shape, kind)
    return np.memmap(ref.file, kind, "r", ref.offset, ref.shape)
