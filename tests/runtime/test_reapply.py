"""The series on another release: a tiny upstream, two patches, three releases."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mone_edge.errors import MoneEdgeError
from mone_edge.runtime import reapply
from mone_edge.runtime.upstream import Upstream

TREE = "vendor/llama.cpp"
LINES = [f"line {number}\n" for number in range(40)]


def archive(folder: Path, version: str, changes: dict[int, str]) -> Path:
    """A source distribution whose tree has `a.c` and `b.c`, the first with some lines changed."""
    tree = folder / f"llama_cpp_python-{version}" / TREE
    tree.mkdir(parents=True)
    (tree / ".git").write_text("gitdir: elsewhere\n")
    (tree / "a.c").write_text("".join(changes.get(i, line) for i, line in enumerate(LINES)))
    (tree / "b.c").write_text("".join(LINES))
    path = folder / f"llama_cpp_python-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / f"llama_cpp_python-{version}", f"llama_cpp_python-{version}")
    return path


@pytest.fixture
def releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[int, str]], Path]:
    """Makes releases; the pinned one is there, with a patch for each file at line 10."""
    pinned = archive(tmp_path, "1.0", {})
    repository = tmp_path / "maker"
    repository.mkdir()
    upstream = Upstream("llama-cpp-python", "1.0", "", TREE)
    reapply.git(repository, "init", "-q", "-b", "master")
    reapply.commit_tree(repository, upstream, pinned, "base")
    for name in ("a.c", "b.c"):
        (repository / name).write_text("".join([*LINES[:10], "ours\n", *LINES[10:]]))
        reapply.git(repository, "commit", "-qam", f"ours in {name}")
    reapply.git(repository, "format-patch", "-q", "-o", str(tmp_path / "patches"), "HEAD~2")
    patches = sorted((tmp_path / "patches").glob("*.patch"))
    monkeypatch.setattr(reapply, "read_upstream", lambda: upstream)
    monkeypatch.setattr(reapply, "fetch_sdist", lambda *_, **__: pinned)
    monkeypatch.setattr(reapply, "patch_files", lambda: patches)
    return lambda version, changes: archive(tmp_path, version, changes)


@pytest.mark.parametrize(
    ("changes", "states"),
    [
        ({30: "theirs\n"}, ["applies", "applies"]),
        ({8: "theirs\n"}, ["merged", "applies"]),
        ({9: "theirs\n", 10: "theirs\n"}, ["conflicts"]),
    ],
)
def test_states(
    releases: Callable[[str, dict[int, str]], Path],
    tmp_path: Path,
    changes: dict[int, str],
    states: list[str],
) -> None:
    target = tmp_path / "out"
    outcomes = list(reapply.reapply(str(releases("1.1", changes)), target))
    assert [outcome.state for outcome in outcomes] == states
    text = (target / "a.c").read_text()
    assert "theirs" in text
    assert "ours" in text
    if states == ["conflicts"]:
        line = text.splitlines().index("<<<<<<< HEAD") + 1
        assert outcomes[0].conflicts == (f"a.c:{line}",)
    else:
        assert "ours" in (target / "b.c").read_text()


def test_folder_in_use(releases: Callable[[str, dict[int, str]], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "work").write_text("precious")
    with pytest.raises(MoneEdgeError, match="is not empty"):
        list(reapply.reapply(str(releases("1.1", {})), tmp_path / "out"))
