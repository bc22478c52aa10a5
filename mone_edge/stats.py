"""ExpertStats: what calibration learned about every expert, in one mergeable safetensors file.

In: accumulated sums (from `mone_edge.collect`). Out: a file, and the same numbers for criteria,
novices and importance-weighted quantising. Knows nothing about models, criteria or plans.

All sums run over calibration tokens `t` that the router sent to expert `i` (`i in S_t`), with
`g` the gate weight that multiplies the expert's output and `f` the raw expert output. Means and
second moments merge exactly by Chan's formula, everything else by addition. One statistic does not
merge exactly, `pair_error` (see `LayerStats.merge`). What is `SAMPLED` is of a few hundred of the
tokens, on which all experts were run. Files of older versions lack what is `OPTIONAL`: version 1
all of it, version 2 what is sampled.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mone_edge.documents import parse_json, reason, require_keys
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import atomic_write, require_file
from mone_edge.recipe import Calibration
from mone_edge.safetensors_header import require_safetensors

FORMAT = "mone-edge-stats"
VERSION = 4
READABLE = (1, 2, 3, 4)

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one MoE layer with E experts, output width D, input width H, inner width I."""

    tokens: int  # tokens that reached the layer
    top_k: int
    count: Int  # [E] tokens routed to the expert
    gate_sum: Float  # [E] sum g
    gate_sq_sum: Float  # [E] sum g^2
    output_mean: Float  # [E, D] mean f
    output_m2: Float  # [E, D] sum (f - mean f)^2
    gate_sq_mean: Float  # [E, D] sum g^2 f / sum g^2
    norm_sum: Float  # [E] sum ||f||
    norm_sq_sum: Float  # [E] sum ||f||^2
    gate_norm_sum: Float  # [E] sum g ||f||
    gate_sq_norm_sq_sum: Float  # [E] sum g^2 ||f||^2
    input_sq_sum: Float  # [E, H] sum x^2, x the expert's input
    inner_sq_sum: Float  # [E, I] sum a^2, a the input of the down projection
    output_max: Float | None = None  # [E] largest |f| of a token and channel
    pair_gate: Float | None = None  # [E, E] sum g_i g_j over tokens routed to both
    pair_error: Float | None = None  # [E, E] sum g_i g_j <f_i - mean_i, f_j - mean_j>
    # Of sampled tokens, Y_i [S, D] the centred outputs of expert i, l the router's logits [S, E]
    sampled: int = 0  # S
    sample_sum: Float | None = None  # [E, D] sum f, routed to the expert or not
    sample_kernel: Float | None = None  # [E, E] ||Y_i^T Y_j||_F^2 / S, added up over merged parts
    sample_logits: Float | None = None  # [E, E] sum l_i l_j
    # [1] sum over tokens of 1 / ||h||^2, h the residual stream that the layer leaves; 0: not seen
    stream_inverse: Float | None = None

    @property
    def num_experts(self) -> int:
        return len(self.count)

    def check(self) -> None:
        """Raise ValueError where the arrays contradict each other or are not finite."""
        experts, width = self.output_mean.shape
        for name in ARRAYS:
            values = getattr(self, name)
            if values is None and name in OPTIONAL:
                continue
            wide, rows = name in (*WIDE, *PAIRS, *SAMPLED), 1 if name == STREAM else experts
            if values.shape[:1] != (rows,) or values.ndim != (2 if wide else 1):
                raise ValueError(f"{name} has shape {values.shape} for {experts} experts")
            if name in (*MEANS, "sample_sum") and values.shape[1] != width:
                raise ValueError(f"{name} is {values.shape[1]} wide, not {width}")
            if name in SQUARE and values.shape[1] != experts:
                raise ValueError(f"{name} has shape {values.shape} for {experts} experts")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite")
        if self.count.sum() != self.tokens * self.top_k:
            raise ValueError(
                f"{self.count.sum()} routed tokens, not {self.tokens} tokens times {self.top_k}"
            )

    def merge(self, other: "LayerStats") -> "LayerStats":
        """The statistics of both sets of tokens together (Chan et al. 1979 for mean and M2).

        `pair_error` moves with the means as a covariance does, which is exact if the tokens that a
        pair shares have the same mean output as all tokens of an expert, and else off by the
        product of two small differences. `sample_kernel` adds up: outputs of a part are centred
        around that part's own mean, and tokens of different parts are not compared. What one side
        lacks, the whole lacks.
        """
        if self.output_mean.shape != other.output_mean.shape or self.top_k != other.top_k:
            raise MoneEdgeError(
                f"statistics differ in shape: {self.output_mean.shape} top-{self.top_k} "
                f"and {other.output_mean.shape} top-{other.top_k}"
            )
        count = self.count + other.count
        share = _share(other.count, count)  # [E, 1]
        delta = other.output_mean - self.output_mean
        gate_sq_sum = self.gate_sq_sum + other.gate_sq_sum
        merged: dict[str, Any] = {n: getattr(self, n) + getattr(other, n) for n in ADDITIVE}
        merged |= {n: _both(np.add, getattr(self, n), getattr(other, n)) for n in SAMPLED}
        return LayerStats(
            top_k=self.top_k,
            output_mean=self.output_mean + delta * share,
            output_m2=self.output_m2 + other.output_m2 + delta**2 * share * self.count[:, None],
            gate_sq_mean=self.gate_sq_mean
            + (other.gate_sq_mean - self.gate_sq_mean) * _share(other.gate_sq_sum, gate_sq_sum),
            output_max=_both(np.maximum, self.output_max, other.output_max),
            pair_gate=_both(np.add, self.pair_gate, other.pair_gate),
            pair_error=self._merged_pair_error(other, delta, share),
            stream_inverse=_both(np.add, self.stream_inverse, other.stream_inverse),
            **merged,
        )

    def _merged_pair_error(self, other: "LayerStats", delta: Float, share: Float) -> Float | None:
        if self.pair_gate is None or other.pair_gate is None:
            return None
        moved = delta @ delta.T
        shifts = self.pair_gate * (share * share.T) + other.pair_gate * (
            (1 - share) * (1 - share.T)
        )
        sums = _both(np.add, self.pair_error, other.pair_error)
        return None if sums is None else sums + shifts * moved


MEANS = ("output_mean", "output_m2", "gate_sq_mean")
WIDE = (*MEANS, "input_sq_sum", "inner_sq_sum")  # [E, ...], the others are [E]
PAIRS = ("pair_gate", "pair_error")  # [E, E]
SAMPLED = ("sample_sum", "sample_kernel", "sample_logits")  # since version 3
SQUARE = (*PAIRS, *SAMPLED[1:])
STREAM = "stream_inverse"  # [1], since version 4
OPTIONAL = ("output_max", *PAIRS, *SAMPLED, STREAM)  # the others since version 2
SCALARS = ("tokens", "top_k", "sampled")
ADDITIVE = tuple(
    f.name for f in dataclasses.fields(LayerStats) if f.name not in (*MEANS, *OPTIONAL, "top_k")
)
ARRAYS = tuple(f.name for f in dataclasses.fields(LayerStats) if f.name not in SCALARS)


def _both(join: Callable[[Float, Float], Float], a: Float | None, b: Float | None) -> Float | None:
    return None if a is None or b is None else join(a, b)


def _share(part: Float | Int, whole: Float | Int) -> Float:
    """`part / whole` as a column, 0 where nothing was seen."""
    ratio = np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
    return np.asarray(ratio, dtype=np.float64)[:, None]


@dataclass(frozen=True)
class LinearStats:
    """Input second moments of an ordinary linear layer (the importance matrix of its weight)."""

    count: int  # tokens
    input_sq_sum: Float  # [in_features] sum x^2

    def merge(self, other: "LinearStats") -> "LinearStats":
        return LinearStats(self.count + other.count, self.input_sq_sum + other.input_sq_sum)


@dataclass(frozen=True)
class Provenance:
    """Where statistics come from: the model, and the text it read."""

    model: str  # as the user named it
    fingerprint: str  # of the weights: `Source.fingerprint`
    architecture: str  # transformers' model_type
    data: tuple[str, ...] = ()  # calibration specs
    data_sha256: tuple[str, ...] = ()  # of the token ids, one per merged part
    samples: int = 0
    seq_len: int = 0
    seed: int = 0
    tool: str = ""  # versions that measured

    @property
    def calibration(self) -> Calibration | None:
        """What reads the same text again; None where merged parts read each its own."""
        if len(self.data_sha256) != 1:
            return None
        return Calibration(self.data, self.samples, self.seq_len, self.seed)


@dataclass(frozen=True)
class ExpertStats:
    """All layers of a model. Keys of `layers` are block indices, of `linears` module names."""

    provenance: Provenance
    layers: Mapping[int, LayerStats]
    linears: Mapping[str, LinearStats] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return max((layer.tokens for layer in self.layers.values()), default=0)

    def unseen(self) -> int:
        """Number of experts that no calibration token reached."""
        return sum(int((layer.count == 0).sum()) for layer in self.layers.values())

    def repeated_data(self) -> int:
        """Number of merged parts that read the same tokens as another part."""
        return len(self.provenance.data_sha256) - len(set(self.provenance.data_sha256))

    def merge(self, other: "ExpertStats") -> "ExpertStats":
        """Exact sum of two runs over different tokens of the same model.

        Raises:
            MoneEdgeError: the two come from different models.
        """
        mine, theirs = self.provenance, other.provenance
        if mine.fingerprint != theirs.fingerprint or self.layers.keys() != other.layers.keys():
            raise MoneEdgeError(
                f"statistics of different models cannot be merged: {mine.model} "
                f"({mine.fingerprint[:12]}) and {theirs.model} ({theirs.fingerprint[:12]})"
            )
        provenance = dataclasses.replace(
            mine,
            data=tuple(dict.fromkeys(mine.data + theirs.data)),
            data_sha256=mine.data_sha256 + theirs.data_sha256,
            samples=mine.samples + theirs.samples,
        )
        layers = {i: layer.merge(other.layers[i]) for i, layer in self.layers.items()}
        shared = self.linears.keys() & other.linears.keys()
        linears = {name: self.linears[name].merge(other.linears[name]) for name in sorted(shared)}
        return ExpertStats(provenance, layers, linears)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors: dict[str, NDArray[np.generic]] = {}
        for index, layer in self.layers.items():
            arrays = {name: getattr(layer, name) for name in ARRAYS}
            tensors |= {f"layer.{index}.{n}": v for n, v in arrays.items() if v is not None}
            tensors[f"layer.{index}.scalars"] = np.array([getattr(layer, n) for n in SCALARS])
        for module, linear in self.linears.items():
            tensors[f"linear.{module}"] = np.append(linear.input_sq_sum, linear.count)
        document = {"version": VERSION, "provenance": dataclasses.asdict(self.provenance)}
        # One entry only: safetensors writes several in random order, and the file is hashed.
        header = {FORMAT: json.dumps(document)}
        with atomic_write(path) as temporary:
            try:
                save_file(
                    {k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, header
                )
            except SafetensorError as error:  # what it makes of a full disk
                raise OSError(str(error)) from error

    @classmethod
    def load(cls, path: Path) -> "ExpertStats":
        """Read a statistics file.

        Raises:
            MoneEdgeError: the file is missing, damaged, or not a statistics file.
        """
        from safetensors import SafetensorError, safe_open

        require_file(path, "statistics file", "stats MODEL")
        require_safetensors(path, "statistics file")
        try:
            with safe_open(path, framework="numpy") as file:
                header = _header(path, file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _assemble(header["provenance"], tensors)
        except KeyError as error:
            raise MoneEdgeError(f"{path} is damaged: it has no {error.args[0]}") from error
        except (SafetensorError, OSError, ValueError, TypeError, IndexError) as error:
            raise MoneEdgeError(f"{path} is damaged: {reason(error)}") from error


def _header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if FORMAT not in (metadata or {}):
        raise MoneEdgeError(f"{path} is not a mone-edge statistics file")
    document: dict[str, Any] = parse_json((metadata or {})[FORMAT])
    if document["version"] not in READABLE:
        raise MoneEdgeError(
            f"{path} has statistics version {document['version']}, this mone-edge reads up to "
            f"{VERSION}"
        )
    return document


def _assemble(provenance: dict[str, Any], tensors: Mapping[str, NDArray[Any]]) -> ExpertStats:
    """The statistics of a file's tensors; KeyError, ValueError, IndexError where they are wrong."""
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in provenance.items()
    }
    require_keys(fields, Provenance)
    indices = [int(n.split(".")[1]) for n in tensors if n.endswith(".scalars")]
    linears = {
        name.removeprefix("linear."): LinearStats(int(values[-1]), values[:-1])
        for name, values in tensors.items()
        if name.startswith("linear.")
    }
    broken = next((n for n, s in linears.items() if not np.isfinite(s.input_sq_sum).all()), None)
    if broken is not None:
        raise ValueError(f"linear {broken} is not finite")
    layers = {index: _layer(index, tensors) for index in sorted(indices)}
    return ExpertStats(Provenance(**fields), layers, linears)


def _layer(index: int, tensors: Mapping[str, NDArray[Any]]) -> LayerStats:
    tokens, top_k, *later = map(int, tensors[f"layer.{index}.scalars"])
    names = [n for n in ARRAYS if n not in OPTIONAL or f"layer.{index}.{n}" in tensors]
    arrays = {name: tensors[f"layer.{index}.{name}"] for name in names}
    layer = LayerStats(tokens, top_k, sampled=sum(later), **arrays)
    try:
        layer.check()
    except ValueError as error:
        raise ValueError(f"layer {index}: {error}") from error
    return layer


def empty_layer(experts: int, width: int, inner: int, *, top_k: int) -> LayerStats:
    """A layer that saw nothing: E experts, output and input width D, inner width I."""
    columns = dict.fromkeys((*WIDE, "sample_sum"), width) | dict.fromkeys(SQUARE, experts)
    columns |= {"inner_sq_sum": inner}
    arrays: dict[str, Any] = {
        name: np.zeros((experts, columns[name]) if name in columns else experts)
        for name in ARRAYS
        if name not in ("count", STREAM)
    }
    return LayerStats(tokens=0, top_k=top_k, count=np.zeros(experts, dtype=np.int64), **arrays)


def merge_all(parts: Iterable[ExpertStats]) -> ExpertStats:
    """Merge any number of statistics, left to right.

    Raises:
        MoneEdgeError: there are none, or they come from different models.
    """
    merged: ExpertStats | None = None
    for part in parts:
        merged = part if merged is None else merged.merge(part)
    if merged is None:
        raise MoneEdgeError("nothing to merge: name at least one statistics file")
    return merged


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as recorded in plans and GGUFs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
