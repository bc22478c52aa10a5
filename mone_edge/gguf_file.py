"""A GGUF as a model to prune: what it is, and its tensors as raw blocks, slice by slice.

In: a GGUF (of a split one, its first part). Out: a `Source`, and from it a `ModelFile` whose
chunks are the file's own bytes, one expert each, read when asked for. Nothing is dequantised here,
so that what is kept can be written bit for bit.
"""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.gguf_header import Entry, Header, read_header
from mone_edge.model_file import Chunk, LazyTensor, ModelFile
from mone_edge.safetensors_header import TensorRef
from mone_edge.source import Progress, Source, is_gguf

if TYPE_CHECKING:
    from mone_edge.calibration import Batches, Tokenizer
    from mone_edge.collect.work import Work
    from mone_edge.low_rank import LowRankNovices
    from mone_edge.plan import PrunePlan
    from mone_edge.stats import ExpertStats

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
ROUTER = ".ffn_gate_inp.weight"  # behind the name of its block
PER_EXPERT = re.compile(
    r"blk\.\d+\.(ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale)"
    r"|ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias)?)"
)
CONTAINER_KEYS = ("general.alignment", "split.no", "split.count", "split.tensors.count")
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4",
               "I64": "<i8", "BF16": "<u2"}  # fmt: skip


@dataclass(frozen=True)
class GgufSource(Source):
    """A GGUF, quantised or not."""

    parts: tuple[Header, ...] = field(repr=False, compare=False)

    keeps_types = True

    @property
    def label(self) -> str:
        """The file's name without part number and file type."""
        match = PART.fullmatch(self.path.name)
        stem = match["stem"] if match else self.path.stem
        return re.sub(rf"[-_.]{re.escape(self.file_type)}$", "", stem, flags=re.I)

    @property
    def file_type(self) -> str:
        """Name of `general.file_type`, "keep" where the file names none that is known."""
        from gguf import LlamaFileType

        number = self.parts[0].value("general.file_type")
        if number not in list(LlamaFileType):
            return "keep"
        return str(LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_"))

    @property
    def architecture(self) -> str:
        """llama.cpp's name."""
        return self.parts[0].arch

    @property
    def num_experts(self) -> int:
        return self.parts[0].count("{arch}.expert_count")

    @property
    def top_k(self) -> int:
        return self.parts[0].count("{arch}.expert_used_count")

    @property
    def num_layers(self) -> int:
        return self.parts[0].count("{arch}.block_count")

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        return {name: ref for part in self.parts for name, ref in part.tensors.items()}

    def open(self, *, dtype: str = "F32", tokenizer_pre: str = "") -> ModelFile:
        """The model as it is stored; `dtype` changes nothing.

        Raises:
            UsageError: a pre-tokenizer is named, which a GGUF has already.
        """
        if tokenizer_pre:
            raise UsageError(f"--tokenizer-pre is for checkpoints; {self.name} has its tokenizer")
        metadata = self.parts[0].metadata
        return ModelFile(
            self.architecture,
            {k: _value(e) for k, e in metadata.items() if k not in CONTAINER_KEYS and _any(e)},
            {name: _lazy(ref) for name, ref in self.tensors.items()},
            lambda module, values: (module, values),
        )

    def tokenizer(self) -> "Tokenizer":
        """See `collect.gguf.GgufTokenizer`."""
        from mone_edge.collect.gguf import GgufTokenizer

        return GgufTokenizer(self.path)

    def collect(
        self,
        batches: "Batches",
        *,
        device: str = "auto",
        threads: int | None = None,
        sequential: bool = False,
        work: "Work | None" = None,
        progress: Progress | None = None,
    ) -> "ExpertStats":
        """See `collect.gguf.collect`; it keeps no unfinished work."""
        from mone_edge.collect.gguf import collect

        if sequential:
            raise UsageError(
                "--sequential is for checkpoints; llama.cpp maps a GGUF and reads what it needs"
            )
        return collect(
            self.path,
            batches,
            model=self.name,
            fingerprint=self.fingerprint,
            threads=threads,
            on_progress=progress,
        )

    def fit(
        self,
        plan: "PrunePlan",
        batches: "Batches",
        work: "Work",
        *,
        device: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> "LowRankNovices":
        """See `collect.gguf_fitting.fit_gguf`."""
        from mone_edge.collect.gguf_fitting import fit_gguf

        return fit_gguf(self, plan, batches, work, threads=threads, on_progress=progress)

    def settings_sha256(self) -> str:
        metadata = self.parts[0].metadata
        told = {k: e.value for k, e in metadata.items() if not k.startswith("general.")}
        return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()

    def require_device(self, device: str) -> None:
        if device not in ("auto", "cpu"):
            raise UsageError(f"--device {device}: a GGUF is calibrated by llama.cpp on the CPU")


def open_source(name: str, path: Path) -> GgufSource:
    """The GGUF at `path`, with all its parts checked.

    Raises:
        MoneEdgeError: it is not a GGUF, is damaged, lacks parts, has no experts, or is pruned.
    """
    if not is_gguf(path):
        raise MoneEdgeError(
            f"{path} is neither a GGUF nor a checkpoint folder; a model is one of these, a hub id "
            "or demo"
        )
    source = GgufSource(name, path, parts(path))
    if source.num_layers > len(source.tensors):
        raise MoneEdgeError(
            f"{name} says {source.num_layers} blocks, and has {len(source.tensors)} tensors"
        )
    if not source.num_experts:
        raise MoneEdgeError(
            f"{name} ({source.architecture}) is a dense model: its header has no "
            f"{source.architecture}.expert_count; there is nothing to prune"
        )
    _require_unpruned(source)
    _require_whole_stacks(source)
    return source


def parts(path: Path) -> tuple[Header, ...]:
    """The headers of all files of a model."""
    first = read_header(path)
    count = first.count("split.count")
    if count < 2:
        return (first,)
    match = PART.fullmatch(path.name)
    if not match or int(match["count"]) != count:
        raise MoneEdgeError(f"{path} is one of {count} parts, but its name does not say which")
    names = [f"{match['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    if path.name != names[0]:
        raise MoneEdgeError(f"{path} is part {match['number']} of {count}; name {names[0]}")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise MoneEdgeError(
            f"{path} lacks {len(missing)} of {count} parts, first {missing[0]}; fetch it again"
        )
    parts = (first, *(read_header(path.parent / name) for name in names[1:]))
    found = [name for part in parts for name in part.tensors]
    promised = first.count("split.tensors.count")
    if len(set(found)) != len(found) or len(found) != promised:
        raise MoneEdgeError(
            f"the {count} parts of {path} hold {len(set(found))} tensors, not {promised}; "
            "they do not belong together"
        )
    return parts


def _require_unpruned(source: GgufSource) -> None:
    header = source.parts[0]
    kept = header.value("{arch}.expert_kept_count")
    if kept is None and "mone.version" not in header.metadata:
        return
    before, kept = experts_left(source.parts)
    share = 1 - sum(kept) / (before * len(kept)) if kept and before else 0
    how = f" ({share:.1%} of its experts)" if share else ""
    raise MoneEdgeError(
        f"{source.name} is pruned already{how}; prune the model it was made from, at another "
        "--prune-ratio"
    )


def experts_left(parts: Sequence[Header]) -> tuple[int, tuple[int, ...]]:
    """Experts of a layer before pruning, and with weights in each layer now, if any are gone.

    Raises:
        MoneEdgeError: they are no numbers.
    """
    header, names = parts[0], {name for part in parts for name in part.tensors}
    stored = header.count("{arch}.expert_count")
    before = max(stored, header.count("mone.base_expert_count"))
    if before > stored:  # dropped or merged, as many in every block
        return before, (stored,) * sum(name.endswith(ROUTER) for name in names)
    kept = header.value("{arch}.expert_kept_count", [])
    if not isinstance(kept, list) or any(type(count) is not int for count in kept):
        raise MoneEdgeError(f"{header.file} does not tell in numbers how many experts it keeps")
    # blocks without experts have a number too
    return before, tuple(n for i, n in enumerate(kept) if f"blk.{i}{ROUTER}" in names)


def _require_whole_stacks(source: GgufSource) -> None:
    """Every stack of experts and every router must have as many rows as there are experts."""
    for name, ref in source.tensors.items():
        experts = ref.shape[1] if len(ref.shape) == 2 and ref.shape[0] == 1 else ref.shape[0]
        if PER_EXPERT.fullmatch(name) and experts != source.num_experts:
            raise MoneEdgeError(
                f"{source.path}: {name} is for {experts} experts, "
                f"{source.architecture}.expert_count says {source.num_experts}"
            )


def _any(entry: Entry) -> bool:
    """Whether gguf's writer can write it: an empty array it cannot."""
    return not isinstance(entry.value, list) or bool(entry.value)


def _value(entry: Entry) -> Any:
    from mone_edge.conversion import packages

    gguf, _ = packages()
    kind = gguf.GGUFValueType
    item = None if entry.item_kind is None else kind(entry.item_kind)
    return gguf.gguf_writer.GGUFValue(entry.value, kind(entry.kind), item)


def _lazy(ref: TensorRef) -> LazyTensor:
    """A stack of experts reads one at a time, any other tensor at once."""
    count = ref.shape[0] if len(ref.shape) == 3 else 1
    shape = ref.shape[1:] if count > 1 else ref.shape
    step = ref.size // count
    chunks: tuple[Chunk, ...] = tuple(
        functools.partial(_read, ref, ref.offset + i * step, step, shape) for i in range(count)
    )
    return LazyTensor(ref.shape, chunks, ref.dtype)


def _read(ref: TensorRef, offset: int, size: int, shape: tuple[int, ...]) -> Any:
    """Stored values: of `shape`, block types as bytes with whole rows in the last dimension.

    Raises:
        MoneEdgeError: the file has changed under our hands.
    """
    kind = np.dtype(NUMPY_TYPES.get(ref.dtype, "u1"))
    try:
        data = np.fromfile(ref.file, kind, size // kind.itemsize, offset=offset)
    except OSError as error:
        raise MoneEdgeError(f"cannot read {ref.file}: {error.strerror or error}") from error
    if data.nbytes != size:
        raise MoneEdgeError(f"{ref.file} became shorter while it was read")
    return data.reshape(shape if ref.dtype in NUMPY_TYPES else (*shape[:-1], -1))
