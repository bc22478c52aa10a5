"""Calibration text -> packed token sequences.

In: data specs (text files, jsonl, hub datasets) and a tokenizer. Out: `Batches`, whole sequences
without padding, the same for the same seed. Knows nothing about models or statistics.

Sampling: each source is tokenized document by document, an end-of-sequence token (if the tokenizer
has one) between documents, and cut into consecutive sequences of `seq_len`. Reading stops at four
times the tokens wanted, so that long corpora are not read to the end. `samples` are shared among
the sources by their weights (`SPEC@WEIGHT`, else 1); from each, distinct sequences are drawn by
`numpy.random.default_rng([seed, source])` and kept in the order of the text. A source with too few
sequences leaves its share to the others.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mone_edge import hub
from mone_edge.documents import is_text, parse_json, reason
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.paths import exists, expand, is_file

SAMPLES, SEQ_LEN, SEED = 128, 2048, 42
HEADROOM = 4  # tokens read, as a multiple of the tokens wanted
MAX_CHARACTERS_PER_TOKEN = 8
MIN_SEQ_LEN = 16
MOST = 1 << 20  # sequences, or tokens of one; so that no product of both overflows
MOST_WEIGHT = 1e6
ROUNDING = 1e-9  # so that a whole number of sequences is not one less in floating point
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
TEXT_COLUMNS = ("text", "content")
FILE_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".ndjson")

_HUB = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:\[(?P<subset>[^\]]+)\])?"
    r"(?:\((?P<split>[^)]+)\))?(?::(?P<limit>\d+))?"
)
_WEIGHTED = re.compile(r"(?P<spec>.+)@(?P<weight>\d+(?:\.\d+)?|\.\d+)")


class Tokenizer(Protocol):
    """What packing needs of a tokenizer."""

    @property
    def eos_id(self) -> int | None:
        """The token between documents."""

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, none added at its ends."""

    def chat(self, messages: list[Any]) -> str | None:
        """Messages through the chat template, None if there is none."""


class TransformersTokenizer:
    """A transformers tokenizer as `Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def eos_id(self) -> int | None:
        found: int | None = self._tokenizer.eos_token_id
        return found

    def ids(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def chat(self, messages: list[Any]) -> str | None:
        if not getattr(self._tokenizer, "chat_template", None):
            return None
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))


@dataclass(frozen=True)
class Batches:
    """Packed calibration tokens and where they come from."""

    tokens: NDArray[np.int64]  # [samples, seq_len]
    specs: tuple[str, ...]  # as given; none: the text that comes with the package
    sha256: str  # of the token ids, little-endian int64, row by row
    seed: int
    requested_samples: int
    requested_seq_len: int
    available_tokens: int  # in all sources together
    unused: tuple[str, ...] = ()  # sources too short for one sequence of their own

    @property
    def short(self) -> str:
        """What was asked for and could not be had, in numbers; empty if nothing was missing."""
        samples, seq_len = self.tokens.shape
        if (samples, seq_len) == (self.requested_samples, self.requested_seq_len):
            names = ", ".join(self.unused)
            return names and f"--data {names}: unused, less than one sequence of {seq_len} tokens"
        return (
            f"the calibration text has {self.available_tokens:,} tokens: using {samples} sequences "
            f"of {seq_len}, not {self.requested_samples} of {self.requested_seq_len}; add --data"
        )


def load(
    specs: Sequence[str],
    tokenizer: Tokenizer,
    *,
    samples: int = SAMPLES,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    offline: bool = False,
) -> Batches:
    """Read, tokenize and pack calibration text.

    Args:
        specs: files or `name[subset](split):N` of hub datasets (a local path wins), each with its
            weight if `@WEIGHT` follows; none means the text that comes with the package.
        tokenizer: the model's own (`Source.tokenizer`).
        samples: sequences wanted.
        seq_len: tokens per sequence. Text shorter than one sequence gives one shorter sequence.
        seed: of the sampling.
        offline: read hub datasets from the local cache only.

    Raises:
        MoneEdgeError: a source cannot be read, or holds less than 16 tokens.
        UsageError: `samples` or `seq_len` make no sense.
    """
    if not (1 <= samples <= MOST and MIN_SEQ_LEN <= seq_len <= MOST):
        raise UsageError(
            f"--samples {samples} --seq-len {seq_len}: 1 to {MOST} sequences of {MIN_SEQ_LEN} to "
            f"{MOST} tokens"
        )
    names = tuple(specs) or (_default_spec(),)
    places, weights = zip(*map(split_weight, names), strict=True)
    enough = HEADROOM * samples * seq_len
    streams = [_token_stream(place, tokenizer, enough, offline) for place in places]
    available = sum(map(len, streams))
    if available < MIN_SEQ_LEN:
        raise MoneEdgeError(
            f"calibration data {', '.join(names)}: {available} tokens in all, "
            f"at least {MIN_SEQ_LEN} are needed; add --data"
        )
    tokens = _pack(streams, weights, samples, seq_len, seed)
    sha256 = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
    length = tokens.shape[1]
    unused = [n for n, s in zip(names, streams, strict=True) if len(s) < length == seq_len]
    return Batches(tokens, tuple(specs), sha256, seed, samples, seq_len, available, tuple(unused))


def require(specs: Sequence[str]) -> None:
    """Refuse what `load` would: files that are not there, and names that no dataset can have.

    Raises:
        MoneEdgeError: there is one among `specs`.
    """
    for spec in specs:
        _find(split_weight(spec)[0])


def split_weight(spec: str) -> tuple[str, float]:
    """`web.txt@3` -> `web.txt` and 3.0; weight 1 where none is given. A path that exists wins.

    Raises:
        UsageError: the weight is 0.
    """
    match = _WEIGHTED.fullmatch(spec)
    if match is None or exists(expand(spec)):
        return spec, 1.0
    if not (weight := float(match["weight"])):
        raise UsageError(f"--data {spec}: a source of weight 0 is not read; leave it out")
    if not 1 / MOST_WEIGHT <= weight <= MOST_WEIGHT:
        raise UsageError(f"--data {spec[:80]}: weights are from 1e-6 to 1e6")
    return match["spec"], weight


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, to pack text with."""
    return TransformersTokenizer(transformers_tokenizer(folder))


def transformers_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a checkpoint folder, from local files only.

    Raises:
        MoneEdgeError: the folder has none that transformers can read.
    """
    from transformers import AutoTokenizer

    from mone_edge.transformers_quiet import LOAD_ERRORS, quiet

    if not any(is_file(folder / name) for name in TOKENIZER_FILES):
        raise MoneEdgeError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); fetch the model again"
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except LOAD_ERRORS as error:
        raise MoneEdgeError(f"{folder}: no usable tokenizer: {reason(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # the Rust tokenizer raises nothing more special
            raise
        raise MoneEdgeError(f"{folder}: damaged tokenizer: {reason(error)}") from error


def _default_spec() -> str:
    from mone_edge.demo import calibration_text

    return str(calibration_text())


def _pack(
    streams: Sequence[NDArray[np.int64]],
    weights: Sequence[float],
    samples: int,
    seq_len: int,
    seed: int,
) -> NDArray[np.int64]:
    """Draw whole sequences from every source; one shorter sequence if there is no whole one."""
    rows = [stream[: len(stream) // seq_len * seq_len].reshape(-1, seq_len) for stream in streams]
    if not any(len(r) for r in rows):
        return np.concatenate(streams)[None, :seq_len]
    picked = []
    shares = _shares([len(r) for r in rows], weights, samples)
    for source, (row, take) in enumerate(zip(rows, shares, strict=True)):
        rng = np.random.default_rng([seed, source])
        picked.append(row[np.sort(rng.choice(len(row), take, replace=False))])
    return np.concatenate(picked)


def _shares(available: Sequence[int], weights: Sequence[float], samples: int) -> list[int]:
    """Split `samples` by weight over sources that hold `available` sequences each."""
    shares, left, rest = [0] * len(available), samples, sum(weights)
    # what a source cannot give must fall to those that come after it
    for source in sorted(range(len(available)), key=lambda i: available[i] / weights[i]):
        fair = int(left * weights[source] / rest + ROUNDING)
        shares[source] = min(available[source], fair)
        left -= shares[source]
        rest -= weights[source]
    return shares


def _token_stream(spec: str, tokenizer: Tokenizer, enough: int, offline: bool) -> NDArray[np.int64]:
    """Token ids of a source, documents joined by the end-of-sequence token."""
    ids: list[int] = []
    eos = tokenizer.eos_id
    for document in _documents(spec, tokenizer, enough, offline):
        encoded = tokenizer.ids(document)
        if ids and encoded and eos is not None:
            ids.append(eos)
        ids.extend(encoded)
        if len(ids) >= enough:
            break
    return np.asarray(ids, dtype=np.int64)


def _documents(spec: str, tokenizer: Tokenizer, enough: int, offline: bool) -> Iterator[str]:
    found = _find(spec)
    if isinstance(found, Path):
        return _file_documents(found, tokenizer, enough * MAX_CHARACTERS_PER_TOKEN)
    return _hub_documents(spec, found, tokenizer, offline)


def _find(spec: str) -> "Path | re.Match[str]":
    """The file, or the parts of a dataset's name."""
    path = expand(spec)
    if exists(path) and path.is_dir():
        raise MoneEdgeError(f"--data {spec} is a folder; name a text or jsonl file in it")
    if is_file(path):
        return path
    match = _HUB.fullmatch(spec)
    looks_like_file = path.suffix in FILE_SUFFIXES or spec.startswith((".", "/", "~"))
    if match is None or looks_like_file:
        raise MoneEdgeError(
            f"--data {spec}: no such file, and not a dataset name like name[subset](split):N"
        )
    return match


def _file_documents(path: Path, tokenizer: Tokenizer, characters: int) -> Iterator[str]:
    try:
        if path.suffix not in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8-sig") as file:
                yield file.read(characters)
            return
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _record_text(
                        _json(line, path, number), tokenizer, f"{path}, line {number}"
                    )
    except UnicodeDecodeError as error:
        raise MoneEdgeError(f"--data {path} is not UTF-8 text: byte {error.start}") from error
    except OSError as error:
        raise MoneEdgeError(f"cannot read --data {path}: {error.strerror}") from error


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise MoneEdgeError(f"{path}, line {number}: not JSON: {reason(error)}") from error


def _record_text(record: Any, tokenizer: Tokenizer, where: str) -> str:
    """The text of a record: its "text", or its "messages" through the tokenizer's chat template."""
    if isinstance(record, dict):
        for column in TEXT_COLUMNS:
            if is_text(record.get(column)):
                return str(record[column])
        if isinstance(record.get("messages"), list):
            return _chat_text(record["messages"], tokenizer, where)
    raise MoneEdgeError(f'{where}: no "text" and no "messages" to calibrate on')


def _chat_text(messages: list[Any], tokenizer: Tokenizer, where: str) -> str:
    try:
        text = tokenizer.chat(messages)
    except Exception as error:  # a template is a program, and may fail like one
        raise MoneEdgeError(
            f"{where}: the chat template refuses these messages: {reason(error)}"
        ) from error
    if text is not None and not is_text(text):
        raise MoneEdgeError(f"{where}: its messages hold half of a surrogate pair")
    if text is None:
        raise MoneEdgeError(f'{where}: has "messages", but the tokenizer has no chat template')
    return text


def _hub_documents(
    spec: str, match: re.Match[str], tokenizer: Tokenizer, offline: bool
) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise MoneEdgeError(
            f"--data {spec}: no such file; hub datasets need: pip install datasets"
        ) from error
    hub.say_less()
    if offline:
        hub.stay_offline()
    split = match["split"] or "train"
    try:
        rows = datasets.load_dataset(
            match["name"], match["subset"], split=split, streaming=not offline
        )
        limit = int(match["limit"]) if match["limit"] else None
        for number, row in enumerate(islice(rows, limit), 1):
            yield _record_text(row, tokenizer, f"{spec}, row {number}")
    except MoneEdgeError:
        raise
    except Exception as error:  # the library's errors have no common base
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise MoneEdgeError(
            f"--data {spec}: not a local file, and not loaded: {first_line}"
        ) from error
