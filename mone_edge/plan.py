"""PrunePlan: which experts go, and what replaces them. Pure: statistics + choices -> plan.

In: scores [experts] per layer, a ratio, a scope. Out: a frozen plan that is a small JSON file.
Knows nothing about models, tensors or files other than its own.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mone_edge.errors import MoneEdgeError
from mone_edge.paths import atomic_write

FORMAT = "mone-edge-plan"
VERSION = 1


@dataclass(frozen=True)
class PrunePlan:
    """The decision, layer by layer. Keys of the mappings are block indices of MoE layers."""

    model: str  # as the user named it
    fingerprint: str  # of the weights it was made for
    method: str
    scope: str  # "layer" or "model"
    replacement: str  # "mean", "zero" or "drop"
    prune_ratio: float  # fraction of all experts removed, as asked for
    top_k: int
    num_experts: Mapping[int, int]  # before pruning
    kept: Mapping[int, tuple[int, ...]]  # ids of the kept experts, ascending
    seed: int = 0
    protect: tuple[int, ...] = ()  # blocks left whole
    stats_path: str = ""  # where the novices' means are
    stats_sha256: str = ""

    def pruned(self, layer: int) -> tuple[int, ...]:
        """Ids of the removed experts of a layer, ascending."""
        kept = set(self.kept[layer])
        return tuple(i for i in range(self.num_experts[layer]) if i not in kept)

    def order(self, layer: int) -> tuple[int, ...]:
        """Original id of each new id: kept experts first, then the pruned ones."""
        return self.kept[layer] + self.pruned(layer)

    @property
    def removed_fraction(self) -> float:
        """Fraction of experts that really goes (whole experts, so it may differ from the ratio)."""
        total = sum(self.num_experts.values())
        return 1 - sum(len(ids) for ids in self.kept.values()) / total

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "PrunePlan":
        """Read a plan.

        Raises:
            MoneEdgeError: the file is missing, damaged, or not a plan.
        """
        if not path.is_file():
            raise MoneEdgeError(f"no plan file {path}; make it with: mone-edge plan STATS -o {path}")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.pop("format") != FORMAT or document.pop("version") != VERSION:
                raise MoneEdgeError(f"{path} is not a plan of this mone-edge (version {VERSION})")
            document["num_experts"] = {int(k): int(v) for k, v in document["num_experts"].items()}
            document["kept"] = {int(k): tuple(map(int, v)) for k, v in document["kept"].items()}
            document["protect"] = tuple(document["protect"])
            plan = cls(**document)
            plan._check(path)
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise MoneEdgeError(f"{path} is not a readable plan: {error!r}") from error
        return plan

    def _check(self, path: Path) -> None:
        if self.kept.keys() != self.num_experts.keys():
            raise MoneEdgeError(f"{path}: kept and num_experts name different layers")
        for layer, ids in self.kept.items():
            if list(ids) != sorted(set(ids)) or not ids or not 0 <= ids[0] <= ids[-1] < self.num_experts[layer]:
                raise MoneEdgeError(
                    f"{path}: layer {layer} keeps {len(ids)} experts of {self.num_experts[layer]}; "
                    "ids must be distinct, ascending and in range"
                )
