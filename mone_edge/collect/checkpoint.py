"""A checkpoint's statistics by torch: in memory or layer by layer, in one process or several.

In: a checkpoint and packed tokens. Out: ExpertStats, in the first process. Chooses among the
collectors; measures nothing itself.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mone_edge.calibration import Batches
from mone_edge.collect import distributed, torch_model
from mone_edge.collect.work import Work
from mone_edge.stats import ExpertStats

if TYPE_CHECKING:
    from mone_edge.source import Checkpoint

Progress = Callable[[int, int], None]


def collect_checkpoint(
    source: "Checkpoint",
    batches: Batches,
    *,
    device: str = "auto",
    threads: int | None = None,
    sequential: bool = False,
    work: Work | None = None,
    progress: Progress | None = None,
) -> ExpertStats | None:
    """Run packed tokens through the model; under torchrun, each process its share of them.

    Returns:
        The statistics; None in processes of a torchrun other than the first.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    return distributed.run(
        lambda group: _collect(group, source, batches, device, sequential, work, progress)
    )


def _collect(
    group: distributed.Group,
    source: "Checkpoint",
    batches: Batches,
    device: str,
    sequential: bool,
    work: Work | None,
    progress: Progress | None,
) -> ExpertStats:
    batch_tokens = torch_model.BATCH_TOKENS
    batches = group.share(batches, batch_tokens)
    work = work and work.of_rank(group.rank, group.size)
    if sequential:
        from mone_edge.collect.sequential import collect_sequential

        assert work is not None
        return collect_sequential(
            source,
            batches,
            work,
            device=device,
            batch_tokens=batch_tokens,
            on_progress=progress,
        )
    return torch_model.collect(
        source.path,
        batches,
        model=source.name,
        fingerprint=source.fingerprint,
        device=device,
        batch_tokens=batch_tokens,
        work=work,
        on_progress=progress,
    )
