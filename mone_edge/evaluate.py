"""What models are worth on a text and on tasks, and how far they are from a base model.

In: models (a GGUF, a Hugging Face folder or hub id, `demo`), a text file, task files. Out: one
`EvalResult` a model. How a text and a task are scored is in `scoring` and `tasks`; this module
opens the models and puts the numbers together.
"""

import glob
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.harness import score_harness
from mone_edge.paths import exists, expand
from mone_edge.safetensors_header import weight_bytes
from mone_edge.scoring import (
    N_CTX,
    Divergence,
    LanguageModel,
    Logits,
    Progress,
    TextScore,
    score_text,
    silent,
)
from mone_edge.tasks import TaskItem, TaskScore, averages, first_of_each, read_items, score_items


@dataclass(frozen=True)
class EvalResult:
    """Everything measured on one model; parts that were not asked for are None or empty."""

    model: str
    file_bytes: int
    seconds: float
    text: TextScore | None = None
    divergence: Divergence | None = None
    tasks: dict[str, TaskScore] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document scripts read: `ppl`, `kld_mean`, `tasks.{name}.acc`, ... where measured."""
        document: dict[str, Any] = {"model": self.model, "file_bytes": self.file_bytes, "tokens": 0}
        for part in (self.text, self.divergence):
            document |= vars(part) if part else {}
        if self.tasks:
            scores: dict[str, Any] = {name: vars(score) for name, score in self.tasks.items()}
            document["tasks"] = scores | averages(self.tasks.values())
        return document | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Questions:
    """What every model is asked; read from files once."""

    text: str | None = None
    items: tuple[TaskItem, ...] = ()
    kld_base: str | None = None
    n_ctx: int = N_CTX
    max_chunks: int | None = None
    harness: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    offline: bool = False


def evaluate(
    models: Sequence[str | Path],
    *,
    text: Path | None = None,
    kld_base: str | Path | None = None,
    tasks: Sequence[Path] = (),
    harness: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    n_ctx: int = N_CTX,
    max_chunks: int | None = None,
    threads: int | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> list[EvalResult]:
    """Measure models, one after the other, on the same text and the same task items.

    Args:
        models: GGUF files, checkpoint folders, hub ids, or `demo`.
        text: UTF-8 text for perplexity (and KL divergence).
        kld_base: the model whose distributions count as right; it runs in lock-step with each
            model, so both must fit into memory, and no file of logits is written.
        tasks: files of task items.
        harness: names of tasks of lm-evaluation-harness.
        num_fewshot: examples before each of their questions; None is the task's own number.
        limit: at most this many items of each task, the first ones.
        n_ctx: tokens per chunk of text.
        max_chunks: stop after this many chunks.

    Raises:
        UsageError: nothing to measure, or a base without a text.
        MoneEdgeError: a file cannot be used; tokenizers of model and base differ.
    """
    if text is None and not tasks and not harness:
        raise UsageError("nothing to measure: give --ppl FILE, --tasks FILE.jsonl, or both")
    if kld_base is not None and text is None:
        raise UsageError("--kld-base compares models on a text: add --ppl FILE")
    questions = Questions(
        read_text(text) if text else None,
        tuple(first_of_each((i for path in tasks for i in read_items(path, limit)), limit)),
        str(kld_base) if kld_base is not None else None,
        n_ctx,
        max_chunks,
        tuple(harness),
        limit,
        num_fewshot,
        offline,
    )
    paths = [locate(str(model), offline=offline) for model in models]
    base = locate(questions.kld_base, offline=offline) if questions.kld_base else None
    return [
        _evaluate_one(str(model), path, base, questions, threads, progress)
        for model, path in zip(models, paths, strict=True)
    ]


def _evaluate_one(
    name: str,
    path: Path,
    base_path: Path | None,
    questions: Questions,
    threads: int | None,
    progress: Progress,
) -> EvalResult:
    start = time.monotonic()
    score = divergence = None
    with opened(path, threads) as model:
        if questions.text is not None:
            with opened(base_path, threads) as base:
                score, divergence = score_text(
                    model,
                    questions.text,
                    n_ctx=questions.n_ctx,
                    max_chunks=questions.max_chunks,
                    base=base,
                    base_name=questions.kld_base or "",
                    progress=progress,
                )
        scores = score_items(model, questions.items, progress)
        if questions.harness:
            scores |= score_harness(
                model,
                questions.harness,
                limit=questions.limit,
                num_fewshot=questions.num_fewshot,
                offline=questions.offline,
            )
    seconds = time.monotonic() - start
    return EvalResult(name, file_bytes(path), seconds, score, divergence, scores)


def locate(model: str, *, offline: bool = False) -> Path:
    """The file or folder of a model to evaluate; dense models are welcome too."""
    path = expand(model)
    if exists(path):
        return path
    from mone_edge import source

    return source.resolve(model, offline=offline).path


def read_text(path: Path) -> str:
    """A text file as it is, newlines untouched.

    Raises:
        MoneEdgeError: it is missing or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise MoneEdgeError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MoneEdgeError(
            f"{path} is not UTF-8 text: byte {error.start}: {error.reason}"
        ) from error


def file_bytes(path: Path) -> int:
    """Bytes of a GGUF (all parts of a split one), or of a checkpoint folder's weights."""
    if path.is_dir():
        return weight_bytes(path)
    stem, found, rest = path.name.rpartition("-00001-of-")
    pattern = f"{glob.escape(stem)}-*-of-{glob.escape(rest)}"
    parts = path.parent.glob(pattern) if found else [path]
    return sum(part.stat().st_size for part in parts)


@contextmanager
def opened(path: Path | None, threads: int | None) -> Iterator[Any]:
    """A `LanguageModel` for the time of a block (None for None)."""
    model = open_model(path, threads) if path else None
    try:
        yield model
    finally:
        if model:
            model.close()


def open_model(path: Path, threads: int | None = None) -> LanguageModel:
    """Open a checkpoint folder in torch, anything else as a GGUF."""
    if path.is_dir():
        return TorchModel.open(path, threads)
    from mone_edge.llama import GgufModel

    return GgufModel(path, threads=threads)


class TorchModel:
    """A transformers causal language model as a `LanguageModel`; logits computed in float32.

    Args:
        model: in evaluation mode; where its weights are decides where it runs.
        tokenizer: its transformers tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, folder: Path, threads: int | None = None) -> "TorchModel":
        """Load a checkpoint folder.

        Raises:
            MoneEdgeError: it is damaged, or transformers cannot read it.
        """
        import torch

        from mone_edge.calibration import transformers_tokenizer
        from mone_edge.collect.loading import load_model
        from mone_edge.source import open_folder

        if threads:
            torch.set_num_threads(threads)
        checked = open_folder(folder).path
        tokenizer = transformers_tokenizer(checked)
        return cls(load_model(checked, device="cpu", dtype="float32"), tokenizer)

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_output_embeddings().weight.shape[0])

    @property
    def bos_id(self) -> int | None:
        bos: int | None = self._tokenizer.bos_token_id
        return bos if bos is not None and self.token_ids("a")[:1] == [bos] else None

    @property
    def start_id(self) -> int | None:
        bos: int | None = self._tokenizer.bos_token_id
        return self._tokenizer.eos_token_id if bos is None else bos

    @property
    def context_length(self) -> int:
        config = self._model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2**31)

    def token_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        rows: Logits = self._read([tokens], len(tokens) - first, use_cache=False)[0][0]
        return rows

    def branch_logits(
        self, prefix: Sequence[int], branches: Sequence[Sequence[int]]
    ) -> list[Logits]:
        """The prefix is read once, and all branches go on from its cache together.

        Not with recurrent layers, nor where a model gives no cache: Jamba's, for one, forget the
        prefix when more than one token follows.
        """
        separately = getattr(self._model, "_is_stateful", False)
        if not separately:
            start, cache = self._read([prefix], 1, use_cache=True)
            separately = not _repeats(cache)
        if separately:
            return [self.logits([*prefix, *branch[:-1]], len(prefix) - 1) for branch in branches]
        longest = max(map(len, branches)) - 1
        rows = np.empty((len(branches), 0, self.vocab_size), np.float32)
        if longest:
            cache.batch_repeat_interleave(len(branches))
            # what fills up the shorter ones comes after them, where no token of theirs looks
            read = [[*branch[:-1], *[0] * longest][:longest] for branch in branches]
            rows = self._read(read, longest, use_cache=True, past_key_values=cache)[0]
        return [
            np.concatenate([start[0], row[: len(branch) - 1]])
            for branch, row in zip(branches, rows, strict=True)
        ]

    def _read(
        self, sequences: Sequence[Sequence[int]], last: int, **options: Any
    ) -> tuple[Logits, Any]:
        """Logits [sequences, last, vocabulary] of the last tokens; the cache, where one is used."""
        import torch

        from mone_edge.transformers_quiet import quiet

        with torch.inference_mode(), quiet(), warnings.catch_warnings():
            # `past_key_values` is `cache` since transformers 5.24, which warns in two ways
            warnings.simplefilter("ignore", FutureWarning)
            ids = torch.tensor([list(tokens) for tokens in sequences], device=self._model.device)
            output = self._model(ids, logits_to_keep=last, **options)
            result: Logits = output.logits.float().cpu().numpy()
            return result, output.get("past_key_values")

    def close(self) -> None:
        self._model = None


def _repeats(cache: Any) -> bool:
    """Whether a cache of transformers can serve several continuations at once."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(hasattr(layer, "batch_repeat_interleave") for layer in layers)
