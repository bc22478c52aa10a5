"""Whether llama.cpp accepts a GGUF's header, asked in a process of its own.

In: a GGUF. Out: nothing, or one clear error. llama.cpp ends the process that loads certain damaged
files (a failed assertion aborts); here that is the child. Only the header is loaded: the child
reserves no memory for weights and reads none.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

from mone_edge.errors import MoneEdgeError

SECONDS = 120
ASSERTION = re.compile(r"(GGML_ASSERT\(.+?\) failed|.*: fatal error.*)")
CONTEXT_TOKENS = 64


def require_loadable(path: Path) -> None:
    """Refuse a file that llama.cpp refuses, or that would end this process.

    Raises:
        MoneEdgeError: with llama.cpp's reason.
        RuntimeMissing: the patched llama.cpp is not built.
    """
    from mone_edge import runtime

    runtime.load()
    state = path.stat()
    _require_loadable(path.resolve(), state.st_size, state.st_mtime_ns, str(path))


@functools.lru_cache(maxsize=64)
def _require_loadable(path: Path, _size: int, _mtime_ns: int, name: str) -> None:
    command = [sys.executable, "-m", "mone_edge.probe", str(path)]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env=environment,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise MoneEdgeError(
            f"{name} is damaged: llama.cpp has not read its header after {SECONDS} seconds"
        ) from error
    if done.returncode == 0:
        return
    if done.returncode > 0 and done.stdout.strip():
        raise MoneEdgeError(f"llama.cpp cannot load {name}: {done.stdout.strip()}")
    assertion = ASSERTION.search(done.stderr)
    why = assertion[1] if assertion else f"it ended with status {done.returncode}"
    raise MoneEdgeError(f"{name} is damaged: llama.cpp crashes on its header ({why})")


def _refusal(path: Path) -> str:
    """llama.cpp's reason not to load a file; empty where there is none."""
    from mone_edge import runtime
    from mone_edge.llama import LogTail, listen

    api = runtime.load().llama_cpp
    log = LogTail()
    listen(api, log)
    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model_params.no_alloc, model_params.load_mode = True, api.LLAMA_LOAD_MODE_NONE
    model = api.llama_model_load_from_file(os.fsencode(path), model_params)
    if not model:
        return log.reason()
    context_params = api.llama_context_default_params()
    context_params.n_ctx = context_params.n_batch = context_params.n_ubatch = CONTEXT_TOKENS
    context = api.llama_init_from_model(model, context_params)
    return "" if context else log.reason()


if __name__ == "__main__":
    refusal = _refusal(Path(sys.argv[1]))
    sys.stdout.write(refusal)
    sys.stdout.flush()
    os._exit(1 if refusal else 0)
