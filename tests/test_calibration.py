"""Calibration: sources, packing, determinism, refusals."""

import builtins
import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mone_edge import calibration
from mone_edge.calibration import Batches, TransformersTokenizer
from mone_edge.errors import MoneEdgeError, UsageError
from tests.tiny import TEXT, make_tokenizer


def load(specs: list[str], tokenizer: Any, **options: Any) -> Batches:
    return calibration.load(specs, TransformersTokenizer(tokenizer), **options)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    return str(path)


def test_same_seed_same_tokens(tokenizer: Any, text: str) -> None:
    first, again, other = (
        load([text], tokenizer, samples=6, seq_len=32, seed=seed) for seed in (1, 1, 2)
    )
    assert first.tokens.shape == (6, 32)
    assert first.tokens.dtype == np.int64
    assert first.short == ""
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != other.sha256
    assert len(first.sha256) == 64


def test_sequences_are_distinct_pieces_of_the_text(tokenizer: Any, text: str) -> None:
    batches = load([text], tokenizer, samples=6, seq_len=32)
    stream = tokenizer(TEXT * 8, add_special_tokens=False)["input_ids"]
    starts = [
        next(s for s in range(0, len(stream), 32) if stream[s : s + 32] == row)
        for row in batches.tokens.tolist()
    ]
    assert starts == sorted(set(starts))


def test_jsonl_and_chats(tokenizer: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Who crosses?"}, {"role": "assistant", "content": "All."}]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "The miller"}) + "\n\n" + json.dumps({"messages": chat}))
    batches = load([str(path)], tokenizer, samples=1, seq_len=512)
    rendered = tokenizer.decode(batches.tokens[0])
    assert rendered == "The miller</s>[user] Who crosses?\n[assistant] All.\n"


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{% if %}", "{{ messages[0].x.y }}"])
def test_a_template_that_fails_is_told(template: str, tokenizer: Any, tmp_path: Path) -> None:
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = template
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    with pytest.raises(MoneEdgeError, match="line 1: the chat template refuses these messages"):
        load([str(path)], broken)


def test_several_sources_share_the_samples(tokenizer: Any, text: str, tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text("cart " * 70)
    batches = load([text, str(small)], tokenizer, samples=8, seq_len=32)
    carts = [tokenizer.decode(row).count("cart") > 4 for row in batches.tokens]
    assert batches.tokens.shape == (8, 32)
    assert carts == sorted(carts)
    assert 1 <= sum(carts) <= 4
    assert batches.specs == (text, str(small))


def test_weights_share_the_samples(tokenizer: Any, text: str, tmp_path: Path) -> None:
    carts = tmp_path / "carts@home.txt"  # an @ that is no weight
    carts.write_text("cart " * 2000)
    specs = [f"{text}@3", str(carts)]
    batches = load(specs, tokenizer, samples=8, seq_len=32)
    of_carts = [tokenizer.decode(row).count("cart") > 4 for row in batches.tokens]
    assert sum(of_carts) == 2
    assert batches.specs == tuple(specs)
    reversed_shares = load([text, f"{carts}@.5"], tokenizer, samples=12, seq_len=32)
    assert sum(tokenizer.decode(r).count("cart") > 4 for r in reversed_shares.tokens) == 4


@pytest.mark.parametrize("samples", [1, 7, 100])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.1, 0.2, 0.7], [5, 1, 1]])
def test_shares_give_all_that_is_there(samples: int, weights: list[float]) -> None:
    for available in ([1000, 1000, 1000], [3, 50, 50], [0, 0, 2]):
        shares = calibration._shares(available, weights, samples)
        assert sum(shares) == min(samples, sum(available))
        assert all(0 <= s <= a for s, a in zip(shares, available, strict=True))


def test_weight_zero_is_refused(tokenizer: Any, text: str) -> None:
    with pytest.raises(UsageError, match="weight 0"):
        load([f"{text}@0"], tokenizer, samples=4, seq_len=32)


def test_a_source_without_one_sequence_is_told(tokenizer: Any, text: str, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.txt"
    tiny.write_text("one cart")
    batches = load([text, str(tiny)], tokenizer, samples=4, seq_len=32)
    assert batches.unused == (str(tiny),)
    assert "tiny.txt: unused, less than one sequence of 32 tokens" in batches.short


def test_shares_are_even_and_complete() -> None:
    assert calibration._shares([10, 10], [1, 1], 6) == [3, 3]
    assert calibration._shares([1, 10, 10], [1, 1, 1], 7) == [1, 3, 3]
    assert calibration._shares([0, 2, 9], [1, 1, 1], 20) == [0, 2, 9]
    assert calibration._shares([5, 5], [1, 1], 1) == [0, 1]
    assert calibration._shares([10, 10], [1, 3], 8) == [2, 6]
    assert calibration._shares([10, 2], [1, 9], 8) == [6, 2]


def test_too_little_text_is_used_and_told(tokenizer: Any, text: str) -> None:
    batches = load([text], tokenizer, samples=1000, seq_len=64)
    assert len(batches.tokens) == batches.available_tokens // 64
    assert f"using {len(batches.tokens)} sequences of 64, not 1000 of 64" in batches.short
    one = load([text], tokenizer, samples=4, seq_len=100_000)
    assert one.tokens.shape == (1, one.available_tokens)
    assert "not 4 of 100000" in one.short


def test_reading_stops_when_there_is_enough(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(50)) + "not json")
    assert load([str(path)], tokenizer, samples=2, seq_len=32).tokens.shape == (2, 32)


def test_default_text_ships_with_the_package(tokenizer: Any) -> None:
    assert load([], tokenizer, samples=2, seq_len=32).tokens.shape == (2, 32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "0 tokens in all"),
        ("a.txt", b"Hi", "at least 16 are needed"),
        ("a.txt", b"\xff\xfe\x00" * 20, "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2: not JSON"),
        ("a.jsonl", b"[1]", 'line 1: no "text" and no "messages"'),
        ("a.jsonl", b'{"messages": [{"who": 1}]}', "line 1: the chat template refuses"),
    ],
)
def test_bad_files_get_one_line(
    tokenizer: Any, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MoneEdgeError) as error:
        load([str(path)], tokenizer, samples=2, seq_len=32)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["gone.txt", "/no/where", "a b c", "./x", "name[a"])
def test_missing_files_are_named(tokenizer: Any, spec: str) -> None:
    with pytest.raises(MoneEdgeError, match="no such file") as error:
        load([spec], tokenizer)
    assert spec in str(error.value)


def test_folders_and_sizes_are_refused(tokenizer: Any, tmp_path: Path, text: str) -> None:
    with pytest.raises(MoneEdgeError, match="is a folder"):
        load([str(tmp_path)], tokenizer)
    with pytest.raises(UsageError, match="--samples 0"):
        load([text], tokenizer, samples=0)
    with pytest.raises(UsageError, match="--seq-len 1"):
        load([text], tokenizer, seq_len=1)


def test_missing_datasets_library_is_told(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MoneEdgeError, match="pip install datasets"):
        load(["org/name"], tokenizer)


def test_hub_datasets_are_streamed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(name: str, subset: str | None, **options: Any) -> Any:
        if name == "org/gone":
            raise ConnectionError("cannot reach it\nwith details")
        asked.update(name=name, subset=subset, **options)
        return ({"text": TEXT} for _ in range(100))

    fake = types.SimpleNamespace(load_dataset=load_dataset, config=types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    batches = load(["org/name[en](validation):2"], tokenizer, samples=99, seq_len=32)
    assert asked == {
        "name": "org/name",
        "subset": "en",
        "split": "validation",
        "streaming": True,
    }
    one = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert batches.available_tokens == 2 * one + 1
    with pytest.raises(MoneEdgeError, match=r"org/gone: .*cannot reach it$"):
        load(["org/gone"], tokenizer)


def test_a_local_path_wins(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wikitext").write_text(TEXT)
    assert load(["wikitext"], tokenizer, samples=1, seq_len=32).specs == ("wikitext",)
