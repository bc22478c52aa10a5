"""llama.cpp's tools and llama-cpp-python make of a pruned file what they make of the whole one.

The whole one has zeroed experts and the same bias, so that not a bit may differ. What perplexity,
KL divergence and llama-bench make of pruned files is in test_evaluate.py and test_bench.py, text
against torch in test_generate.py, split and saved files in test_pruned_graph.py.
"""

import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from mone_edge import runtime
from tests.runtime import tiny_gguf as tiny

KEPT = [3, 0, 5]
PROMPT = "The river left the mountains before dawn"
TOKENS = [1, *PROMPT.encode()]
# no control tokens, so that each is a character
SAMPLED = ("--samplers", "temperature", "--temp", "1", "--seed", "7", "--ignore-eos")
SAMPLED += ("--logit-bias", "0-99", "--logit-bias", "1-99")
LENGTH = 40
Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, built_runtime: runtime.RuntimeInfo) -> Files:
    """The whole file and the pruned one, Q8_0 (repacked), with a tokenizer."""
    folder = tmp_path_factory.mktemp("tools")
    model = tiny.random_model("qwen2moe", n_embd=256, n_ff=256)
    whole, pruned = tiny.zeroed(model, KEPT), tiny.pruned(model, KEPT)
    return (
        tiny.write(folder / "whole.gguf", whole, "Q8_0", text=True),
        tiny.write(folder / "pruned.gguf", pruned, "Q8_0", kept=KEPT, text=True),
    )


@pytest.fixture(scope="module")
def reordered(files: Files) -> Path:
    """A file with low-rank novices and `eid2slot`."""
    order = (6, 1, 4, 3, 0, 7, 2, 5)
    model = tiny.random_model("olmoe", n_embd=256, n_ff=256)
    model = tiny.pruned(tiny.stored_in_order(model, dict.fromkeys(range(3), order)), KEPT)
    model = tiny.with_novices(model, KEPT, (8, 4, 16))
    return tiny.write(files[0].with_name("reordered.gguf"), model, "Q8_0", kept=KEPT, text=True)


def use(name: str, *arguments: object) -> str:
    """Run a tool; what it prints on stdout."""
    command = [str(part) for part in (runtime.tool(name), *arguments)]
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, (command, done.stderr[-2000:])
    return done.stdout.decode()


def completion(model: Path, *options: str) -> str:
    """Text from llama-completion; its last characters may be lost, as nothing waits for its log."""
    for _ in range(20):
        text = use(
            "llama-completion", "-m", model, "-p", PROMPT, "-n", LENGTH, "-t", 1, "-c", 128,
            "-no-cnv", "--no-display-prompt", *SAMPLED, *options,
        )  # fmt: skip
        if len(text) >= LENGTH:
            return text
    raise AssertionError(text)


@pytest.mark.parametrize(
    "options",
    [(), ("--load-mode", "none"), ("--no-repack",), ("--n-cpu-moe", "2"), ("-ot", "exps=CPU")],
    ids=" ".join,
)
def test_completion(files: Files, options: tuple[str, ...]) -> None:
    """However the weights are loaded; sampled, so that all logits count."""
    whole, pruned = (completion(path, *options) for path in files)
    assert whole == pruned
    assert len(set(whole)) > 10


def test_cli(files: Files) -> None:
    """One turn of a chat."""
    whole, pruned = (
        use("llama-cli", "-m", path, "-p", PROMPT, "-n", LENGTH, "-t", 1, "-c", 128,
            "--single-turn", "--simple-io", "--no-show-timings", *SAMPLED)
        for path in files
    )  # fmt: skip
    answers = [text.partition(PROMPT)[2] for text in (whole, pruned)]
    assert len(answers[0]) >= LENGTH
    assert answers[0] == answers[1]


@contextlib.contextmanager
def serve(model: Path, *options: object) -> Iterator[str]:
    """llama-server on a free port; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [runtime.tool("llama-server"), "-m", model, "--port", port, "-t", 1, "-c", 512]
    with subprocess.Popen(
        [str(part) for part in (*command, *options)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            for _ in range(600):
                assert process.poll() is None
                with contextlib.suppress(OSError):
                    if ask(f"http://127.0.0.1:{port}", "/health")["status"] == "ok":
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """A request; the JSON of the answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def answers(model: Path, folder: Path) -> list[object]:
    """Chat, two slots at a time, and a slot that is saved and restored."""
    sampling: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": LENGTH,
        "n_predict": LENGTH,
        "ignore_eos": True,
    }
    sampling["logit_bias"] = [[0, False], [1, False]]
    with serve(model, "--parallel", 2, "--slot-save-path", f"{folder}/") as address:
        message = {"role": "user", "content": PROMPT}
        chat = ask(address, "/v1/chat/completions", {"messages": [message]} | sampling)
        texts = [chat["choices"][0]["message"]["content"]]

        def complete(slot: int) -> str:
            body = {"prompt": f"{slot}: {PROMPT}", "id_slot": slot}
            return str(ask(address, "/completion", body | sampling)["content"])

        with ThreadPoolExecutor(2) as pool:
            texts += list(pool.map(complete, (0, 1)))
        assert ask(address, "/slots/1?action=save", {"filename": "slot"})["n_saved"] > LENGTH
        assert ask(address, "/slots/1?action=restore", {"filename": "slot"})["n_restored"] > LENGTH
        assert complete(1) == texts[2]
    assert all(len(text) >= LENGTH for text in texts)
    return texts


def test_server(files: Files, reordered: Path, tmp_path: Path) -> None:
    """Chat, parallel slots, slots to disk and back."""
    whole, pruned = (answers(path, tmp_path) for path in files)
    assert whole == pruned
    assert answers(reordered, tmp_path) != pruned


def test_server_embeddings(files: Files) -> None:
    vectors = []
    for path in files:
        with serve(path, "--embeddings", "--pooling", "mean") as address:
            answer = ask(address, "/v1/embeddings", {"input": [PROMPT, "dawn"]})
            vectors.append([row["embedding"] for row in answer["data"]])
    assert vectors[0] == vectors[1]
    assert np.shape(vectors[0]) == (2, 256)
    assert vectors[0][0] != vectors[0][1]


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_imatrix_and_quantize(files: Files, llama: ModuleType, tmp_path: Path) -> None:
    """The stored experts' statistics are those of the whole model, and so are their blocks."""
    text = tmp_path / "text.txt"
    text.write_text(f"{PROMPT}. " * 40, encoding="utf-8")
    found, small = [], []
    for path in files:
        out = tmp_path / f"{path.stem}-imatrix.gguf"
        use("llama-imatrix", "-m", path, "-f", text, "-o", out, "-c", 128, "-t", 1)
        found.append(tensors(out))
        small.append(tmp_path / f"{path.stem}-Q4_K_M.gguf")
        use("llama-quantize", "--allow-requantize", "--imatrix", out, path, small[-1], "Q4_K_M", 1)
    whole, pruned = found
    assert {name for name in whole if name not in pruned} == {
        f"blk.1.ffn_{part}_exps.weight.{kind}"
        for part in tiny.PARTS
        for kind in ("in_sum2", "counts")
    }
    for name, values in pruned.items():
        layer = int(name.split(".")[1]) if "_exps" in name else None
        n_kept = None if layer is None else KEPT[layer]
        assert np.array_equal(values, whole[name][:n_kept])
    assert 0 < pruned["blk.0.ffn_down_exps.weight.counts"].sum() < 4 * pruned_tokens(pruned)
    a, b = (tiny.logits(llama, path, [(5, 1), (96, 1)]) for path in small)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def pruned_tokens(statistics: dict[str, np.ndarray]) -> int:
    """Tokens that the statistics are of."""
    return int(statistics["blk.0.attn_q.weight.counts"].sum())


def test_imatrix_counts_novices(reordered: Path, tmp_path: Path) -> None:
    """Every slot of every token is a stored expert's or a novice's."""
    text = tmp_path / "text.txt"
    text.write_text(f"{PROMPT}. " * 40, encoding="utf-8")
    out = tmp_path / "imatrix.gguf"
    use("llama-imatrix", "-m", reordered, "-f", text, "-o", out, "-c", 128, "-t", 1)
    found = tensors(out)
    for layer, n_kept in enumerate(KEPT):
        stored = f"blk.{layer}.ffn_down_exps.weight.counts"
        novices = found[f"blk.{layer}.ffn_novice_up.weight.counts"]
        assert novices.size == tiny.N_EXPERTS - n_kept
        total = novices.sum() + (found[stored].sum() if n_kept else 0)
        assert total == tiny.TOP_K * pruned_tokens(found)


def open_model(path: Path, **options: Any) -> Any:
    """A `llama_cpp.Llama` that keeps all logits."""
    llama_cpp = runtime.load()
    defaults = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}
    return llama_cpp.Llama(str(path), verbose=False, **defaults | options)


def scores(path: Path, **options: Any) -> np.ndarray:
    """Logits [tokens, vocabulary] of the prompt."""
    model = open_model(path, **options)
    model.eval(TOKENS)
    values = np.array(model.scores[: model.n_tokens])
    model.close()
    return values


def test_lora_of_attention(files: Files, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "qwen2moe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name in ("attn_q", "attn_v", "attn_output"):
        for half, shape in (("a", (4, 256)), ("b", (256, 4))):
            draw = rng.normal(0, 0.1, shape).astype(np.float32)
            writer.add_tensor(f"blk.1.{name}.weight.lora_{half}", draw)
    lora = str(tiny.finish(writer, tmp_path / "lora.gguf"))
    whole, pruned = (scores(path, lora_path=lora) for path in files)
    assert np.array_equal(whole, pruned)
    assert np.abs(pruned - scores(files[1])).max() > 0.1


def test_loaded_without_mmap(reordered: Path) -> None:
    assert np.array_equal(scores(reordered), scores(reordered, use_mmap=False))


def test_saved_state(files: Files, reordered: Path) -> None:
    """What follows a restored state is what followed it before, also in another context."""
    for path in (files[1], reordered):
        model = open_model(path)
        model.eval(TOKENS[:20])
        state = model.save_state()
        model.eval(TOKENS[20:])
        expected = np.array(model.scores[20 : model.n_tokens])
        model.load_state(state)
        model.eval(TOKENS[20:])
        assert np.array_equal(model.scores[20 : model.n_tokens], expected)
        other = open_model(path)
        other.load_state(state)
        other.eval(TOKENS[20:])
        assert np.array_equal(other.scores[20 : other.n_tokens], expected)
        model.close()
        other.close()


def test_streamed_text(files: Files) -> None:
    """Completion and chat of llama-cpp-python, in pieces and at once."""
    texts = []
    for path in files:
        model = open_model(path, logits_all=False)
        sampling = {"max_tokens": 12, "temperature": 0}
        whole = model.create_completion(PROMPT, **sampling)["choices"][0]["text"]
        pieces = model.create_completion(PROMPT, stream=True, **sampling)
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole
        messages = [{"role": "user", "content": PROMPT}]
        chat = model.create_chat_completion(messages, **sampling)
        texts.append((whole, chat["choices"][0]["message"]["content"]))
        model.close()
    assert texts[0] == texts[1]
    assert all(texts[0])
