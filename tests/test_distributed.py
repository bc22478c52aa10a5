"""Two processes over gloo: the plan of one process, and one clear line when one is lost."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mone_edge import calibration, cli
from mone_edge.calibration import Batches
from mone_edge.collect import distributed, torch_model
from mone_edge.collect.distributed import Group
from mone_edge.collect.work import Work, work_path
from mone_edge.errors import MoneEdgeError
from mone_edge.plan import make_plan
from mone_edge.source import Source, resolve
from mone_edge.stats import ARRAYS, SAMPLED, ExpertStats, merge_all
from tests.tiny import TEXT, make_checkpoint

Break = Callable[[int], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.set_num_threads(1)
    return resolve(str(make_checkpoint("qwen2_moe", tmp_path_factory.mktemp("m") / "model")))


@pytest.fixture
def arguments(model: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that takes seven micro-batches."""
    monkeypatch.setattr(torch_model, "BATCH_TOKENS", 64)
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    return [
        "stats", str(model.path), "--data", str(tmp_path / "text.txt"),
        "--samples", "13", "--seq-len", "32", "--device", "cpu",
    ]  # fmt: skip


def torchrun(
    arguments: list[str], log: Path, break_it: Break = lambda rank: None, size: int = 2
) -> list[int | None]:
    """Exit codes of `size` processes that run a command as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_rank, args=(rank, size, port, arguments, log, break_it))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


def _rank(
    rank: int, size: int, port: int, arguments: list[str], log: Path, break_it: Break
) -> None:
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    out = os.open(log.with_suffix(f".{rank}"), os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import sys

    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    break_it(rank)
    code = cli.run(arguments)
    sys.stdout.flush()
    os._exit(code)


@pytest.mark.parametrize("sequential", [False, True])
def test_two_processes_make_the_plan_of_one(
    model: Source, arguments: list[str], sequential: bool, tmp_path: Path
) -> None:
    one, two, log = (tmp_path / name for name in ("one", "two", "log"))
    extra = ["--sequential"] if sequential else []
    assert cli.run([*arguments, *extra, "-o", str(one)]) == 0
    assert torchrun([*arguments, *extra, "-o", str(two)], log) == [0, 0]
    expected, got = ExpertStats.load(one), ExpertStats.load(two)
    assert got.provenance == expected.provenance
    for index, layer in expected.layers.items():
        for name in set(ARRAYS) - set(SAMPLED):
            want, have = getattr(layer, name), getattr(got.layers[index], name)
            rtol = 1e-12 if name != "pair_error" else 0.05  # merged in other groups
            atol = rtol * np.abs(want).max()
            np.testing.assert_allclose(have, want, rtol=rtol, atol=atol, err_msg=name)
    assert_samples_are_those_of_the_shares(model, got, tmp_path / "text.txt")
    for scope in ("layer", "model"):
        assert make_plan(got, scope=scope) == make_plan(expected, scope=scope)
    assert got.linears.keys() == expected.linears.keys()
    talk = [log.with_suffix(f".{rank}").read_text() for rank in (0, 1)]
    assert talk[1] == "" and talk[0].startswith(f"{two}: 2 MoE layers, ")
    assert not list(tmp_path.glob("*.work*"))


def assert_samples_are_those_of_the_shares(model: Source, got: ExpertStats, text: Path) -> None:
    """Each process takes a sample of its own; what they find is added up, to the last bit."""
    tokenizer = calibration.load_tokenizer(model.path)
    batches = calibration.load([str(text)], tokenizer, samples=13, seq_len=32, seed=42)
    shares = [Group(rank, 2).share(batches, 64) for rank in (0, 1)]
    alone = merge_all(torch_model.collect(model.path, part, batch_tokens=64) for part in shares)
    for index, layer in alone.layers.items():
        assert got.layers[index].sampled == layer.sampled == 13 * 32
        for name in SAMPLED:
            assert np.array_equal(getattr(got.layers[index], name), getattr(layer, name))


def test_a_lost_process_ends_the_run_with_one_line(arguments: list[str], tmp_path: Path) -> None:
    def die(rank: int) -> None:
        if rank == 1:
            torch_model.collect_loaded = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "out"
    assert torchrun([*arguments, "-o", str(out)], tmp_path / "log", die) == [1, -signal.SIGKILL]
    (line,) = _complaints(tmp_path / "log.0")
    assert line.startswith("mone-edge: another process of this run was lost")
    assert not out.exists()


def test_a_failure_elsewhere_is_told_by_the_first_process(
    arguments: list[str], tmp_path: Path
) -> None:
    def fail(rank: int) -> None:
        def broken(*_: object, **__: object) -> None:
            raise MemoryError("12 GB")

        if rank == 1:
            torch_model.collect_loaded = broken

    out = tmp_path / "out"
    assert torchrun([*arguments, "-o", str(out)], tmp_path / "log", fail) == [1, 1]
    assert _complaints(tmp_path / "log.0") == [
        "mone-edge: process 1: unexpected MemoryError: 12 GB"
    ]
    assert (tmp_path / "log.1").read_text() == "" and not out.exists()


def _complaints(log: Path) -> list[str]:
    """What the command said; gloo's own log lines start with a bracket."""
    return [line for line in log.read_text().splitlines() if line.startswith("mone-edge")]


def test_shares_are_whole_batches() -> None:
    tokens = np.arange(13 * 4).reshape(13, 4)
    batches = Batches(tokens, (), "sha", 0, 13, 4, tokens.size)
    for size in (1, 2, 3, 7):
        shares = [Group(rank, size).share(batches, 8).tokens for rank in range(size)]
        assert np.array_equal(np.concatenate(shares), tokens)
        assert all(len(share) % 2 == 0 for share in shares[:-1])
    with pytest.raises(MoneEdgeError, match="too few for 8 processes"):
        Group(0, 8).share(batches, 8)


def test_each_process_has_its_own_work(tmp_path: Path) -> None:
    work = Work(work_path(tmp_path / "s"))
    assert work.of_rank(0, 1) == work
    assert work.of_rank(1, 2).path.name == "s.work.rank1of2"
    assert not work.started
    work.of_rank(1, 2).path.mkdir()
    (work.of_rank(1, 2).path / "state.json").touch()
    assert work.started


def test_convert_is_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "world", lambda: Group(0, 2))
    from mone_edge.commands.deciding import Means, measure
    from mone_edge.console import Console

    with pytest.raises(MoneEdgeError, match="convert is one process"):
        measure(Console(), None, None, tmp_path / "s", Means("cpu", None, False))
