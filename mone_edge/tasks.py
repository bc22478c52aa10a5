"""Zero-shot tasks: which choice does a model find most likely after a context.

In: JSONL files of `{"task", "context", "choices": [...], "answer": index}`, a `LanguageModel`.
Out: accuracy per task, by log-likelihood (`acc`, as EleutherAI's lm-evaluation-harness counts it)
and by log-likelihood per byte of the choice (`acc_norm`; the harness's of that name is per
character, without the space before the choice).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mone_edge.documents import is_text, parse_json, reason
from mone_edge.errors import MoneEdgeError
from mone_edge.scoring import (
    Float,
    LanguageModel,
    Logits,
    Progress,
    log_softmax,
    require_finite,
    share_stderr,
    silent,
)

AVERAGES = ("average", "average_norm")  # beside the tasks' names in results


@dataclass(frozen=True)
class TaskItem:
    """One question."""

    task: str
    context: str
    choices: tuple[str, ...]
    answer: int  # index into choices
    where: str = ""  # file:line, for messages


@dataclass(frozen=True)
class TaskScore:
    """Shares of right answers, from 0 to 1."""

    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    items: int
    truncated: int = 0  # items whose context was cut to the model's context length


def read_items(path: Path, limit: int | None = None) -> list[TaskItem]:
    """Read a task file, or the first `limit` items of each task in it.

    Raises:
        MoneEdgeError: the file is missing or not UTF-8, or a line is malformed (file:line: why).
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise MoneEdgeError(f"cannot read task file {path}: {error.strerror}") from error
    except ValueError as error:
        raise MoneEdgeError(f"cannot read task file {path}: {reason(error)}") from error
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    items = list(first_of_each((_parse(line, f"{path}:{n}") for n, line in numbered), limit))
    if not items:
        raise MoneEdgeError(f"{path} holds no task items")
    return items


def first_of_each(items: Iterable[TaskItem], limit: int | None) -> Iterator[TaskItem]:
    """The first `limit` items of each task, all for None; whichever files they are of."""
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.task] += 1
        if limit is None or seen[item.task] <= limit:
            yield item


def _parse(line: str, where: str) -> TaskItem:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise MoneEdgeError(f"{where}: not JSON: {reason(error)}") from error
    fault = _fault(entry)
    if fault:
        raise MoneEdgeError(
            f'{where}: {fault}; a line is {{"task": text, "context": text, "choices": [text, ...], '
            '"answer": index}'
        )
    choices = tuple(entry["choices"])
    return TaskItem(entry["task"], entry["context"], choices, entry["answer"], where)


def _fault(entry: Any) -> str:
    """What is wrong with a parsed line, or nothing."""
    if not isinstance(entry, dict):
        return "not an object"
    missing = [key for key in ("task", "context", "choices", "answer") if key not in entry]
    if missing:
        return f"no {', '.join(missing)}"
    for key in ("task", "context"):
        if not is_text(entry[key]) or not entry[key]:
            return f"{key} is not a text, or empty"
    if entry["task"] in AVERAGES:
        return f"a task cannot be called {entry['task']}"
    choices, answer = entry["choices"], entry["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        return "choices is not a list of two or more"
    if any(not is_text(choice) or not choice for choice in choices):
        return "a choice is not a text, or empty"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"answer is {answer!r}, not an index from 0 to {len(choices) - 1}"
    return ""


def score_items(
    model: LanguageModel,
    items: Sequence[TaskItem],
    progress: Progress = silent,
) -> dict[str, TaskScore]:
    """Accuracy of each task, in the order the tasks first appear."""
    right: dict[str, list[tuple[bool, bool, bool]]] = {}
    for number, item in enumerate(items):
        likelihood, truncated = log_likelihoods(model, item)
        per_byte = likelihood / [len(choice.encode()) for choice in item.choices]
        right.setdefault(item.task, []).append(
            (likelihood.argmax() == item.answer, per_byte.argmax() == item.answer, truncated)
        )
        progress("tasks", number + 1, len(items))
    return {task: _task_score(rows) for task, rows in right.items()}


def _task_score(rows: Sequence[tuple[bool, bool, bool]]) -> TaskScore:
    count = len(rows)
    right, right_norm, truncated = (int(n) for n in np.sum(rows, axis=0))
    return TaskScore(
        acc=right / count,
        acc_stderr=share_stderr(right / count, count),
        acc_norm=right_norm / count,
        acc_norm_stderr=share_stderr(right_norm / count, count),
        items=count,
        truncated=truncated,
    )


def averages(scores: Iterable[TaskScore]) -> dict[str, float]:
    """Unweighted means over tasks: of `acc` as `average`, of `acc_norm` as `average_norm`."""
    rows = [(score.acc, score.acc_norm) for score in scores]
    return dict(zip(AVERAGES, np.mean(rows, axis=0).tolist(), strict=True))


def log_likelihoods(model: LanguageModel, item: TaskItem) -> tuple[Float, bool]:
    """log p(choice | context) of each choice, in nats, and whether the context had to be cut."""
    rows, branches, truncated = choice_logits(model, item)
    scores = (log_softmax(require_finite(row)) for row in rows)
    return np.array([picked(s, ids) for s, ids in zip(scores, branches, strict=True)]), truncated


def choice_logits(
    model: LanguageModel, item: TaskItem
) -> tuple[list[Logits], list[list[int]], bool]:
    """Logits [tokens, vocabulary] and ids of each choice; whether the context had to be cut.

    A choice is what its tokens add to those of the context, with both tokenised together; where
    they merge across the border, the merged token counts as part of the choice. Without a token
    before it the model starts from BOS, or from EOS, as in lm-evaluation-harness.
    """
    context = model.token_ids(item.context)
    whole = [model.token_ids(item.context + choice) for choice in item.choices]
    shared = min(_common_prefix(context, ids) for ids in whole)
    shared = min(shared, *(len(ids) - 1 for ids in whole))
    branches = [ids[shared:] for ids in whole]
    prefix = context[:shared]
    if not prefix:
        if model.start_id is None:
            raise MoneEdgeError(f"{item.where}: the context gives no token to start from")
        prefix, shared = [model.start_id], 1
    excess = shared + max(map(len, branches)) - model.context_length
    if excess > 0:
        keep = 1 if prefix[0] == model.bos_id else 0
        prefix = prefix[:keep] + prefix[min(keep + excess, shared - 1) :]
    return model.branch_logits(prefix, branches), branches, excess > 0


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def picked(scores: Logits, ids: Sequence[int]) -> float:
    """Sum of the log-probabilities [n, vocabulary] of `ids`."""
    return float(scores[np.arange(len(ids)), list(ids)].sum(dtype=np.float64))
