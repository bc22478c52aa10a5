"""Sums of an unfinished calibration, in a file: what an in-memory run goes on from.

In: accumulators and a work folder. Out: the same accumulators in another process, to the last
bit. Knows nothing about models.
"""

import time
from pathlib import Path

from mone_edge.collect.accumulate import LayerAccumulator, LinearAccumulator
from mone_edge.collect.work import WorkFolder
from mone_edge.errors import MoneEdgeError
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
        self.folder.save(rows=rows)
        if before:
            self._file(before).unlink(missing_ok=True)
        now = time.monotonic()
        self._due = now + max(SAVE_SECONDS, (now - started) / SAVE_SHARE)

    def _file(self, rows: int) -> Path:
        return self.folder.path / f"sums.{rows}.safetensors"
