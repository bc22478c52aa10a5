"""`mone-edge serve`: the patched tree's llama-server on a GGUF."""

import errno
import os
import socket
import sys
from pathlib import Path

import click

from mone_edge.commands.options import threads_option
from mone_edge.console import Console, common_options
from mone_edge.errors import MoneEdgeError


@click.command("serve")
@click.argument("model", metavar="GGUF", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535))
@click.option("-c", "--ctx-size", type=click.IntRange(1), help="Default: what the model has.")
@threads_option("Default: llama-server's choice.")
@common_options
def command(
    console: Console,
    model: Path,
    host: str,
    port: int,
    ctx_size: int | None,
    threads: int | None,
) -> None:
    """Serve a GGUF through an OpenAI-compatible API; there is no web page. Ctrl-C ends it.

    \b
    mone-edge serve model.gguf --port 8080
    curl http://127.0.0.1:8080/v1/chat/completions -d '{"messages": [...]}'
    """
    from mone_edge import runtime
    from mone_edge.llama import check_gguf
    from mone_edge.probe import require_loadable

    check_gguf(model)
    require_free(host, port)
    require_loadable(model)
    server = str(runtime.tool("llama-server"))
    arguments = [server, "-m", str(model), "--host", host, "--port", str(port)]
    arguments += ["-c", str(ctx_size)] if ctx_size else []
    arguments += ["-t", str(threads)] if threads else []
    console.info(f"serving {model} on http://{host}:{port}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(server, arguments)


def require_free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        MoneEdgeError: the port is in use or not ours to open, or the host is not this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        foreign = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        option = "--host" if foreign else "--port"
        raise MoneEdgeError(
            f"cannot listen on {host}:{port}: {reason}; choose another with {option}"
        ) from error
