"""Scores against llama-perplexity, plain torch and plain NumPy."""

import json
import logging
import logging.handlers
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers.utils import logging as transformers_logging

from mone_edge import runtime
from mone_edge.collect.loading import load_model
from mone_edge.errors import MoneEdgeError, UsageError
from mone_edge.evaluate import TorchModel, evaluate
from mone_edge.llama import GgufModel
from mone_edge.plan import make_plan
from mone_edge.recipe import Recipe
from mone_edge.scoring import chunk_ids, kl_divergence, log_softmax, score_text
from mone_edge.source import resolve
from mone_edge.tasks import TaskItem, first_of_each, log_likelihoods, read_items, score_items
from tests import architectures, tiny
from tests.conftest import Calibrated

N_CTX = 64
AGREE = 1e-4  # relative, as far as perplexity may be from the tool's
NEAR_TIES = 5e-3  # the same between torch and llama.cpp: a routing near-tie may fall otherwise


@dataclass(frozen=True)
class Files:
    """One tiny model in every form."""

    folder: Path
    whole: Path
    pruned: Path
    text: Path


@pytest.fixture(scope="session", params=[False, True], ids=["no-bos", "bos"])
def files(
    request: pytest.FixtureRequest,
    built_runtime: runtime.RuntimeInfo,
    calibrated: Callable[[str], Calibrated],
    tmp_path_factory: pytest.TempPathFactory,
) -> Files:
    """A checkpoint with and without a BOS rule, its F32 GGUF, and one with half of its experts."""
    from mone_edge import convert

    home = tmp_path_factory.mktemp("evaluate")
    model = calibrated("qwen3_moe")
    folder = Path(shutil.copytree(model.source.path, home / "model"))
    if request.param:
        _add_bos(folder)
    source = resolve(str(folder))
    plan = make_plan(model.stats, prune_ratio=0.5)
    for name, chosen in (("whole", None), ("pruned", plan)):
        recipe = Recipe(model=source.name, imatrix="none", tokenizer_pre="gpt-2")
        outfile = {"F32": home / f"{name}.gguf"}
        convert.write(
            convert.prepare(source, recipe, outfile, plan=chosen, stats=model.stats), recipe
        )
    text = home / "text.txt"
    text.write_text(tiny.TEXT * 2, encoding="utf-8")
    return Files(folder, home / "whole.gguf", home / "pruned.gguf", text)


def _add_bos(folder: Path) -> None:
    """Make tokenizer and GGUF start every text with BOS."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": tiny.BOS, "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            bos,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {tiny.BOS: {"id": tiny.BOS, "ids": [0], "tokens": [tiny.BOS]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def llama_perplexity(model: Path, text: Path, *options: str, until: str = "") -> str:
    """The tool's output, which ends with a line that holds `until`.

    One sequence a batch (-b), as we do: its flash attention rounds otherwise in larger batches,
    which routing turns into 0.15 % of perplexity on a random model. Its log is written by a thread
    that is not waited for, so that on a busy machine the last lines may be lost: then once more.
    """
    tool, context = str(runtime.tool("llama-perplexity")), str(N_CTX)
    command = [tool, "-m", str(model), "-f", str(text), "-c", context, "-b", context, "-t", "1"]
    command += options
    for _ in range(500):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        if until in done.stdout + done.stderr:
            break
    return done.stdout + done.stderr


def numbers(output: str, label: str) -> tuple[float, ...]:
    found = re.search(re.escape(label) + r"\D*([\d.]+)(?:[^\d\n]+([\d.]+))?", output)
    assert found, f"no {label!r} in {output}"
    return tuple(float(n) for n in found.groups() if n)


FINAL = "Final estimate: PPL ="


@pytest.mark.parametrize("which", ["whole", "pruned"])
def test_perplexity_is_llama_perplexitys(files: Files, which: str) -> None:
    model = getattr(files, which)
    ppl, stderr = numbers(llama_perplexity(model, files.text, until=FINAL), FINAL)
    ours = evaluate([model], text=files.text, n_ctx=N_CTX, threads=1)[0].to_json()
    assert ours["ppl"] == pytest.approx(ppl, rel=AGREE)
    assert ours["ppl_stderr"] == pytest.approx(stderr, rel=1e-2)


def test_divergence_is_llama_perplexitys(files: Files, tmp_path: Path) -> None:
    stored = str(tmp_path / "logits")
    llama_perplexity(files.whole, files.text, "--kl-divergence-base", stored)
    output = llama_perplexity(
        files.pruned,
        files.text,
        "--kl-divergence",
        "--kl-divergence-base",
        stored,
        until="Same top p:",
    )
    result = evaluate(
        [files.pruned], text=files.text, kld_base=files.whole, n_ctx=N_CTX, threads=1
    )[0].to_json()
    mean, stderr = numbers(output, "Mean    KLD:")
    assert mean > 0.01
    assert result["kld_mean"] == pytest.approx(mean, rel=1e-2)
    assert result["kld_stderr"] == pytest.approx(stderr, rel=2e-2)
    assert result["kld_median"] == pytest.approx(numbers(output, "Median  KLD:")[0], rel=1e-2)
    assert result["kld_p99"] == pytest.approx(numbers(output, "99.0%   KLD:")[0], rel=1e-2)
    same, same_stderr = numbers(output, "Same top p:")
    assert 100 * result["same_top_p"] == pytest.approx(same, abs=0.5)
    assert 100 * result["same_top_p_stderr"] == pytest.approx(same_stderr, abs=0.1)
    base_ppl = numbers(output, "Mean PPL(base)                :")[0]
    assert result["ppl_base"] == pytest.approx(base_ppl, rel=AGREE)


def test_checkpoint_and_its_gguf_score_alike(files: Files) -> None:
    gguf, folder = (
        result.to_json()
        for result in evaluate([files.whole, files.folder], text=files.text, n_ctx=N_CTX, threads=1)
    )
    assert folder["ppl"] == pytest.approx(gguf["ppl"], rel=NEAR_TIES)
    assert folder["tokens"] == gguf["tokens"] == gguf["chunks"] * (N_CTX // 2 - 1)
    assert gguf["file_bytes"] == files.whole.stat().st_size


def test_exact_scores_are_torchs(files: Files) -> None:
    with GgufModel(files.whole, threads=1, exact=True) as model:
        score, divergence = score_text(
            model, tiny.TEXT * 2, n_ctx=N_CTX, base=TorchModel.open(files.folder)
        )
    assert divergence is not None
    assert score.ppl == pytest.approx(divergence.ppl_base, rel=1e-5)
    assert abs(divergence.kld_mean) < 1e-6
    assert divergence.same_top_p == 1


def test_a_checkpoint_does_not_diverge_from_its_gguf(files: Files) -> None:
    result = evaluate(
        [files.folder], text=files.text, kld_base=files.whole, n_ctx=N_CTX, threads=1
    )[0].to_json()
    assert abs(result["kld_mean"]) < 1e-3
    assert result["same_top_p"] > 0.95


ITEMS = (
    ("The river left the mountains before", (" dawn and reached the harbour", " cup", " 17")),
    ("the jar was still", (" there, half full", " colour")),
)


def write_items(path: Path, answers: Sequence[int]) -> Path:
    lines = [
        json.dumps({"task": "bridge", "context": context, "choices": choices, "answer": answer})
        for (context, choices), answer in zip(ITEMS, answers, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def torch_log_likelihood(folder: Path, context: str, choice: str) -> float:
    """Token by token, one full forward pass each: slow and plain."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + choice)["input_ids"]
    total = 0.0
    with torch.no_grad():
        for position in range(start, len(ids)):
            logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
            total += float(torch.log_softmax(logits, -1)[ids[position]])
    return total


def test_choices_are_as_likely_as_in_plain_torch(files: Files) -> None:
    in_torch = TorchModel.open(files.folder)
    for context, choices in ITEMS:
        oracle = [torch_log_likelihood(files.folder, context, choice) for choice in choices]
        item = TaskItem("bridge", context, choices, 0)
        with GgufModel(files.whole, threads=1, exact=True) as model:
            assert log_likelihoods(model, item)[0] == pytest.approx(oracle, rel=1e-5)
        assert log_likelihoods(in_torch, item)[0] == pytest.approx(oracle, rel=1e-5)


@pytest.mark.parametrize("name", ["gemma4", "jamba", "lfm2_moe", "deepseek_v3"])
def test_choices_go_on_from_a_context_that_is_read_once(name: str, tmp_path: Path) -> None:
    folder = architectures.make(name, tmp_path / "model")
    model = TorchModel(load_model(folder, device="cpu", dtype="float32"), None)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, model.vocab_size, 90)]
    prefix, branches = ids[:60], [ids[60:61], ids[61:75], ids[75:80]]  # gemma4 looks back 32
    for branch, logits in zip(branches, model.branch_logits(prefix, branches), strict=True):
        whole = model.logits([*prefix, *branch[:-1]], len(prefix) - 1)
        assert np.abs(logits - whole).max() < 1e-5 * np.ptp(whole)
    (only,) = model.branch_logits(prefix[:1], [ids[:1]])
    assert np.array_equal(only, model.logits(prefix[:1]))


def test_transformers_says_nothing_in_between(files: Files) -> None:
    told = logging.handlers.BufferingHandler(100)
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    transformers_logging.add_handler(told)
    try:
        TorchModel.open(files.folder).branch_logits([1, 2, 3], [[4, 5], [6, 7]])
    finally:
        transformers_logging.remove_handler(told)
    assert not told.buffer


def test_accuracy_follows_the_likelihoods(files: Files, tmp_path: Path) -> None:
    with GgufModel(files.whole, threads=1) as model:
        values = [log_likelihoods(model, TaskItem("", c, choices, 0))[0] for c, choices in ITEMS]
    best = [int(v.argmax()) for v in values]
    per_byte = [
        int((v / [len(c.encode()) for c in i[1]]).argmax())
        for v, i in zip(values, ITEMS, strict=True)
    ]
    answers = [best[0], (best[1] + 1) % 2]
    path = write_items(tmp_path / "bridge.jsonl", answers)
    tasks = evaluate([files.whole], tasks=[path], threads=1)[0].to_json()["tasks"]
    expected = np.mean([a == b for a, b in zip(per_byte, answers, strict=True)])
    assert (tasks["bridge"]["acc"], tasks["bridge"]["items"]) == (0.5, 2)
    assert tasks["bridge"]["acc_norm"] == tasks["average_norm"] == expected
    assert tasks["average"] == 0.5
    one = evaluate([files.whole], tasks=[path], limit=1, threads=1)[0].to_json()["tasks"]
    assert (one["bridge"]["acc"], one["bridge"]["items"]) == (1.0, 1)


class Uniform:
    """A model of bytes that finds every byte equally likely, and reads at most 16."""

    vocab_size, bos_id, start_id, context_length = 256, None, None, 16

    def token_ids(self, text: str) -> list[int]:
        return list(text.encode())

    def logits(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
        assert len(tokens) <= self.context_length
        return np.zeros((len(tokens) - first, 256), np.float32)

    def branch_logits(
        self, prefix: Sequence[int], branches: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        return [self.logits([*prefix, *branch[:-1]], len(prefix) - 1) for branch in branches]

    def close(self) -> None:
        pass


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    score, divergence = score_text(Uniform(), "x" * 100 + "\n", n_ctx=16, base=Uniform())
    assert score.ppl == pytest.approx(256, rel=1e-6)
    assert (score.ppl_stderr, score.chunks, score.tokens) == (pytest.approx(0, abs=1e-3), 6, 6 * 7)
    assert divergence is not None
    assert (divergence.kld_mean, divergence.same_top_p) == (0, 1)


def test_a_loss_that_has_no_perplexity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mone_edge.scoring.LARGEST_LOSS", 5.0)  # a uniform model's is 5.5
    with pytest.raises(MoneEdgeError, match=r"perplexity is e\^5.55, which is no number"):
        score_text(Uniform(), "x" * 100 + "\n", n_ctx=16)


def test_long_contexts_are_cut_from_the_left() -> None:
    item = TaskItem("t", "c" * 40, ("ab", "abcd"), 0)
    likelihood, truncated = log_likelihoods(Uniform(), item)
    assert truncated
    assert likelihood == pytest.approx([-2 * np.log(256), -4 * np.log(256)])
    assert score_items(Uniform(), [item])["t"].truncated == 1


def test_kl_divergence_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    p, q = (log_softmax(rng.normal(0, 3, (100, 50)).astype(np.float32)) for _ in range(2))
    p64, q64 = p.astype(np.float64), q.astype(np.float64)
    assert kl_divergence(p, q) == pytest.approx((np.exp(p64) * (p64 - q64)).sum(axis=1), rel=1e-5)


def test_short_text_names_the_numbers() -> None:
    with pytest.raises(MoneEdgeError, match=r"31 tokens.* at least 32 .*--ctx-size 15"):
        chunk_ids(Uniform(), "x" * 31 + "\n", 16, None)


def test_different_tokenizers_are_refused() -> None:
    class Reversed(Uniform):
        def token_ids(self, text: str) -> list[int]:
            return [255 - byte for byte in text.encode()]

    with pytest.raises(MoneEdgeError, match="one tokenizer: .*token 0: 120 and 135"):
        score_text(Uniform(), "x" * 100, n_ctx=16, base=Reversed())

    class Wider(Uniform):
        vocab_size = 300

    with pytest.raises(MoneEdgeError, match="256 tokens, the base 300"):
        score_text(Uniform(), "x" * 100, n_ctx=16, base=Wider())


def test_nan_is_refused() -> None:
    class Broken(Uniform):
        def logits(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
            return np.full((len(tokens) - first, 256), np.nan, np.float32)

    with pytest.raises(MoneEdgeError, match="NaN at 7 of 7"):
        score_text(Broken(), "x" * 100, n_ctx=16)


GOOD = '{"task": "t", "context": "c", "choices": ["a", "b"], "answer": 0}'


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        (GOOD.replace('"answer": 0', '"answer": 2'), "answer is 2, not an index from 0 to 1"),
        (GOOD.replace('"answer": 0', '"answer": true'), "answer is True"),
        (GOOD.replace('["a", "b"]', '["a"]'), "two or more"),
        (GOOD.replace('"a", "b"', '"a", 3'), "a choice is not a text"),
        (GOOD.replace('"context"', '"ctx"'), "no context"),
        (GOOD.replace('"t"', '"average"'), "cannot be called average"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(MoneEdgeError, match=re.escape(fault)) as caught:
        read_items(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_the_limit_is_of_a_task_whatever_its_files(tmp_path: Path) -> None:
    items = [TaskItem(task, "c", ("a", "b"), 0) for task in "abaab"]
    assert [i.task for i in first_of_each(items, 2)] == ["a", "b", "a", "b"]
    assert list(first_of_each(items, None)) == items


def test_nothing_to_measure_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ppl"):
        evaluate([tmp_path])
    with pytest.raises(UsageError, match="add --ppl"):
        evaluate([tmp_path], tasks=[tmp_path], kld_base=tmp_path)


@pytest.mark.usefixtures("built_runtime")
def test_bad_files_are_refused_with_the_reason(files: Files, tmp_path: Path) -> None:
    other, cut = tmp_path / "other.gguf", tmp_path / "cut.gguf"
    other.write_bytes(b"PK\x03\x04 a zip file")
    cut.write_bytes(files.whole.read_bytes()[:-5000])
    for path, reason in (
        (tmp_path / "none.gguf", "no file"),
        (other, r"not a GGUF file: it starts with b'PK"),
        (cut, "cannot load .*not within the file bounds"),
    ):
        with pytest.raises(MoneEdgeError, match=reason):
            GgufModel(path)
