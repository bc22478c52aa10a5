"""Generated text against greedy decoding in plain torch; what `run` and `serve` refuse."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mone_edge import convert, runtime
from mone_edge.cli import run as run_cli
from mone_edge.errors import MoneEdgeError
from mone_edge.generate import Generator
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Recipe
from tests import tiny
from tests.conftest import Calibrated

PROMPT = "Years later nobody"


@pytest.fixture(scope="module")
def pruned(
    built_runtime: runtime.RuntimeInfo,
    calibrated: Callable[[str], Calibrated],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, PrunePlan]:
    """A tiny GGUF with half of its experts, and the plan."""
    model = calibrated("qwen3_moe")
    plan = make_plan(model.stats, prune_ratio=0.5, method="mone")
    recipe = Recipe(model=model.source.name, imatrix="none", tokenizer_pre="gpt-2")
    path = tmp_path_factory.mktemp("generate") / "m.gguf"
    jobs = convert.prepare(model.source, recipe, {"F32": path}, plan=plan, stats=model.stats)
    convert.write(jobs, recipe)
    return path, plan


def greedy_in_torch(model: Calibrated, plan: PrunePlan, prompt: str, tokens: int) -> str:
    import torch
    from transformers import AutoTokenizer

    from mone_edge import novices
    from mone_edge.collect.loading import load_model

    network = novices.apply(
        load_model(model.source.path, device="cpu", dtype="float32"), plan, model.stats
    )
    tokenizer = AutoTokenizer.from_pretrained(model.source.path)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    text = str(tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False))
    return text.replace("\ufffd", "")  # llama-cpp-python leaves out bytes that are not UTF-8


def test_greedy_text_is_torchs(
    pruned: tuple[Path, PrunePlan], calibrated: Callable[[str], Calibrated]
) -> None:
    path, plan = pruned
    oracle = greedy_in_torch(calibrated("qwen3_moe"), plan, PROMPT, 12)
    with Generator(path, n_ctx=128, threads=1) as generator:
        first = "".join(generator.complete(PROMPT, 12, 0.0))
        speed = generator.speed()
        again = "".join(generator.complete(PROMPT, 12, 0.0))
    assert first == again
    assert first == oracle
    assert speed.generated_tokens == 11  # the first comes out of the prefill
    assert speed.prompt_tokens > 5
    assert speed.prompt_seconds > 0
    assert speed.generated_seconds > 0


def test_seed_decides_sampled_text(pruned: tuple[Path, PrunePlan]) -> None:
    def sample(seed: int) -> str:
        with Generator(pruned[0], n_ctx=128, threads=1, seed=seed) as generator:
            return "".join(generator.complete(PROMPT, 16, 1.0))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_chat_uses_the_models_template(pruned: tuple[Path, PrunePlan]) -> None:
    laid_out = f"[user] {PROMPT}\n[assistant] "  # tiny.CHAT_TEMPLATE
    assert "[assistant] " in tiny.CHAT_TEMPLATE
    with Generator(pruned[0], n_ctx=128, threads=1) as generator:
        plain = "".join(generator.complete(laid_out, 8, 0.0))
        chat = "".join(generator.chat([{"role": "user", "content": PROMPT}], 8, 0.0))
    assert chat == plain


def test_the_context_is_as_long_as_was_asked_for(pruned: tuple[Path, PrunePlan]) -> None:
    with Generator(pruned[0], n_ctx=40, threads=1) as generator:
        prompt = len(generator._llama.tokenize(PROMPT.encode()))
        for _ in generator.complete(PROMPT, -1, 0.0):
            pass
        assert prompt + generator.speed().generated_tokens + 1 == 40
        chat = [{"role": "user", "content": PROMPT}]
        for _ in generator.chat(chat, -1, 0.0):
            pass
        assert generator._llama.n_tokens + 1 == 40
        for words in (30, 300):
            with pytest.raises(MoneEdgeError, match=r"the prompt has \d+ tokens, the context 40"):
                next(generator.chat([{"role": "user", "content": "x y " * words}], 4, 0.0))


def test_run_streams_text_and_tells_speed(
    pruned: tuple[Path, PrunePlan], capfd: pytest.CaptureFixture[str]
) -> None:
    options = [str(pruned[0]), "-p", PROMPT, "-n", "6", "--temp", "0", "-c", "128", "-t", "1"]
    assert run_cli(["run", *options]) == 0
    text = capfd.readouterr()
    assert "prefill" in text.err
    assert "decode 5 tokens" in text.err
    assert run_cli(["run", *options, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert text.out == document["text"] + "\n"
    assert document["generated_tokens"] == 5
    assert run_cli(["run", *options, "-q"]) == 0
    assert capfd.readouterr().err == ""


def test_run_refuses_in_one_line(
    pruned: tuple[Path, PrunePlan], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(pruned[0])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(pruned[0].read_bytes()[:3000])
    for arguments, code, words in (
        ([path], 2, "-p TEXT"),
        ([path, "-p", "x" * 500, "-c", "64"], 1, "the context 64; give -c"),
        ([str(tmp_path / "none.gguf"), "-p", "x"], 1, "no file"),
        ([str(broken), "-p", "x"], 1, "cannot load"),
    ):
        assert run_cli(["run", *arguments]) == code
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert words in err


def test_a_model_without_template_does_not_chat(
    pruned: tuple[Path, PrunePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Generator(pruned[0], n_ctx=64, threads=1) as generator:
        monkeypatch.delitem(generator._llama.metadata, "tokenizer.chat_template")
        with pytest.raises(MoneEdgeError, match="no chat template; leave --chat out"):
            next(generator.chat([{"role": "user", "content": "x"}], 4, 0.0))


def test_serve_hands_over_to_llama_server(
    pruned: tuple[Path, PrunePlan],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(pruned[0])
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, arguments: started.append(arguments))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert run_cli(["serve", path, "--port", port]) == 1
        err = capsys.readouterr().err
        assert (f"127.0.0.1:{port}" in err, err.count("\n"), started) == (True, 1, [])
        assert "with --port" in err
    for host in ("nowhere.invalid", "192.0.2.1"):
        assert run_cli(["serve", path, "--host", host, "--port", port]) == 1
        assert "choose another with --host" in capsys.readouterr().err
    assert run_cli(["serve", path, "--port", port]) == 0
    server, *arguments = started[0]
    assert server == str(runtime.tool("llama-server"))
    assert arguments == ["-m", path, "--host", "127.0.0.1", "--port", port]
