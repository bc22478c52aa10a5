"""Perplexity and KL divergence, as llama.cpp's `llama-perplexity` (tools/perplexity) defines them.

In: a `LanguageModel` (ids of a text, logits of ids), a text, perhaps a base model. Out: a
`TextScore` and a `Divergence`. Knows nothing about files, frameworks or pruning.

The text is cut into chunks of `n_ctx` tokens, the first id of each chunk is replaced by BOS where
the model wants one, and only the second half of a chunk is scored, so that every prediction has at
least half a context before it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mone_edge.errors import MoneEdgeError

Logits = NDArray[np.float32]
Float = NDArray[np.float64]
Progress = Callable[[str, int, int], None]  # what, done, total

N_CTX = 512  # tokens per chunk of text
LARGEST_LOSS = 700.0  # nats a token, whose exponential is a number
ROWS_AT_ONCE = 64  # of [positions, vocabulary]: bounds the temporaries of a large vocabulary


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""
    del what, done, total


class LanguageModel(Protocol):
    """What scoring asks of a model."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    @property
    def bos_id(self) -> int | None:
        """The id that starts every sequence, None if the tokenizer adds none."""

    @property
    def start_id(self) -> int | None:
        """BOS, whether the tokenizer adds it or not; without one EOS."""

    @property
    def context_length(self) -> int:
        """Tokens of context the model was trained with."""

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text, with BOS if the model wants one."""

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """Logits [len(tokens) - first, vocabulary] that predict what follows each position."""

    def branch_logits(
        self, prefix: Sequence[int], branches: Sequence[Sequence[int]]
    ) -> list[Logits]:
        """For each continuation of the prefix, the logits [len(branch), vocabulary] of its ids."""

    def close(self) -> None:
        """Free the memory."""


@dataclass(frozen=True)
class TextScore:
    """Perplexity over the scored positions of a text."""

    ppl: float
    ppl_stderr: float
    tokens: int  # positions scored
    chunks: int
    n_ctx: int


@dataclass(frozen=True)
class Divergence:
    """KL(base || model) of next-token distributions, in nats, over the positions of a TextScore."""

    kld_base: str
    kld_mean: float
    kld_stderr: float
    kld_median: float
    kld_p99: float  # 99 % of positions diverge less
    kld_max: float
    same_top_p: float  # share of positions where both models' most likely token is the same
    same_top_p_stderr: float
    ppl_base: float


def log_softmax(logits: Logits) -> Logits:
    """Log-probabilities [n, vocabulary]; exponentials in float32, their sums in float64."""
    result = np.empty_like(logits)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = logits[start : start + ROWS_AT_ONCE]
        shifted = rows - rows.max(axis=1, keepdims=True)
        total = np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)
        result[start : start + ROWS_AT_ONCE] = shifted - np.log(total)
    return result


def kl_divergence(base: Logits, model: Logits) -> Float:
    """KL(base || model) of each row of log-probabilities [n, vocabulary], in nats.

    `llama-perplexity` leaves out tokens with a base probability under e^-16 because it stores
    log-probabilities in 16 bits; here they count, so its value may be smaller by about that.
    """
    parts = [np.empty(0)]
    for start in range(0, len(base), ROWS_AT_ONCE):
        p, q = base[start : start + ROWS_AT_ONCE], model[start : start + ROWS_AT_ONCE]
        probability = np.exp(p)
        gap = np.subtract(p, q, out=np.zeros_like(p), where=probability > 0)  # no -inf - -inf
        parts.append((probability * gap).sum(axis=1, dtype=np.float64))
    return np.concatenate(parts)


def mean_and_stderr(values: Float) -> tuple[float, float]:
    """Mean and its standard error, sqrt((E[x^2] - E[x]^2) / (n - 1)); 0 for fewer than 2 values."""
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def share_stderr(share: float, count: int) -> float:
    """Standard error of a share of `count` items: sqrt(p (1 - p) / (n - 1))."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.0


def require_tokens(count: int, n_ctx: int) -> None:
    """Refuse a text of less than two chunks.

    Raises:
        MoneEdgeError: it has `count` tokens only.
    """
    if count < 2 * n_ctx:
        enough = f", or less context: mone-edge eval --ctx-size {count // 2}" if count >= 8 else ""
        raise MoneEdgeError(
            f"the text has {count} tokens, perplexity needs at least {2 * n_ctx} with a context "
            f"of {n_ctx}; give a longer text{enough}"
        )


def chunk_ids(
    model: LanguageModel, text: str, n_ctx: int, max_chunks: int | None
) -> list[list[int]]:
    """Cut a text into chunks of `n_ctx` ids; what does not fill a chunk is left out.

    As `llama-perplexity` does, one newline at the end of the text is dropped first.

    Raises:
        MoneEdgeError: the text is shorter than two chunks.
    """
    if n_ctx < 4:
        raise MoneEdgeError(f"a context of {n_ctx} tokens leaves nothing to score; give 4 or more")
    ids = model.token_ids(text.removesuffix("\n"))
    require_tokens(len(ids), n_ctx)
    count = min(len(ids) // n_ctx, max_chunks or len(ids))
    return [ids[i * n_ctx : (i + 1) * n_ctx] for i in range(count)]


def require_same_ids(model: LanguageModel, base: LanguageModel, text: str) -> None:
    """Refuse to compare distributions over different vocabularies.

    Raises:
        MoneEdgeError: sizes of the vocabularies, BOS rules, or ids of the text differ.
    """
    if model.vocab_size != base.vocab_size:
        raise MoneEdgeError(
            f"KL divergence needs one vocabulary: the model has {model.vocab_size} tokens, "
            f"the base {base.vocab_size}"
        )
    pairs = zip_longest(model.token_ids(text), base.token_ids(text))
    different = next(((i, a, b) for i, (a, b) in enumerate(pairs) if a != b), None)
    if different or model.bos_id != base.bos_id:
        where = "at token {}: {} and {}".format(*different) if different else "at its start (BOS)"
        raise MoneEdgeError(
            f"KL divergence needs one tokenizer: model and base differ on this text {where}"
        )


def score_text(
    model: LanguageModel,
    text: str,
    *,
    n_ctx: int = N_CTX,
    max_chunks: int | None = None,
    base: LanguageModel | None = None,
    base_name: str = "",
    progress: Progress = silent,
) -> tuple[TextScore, Divergence | None]:
    """Perplexity of a text, and divergence from a base model that reads the same chunks.

    Raises:
        MoneEdgeError: the text is too short, tokenizers differ, or a model computes NaN.
    """
    chunks = chunk_ids(model, text, n_ctx, max_chunks)
    if base:
        require_same_ids(model, base, text)
    first = n_ctx // 2
    nll, base_nll, klds, same = [], [], [], []
    for number, chunk in enumerate(chunks):
        tokens = chunk if model.bos_id is None else [model.bos_id, *chunk[1:]]
        targets = np.array(chunk[first + 1 :])
        scores = _log_probabilities(model, tokens, first)
        nll.append(-_pick(scores, targets))
        if base:
            base_scores = _log_probabilities(base, tokens, first)
            base_nll.append(-_pick(base_scores, targets))
            klds.append(kl_divergence(base_scores, scores))
            same.append(scores.argmax(axis=1) == base_scores.argmax(axis=1))
        progress("text", number + 1, len(chunks))
    mean, stderr = mean_and_stderr(np.concatenate(nll))
    if mean > LARGEST_LOSS:
        raise MoneEdgeError(
            f"the model's perplexity is e^{mean:.3g}, which is no number: its weights are damaged"
        )
    ppl = math.exp(mean)
    score = TextScore(ppl, ppl * stderr, sum(map(len, nll)), len(chunks), n_ctx)
    if not base:
        return score, None
    base_ppl = math.exp(mean_and_stderr(np.concatenate(base_nll))[0])
    return score, _divergence(base_name, np.concatenate(klds), np.concatenate(same), base_ppl)


def _divergence(name: str, klds: Float, same: NDArray[np.bool_], base_ppl: float) -> Divergence:
    mean, stderr = mean_and_stderr(klds)
    share = float(same.mean())
    return Divergence(
        kld_base=name,
        kld_mean=mean,
        kld_stderr=stderr,
        kld_median=float(np.median(klds)),
        kld_p99=float(np.quantile(klds, 0.99)),
        kld_max=float(klds.max()),
        same_top_p=share,
        same_top_p_stderr=share_stderr(share, len(same)),
        ppl_base=base_ppl,
    )


def _log_probabilities(model: LanguageModel, tokens: Sequence[int], first: int) -> Logits:
    """Log-probabilities that predict `tokens[first + 1:]`."""
    return log_softmax(require_finite(model.logits(tokens, first)[:-1]))


def require_finite(logits: Logits) -> Logits:
    """Refuse a broken model instead of reporting a number made of NaN."""
    broken = int((np.isnan(logits) | np.isposinf(logits)).any(axis=1).sum())
    if broken:
        value = "NaN" if np.isnan(logits).any() else "infinity"
        raise MoneEdgeError(
            f"the model computes {value} at {broken} of {len(logits)} positions; its file "
            "is damaged or its weights overflow"
        )
    return logits


def _pick(scores: Logits, targets: NDArray[np.int64]) -> Float:
    """The score of each row's target, in float64."""
    return scores[np.arange(len(targets)), targets].astype(np.float64)
