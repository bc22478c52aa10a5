"""What MODEL is, from headers only: a hub id, a checkpoint folder, a GGUF file, or `demo`.

In: the word the user typed. Out: a `Source`: what its headers say, an index of tensors, a
fingerprint of the weights, and the ways to open it and to measure it. Loads no weights.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mone_edge.config import (
    EXPERT_COUNT_KEYS,
    LAYER_COUNT_KEYS,
    TOP_K_KEYS,
    check_shapes,
    count,
    read_config,
)
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import exists, expand, is_file
from mone_edge.safetensors_header import TensorRef, read_header, shards

if TYPE_CHECKING:
    from mone_edge.calibration import Batches, Tokenizer
    from mone_edge.collect.work import Work
    from mone_edge.low_rank import LowRankNovices
    from mone_edge.model_file import ModelFile
    from mone_edge.plan import PrunePlan
    from mone_edge.stats import ExpertStats

Progress = Callable[[int, int], None]

PRUNED_METHOD = "mone-edge"  # quantization_config.quant_method of a pruned checkpoint
# names of files that decide how text is read
TEXT_FILE = re.compile(r"token|chat_template|^vocab\.|^merges\.")
FOREIGN_SUFFIX = "_compressed"  # of the model_type that other pruners give their checkpoints
FOREIGN_NOVICES = {"version": 1, "replacement_type": "constant"}
CUT = "mone_edge"  # in config.json: which experts were dropped or merged
FINGERPRINT_BYTES = 64  # of each tensor: enough to tell two trainings of one shape apart
# The name of a tensor of one expert: everything before its number, the number, the rest.
EXPERT_KEY = re.compile(r"(?P<prefix>.*\bexperts\.(?:[a-z_]\w*\.)*)(?P<id>\d+)\.(?P<part>.+)")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


@dataclass(frozen=True)
class Source(ABC):
    """A Mixture-of-Experts model on disk, whatever its format."""

    name: str  # as the user named it
    path: Path  # a checkpoint's folder, a GGUF's first file

    keeps_types: ClassVar[bool] = False  # whether its tensors have ggml types that can stay

    @property
    @abstractmethod
    def label(self) -> str:
        """A short name for files."""

    @property
    def file_type(self) -> str:
        """llama.cpp's name of the types that it has, where they can be kept."""
        return "keep"

    @property
    @abstractmethod
    def architecture(self) -> str:
        """The format's own name of the architecture."""

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """Experts a layer; 0 for a dense model."""

    @property
    @abstractmethod
    def top_k(self) -> int:
        """Experts that a token is sent to."""

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Blocks of the model."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorRef]:
        """Every tensor, by name."""

    @abstractmethod
    def open(self, *, dtype: str = "F32", tokenizer_pre: str = "") -> "ModelFile":
        """The model as a GGUF holds it, nothing read yet.

        Args:
            dtype: type of the weights, where the format leaves a choice ("F32", "F16", "BF16").
            tokenizer_pre: name of the pre-tokenizer, for one that is not recognised.
        """

    @abstractmethod
    def tokenizer(self) -> "Tokenizer":
        """The model's own, to pack calibration text."""

    @abstractmethod
    def collect(
        self,
        batches: "Batches",
        *,
        device: str = "auto",
        threads: int | None = None,
        sequential: bool = False,
        work: "Work | None" = None,
        progress: Progress | None = None,
    ) -> "ExpertStats | None":
        """Run packed tokens through the model and gather every statistic.

        Args:
            sequential: keep one layer's weights in memory; needs `work`.
            work: where what is finished is kept until the caller has saved the statistics.

        Returns:
            The statistics; None in processes of a torchrun other than the first.
        """

    @abstractmethod
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
        """Fit low-rank novices for the experts that a plan prunes.

        Args:
            work: where what is finished is kept until the caller has saved the novices.
        """

    @property
    def is_pruned(self) -> bool:
        """Whether experts are missing already, with novices in their place."""
        return False

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the model that plans and statistics are of."""
        return self.fingerprint

    @abstractmethod
    def settings_sha256(self) -> str:
        """Of what decides, beside the weights, how text is read and what is computed."""

    @abstractmethod
    def require_device(self, device: str) -> None:
        """Refuse a torch device (or "auto") that the model cannot be measured on.

        Raises:
            UsageError: there is none, or it is not for this format.
        """

    def fits(self, device: str = "auto") -> bool:
        """Whether the whole model has room in the memory that it is measured in."""
        return True

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.size for ref in self.tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(dict.fromkeys(ref.file for ref in self.tensors.values()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names, types, shapes and first bytes of all tensors."""
        digest = hashlib.sha256()
        handles = {file: file.open("rb") for file in {r.file for r in self.tensors.values()}}
        try:
            for name, ref in self.tensors.items():
                digest.update(f"{name} {ref.dtype} {ref.shape}\n".encode())
                handles[ref.file].seek(ref.offset)
                digest.update(handles[ref.file].read(min(ref.size, FINGERPRINT_BYTES)))
        finally:
            for handle in handles.values():
                handle.close()
        return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint(Source):
    """A checkpoint in the Hugging Face format."""

    config: Mapping[str, Any]

    def settings_sha256(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for file in sorted(self.path.iterdir()):
            if TEXT_FILE.search(file.name) and is_file(file):
                digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    @property
    def label(self) -> str:
        """The folder's name, or the hub id's without its owner."""
        if exists(expand(self.name)):
            return self.path.resolve().name
        return self.name.partition("@")[0].rpartition("/")[2]

    @property
    def architecture(self) -> str:
        """transformers' model_type."""
        return str(self.config.get("model_type", "?"))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config (the whole of it for a text-only model)."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def is_pruned(self) -> bool:
        """Whether experts are missing, with novices in their place (`mone_edge.checkpoint`)."""
        return bool(self.pruned_plan or self.novice_ids)

    @property
    def cut(self) -> str:
        """What of its experts is gone, of a checkpoint that lost router rows too; else empty."""
        found = self.config.get(CUT)
        if not isinstance(found, dict):
            return ""
        kept, total = found.get("experts_kept"), found.get("experts")
        return f"{kept} of {total} experts a layer are left, by {found.get('method')}"

    @property
    def pruned_plan(self) -> Mapping[str, Any]:
        """The plan of a pruned checkpoint of ours, as its config.json has it."""
        found = self.config.get("quantization_config")
        if not isinstance(found, dict) or found.get("quant_method") != PRUNED_METHOD:
            return {}
        plan = found.get("plan")
        return plan if isinstance(plan, dict) else {}

    @property
    def novice_ids(self) -> Mapping[str, Any]:
        """Pruned experts by layer, as other MoNE pruners write them too.

        mode-pd and llm-compressor name them in `approximate_experts`, vLLM's loader in `mone`.

        Raises:
            MoneEdgeError: they are replaced in a way that is not known.
        """
        described = self.text_config.get("mone")
        if isinstance(described, dict):
            kind = {key: described.get(key) for key in FOREIGN_NOVICES}
            if kind != FOREIGN_NOVICES:
                raise MoneEdgeError(
                    f"{self.path / 'config.json'}: mone is {kind}; only {FOREIGN_NOVICES} is known"
                )
            found = described.get("experts_by_layer")
        else:
            found = self.text_config.get("approximate_experts")
        if isinstance(found, list):
            found = {str(layer): ids for layer, ids in enumerate(found)}
        found = found if isinstance(found, dict) else {}
        for layer, ids in found.items():
            if not isinstance(ids, list) or any(type(i) is not int for i in ids):
                raise MoneEdgeError(
                    f"{self.path / 'config.json'}: the pruned experts of layer {layer} are no list "
                    "of numbers"
                )
        return found

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the model that plans and statistics are of."""
        return str(self.pruned_plan.get("fingerprint") or self.fingerprint)

    @property
    def num_experts(self) -> int:
        return count(self.text_config, EXPERT_COUNT_KEYS)

    @property
    def top_k(self) -> int:
        return count(self.text_config, TOP_K_KEYS)

    @property
    def num_layers(self) -> int:
        return count(self.text_config, LAYER_COUNT_KEYS)

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Every tensor of the checkpoint, by name.

        Raises:
            MoneEdgeError: a shard is missing, truncated or not a safetensors file.
        """
        found: dict[str, TensorRef] = {}
        for file in shards(self.path):
            found |= read_header(file)
        return dict(sorted(found.items()))

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the checkpoint folder."""
        return tuple(sorted(path for path in self.path.iterdir() if path.is_file()))

    def open(self, *, dtype: str = "F32", tokenizer_pre: str = "") -> "ModelFile":
        """See `conversion.open_checkpoint`."""
        from mone_edge.conversion import open_checkpoint

        return open_checkpoint(self, dtype=dtype, tokenizer_pre=tokenizer_pre)

    def tokenizer(self) -> "Tokenizer":
        """See `calibration.load_tokenizer`."""
        from mone_edge.calibration import load_tokenizer

        return load_tokenizer(self.path)

    def collect(
        self,
        batches: "Batches",
        *,
        device: str = "auto",
        threads: int | None = None,
        sequential: bool = False,
        work: "Work | None" = None,
        progress: Progress | None = None,
    ) -> "ExpertStats | None":
        """See `collect.checkpoint.collect_checkpoint`."""
        from mone_edge.collect.checkpoint import collect_checkpoint

        return collect_checkpoint(
            self,
            batches,
            device=device,
            threads=threads,
            sequential=sequential,
            work=work,
            progress=progress,
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
        """See `collect.fitting.fit_checkpoint`."""
        import torch

        from mone_edge.collect.fitting import fit_checkpoint

        if threads:
            torch.set_num_threads(threads)
        return fit_checkpoint(self, plan, batches, work, device=device, on_progress=progress)

    def require_device(self, device: str) -> None:
        from mone_edge.collect.loading import choose_device

        choose_device(device)

    def fits(self, device: str = "auto") -> bool:
        from mone_edge.collect import loading

        return loading.fits(self.path, loading.choose_device(device))


def is_gguf(path: Path) -> bool:
    """Whether a file starts as a GGUF does."""
    if not is_file(path):
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise MoneEdgeError(f"cannot read {path}: {error.strerror}") from error


def resolve(model: str, *, offline: bool = False) -> Source:
    """Find MODEL, checking all that its headers can tell.

    Args:
        model: hub id `org/name[@revision]`, checkpoint folder, GGUF file, or `demo`; a local path
            wins.
        offline: never ask the network.

    Raises:
        MoneEdgeError: it is not there, is damaged, is not a Mixture-of-Experts model, or is a GGUF
            that is pruned already.
    """
    path = _locate(model, offline=offline)
    if path.is_file():
        from mone_edge.gguf_file import open_source

        return open_source(model, path)
    source = open_folder(path, model)
    if not source.num_experts:
        raise MoneEdgeError(
            f"{model} ({source.architecture}) is a dense model: its config.json names no experts "
            f"({', '.join(EXPERT_COUNT_KEYS)}); there is nothing to prune"
        )
    if not _top_k_fits(source):
        raise MoneEdgeError(
            f"{path / 'config.json'}: {source.top_k} experts a token of {source.num_experts} "
            "cannot be"
        )
    return source


def open_folder(path: Path, name: str = "") -> Checkpoint:
    """A checkpoint folder, dense ones too, with config and headers checked.

    Raises:
        MoneEdgeError: it is no checkpoint, is damaged, or config and weights differ.
    """
    source = Checkpoint(name or str(path), path, read_config(path))
    shapes = ((tensor, ref.shape) for tensor, ref in source.tensors.items())
    check_shapes(path / "config.json", source.text_config, shapes)
    return source


def _top_k_fits(source: Checkpoint) -> bool:
    given = any(source.text_config.get(key) is not None for key in TOP_K_KEYS)
    return not given or 0 < source.top_k <= source.num_experts


def _locate(model: str, *, offline: bool) -> Path:
    path = expand(model)
    if exists(path):
        return path
    if model == "demo":
        from mone_edge import demo

        return demo.model_dir(offline=offline)
    if HUB_ID.match(model) and path.suffix != ".gguf":
        from mone_edge.hub import download

        return download(model, offline=offline)
    raise MoneEdgeError(
        f"no model {model}: not a file or folder here, not a hub id (org/name), not the word demo"
    )
