"""EleutherAI's lm-evaluation-harness, on every model that `eval` can open.

In: a `LanguageModel`, names of the harness's tasks. Out: its results, as `TaskScore`s. The harness
brings tasks, prompts and metrics; only the likelihoods are computed here. Tasks that let the model
write an answer are refused by name: the harness runs those on `mone-edge serve`.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mone_edge import hub
from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.scoring import LanguageModel, log_softmax, require_finite, share_stderr
from mone_edge.tasks import TaskItem, TaskScore, choice_logits, picked

ACC, ACC_NORM = "acc,none", "acc_norm,none"
INSTALL = 'pip install "mone-edge[lm-eval]"'


def score_harness(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    task_folder: str | None = None,
    offline: bool = False,
) -> dict[str, TaskScore]:
    """Accuracy of each task, as the harness counts it.

    Args:
        tasks: names that `lm-eval ls tasks` lists.
        limit: first items of each task only.
        num_fewshot: examples before each question; None is the task's own number.
        task_folder: further task files (YAML).
        offline: take their data from the local cache only.

    Raises:
        UsageError: there is no such task, or it has no accuracy.
        MoneEdgeError: the harness is not installed, or cannot get the task's data.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MoneEdgeError(f"lm-evaluation-harness is not installed: {INSTALL}") from error
    if offline:
        hub.stay_offline()
    manager = TaskManager(include_path=task_folder)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(f"lm-evaluation-harness has no task {unknown[0]}; see: lm-eval ls tasks")
    try:
        found = simple_evaluate(
            model=harness_model(model),
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except MoneEdgeError:
        raise
    except Exception as error:  # data that cannot be fetched or read: no common base
        raise MoneEdgeError(
            f"lm-evaluation-harness: {', '.join(tasks)}: {reason(error)}"
        ) from error
    samples = {name: int(n["effective"]) for name, n in found["n-samples"].items()}
    return {n: _score(n, found["results"][n], samples[n]) for n in samples}


def _score(name: str, metrics: dict[str, Any], items: int) -> TaskScore:
    if ACC not in metrics:
        measured = ", ".join(key.partition(",")[0] for key in metrics if key.endswith(",none"))
        raise UsageError(f"the task {name} has no accuracy (it measures {measured})")
    acc, norm = float(metrics[ACC]), float(metrics.get(ACC_NORM, metrics[ACC]))
    return TaskScore(acc, share_stderr(acc, items), norm, share_stderr(norm, items), items)


def harness_model(model: LanguageModel) -> Any:
    """The model as an object of the harness's `LM` class, for its own Python interface too."""
    from lm_eval.api.model import LM

    class HarnessModel(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool]] = []
            for context, group in groupby((r.args for r in requests), key=lambda args: args[0]):
                answers += _likelihoods(model, context, [continuation for _, continuation in group])
            return answers

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise UsageError("this task measures whole texts: use mone-edge eval --ppl FILE")

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise UsageError(
                "this task lets the model write: run lm-eval --model local-completions on the "
                "server of mone-edge serve"
            )

    return HarnessModel()


def _likelihoods(
    model: LanguageModel, context: str, continuations: list[str]
) -> list[tuple[float, bool]]:
    """(log p(continuation | context) in nats, whether each of its tokens is the likeliest)."""
    text = context.rstrip()
    space = context[len(text) :]  # tokenizers join it to the word that follows
    item = TaskItem(
        "", text or context, tuple(space + c for c in continuations), 0, "a task's item"
    )
    rows, branches, _ = choice_logits(model, item)
    return [
        (
            picked(log_softmax(require_finite(row)), ids),
            bool(np.array_equal(row.argmax(axis=1), ids)),
        )
        for row, ids in zip(rows, branches, strict=True)
    ]
