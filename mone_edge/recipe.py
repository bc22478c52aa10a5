"""The one record of a run: what was asked for, as YAML in and out.

A recipe holds options only (no measurement), so that the same recipe on the same weights gives
the same file. Knows nothing about how any of it is done.
"""

import dataclasses
import functools
import hashlib
import re
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mone_edge.documents import reason
from mone_edge.errors import UsageError
from mone_edge.paths import atomic_write

SCOPES = ("layer", "model", "error")
REPLACEMENTS = ("mean", "gate2-mean", "zero", "drop", "merge", "rank", "rank-R")
CUTTING = ("drop", "merge")  # replacements that leave an ordinary model with fewer experts
NOVICE_ERROR = "novice-error"  # the method whose experts the fit of their novices chooses
DEK, M_SMOE, HC_SMOE = MERGING = ("dek", "m-smoe", "hc-smoe")  # methods that group experts
DEFAULT_METHOD = "joint"  # needs statistics only, and none of those was clearly better
MEASURED = ("mean", "gate2-mean")  # replacements whose vectors come from statistics
MOST = 1 << 63  # numbers of a recipe are below
LOW_RANK = re.compile(r"rank(?:-([1-9]\d{0,3}))?")


def is_replacement(name: object) -> bool:
    """Whether something is what `--replacement` takes: one of `REPLACEMENTS`, R a number."""
    return isinstance(name, str) and name != "rank-R" and (name in REPLACEMENTS or low_rank(name))


def low_rank(replacement: str) -> bool:
    """Whether novices of this replacement are fitted: "rank" or "rank-16"."""
    return LOW_RANK.fullmatch(replacement) is not None


def default_replacement(method: str) -> str:
    """What `--replacement` is where it is not given: what suits the method."""
    if method in MERGING:
        return "merge"
    return {NOVICE_ERROR: "rank", DEFAULT_METHOD: "gate2-mean"}.get(method, "mean")


def contradiction(method: str, replacement: str) -> str:
    """Why a method and a replacement cannot go together; empty where they can."""
    if method in MERGING and replacement != "merge":
        return (
            f"--method {method} merges experts, which --replacement {replacement} does not; leave "
            "--replacement out"
        )
    if method == NOVICE_ERROR and not low_rank(replacement):
        return (
            f"--method {method} compares what low-rank novices leave of each expert, and "
            f"--replacement {replacement} has none; use --replacement rank (or rank-16)"
        )
    if replacement == "merge" and method not in MERGING:
        return (
            f"--replacement merge needs a method that groups experts ({', '.join(MERGING)}), not "
            f"--method {method}"
        )
    return ""


def rank_of(replacement: str) -> int | None:
    """The R of "rank-R"; None for "rank", which leaves it to the fit."""
    match = LOW_RANK.fullmatch(replacement)
    return int(match[1]) if match and match[1] else None


@dataclass(frozen=True)
class Calibration:
    """Which text the statistics read, and how much of it."""

    data: tuple[str, ...] = ()  # specs; empty: the text that comes with the package
    samples: int = 128
    seq_len: int = 2048
    seed: int = 42


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what `convert` writes."""

    model: str
    prune_ratio: float = 0.25  # fraction of experts removed
    method: str = DEFAULT_METHOD
    scope: str = "layer"
    replacement: str = default_replacement(DEFAULT_METHOD)
    protect: tuple[int, ...] = ()
    protect_super: bool = False
    pretrained: str = ""  # the model before fine-tuning, for the method "router-norm"
    outtype: tuple[str, ...] = ("Q4_K_M",)
    skip_threshold: float = 0.0  # of a token's largest gate weight; 0 runs all (`skipping`)
    imatrix: str = "auto"
    tensor_type: tuple[str, ...] = ()
    tokenizer_pre: str = ""
    calibration: Calibration = Calibration()

    def of_type(self, outtype: str) -> "Recipe":
        """The recipe of one of its file types alone."""
        return dataclasses.replace(self, outtype=(outtype,))

    def to_yaml(self) -> str:
        """YAML text, which `load` reads back."""
        import yaml

        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False)

    def sha256(self) -> str:
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()

    def save(self, path: Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_yaml(), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def load(path: Path) -> dict[str, Any]:
    """The options that a recipe file sets, by their names in `Recipe`; others keep defaults.

    Raises:
        UsageError: the file is missing, is not YAML, or sets an option that does not exist.
    """
    import yaml

    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except OSError as error:
        raise UsageError(f"cannot read recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UsageError(f"{path} is not YAML: {reason(error)}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not a recipe: nested too deeply") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a recipe: it holds no options")
    document = _as_meant(document, Recipe)
    _require_known(str(path), document, Recipe)
    _require_types(str(path), document, Recipe)
    _require_ranges(path, document)
    if isinstance(document.get("calibration"), dict):
        document["calibration"] = _as_meant(document["calibration"], Calibration)
    read_calibration(str(path), document.get("calibration") or {})
    return document


def read_calibration(where: str, document: Any) -> Calibration:
    """A calibration from its options, as YAML or JSON has them; what is not set has its default.

    Raises:
        UsageError: it is no group of options, or sets one that does not exist.
    """
    if not isinstance(document, dict):
        raise UsageError(f"{where}: calibration is not a group of options")
    _require_known(where, document, Calibration, "calibration.")
    _require_types(where, document, Calibration, "calibration.")
    given = {name: value for name, value in document.items() if value is not None}
    for name, least in (("samples", 1), ("seq_len", 2), ("seed", 0)):
        if name in given and given[name] < least:
            raise UsageError(
                f"{where}: calibration.{name} is {given[name]}, at least {least} is needed"
            )
    return Calibration(**given | {"data": tuple(given.get("data", ()))})


def _as_meant(given: dict[str, Any], kind: Any) -> dict[str, Any]:
    """`outtype: Q8_0` as `[Q8_0]`, and 1e-1 as a number, which YAML takes for text."""
    meant = dict(given)
    for field in dataclasses.fields(kind):
        value = meant.get(field.name)
        if isinstance(field.default, tuple) and isinstance(value, (str, int)):
            is_text = field.name == "protect" and isinstance(value, str)  # layers, as 0,2-4
            meant[field.name] = value if is_text else [value]
        elif isinstance(field.default, float) and isinstance(value, str):
            with suppress(ValueError):
                meant[field.name] = float(value)
    return meant


@functools.cache
def _loader() -> Any:
    """YAML's safe loader without what a recipe has no use for: aliases (a few lines of them make
    gigabytes) and keys that occur twice (the last would win in silence)."""
    import yaml

    class RecipeLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not allowed in a recipe")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if str(key.value) in seen:
                    raise yaml.YAMLError(f"{key.value} occurs twice")
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    return RecipeLoader


def _require_known(where: str, given: dict[str, Any], kind: Any, prefix: str = "") -> None:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            raise UsageError(f"{where}: no option {prefix}{name}; there are {', '.join(known)}")


def _require_types(where: str, given: dict[str, Any], kind: Any, prefix: str = "") -> None:
    for field in dataclasses.fields(kind):
        value = given.get(field.name)
        if value is None or field.name == "calibration":
            continue
        default = field.default if field.default is not dataclasses.MISSING else ""
        wanted: Any = (int, float) if isinstance(default, float) else type(default)
        if wanted is tuple:
            wanted = (list, tuple)
        if field.name == "protect" and isinstance(value, str):
            continue
        if isinstance(value, int) and abs(value) >= MOST:
            raise UsageError(f"{where}: {prefix}{field.name} is too large a number")
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise UsageError(f"{where}: {prefix}{field.name} cannot be {reprlib.repr(value)}")
        if wanted == (list, tuple):
            _require_items(where, prefix + field.name, value)


def _require_items(where: str, name: str, values: list[Any]) -> None:
    wanted = int if name == "protect" else str
    for value in values:
        if type(value) is not wanted:
            raise UsageError(f"{where}: {name} cannot hold {reprlib.repr(value)}")


def _require_ranges(path: Path, given: dict[str, Any]) -> None:
    ratio = given.get("prune_ratio")
    if ratio is not None and not 0 <= ratio < 1:
        raise UsageError(f"{path}: prune_ratio is {ratio}, not 0 <= ratio < 1")
    threshold = given.get("skip_threshold")
    if threshold is not None and not 0 <= threshold < 1:
        raise UsageError(f"{path}: skip_threshold is {threshold}, not 0 <= threshold < 1")
    replacement = given.get("replacement")
    for name, known, right in (
        ("scope", SCOPES, given.get("scope") in (None, *SCOPES)),
        ("replacement", REPLACEMENTS, replacement is None or is_replacement(replacement)),
    ):
        if not right:
            raise UsageError(f"{path}: no {name} {given[name]}; there are {', '.join(known)}")
