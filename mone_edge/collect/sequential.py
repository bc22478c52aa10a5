"""Statistics of a model that is larger than the memory: one layer's weights at a time.

In: a checkpoint, packed calibration tokens, a work folder. Out: the same ExpertStats that
`torch_model.collect` gives, to the last bit for the same precision and number of threads.

Layer `l` reads the hidden states that layer `l - 1` left in a file. What is finished after each
layer: its statistics, its outputs, then the state that says so.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mone_edge.calibration import Batches
from mone_edge.collect.accumulate import LayerAccumulator, LinearAccumulator
from mone_edge.collect.hidden import HiddenStates
from mone_edge.collect.layerwise import LayerCalls, open_streamed
from mone_edge.collect.streaming import OUTSIDE, StreamedModel
from mone_edge.collect.torch_model import (
    BATCH_TOKENS,
    by_key,
    checked,
    observe_experts,
    observe_linears,
    provenance,
    sampled,
)
from mone_edge.collect.work import Work, WorkFolder, open_work, run_key
from mone_edge.source import Checkpoint
from mone_edge.stats import ExpertStats

Progress = Callable[[int, int], None]


def collect_sequential(
    source: Checkpoint,
    calibration: Batches,
    work: Work,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Progress | None = None,
) -> ExpertStats:
    """Gather every statistic with one layer's weights in memory.

    Args:
        source: the checkpoint.
        calibration: packed sequences from `mone_edge.calibration.load`.
        work: folder for what is finished; stays until the caller has saved the result.
        device, dtype, batch_tokens: as in `torch_model.collect`.
        on_progress: called with (sequences done in all layers, sequences in all layers).

    Raises:
        MoneEdgeError: the checkpoint or the architecture cannot be streamed, one layer does not
            fit in the memory, the disk is too small, or the work folder is another run's.
    """
    streamed = open_streamed(source, device, dtype)
    made = provenance(streamed.model, calibration, source.name, source.fingerprint)
    with open_work(work, run_key(made, "sequential", batch_tokens)) as folder:
        calls = LayerCalls(streamed, calibration, batch_tokens)
        run = _Run(streamed, calibration, calls, folder, on_progress or (lambda d, t: None))
        with ExitStack() as stack:
            run.layer_sums |= stack.enter_context(
                observe_experts(streamed.model, sampled(calibration))
            )
            run.linear_sums |= stack.enter_context(observe_linears(streamed.model, record=True))
            stack.enter_context(torch.inference_mode())
            run.all_layers()
        return ExpertStats(made, *run.collected())


@dataclass
class _Run:
    """One run over all layers, from the first that is not finished."""

    streamed: StreamedModel
    calibration: Batches
    calls: LayerCalls
    folder: WorkFolder
    report: Progress
    layer_sums: dict[int, LayerAccumulator] = field(default_factory=dict)
    linear_sums: dict[str, LinearAccumulator] = field(default_factory=dict)

    def all_layers(self) -> None:
        names = list(self.streamed.layers)
        done = int(self.folder.state.get("layers", 0))
        shape = self.folder.state.get("shape")
        self.streamed.load(OUTSIDE)
        for number in range(done, len(names)):
            shape = self._layer(number, names[number], shape)
            self.folder.save(layers=number + 1, shape=shape)
            self._hidden_file(number).unlink(missing_ok=True)
        self._head(shape)

    def collected(self) -> tuple[dict[int, Any], dict[str, Any]]:
        """Statistics of all layers, from the files that `_layer` left."""
        layers: dict[int, Any] = {}
        linears: dict[str, Any] = {}
        for number in range(len(self.streamed.layers) + 1):
            part = ExpertStats.load(self._stats_file(number))
            layers |= part.layers
            linears |= part.linears
        return layers, linears

    def _layer(self, number: int, name: str, shape: list[int] | None) -> list[int]:
        """Run one layer over all tokens; returns the shape of a sequence's hidden states."""
        self.streamed.load(name)
        blocks = self._blocks(name)
        rows = len(self.calibration.tokens)
        written: HiddenStates | None = None
        before = self._hidden(number, shape) if number else None
        with ExitStack() as stack:
            for start, tokens in self.calls.batches():
                hidden = before.read(start, len(tokens)) if before else None
                after = self.calls.layer(name, tokens, hidden)
                if written is None:
                    written = self._hidden(number + 1, list(after.shape[1:]))
                    written.require_space(rows)
                    stack.enter_context(written.writing())
                written.write(after)
                for index in blocks:
                    self.layer_sums[index].add_stream(after)
                self._progress(number, start + len(tokens))
        assert written is not None
        self._save_stats(number, name)
        self.streamed.release(name)
        return list(written.shape)

    def _head(self, shape: list[int] | None) -> None:
        """What follows the last layer: the norm, and the output head's inputs."""
        number = len(self.streamed.layers)
        hidden = self._hidden(number, shape)
        for start, tokens in self.calls.batches():
            self.calls.after_layers(tokens, hidden.read(start, len(tokens)))
        self._save_stats(number, OUTSIDE)

    def _save_stats(self, number: int, part: str) -> None:
        """The statistics of one part, in a file; its sums are dropped from memory."""
        tokens = self.calibration.tokens.size
        inside = [n for n in self.linear_sums if self.streamed.part_of(n) == part]
        layers = {
            i: checked(self.streamed.model, i, self.layer_sums.pop(i), tokens)
            for i in self._blocks(part)
        }
        linears = by_key(self.streamed.model, {n: self.linear_sums.pop(n) for n in inside})
        made = provenance(self.streamed.model, self.calibration, "", "")
        ExpertStats(made, layers, linears).save(self._stats_file(number))

    def _blocks(self, part: str) -> list[int]:
        """The blocks with experts in a part: one, or none."""
        return [i for i, name in self.streamed.blocks.items() if name == part]

    def _progress(self, layers: int, rows: int) -> None:
        total = len(self.calibration.tokens)
        self.report(layers * total + rows, len(self.streamed.layers) * total)

    def _hidden(self, number: int, shape: list[int] | None) -> "HiddenStates":
        assert shape is not None
        return HiddenStates(self._hidden_file(number), tuple(shape), self.streamed.dtype)

    def _hidden_file(self, number: int) -> Path:
        return self.folder.path / f"hidden.{number}.bin"

    def _stats_file(self, number: int) -> Path:
        return self.folder.path / f"layer.{number}.safetensors"
