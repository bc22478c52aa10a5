"""Where a command may write: nothing that it reads, and what is there already only by --force."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mone_edge.errors import UsageError
from mone_edge.paths import exists, expand, real, require_writable

if TYPE_CHECKING:
    from mone_edge.plan import PrunePlan
    from mone_edge.source import Source


def input_files(
    *sources: "Source", plan: "PrunePlan | None" = None, data: Iterable[str] = ()
) -> Iterator[Path]:
    """The files that a command reads besides those that its options name.

    Args:
        plan: read with the statistics that it was made from.
        data: of calibration text, as `--data` takes it.
    """
    from mone_edge.calibration import split_weight

    for source in sources:
        yield from source.files
    if plan and plan.stats_path:
        yield Path(plan.stats_path)
    for spec in data:
        yield expand(split_weight(spec)[0])


def require_places(
    outfiles: Iterable[Path],
    inputs: Iterable[Path],
    *,
    force: bool,
    split: bool = False,
    recipe: Path | None = None,
) -> None:
    """Refuse GGUFs that would replace something, themselves or by what is written beside them.

    Args:
        inputs: replaced never, other files with `force`.
        split: each is written in parts.
        recipe: that was given; it may be the one beside an output, and comes out the same.
    """
    from mone_edge.convert import beside

    inputs, taken = list(inputs), set[Path]()
    for outfile in outfiles:
        if outfile.suffix in (".md", ".yaml"):
            raise UsageError(
                f"--outfile {outfile}: a GGUF is meant; name a file that ends in .gguf"
            )
        folder = outfile.parent if exists(outfile.parent) else real(outfile).parent
        parts = sorted(folder.glob(f"{glob.escape(outfile.stem)}-*-of-*.gguf"))
        for path in (outfile, *(parts if split else ())):
            require_writable(path, force=force, inputs=inputs)
        for path in beside(outfile):
            if path in taken:
                raise UsageError(f"two files would have {path}: end --outfile in .gguf")
            taken.add(path)
            again = recipe is not None and path.resolve() == recipe.resolve()
            require_writable(path, force=force or again, inputs=inputs)
