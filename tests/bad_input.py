"""What the tests of bad input share: run a command line, and demand one clear line and no trace."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mone_edge.cli import run

Tree = dict[str, tuple[int, int]]


def tree(folder: Path) -> Tree:
    """Size and time of everything below a folder."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file() or not any(path.iterdir())
    }


def refused(
    capfd: pytest.CaptureFixture[str], workspace: Path, arguments: list[Any], code: int, told: str
) -> None:
    """The command fails with `code`, says `told` in one line, and leaves all files as they were."""
    before = tree(workspace)
    capfd.readouterr()
    got = run([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert got == code, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("mone-edge: ")
    assert told in lines[0], lines[0]
    assert "(MONE_EDGE_DEBUG=1" not in lines[0], lines[0]
    assert len(lines[0]) < 1200
    assert out == ""
    assert tree(workspace) == before, sorted(tree(workspace).keys() - before.keys())


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes one away."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def copy_of(checkpoint: Path, workspace: Path) -> Path:
    return Path(shutil.copytree(checkpoint, workspace / "model"))
