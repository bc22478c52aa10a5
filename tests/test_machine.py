"""Cores are counted once, however many hardware threads they have."""

import os
from pathlib import Path

import pytest

from mone_edge import machine


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux tells")
@pytest.mark.parametrize(
    ("siblings", "allowed", "count"),
    [
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, {0, 1, 2, 3}, 2),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, {0, 2}, 1),  # as `taskset -c 0,2` leaves it
        ({0: "0", 1: "1"}, {0, 1}, 2),
        ({}, {0, 1, 2}, 3),  # no topology, as in some containers
    ],
)
def test_cores(
    siblings: dict[int, str],
    allowed: set[int],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for processor, text in siblings.items():
        (tmp_path / str(processor)).write_text(text + "\n", encoding="ascii")
    monkeypatch.setattr(machine, "_TOPOLOGY", str(tmp_path / "{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: allowed)
    assert machine.cores() == count
