"""Sums of an unfinished calibration, in a file: what an in-memory run goes on from.

In: accumulators and a work folder. Out: the same accumulators in another process, to the last
bit. Knows nothing about models.
"""

import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mone_edge.collect.accumulate import LayerAccumulator, LinearAccumulator
from mone_edge.collect.work import WorkFolder
from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import atomic_write
from mone_edge.stats import ExpertStats, Provenance

SAVE_SECONDS = 120.0  # at least, between two saves
SAVE_SHARE = 0.05  # of the time, at most, that goes into saving

LayerSums = dict[int, LayerAccumulator]
LinearSums = dict[str, LinearAccumulator]


class PartialSums:
    """Keeps the sums of a run in its work folder, now and then."""

    def __init__(self, folder: WorkFolder) -> None:
        self.folder = folder
        self._due = time.monotonic() + SAVE_SECONDS

    def restore(self, layers: LayerSums, linears: LinearSums) -> int:
        """Put saved sums into the accumulators; returns the number of sequences in them.

        Raises:
            MoneEdgeError: the saved sums are of other layers.
        """
        rows = int(self.folder.state.get("rows", 0))
        if not rows:
            return 0
        saved = ExpertStats.load(self._file(rows))
        if saved.layers.keys() != layers.keys() or not saved.linears.keys() <= linears.keys():
            raise MoneEdgeError(f"{self.folder.path} holds the sums of other layers; remove it")
        for index, layer in saved.layers.items():
            layers[index].total = layer
        for index, inputs in self._read_samples(rows).items():
            if sample := layers[index].sample:
                sample.parts = [inputs]
        for name, linear in saved.linears.items():
            linears[name].total = linear
        return rows

    def keep(self, rows: int, layers: LayerSums, linears: LinearSums) -> None:
        """Save the sums of the first `rows` sequences, if it is time to."""
        started = time.monotonic()
        if started < self._due:
            return
        before = self.folder.state.get("rows")
        ExpertStats(
            Provenance("", "", ""),
            {i: s.total for i, s in layers.items() if s.total is not None},
            {n: s.total for n, s in linears.items() if s.total is not None},
        ).save(self._file(rows))
        self._write_samples(rows, layers)
        self.folder.save(rows=rows)
        if before:
            self._file(before).unlink(missing_ok=True)
            self._file(before, "samples").unlink(missing_ok=True)
        now = time.monotonic()
        self._due = now + max(SAVE_SECONDS, (now - started) / SAVE_SHARE)

    def _write_samples(self, rows: int, layers: LayerSums) -> None:
        kept = {str(i): s.sample.inputs for i, s in layers.items() if s.sample and s.sample.parts}
        with atomic_write(self._file(rows, "samples")) as temporary:
            try:
                save_file(kept, temporary)
            except SafetensorError as error:  # what it makes of a full disk
                raise OSError(str(error)) from error

    def _read_samples(self, rows: int) -> dict[int, Tensor]:
        """Inputs of sampled tokens, by layer.

        Raises:
            MoneEdgeError: the file is damaged.
        """
        path = self._file(rows, "samples")
        try:
            return {int(index): inputs for index, inputs in load_file(path).items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise MoneEdgeError(
                f"{path} is damaged ({reason(error)}); remove {path.parent} to start again"
            ) from error

    def _file(self, rows: int, kind: str = "sums") -> Path:
        return self.folder.path / f"{kind}.{rows}.safetensors"
