"""The plots of a report, as SVG text.

In: plain numbers and names. Out: one `<svg>` element each, the same bytes for the same numbers.
Knows nothing about files.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from numpy.typing import NDArray

RED = "#c0392b"
METADATA = ("Creator", "Date", "Format", "Type")  # that matplotlib writes unless told not to


def _svg(draw: Callable[..., Any]) -> Callable[..., str]:
    """Turn a function that returns a figure into one that returns its SVG."""

    @wraps(draw)
    def drawn(*arguments: Any) -> str:
        import matplotlib

        style: Any = {
            "svg.hashsalt": "mone-edge",
            "svg.fonttype": "none",  # text stays text: small, to be searched, in any script
            "text.parse_math": False,  # a file's name may hold dollars
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
        }
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that matplotlib's own font has not
            figure = draw(*arguments)
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata=dict.fromkeys(METADATA))
        text = out.getvalue()
        return text[text.index("<svg") :]  # without the XML declaration, which HTML has none of

    return drawn


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure that no window system and no global state knows of, and its axes; inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


@_svg
def quality_and_size(points: Sequence[tuple[str, int, float]]) -> Any:
    """Name, bytes and KL divergence of each model."""
    figure, axes = _axes(8, 4.5 + 0.2 * len(points))
    for name, size, divergence in points:
        axes.plot(size / 2**20, max(divergence, 0), "o", label=name)
    axes.set(xlabel="file, MiB", ylabel="KL divergence from the base, nats a token")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


@_svg
def speeds(models: Mapping[str, Mapping[str, tuple[float, float]]]) -> Any:
    """Tokens per second and their standard deviation, by model and test: one panel a test, as
    prefill is many times as fast as decoding."""
    from matplotlib.figure import Figure

    tests = list(dict.fromkeys(test for results in models.values() for test in results))
    height = 1.2 + 0.35 * len(models)
    figure = Figure(figsize=(8, height * len(tests)), layout="constrained")
    for axes, test in zip(figure.subplots(len(tests), squeeze=False)[:, 0], tests, strict=True):
        rows = {name: results[test] for name, results in models.items() if test in results}
        axes.barh(
            list(rows), [mean for mean, _ in rows.values()],
            xerr=[error for _, error in rows.values()], color="#5b8db8",
        )  # fmt: skip
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=f"{test}, tokens per second")
    return figure


@_svg
def kept_experts(models: Mapping[str, Sequence[int]]) -> Any:
    """Experts with weights in each block."""
    figure, axes = _axes(8, 3.5)
    for name, kept in models.items():
        axes.step(range(len(kept)), kept, where="mid", label=name)
    axes.set(xlabel="block", ylabel="experts kept")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return figure


@_svg
def expert_load(loads: Mapping[int, NDArray[Any]], removed: Mapping[int, Sequence[int]]) -> Any:
    """How often each expert of each block is used, as a multiple of an equal share.

    Args:
        loads: [experts] by block.
        removed: ids by block, which get a cross.
    """
    import numpy as np

    widest = max(map(len, loads.values()))
    grid = np.full((len(loads), widest), np.nan)
    for row, load in enumerate(loads.values()):
        grid[row, : len(load)] = load
    figure, axes = _axes(9, 1.6 + 0.18 * len(loads))
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    blocks = list(loads)
    crosses = [(e, blocks.index(layer)) for layer, ids in removed.items() for e in ids]
    if crosses:
        axes.plot(*zip(*crosses, strict=True), "x", color=RED, markersize=4)
    step = max(1, len(blocks) // 16)
    axes.set_yticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set(xlabel="expert" + (" (crossed: removed)" if crosses else ""), ylabel="block")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="times an equal share")
    return figure
