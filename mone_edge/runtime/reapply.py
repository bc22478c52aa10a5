"""The patches on another release of llama-cpp-python: what applies, what is merged, what conflicts.

    python -m mone_edge.runtime.reapply 0.3.40            # downloaded by pip
    python -m mone_edge.runtime.reapply sdist.tar.gz --to llama.cpp-new

In: a version or an archive. Out: a git repository of that release with the series on it as far as
it goes, and a line a patch on stdout. Git merges three ways, as the repository holds the pinned
tree as well; where it cannot, the conflicts are listed and left in the working tree, to be resolved
and gone on with by `git am --continue`. Knows nothing of compiling.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mone_edge.errors import MoneEdgeError
from mone_edge.runtime.fetch import fetch_sdist, run_pip
from mone_edge.runtime.source import extract
from mone_edge.runtime.upstream import Upstream, patch_files, read_upstream

CONFLICT_START = re.compile(r"^<<<<<<< ", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """How one patch fared.

    Args:
        patch: its file.
        state: "applies", "merged" (three ways: read the result) or "conflicts".
        conflicts: `path:line` of each conflict; a path alone where the file is gone.
    """

    patch: Path
    state: str
    conflicts: tuple[str, ...] = ()


def reapply(release: str, repository: Path) -> Iterator[Outcome]:
    """Put the series on `release` in a new git repository, up to the first conflict.

    Args:
        release: a version of llama-cpp-python, or the path of a source distribution.
        repository: a folder that does not exist yet, or is empty.

    Raises:
        MoneEdgeError: the source cannot be had, or git failed.
    """
    upstream = read_upstream()
    repository.mkdir(parents=True, exist_ok=True)
    if any(repository.iterdir()):
        raise MoneEdgeError(f"{repository} is not empty; name another folder")
    git(repository, "init", "-q", "-b", "master")
    with tempfile.TemporaryDirectory() as folder:
        commit_tree(repository, upstream, fetch_sdist(upstream, offline=False), upstream.version)
        archive = Path(release)
        if not archive.is_file():
            archive = download(upstream.name, release, Path(folder))
        commit_tree(repository, upstream, archive, archive.name)
    for patch in patch_files():
        outcome = apply(repository, patch)
        yield outcome
        if outcome.state == "conflicts":
            return


def download(name: str, version: str, folder: Path) -> Path:
    """A source distribution of any version, by pip."""
    run_pip(
        ["download", "--no-deps", "--no-binary", name,
         f"{name}=={version}", "--dest", str(folder)],
        f"cannot download {name} {version}",
    )  # fmt: skip
    return next(folder.glob("*.tar.gz"))


def commit_tree(repository: Path, upstream: Upstream, archive: Path, message: str) -> None:
    """Commit the llama.cpp of `archive` as the whole content of `repository`."""
    for entry in list(repository.iterdir()):
        if entry.name != ".git":
            git(repository, "rm", "-rq", "--ignore-unmatch", entry.name)
    with tempfile.TemporaryDirectory(dir=repository.parent, prefix=".reapply-") as folder:
        extract(archive, Path(folder), (upstream.tree,))
        tree = Path(folder) / upstream.tree
        (tree / ".git").unlink(missing_ok=True)
        for entry in list(tree.iterdir()):
            entry.rename(repository / entry.name)
    git(repository, "add", "-Af")
    git(repository, "commit", "-qm", message, "--allow-empty")


def apply(repository: Path, patch: Path) -> Outcome:
    """`git am` one patch."""
    done = git(repository, "am", "-3", "--whitespace=nowarn", str(patch), check=False)
    if done.returncode == 0:
        merged = "3-way merge" in done.stdout
        return Outcome(patch, "merged" if merged else "applies")
    unmerged = git(repository, "diff", "--name-only", "--diff-filter=U").stdout.split()
    places = [place for name in unmerged for place in conflicts_of(repository, name)]
    if not places:
        places = re.findall(r"error: (?:patch failed: )?(\S+)", done.stdout)
    return Outcome(patch, "conflicts", tuple(dict.fromkeys(places)))


def conflicts_of(repository: Path, name: str) -> list[str]:
    """`name:line` of each conflict in a file."""
    file = repository / name
    if not file.is_file():
        return [name]
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = [text.count("\n", 0, match.start()) + 1 for match in CONFLICT_START.finditer(text)]
    return [f"{name}:{line}" for line in lines] or [name]


def git(repository: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git in `repository`, both outputs as one text."""
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "mone-edge"), ("EMAIL", "mone-edge@localhost"))
    }
    done = subprocess.run(
        ["git", "-c", "gc.auto=0", *arguments],
        cwd=repository, check=False, text=True, errors="replace",
        env={**os.environ, **identity, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if check and done.returncode:
        raise MoneEdgeError(f"git {arguments[0]} failed: {done.stdout.strip()[-300:]}")
    return done


def main() -> int:
    """The command; 0: all applies, 1: a conflict or another failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("release", help="a version of llama-cpp-python, or a source archive")
    parser.add_argument("--to", type=Path, default=Path("llama.cpp-reapplied"), metavar="FOLDER")
    arguments = parser.parse_args()
    code = 0
    try:
        for outcome in reapply(arguments.release, arguments.to):
            sys.stdout.write(f"{outcome.state:<9} {outcome.patch.name}\n")
            for place in outcome.conflicts:
                sys.stdout.write(f"          {place}\n")
            if outcome.state == "conflicts":
                code = 1
                sys.stderr.write(
                    f"resolve in {arguments.to}, then: git add -A && git am --continue; "
                    "the patches after this one were not tried\n"
                )
    except MoneEdgeError as error:
        sys.stderr.write(f"{error}\n")
        code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
