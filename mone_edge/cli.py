"""The command group: finds a command's module when it is called, and maps errors to exit codes.

Nothing heavy is imported here, so that `--help` is immediate.
"""

import errno
import importlib
import os
import shlex
import signal
import sys
from typing import NoReturn

import click

from mone_edge import __version__
from mone_edge.console import is_follower
from mone_edge.errors import MoneEdgeError, Resumable, Stopped

INTERRUPTED = 130
EVERYWHERE = ("force", "offline")

COMMANDS = {
    "convert": "Make a smaller, quantised GGUF: calibrate, plan, prune, quantise, write.",
    "stats": "Measure every expert of a model on calibration text.",
    "merge-stats": "Add up statistics files of one model.",
    "plan": "Decide which experts go, from statistics.",
    "fit": "Fit low-rank novices for the experts that a plan removes.",
    "prune": "Carry out a plan on a checkpoint or GGUF, at its own precision.",
    "run": "Generate text with a GGUF.",
    "serve": "Serve a GGUF with llama.cpp's OpenAI-compatible server.",
    "bench": "Speed, memory and size of GGUFs.",
    "eval": "Perplexity, KL divergence and task accuracy of models.",
    "report": "Tables and plots of a folder of results, as one HTML page.",
    "inspect": "Show what is in a model, statistics file or plan.",
    "runtime": "Build the patched llama.cpp, or tell what is built.",
    "doctor": "Tell what is missing on this machine, and how to mend it.",
}


class LazyGroup(click.Group):
    """A group whose commands live in `mone_edge.commands.<name>` and load on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mone_edge.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        _accept_everywhere(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _accept_everywhere(command: click.Command) -> None:
    """--force and --offline are options of every command: also of those that replace no file or
    never use the network, where they change nothing and `--help` leaves them out."""
    if isinstance(command, click.Group):
        for name in command.commands:
            _accept_everywhere(command.commands[name])
        return
    known = {parameter.name for parameter in command.params}
    command.params += [
        click.Option([f"--{name}"], is_flag=True, hidden=True, expose_value=False)
        for name in EVERYWHERE
        if name not in known
    ]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mone-edge")
def cli() -> None:
    """Put Mixture-of-Experts language models on laptops and phones.

    \b
    Try it:   mone-edge convert demo --prune-ratio 0.25
    Then:     mone-edge run demo-MoNE0.25-Q4_K_M.gguf -p "Once upon a time"
    """


def main() -> NoReturn:
    """Run the command line; every error the user can act on is one line on stderr.

    A polite kill and a closed terminal count as Ctrl-C: temporary files go and children end.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # no nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of one command line: 0 done, 1 failed, 2 usage, 3 made but a check
    failed, 130 stopped."""
    try:
        with cli.make_context("mone-edge", list(arguments)) as context:
            code = cli.invoke(context)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.UsageError as error:
        where = f"; see: {error.ctx.command_path} --help" if error.ctx else ""
        _complain(f"{error.format_message().rstrip('.')}{where}")
        return 2
    except click.ClickException as error:
        _complain(error.format_message())
        return 1
    except Stopped as stopped:
        _complain(f"interrupted; {stopped}")
        return INTERRUPTED
    except Resumable as stopped:
        again = shlex.join([*arguments, *stopped.options])
        _complain(f"interrupted; go on with: {_program()} {again}")
        return INTERRUPTED
    except (KeyboardInterrupt, click.Abort):
        _complain(f"interrupted; again with: {_program()} {shlex.join(arguments)}")
        return INTERRUPTED
    except MoneEdgeError as error:
        _complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        _stop_writing()
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return _unexpected(error)
        _stop_writing()
        _complain(f"no space left on the device that {error.filename or 'the output'} goes to")
        return 1
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if os.environ.get("MONE_EDGE_DEBUG"):
        raise error
    _complain(
        f"unexpected {type(error).__name__}: {_first_line(error)} (MONE_EDGE_DEBUG=1 shows where)"
    )
    return 1


def _stop_writing() -> None:
    """Nobody takes the output; Python, which flushes it at the end, is not to fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _program() -> str:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return "mone-edge"
    return f"torchrun --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']} -m mone_edge"


def _complain(message: str) -> None:
    if is_follower():
        return
    print(f"mone-edge: {' '.join(message.split())}", file=sys.stderr)
