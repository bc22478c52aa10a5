"""The work folder of a long calibration: what is finished, so that a killed run goes on from there.

In: a path beside the result and a key that says whose work it is. Out: a locked folder with a
state that changes atomically. Knows nothing about models or sums.
"""

import fcntl
import glob
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mone_edge.errors import MoneEdgeError, Resumable
from mone_edge.paths import atomic_write, parent_folder
from mone_edge.stats import Provenance

FORMAT = "mone-edge-work"
STATE, LOCK = "state.json", "lock"
# every file of a run: these two, hidden states and inputs, what is finished, half-written files
MADE = re.compile(
    r"state\.json|lock|inputs\.bin|hidden\.\d+\.bin|"
    r"(layer|sums|samples|novices)\.\d+\.safetensors|\..+\.tmp"
)


def work_path(outfile: Path) -> Path:
    """Where the work of a run lies whose result is `outfile`."""
    return outfile.with_name(f"{outfile.name}.work")


def run_key(made: Provenance, mode: str, batch_tokens: int) -> dict[str, Any]:
    """What must be the same for a run to go on: model, text, precision, versions, batches."""
    return {
        "mode": mode,
        "model": made.fingerprint,
        "calibration text": made.data_sha256[0],
        "number and length of sequences": [made.samples, made.seq_len],
        "seed": made.seed,  # of the tokens that all experts run on
        "software": made.tool,
        "batch": batch_tokens,
    }


def discard(path: Path) -> None:
    """Remove the work whose result is saved, of all processes; none is fine.

    What runs did not make stays, and so does a folder in which another process is working.
    """
    for folder in (path, *_ranks(path)):
        if (folder / STATE).exists() or not _strangers(folder):
            with suppress(OSError), _locked(folder):
                _empty(folder)
                (folder / LOCK).unlink()
                folder.rmdir()


def _ranks(path: Path) -> Iterator[Path]:
    yield from path.parent.glob(f"{glob.escape(path.name)}.rank*of*")


@dataclass(frozen=True)
class Work:
    """Where a run keeps what is finished, and what to do with what is there already."""

    path: Path
    resume: bool = False  # go on with it
    restart: bool = False  # throw it away (with `resume`: only if it is another run's)

    @property
    def started(self) -> bool:
        """Whether there is something to go on with."""
        return any((path / STATE).exists() for path in (self.path, *_ranks(self.path)))

    def of_rank(self, rank: int, size: int) -> "Work":
        """The work of one of several processes, in a folder of its own."""
        return self if size == 1 else replace(self, path=Path(f"{self.path}.rank{rank}of{size}"))


@dataclass
class WorkFolder:
    """A locked work folder and the state in it."""

    path: Path
    key: Mapping[str, Any]
    state: dict[str, Any]  # empty at the start of a run

    def save(self, **state: Any) -> None:
        """Replace the state, atomically; a killed process leaves the old or the new one."""
        self.state = state
        document = {"format": FORMAT, "key": dict(self.key), "state": state}
        with atomic_write(self.path / STATE) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@contextmanager
def unfinished(work: Work) -> Iterator[None]:
    """Around a run and the saving of its result: what fails leaves only what can go on.

    Raises:
        Resumable: it was interrupted, and there is something to go on with.
    """
    with parent_folder(work.path):
        try:
            yield
        except BaseException as error:
            if not work.started:
                discard(work.path)
            elif isinstance(error, KeyboardInterrupt):
                raise Resumable(*(() if work.resume else ("--resume",))) from error
            raise


@contextmanager
def open_work(work: Work, key: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """Open a work folder, or make it; what is in it stays when the block ends.

    Args:
        key: whose work it is (JSON values): model, calibration text, precision.

    Raises:
        MoneEdgeError: it holds unfinished work and neither `resume` nor `restart` was asked for,
            it is another run's, or another process is working in it.
    """
    path, document = work.path, _read(work.path)
    if document and not work.resume and not work.restart:
        raise MoneEdgeError(
            f"{path} holds unfinished work of an earlier run; add --resume to go on with it, "
            "or --force to start again"
        )
    same = document.get("key") == dict(key)
    if document and not same and not work.restart:
        raise MoneEdgeError(_foreign(path, document.get("key"), key))
    go_on = same and work.resume
    path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(path))
        except BlockingIOError as error:
            raise MoneEdgeError(
                f"another process is working in {path}; when it is done, run this again"
            ) from error
        if not go_on:
            _empty(path)
        yield WorkFolder(path, key, document["state"] if go_on else {})


def _read(path: Path) -> dict[str, Any]:
    """What the folder says of itself; empty if there is none or no step of it was finished."""
    file = path / STATE
    if not file.exists():
        if path.is_file() or _strangers(path):
            raise MoneEdgeError(f"{path} is not a work folder; name another --outfile")
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or not isinstance(document["state"], dict):
            raise ValueError("format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MoneEdgeError(f"{file} is damaged; remove {path} to start again") from error
    return dict(document)


def _strangers(path: Path) -> list[str]:
    """Names in a folder that no run gives a file."""
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    return [name for name in names if not MADE.fullmatch(name)]


def _foreign(path: Path, found: Any, wanted: Mapping[str, Any]) -> str:
    found = found if isinstance(found, dict) else {}
    first = next((name for name in wanted if found.get(name) != wanted[name]), "key")
    return (
        f"{path} is the work of another run: its {first} is {_short(found.get(first))}, "
        f"not {_short(wanted.get(first))}; start again with --force, or name another --outfile"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a folder's lock.

    Raises:
        BlockingIOError: another process holds it.
    """
    with (path / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _empty(path: Path) -> None:
    for file in path.iterdir():
        if file.name != LOCK and MADE.fullmatch(file.name):
            file.unlink()
