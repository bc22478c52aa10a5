"""Code that a checkpoint brings along is never run, whoever asks for it."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mone_edge.transformers_quiet import quiet
from tests import tiny

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class Own(PreTrainedTokenizerFast):
    pass
"""


def test_a_tokenizer_of_the_checkpoint_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    folder, marker = tmp_path / "model", tmp_path / "ran"
    tiny.make_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with quiet(), pytest.raises(ValueError, match="Python code of its own"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert not marker.exists()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # outside, it would have run
    assert marker.exists()
