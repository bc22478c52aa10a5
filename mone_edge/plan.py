"""PrunePlan: which experts go, and what replaces them. Pure: statistics + choices -> plan.

In: ExpertStats, a ratio, a criterion, a scope. Out: a frozen plan that is a small JSON file.
Knows nothing about models, tensors or files other than its own.

Counts: scope `layer` removes `floor(E * ratio + 1/2)` experts of every layer that is not
protected, scopes `model` and `error` remove `floor(sum E * ratio + 1/2)` over those layers (see
`selection`). Among equal scores the expert with the higher id (then the later layer) goes first.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mone_edge.criteria import super_experts
from mone_edge.documents import parse_json, reason, require_keys
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.paths import atomic_write, require_file
from mone_edge.recipe import (
    CUTTING,
    DEFAULT_METHOD,
    MERGING,
    NOVICE_ERROR,
    REPLACEMENTS,
    SCOPES,
    Calibration,
    contradiction,
    default_replacement,
    is_replacement,
    read_calibration,
)
from mone_edge.selection import METHODS, ROUTER_NORM, Choice, merge, prune
from mone_edge.stats import ExpertStats, Float

FORMAT = "mone-edge-plan"
VERSION = 3
READABLE = (1, 2, 3)  # 1: without groups; 2: without the calibration
UNKNOWN_METHOD = "unknown"  # of a model that somebody else pruned

Groups = tuple[tuple[int, ...], ...]
Weights = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PrunePlan:
    """The decision, layer by layer. Keys of the mappings are block indices of MoE layers."""

    model: str  # as the user named it
    fingerprint: str  # of the weights it was made for
    method: str
    scope: str  # "layer" or "model"
    replacement: str  # one of REPLACEMENTS
    prune_ratio: float  # fraction of all experts removed, as asked for
    top_k: int
    num_experts: Mapping[int, int]  # before pruning
    kept: Mapping[int, tuple[int, ...]]  # ids of the kept experts, ascending
    seed: int = 0
    protect: tuple[int, ...] = ()  # blocks left whole
    protect_super: bool = False  # experts with extreme activations stay
    pretrained: str = ""  # the model whose routers "router-norm" compared with
    stats_path: str = ""  # where the novices' means are
    stats_sha256: str = ""
    calibration: Calibration | None = None  # what the statistics read, where that is known
    # Of "merge", of each kept expert: the ids that are merged into it, itself first, and the weight
    # of each of them. Empty for the other replacements.
    groups: Mapping[int, Groups] = field(default_factory=dict)
    merge_weights: Mapping[int, Weights] = field(default_factory=dict)

    def pruned(self, layer: int) -> tuple[int, ...]:
        """Ids of the removed experts of a layer, ascending."""
        kept = set(self.kept[layer])
        return tuple(i for i in range(self.num_experts[layer]) if i not in kept)

    def order(self, layer: int) -> tuple[int, ...]:
        """Original id of each new id: kept experts first, then the pruned ones."""
        return self.kept[layer] + self.pruned(layer)

    @property
    def cuts(self) -> bool:
        """Whether the router loses rows: the result is an ordinary model with fewer experts."""
        return self.replacement in CUTTING

    @property
    def removed_fraction(self) -> float:
        """Fraction of experts that really goes (whole experts, so it may differ from the ratio)."""
        total = sum(self.num_experts.values())
        return 1 - sum(len(ids) for ids in self.kept.values()) / total

    def sha256(self) -> str:
        """Of what is decided: which experts of which weights go, and what replaces them."""
        decided: list[Any] = [self.fingerprint, self.replacement, sorted(self.kept.items())]
        decided += [self.method] if self.method == NOVICE_ERROR else []  # the fit decides
        return hashlib.sha256(json.dumps(decided).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        document = {"format": FORMAT, "version": VERSION, **self.document()}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """What `parse` reads; what is not there is left out."""
        fields = dataclasses.asdict(self)
        optional = ("calibration", "groups", "merge_weights")
        return {k: v for k, v in fields.items() if k not in optional or v}

    @classmethod
    def load(cls, path: Path) -> "PrunePlan":
        """Read a plan.

        Raises:
            MoneEdgeError: the file is missing, damaged, or not a plan.
        """
        require_file(path, "plan file", "plan STATS")
        try:
            document = parse_json(path.read_bytes())
            if document.pop("format") != FORMAT or document.pop("version") not in READABLE:
                raise MoneEdgeError(
                    f"{path} is not a plan of this mone-edge (up to version {VERSION})"
                )
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise MoneEdgeError(f"{path} is not a readable plan: {reason(error)}") from error
        return cls.parse(document, str(path))

    @classmethod
    def parse(cls, document: Mapping[str, Any], where: str) -> "PrunePlan":
        """A plan from its fields, as JSON has them.

        Raises:
            MoneEdgeError: they are no plan; `where` says whose they are.
        """
        try:
            fields = dict(document)
            require_keys(fields, cls)
            fields["num_experts"] = {int(k): v for k, v in fields["num_experts"].items()}
            fields["kept"] = {int(k): tuple(v) for k, v in fields["kept"].items()}
            fields["protect"] = tuple(fields["protect"])
            for name in ("groups", "merge_weights"):
                found = fields.get(name, {}).items()
                fields[name] = {int(k): tuple(map(tuple, v)) for k, v in found}
            if fields.get("calibration") is not None:
                fields["calibration"] = read_calibration(where, fields["calibration"])
            plan = cls(**fields)
            plan._check(where)
        except UsageError as error:  # nobody typed it
            raise MoneEdgeError(str(error)) from error
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise MoneEdgeError(f"{where} is not a readable plan: {reason(error)}") from error
        return plan

    def _check(self, path: str) -> None:
        if not self.kept or self.kept.keys() != self.num_experts.keys():
            raise MoneEdgeError(f"{path}: kept and num_experts name different layers, or none")
        counts = (self.top_k, self.seed, *self.protect, *self.num_experts.values())
        experts_kept = (expert for kept in self.kept.values() for expert in kept)
        if any(type(n) is not int or n < 0 for n in (*counts, *experts_kept)):
            raise MoneEdgeError(f"{path}: an id or a count in it is not a whole number from 0")
        numbers = (self.prune_ratio,)
        texts = (self.model, self.fingerprint, self.method, self.stats_path, self.stats_sha256)
        if (
            not all(isinstance(n, int | float) for n in numbers)
            or not all(isinstance(text, str) for text in (*texts, self.pretrained))
            or not isinstance(self.protect_super, bool)
        ):
            raise MoneEdgeError(f"{path}: a number or a name in it has the wrong type")
        if self.method not in (*METHODS, UNKNOWN_METHOD) or not 0 <= self.prune_ratio < 1:
            raise MoneEdgeError(
                f"{path}: method {self.method!r} with ratio {self.prune_ratio} is not known"
            )
        if self.scope not in SCOPES or not is_replacement(self.replacement):
            raise MoneEdgeError(
                f"{path}: scope {self.scope}, replacement {self.replacement}: this mone-edge knows "
                f"{', '.join(SCOPES)} and {', '.join(REPLACEMENTS)}"
            )
        for layer, ids in self.kept.items():
            experts = self.num_experts[layer]
            ascending = list(ids) == sorted(set(ids))
            in_range = not ids or (ids[0] >= 0 and ids[-1] < experts)
            if not ascending or not in_range or (not ids and self.cuts):
                raise MoneEdgeError(
                    f"{path}: layer {layer} keeps {len(ids)} experts of {experts}; "
                    "ids must be distinct, ascending and in range"
                )
        self._check_groups(path)

    def _check_groups(self, path: str) -> None:
        """That groups are there if experts are merged, and divide each layer's experts."""
        layers = self.kept.keys() if self.replacement == "merge" else ()
        if self.groups.keys() != set(layers) or self.merge_weights.keys() != set(layers):
            raise MoneEdgeError(
                f"{path}: replacement {self.replacement} with groups of other layers"
            )
        if said := contradiction(self.method, self.replacement):
            raise MoneEdgeError(f"{path}: {said}")
        for layer, groups in self.groups.items():
            shares = self.merge_weights[layer]
            members = [expert for ids in groups for expert in ids]
            if (
                [ids[:1] for ids in groups] != [(expert,) for expert in self.kept[layer]]
                or sorted(members) != list(range(self.num_experts[layer]))
                or any(type(expert) is not int for expert in members)
                or list(map(len, shares)) != list(map(len, groups))
                or not all(math.isclose(sum(s), 1) and min(s) >= 0 for s in shares)
            ):
                raise MoneEdgeError(
                    f"{path}: the groups of layer {layer} are no division of its "
                    f"{self.num_experts[layer]} experts, each with the kept one first and with "
                    "weights that add up to 1"
                )


def make_plan(
    stats: ExpertStats,
    *,
    prune_ratio: float = 0.25,
    method: str = DEFAULT_METHOD,
    scope: str = "layer",
    replacement: str | None = None,
    seed: int = 42,
    protect: Iterable[int] = (),
    protect_super: bool = False,
    pretrained: str = "",
    router_change: Mapping[int, Float] | None = None,
    stats_path: str = "",
    stats_sha256: str = "",
) -> PrunePlan:
    """Decide which experts go.

    Args:
        stats: of the whole model.
        prune_ratio: fraction of the experts removed, 0 <= ratio < 1.
        method: one of METHODS.
        scope: "layer" (the same fraction in every layer), "model" (one ranking over all) or
            "error" (fewer where less is lost).
        replacement: one of REPLACEMENTS; default: what suits the method
            (`recipe.default_replacement`).
        seed: of the methods "random" and "dek".
        protect: block indices to leave whole (see `parse_layers`).
        protect_super: keep experts with extreme activations (`criteria.super_experts`).
        pretrained: the model that "router-norm" compares with, recorded in the plan.
        router_change: of "router-norm", by block (`routers.norm_changes`).
        stats_path: where the statistics are, recorded in the plan.
        stats_sha256: of that file, recorded in the plan.

    Raises:
        UsageError: an unknown name, or a ratio that leaves a layer too few experts to run.
    """
    guarded = tuple(sorted(set(protect)))
    replacement = replacement or default_replacement(method)
    _check_choices(stats, prune_ratio, method, scope, replacement, guarded, protect_super)
    _check_routers(stats, method, router_change)
    num_experts = {index: layer.num_experts for index, layer in sorted(stats.layers.items())}
    top_k = max(layer.top_k for layer in stats.layers.values())
    choice = Choice(
        method,
        replacement,
        seed,
        floor=top_k if replacement in CUTTING else 1,
        spared=super_experts(stats.layers) if protect_super else {},
        router_change=router_change or {},
    )
    layers = {index: stats.layers[index] for index in num_experts if index not in guarded}
    groups: dict[int, Groups] = {}
    shares: dict[int, Weights] = {}
    if method in MERGING:
        groups, shares = merge(dict(sorted(stats.layers.items())), prune_ratio, choice)
        kept = {index: tuple(ids[0] for ids in found) for index, found in groups.items()}
    else:
        pruned = prune(layers, scope, prune_ratio, choice) if prune_ratio else {}
        kept = {
            index: tuple(i for i in range(experts) if i not in pruned.get(index, ()))
            for index, experts in num_experts.items()
        }
    return PrunePlan(
        model=stats.provenance.model,
        fingerprint=stats.provenance.fingerprint,
        method=method,
        scope=scope,
        replacement=replacement,
        prune_ratio=prune_ratio,
        top_k=top_k,
        num_experts=num_experts,
        kept=kept,
        seed=seed,
        protect=guarded,
        protect_super=protect_super,
        pretrained=pretrained,
        stats_path=stats_path,
        stats_sha256=stats_sha256,
        calibration=stats.provenance.calibration,
        groups=groups,
        merge_weights=shares,
    )


def parse_layers(text: str, layers: Sequence[int]) -> tuple[int, ...]:
    """Block indices from "0,2-4,-1": numbers, ranges (both ends included), -1 the last MoE layer.

    Args:
        text: what `--protect` got.
        layers: block indices of the model's MoE layers, ascending.

    Raises:
        UsageError: not a list of that form, or a layer that the model does not have.
    """
    chosen: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part[1:].partition("-")  # a leading minus counts from the end
        try:
            start = _layer_index(part[0] + first, layers)
            stop = _layer_index(last, layers) if dash else start
        except ValueError:
            raise UsageError(f"--protect {part}: write layers like 0,2-4,-1") from None
        wanted = [layer for layer in layers if start <= layer <= stop]
        if start not in layers or stop not in layers or not wanted:
            gaps = len(layers) <= layers[-1] - layers[0]
            known = ", ".join(map(str, layers)) if gaps else f"{layers[0]} to {layers[-1]}"
            raise UsageError(f"--protect {part}: the MoE layers of this model are {known}")
        chosen.update(wanted)
    return tuple(sorted(chosen))


def _layer_index(text: str, layers: Sequence[int]) -> int:
    number = int(text)
    if number >= 0:
        return number
    return layers[number] if -number <= len(layers) else number


def _check_choices(
    stats: ExpertStats,
    prune_ratio: float,
    method: str,
    scope: str,
    replacement: str,
    protect: tuple[int, ...],
    protect_super: bool,
) -> None:
    for option, value, known, right in (
        ("method", method, METHODS, method in METHODS),
        ("scope", scope, SCOPES, scope in SCOPES),
        ("replacement", replacement, REPLACEMENTS, is_replacement(replacement)),
    ):
        if not right:
            raise UsageError(f"--{option} {value}: choose one of {', '.join(known)}")
    if not 0 <= prune_ratio < 1:
        raise UsageError(
            f"--prune-ratio {prune_ratio}: the fraction of experts removed, 0 <= ratio < 1"
        )
    if not stats.layers:
        raise UsageError(f"the statistics of {stats.provenance.model} have no MoE layer")
    foreign = sorted(set(protect) - stats.layers.keys())
    if foreign:
        raise UsageError(
            f"--protect {foreign[0]}: the MoE layers of this model are "
            f"{min(stats.layers)} to {max(stats.layers)}"
        )
    if said := contradiction(method, replacement):
        raise UsageError(said)
    if method == NOVICE_ERROR and protect_super:
        raise UsageError(
            f"--protect-super looks for experts in the statistics, and with --method {method} the "
            "fit chooses later; use one of them"
        )
    if replacement in CUTTING and (scope != "layer" or protect) and prune_ratio > 0:
        cause = f"--scope {scope}" if scope != "layer" else "--protect"
        other = "use --replacement mean, or " if replacement == "drop" else ""
        raise UsageError(
            f"--replacement {replacement} with {cause} leaves different numbers of experts per "
            f"layer, and a GGUF without novices holds one number for all; {other}leave {cause} out"
        )


def _check_routers(stats: ExpertStats, method: str, change: Mapping[int, Float] | None) -> None:
    """Refuse "router-norm" without what it needs, and what it needs without it."""
    if method != ROUTER_NORM:
        if change is not None:
            raise UsageError(f"--pretrained is for --method {ROUTER_NORM}, not for {method}")
        return
    if change is None:
        raise UsageError(
            f"--method {ROUTER_NORM} ranks by how fine-tuning changed the router: name the model "
            "before it with --pretrained MODEL"
        )
    for index, layer in stats.layers.items():
        if len(change.get(index, ())) != layer.num_experts:
            raise UsageError(
                f"--method {ROUTER_NORM}: block {index} of {stats.provenance.model} has no router "
                f"of {layer.num_experts} rows that could be read"
            )
