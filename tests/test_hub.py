"""Models of the hub, out of its cache on disk; nothing here asks the network."""

import shutil
from pathlib import Path

import pytest

from mone_edge.evaluate import file_bytes
from mone_edge.hub import HUB_FILES, OTHER_FORMS
from mone_edge.source import Checkpoint, resolve
from tests import tiny

COMMIT = "0123456789" * 4
MODEL = "org/Tiny-MoE-v1.5"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as the hub's cache holds it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("mone_edge.hub.cache_dir", lambda: tmp_path / "cache")
    repo = tmp_path / "hub" / "models--org--Tiny-MoE-v1.5"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return tiny.make_checkpoint("olmoe", repo / "snapshots" / COMMIT)


@pytest.mark.usefixtures("built_runtime")
def test_a_gguf_has_the_models_name(snapshot: Path) -> None:
    found = resolve(MODEL, offline=True)
    assert isinstance(found, Checkpoint)
    written = found.open(dtype="F32", tokenizer_pre="gpt-2").metadata
    told = {key: written[f"general.{key}"].value for key in ("name", "basename", "version")}
    assert told == {"name": "Tiny MoE v1.5", "basename": "Tiny-MoE", "version": "v1.5"}
    local = resolve(str(snapshot), offline=True)
    assert found.fingerprint == local.fingerprint


def test_the_folder_follows_the_hubs_cache(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(MODEL, offline=True).path
    assert first.name == "Tiny-MoE-v1.5"
    assert first.samefile(snapshot)
    shutil.move(tmp_path / "hub", tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    again = resolve(MODEL + f"@{COMMIT}", offline=True).path
    assert again == first
    assert list(first.parent.iterdir()) == [first]
    assert again.samefile(tmp_path / "elsewhere" / snapshot.relative_to(tmp_path / "hub"))


def test_weights_come_once() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "README.md"]
    other = ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"]
    patterns = {"allow_patterns": HUB_FILES, "ignore_patterns": OTHER_FORMS}
    assert list(filter_repo_objects([*wanted, *other], **patterns)) == wanted


def test_weights_that_the_index_does_not_name_are_not_counted(snapshot: Path) -> None:
    size = (snapshot / "model.safetensors").stat().st_size
    shutil.copy(snapshot / "model.safetensors", snapshot / "consolidated.safetensors")
    assert file_bytes(snapshot) == size


def test_without_a_cache_the_snapshot_is_the_folder(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the cache should be")
    assert resolve(MODEL, offline=True).path == snapshot
