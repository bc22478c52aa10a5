"""Calibration by several processes: each reads its share of the text, rank 0 adds the sums up.

In: the environment that torchrun sets. Out: this process's rows, and the merged statistics on
rank 0. A share is whole micro-batches of `torch_model.collect`, in order, so that the same sums
are added as in one process, only in other groups. Knows nothing about models.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from mone_edge.calibration import Batches
from mone_edge.errors import MoneEdgeError
from mone_edge.stats import ExpertStats, merge_all

LOST = "another process of this run was lost; its own message, if it left one, is above"
TIMEOUT = timedelta(hours=24)  # ranks may differ by hours; a dead one closes its connection


@dataclass(frozen=True)
class Group:
    """This process among the others of a torchrun."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def share(self, batches: Batches, batch_tokens: int) -> Batches:
        """This rank's rows.

        Raises:
            MoneEdgeError: there are fewer micro-batches than processes.
        """
        rows, seq_len = batches.tokens.shape
        step = max(1, batch_tokens // seq_len)
        calls = -(-rows // step)
        if calls < self.size:
            raise MoneEdgeError(
                f"{rows} sequences of {seq_len} tokens are {calls} batches of {batch_tokens} "
                f"tokens, too few for {self.size} processes; start fewer, or add --samples"
            )
        first, last = (calls * (self.rank + i) // self.size * step for i in (0, 1))
        return replace(batches, tokens=batches.tokens[first:last])

    def merged(self, stats: ExpertStats) -> ExpertStats | None:
        """The statistics of all ranks on rank 0, merged in their order; None on the others."""
        import torch.distributed as dist

        parts: list[ExpertStats | None] | None = [None] * self.size if self.leads else None
        dist.gather_object(stats, parts)
        if parts is None:
            return None
        merged = merge_all(part for part in parts if part is not None)
        text = stats.provenance.data_sha256  # of all rows, the same on every rank
        return replace(merged, provenance=replace(merged.provenance, data_sha256=text))


def world() -> Group:
    """The group that torchrun started this process in; one process alone if it did not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Group(0, 1)
    return Group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def run(work: Callable[[Group], ExpertStats]) -> ExpertStats | None:
    """Let every process do its share.

    Args:
        work: called with the group, gives this rank's statistics.

    Returns:
        The merged statistics on rank 0, None on the others.

    Raises:
        MoneEdgeError: this rank's share failed, or another rank's did.
    """
    group = world()
    if group.size == 1:
        return work(group)
    with _connected(group):
        failure, stats = "", None
        try:
            stats = work(group)
        except MoneEdgeError as error:
            failure = str(error)
        except Exception as error:  # so that rank 0 can say what broke elsewhere
            failure = f"unexpected {type(error).__name__}: {error}"
        _agree(group, failure)
        assert stats is not None
        return group.merged(stats)


def _agree(group: Group, failure: str) -> None:
    """Every rank learns of the first failure; rank 0 says it, the others only leave."""
    import torch.distributed as dist

    failures: list[Any] = [""] * group.size
    dist.all_gather_object(failures, failure)
    for rank, message in enumerate(failures):
        if message:
            where = "" if rank == 0 else f"process {rank}: "
            raise MoneEdgeError(f"{where}{message}" if group.leads else "")


@contextmanager
def _connected(group: Group) -> Iterator[None]:
    """Join the other ranks; what breaks between them is one clear line."""
    import torch.distributed as dist

    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
        yield
    except (RuntimeError, ConnectionError, _Lost) as error:
        raise MoneEdgeError(LOST if group.leads else "") from error
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()


class _Lost(BaseException):
    """torchrun ends the ranks that are left when one is lost."""


def _stopped(*_: Any) -> None:
    raise _Lost
