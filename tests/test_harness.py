"""lm-evaluation-harness through the adapter: the same accuracy as task files of the same items."""

import json
from pathlib import Path

import pytest

from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.evaluate import open_model
from mone_edge.harness import harness_model, score_harness
from mone_edge.scoring import log_softmax
from mone_edge.tasks import picked, read_items, score_items
from tests import tiny

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {kind}
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: {metric}
  - metric: acc_norm
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def task(folder: Path, name: str, data: Path, kind: str = "multiple_choice") -> str:
    text = TASK.format(name=name, data=data, kind=kind, metric="acc")
    if kind == "generate_until":
        text = text.replace("  - metric: acc\n  - metric: acc_norm", "  - metric: exact_match")
        text = text.replace("doc_to_choice: choices\n", "")
    (folder / f"{name}.yaml").write_text(text)
    return str(folder)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = tiny.TEXT.split()
    rows = [
        {
            "task": "bridge",
            "context": " ".join(words[7 * i : 7 * i + 5]),
            "choices": [" " + words[7 * i + 5], " " + " ".join(words[i : i + 2]), " jar"],
            "answer": i % 3,
        }
        for i in range(12)
    ]
    path = tmp_path_factory.mktemp("items") / "bridge.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_harness_counts_what_task_files_count(items: Path, tmp_path: Path) -> None:
    model = open_model(tiny.make_checkpoint("olmoe", tmp_path / "model"), threads=1)
    folder = task(tmp_path, "bridge", items)
    ours = score_items(model, read_items(items))["bridge"]
    theirs = score_harness(model, ["bridge"], task_folder=folder)["bridge"]
    assert theirs == ours
    assert 0 < ours.acc < 1
    few = score_harness(model, ["bridge"], limit=5, task_folder=folder)["bridge"]
    assert few == score_items(model, read_items(items, 5))["bridge"]


def test_spaces_before_a_choice_and_greedy_choices(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    model = open_model(tiny.make_checkpoint("olmoe", tmp_path / "model"), threads=1)
    pairs = [("The miller ", "measured"), ("The miller", " measured")]
    for prefix in tiny.TEXT.split():
        start = model.token_ids(prefix)
        best = int(model.logits(start, len(start) - 1).argmax())
        word = model._tokenizer.decode([best])
        if model.token_ids(prefix + word) == [*start, best]:
            pairs.append((prefix, word))
            break
    answers = harness_model(model).loglikelihood(
        [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    )
    assert answers[0] == answers[1]
    assert [greedy for _, greedy in answers] == [False, False, True]


def test_without_a_context_the_model_starts_from_its_end_of_text(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    model = open_model(tiny.make_checkpoint("qwen2_moe", tmp_path / "model"), threads=1)
    assert model.bos_id is None
    ids = model.token_ids("The miller")
    logits = model.logits([model.start_id, *ids[:-1]])
    (answer,) = harness_model(model).loglikelihood(
        [Instance("loglikelihood", {}, ("", "The miller"), 0)]
    )
    expected = picked(log_softmax(logits), ids)
    assert answer[0] == pytest.approx(expected, rel=1e-5)


def test_offline_keeps_the_hubs_libraries_off_the_network(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    for settings in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    model = open_model(tiny.make_checkpoint("olmoe", tmp_path / "model"), threads=1)
    with pytest.raises(UsageError, match="no task nosuchtask"):
        score_harness(model, ["nosuchtask"], offline=True)
    assert datasets.config.HF_HUB_OFFLINE
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_the_adapter_cannot_run_is_refused_by_name(items: Path, tmp_path: Path) -> None:
    model = open_model(tiny.make_checkpoint("olmoe", tmp_path / "model"), threads=1)
    with pytest.raises(UsageError, match="no task nosuchtask"):
        score_harness(model, ["nosuchtask"])
    folder = task(tmp_path, "writing", items, "generate_until")
    with pytest.raises(MoneEdgeError, match="mone-edge serve"):
        score_harness(model, ["writing"], task_folder=folder)
    folder = task(tmp_path, "nodata", tmp_path / "missing.jsonl")
    with pytest.raises(MoneEdgeError, match=r"lm-evaluation-harness: nodata: .*missing.jsonl"):
        score_harness(model, ["nodata"], task_folder=folder)
