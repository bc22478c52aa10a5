"""Shared pieces: the patched runtime, and one calibrated tiny checkpoint of each architecture."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mone_edge import calibration, runtime, source
from mone_edge.collect.torch_model import collect
from mone_edge.stats import ExpertStats
from tests import tiny


@pytest.fixture(scope="session")
def built_runtime() -> runtime.RuntimeInfo:
    """The patched llama.cpp, built if it is not (minutes, once a machine)."""
    return runtime.build()


@dataclass(frozen=True)
class Calibrated:
    """A tiny checkpoint and its statistics, as files and as objects."""

    source: source.Source
    stats: ExpertStats
    stats_file: Path
    tokens: np.ndarray  # [samples, seq_len] that were calibrated on


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Calibrated]:
    """Make (once) a calibrated tiny checkpoint of a model type."""
    made: dict[str, Calibrated] = {}

    def make(model_type: str) -> Calibrated:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            made[model_type] = _calibrate(model_type, folder)
        return made[model_type]

    return make


def _calibrate(model_type: str, folder: Path) -> Calibrated:
    found = source.resolve(str(tiny.make_checkpoint(model_type, folder / "model")))
    text = folder / "text.txt"
    text.write_text(tiny.TEXT * 2, encoding="utf-8")
    tokenizer = calibration.load_tokenizer(found.path)
    batches = calibration.load([str(text)], tokenizer, samples=12, seq_len=64, seed=0)
    stats = collect(found.path, batches, model=found.name, fingerprint=found.fingerprint)
    stats.save(folder / "stats.safetensors")
    return Calibrated(found, stats, folder / "stats.safetensors", batches.tokens)
