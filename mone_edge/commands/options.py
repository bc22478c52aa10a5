"""Options that more than one command has, and the lists of names they take."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import click
from click.core import ParameterSource

from mone_edge.recipe import (
    DEFAULT_METHOD,
    REPLACEMENTS,
    SCOPES,
    Calibration,
    is_replacement,
)

Command = Callable[..., Any]
MAX_THREADS = 512  # ggml's GGML_MAX_N_THREADS
MAX_CONTEXT = 1 << 20  # tokens


class FiniteRange(click.FloatRange):
    """A number of a range; "nan", which compares with none, and "inf" are in no range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


def threads_option(default: str = "[default: all cores]") -> Callable[[Command], Command]:
    """--threads, -t.

    Args:
        default: what its help says of leaving it out.
    """
    return click.option("-t", "--threads", type=click.IntRange(1, MAX_THREADS), help=default)


def calibration_options(command: Command) -> Command:
    """--data, --samples, --seq-len, --seed and --device."""
    options = [
        click.option(
            "--data",
            multiple=True,
            metavar="SPEC",
            help="Calibration text: a text or jsonl file, or name[subset](split):N of a hub "
            "dataset, each with @WEIGHT after it for another share than its neighbours; may be "
            "repeated. Default: text that comes with the package.",
        ),
        click.option("--samples", type=click.IntRange(1), default=128, show_default=True),
        click.option(
            "--seq-len", type=click.IntRange(2), default=2048, show_default=True, help="Tokens."
        ),
        click.option("--seed", type=click.IntRange(0), default=42, show_default=True),
        click.option("--device", default="auto", show_default=True, help="A torch device."),
    ]
    return _apply(options, command)


def chosen_calibration(
    ctx: click.Context, measured: Calibration | None, saved: Mapping[str, Any] | None = None
) -> Calibration:
    """Options of the command line, then a recipe's, then those of what was measured before.

    Args:
        measured: of the statistics that are used, where that is known; else the defaults hold.
        saved: the recipe's group `calibration`.
    """
    fields = dataclasses.asdict(measured or Calibration())
    fields |= {name: value for name, value in (saved or {}).items() if value is not None}
    given = (n for n in fields if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE)
    fields |= {name: ctx.params[name] for name in given}
    return Calibration(**fields | {"data": tuple(fields["data"])})


def plan_options(command: Command) -> Command:
    """--prune-ratio, --method, --scope, --replacement, --protect, --protect-super, --pretrained."""
    options = [
        click.option(
            "--prune-ratio",
            type=FiniteRange(0, 1, max_open=True),
            default=0.25,
            show_default=True,
            help="Fraction of the experts to remove.",
        ),
        click.option("--method", default=DEFAULT_METHOD, show_default=True, callback=_known_method),
        click.option("--scope", type=click.Choice(SCOPES), default="layer", show_default=True),
        click.option(
            "--replacement",
            show_default="gate2-mean of joint, rank of novice-error, merge of methods that "
            "group experts, else mean",
            callback=_known_replacement,
            metavar="|".join(REPLACEMENTS),
            help="What stands in for a removed expert; rank: fitted, R components.",
        ),
        click.option("--protect", default="", metavar="LAYERS", help="Left whole, as 0,2-4,-1."),
        click.option(
            "--protect-super", is_flag=True, help="Keep every expert with extreme activations."
        ),
        click.option(
            "--pretrained",
            default="",
            metavar="MODEL",
            help="Before fine-tuning; --method router-norm compares routers with it.",
        ),
    ]
    return _apply(options, command)


def _apply(options: list[Command], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def _known_replacement(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> str | None:
    if value is not None and not is_replacement(value):
        raise click.BadParameter(
            f"no replacement {value}; there are {', '.join(REPLACEMENTS)} (R as in rank-16)"
        )
    return value


def _known_method(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    from mone_edge.selection import METHODS

    if value not in METHODS:
        raise click.BadParameter(f"no method {value}; there are {', '.join(METHODS)}")
    return value
