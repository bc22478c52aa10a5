"""Text from a GGUF: the patched llama-cpp-python, streamed, with the speeds llama.cpp measured.

In: a GGUF, a prompt or a conversation. Out: pieces of text as they come, then a `Speed`. Knows
nothing about terminals; `commands/run.py` does.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError
from mone_edge.llama import LogTail, check_gguf, listen
from mone_edge.machine import cores

DEFAULT_CONTEXT = 4096

TOO_LONG = re.compile(r"Requested tokens \((\d+)\) exceed")  # as llama-cpp-python says it

Message = Mapping[str, str]  # {"role": "user", "content": ...}


@dataclass(frozen=True)
class Speed:
    """What llama.cpp measured since the generator was opened or last asked."""

    prompt_tokens: int
    prompt_seconds: float
    generated_tokens: int
    generated_seconds: float

    def __str__(self) -> str:
        return (
            f"prefill {_rate(self.prompt_tokens, self.prompt_seconds)}, "
            f"decode {_rate(self.generated_tokens, self.generated_seconds)}"
        )


def _rate(tokens: int, seconds: float) -> str:
    if not tokens or seconds <= 0:  # of one token, llama.cpp counts a prompt as decoding
        return f"{tokens} tokens"
    return f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s)"


class Generator:
    """A GGUF opened for generating. A context manager; `close` frees the memory.

    Args:
        path: the file.
        n_ctx: tokens that prompt and answer may fill together.
        threads: None uses every core (`machine.cores`).
        seed: of the sampler; the same seed, prompt and temperature give the same text.

    Raises:
        MoneEdgeError: the file is missing, damaged, or llama.cpp refuses it (with its reason).
        RuntimeMissing: the patched llama.cpp is not built.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = DEFAULT_CONTEXT,
        threads: int | None = None,
        seed: int = 42,
    ) -> None:
        check_gguf(path)
        from jinja2 import TemplateError

        from mone_edge import runtime
        from mone_edge.probe import require_loadable

        require_loadable(path)
        llama_cpp: Any = runtime.load()
        self._api = llama_cpp.llama_cpp
        self._path = path
        self._n_ctx = n_ctx
        log = LogTail()
        listen(self._api, log)
        count = threads or cores()
        try:
            self._llama = llama_cpp.Llama(
                str(path),
                n_ctx=n_ctx,
                n_threads=count,
                n_threads_batch=count,
                seed=seed,
                n_gpu_layers=-1,
                verbose=False,
            )
        except ValueError as error:
            raise MoneEdgeError(f"llama.cpp cannot load {path}: {log.reason()}") from error
        except TemplateError as error:
            raise MoneEdgeError(
                f"{path} has a damaged chat template: {reason(error)}; convert the model again"
            ) from error
        self._llama._n_ctx = n_ctx  # not what llama.cpp rounds it up to

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._llama.close()

    def complete(self, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
        """Continue a text.

        Args:
            max_tokens: stop after this many tokens; -1 goes on to the end of the context.
            temperature: 0 always takes the most likely token.

        Raises:
            MoneEdgeError: the prompt does not fit into the context.
        """
        ids = self._llama.tokenize(prompt.encode("utf-8", "surrogateescape"), special=True)
        self._require_room(len(ids))
        events = self._llama.create_completion(
            ids, max_tokens=max_tokens, temperature=temperature, stream=True
        )
        for event in events:
            yield str(event["choices"][0]["text"])

    def chat(
        self, messages: Sequence[Message], max_tokens: int, temperature: float
    ) -> Iterator[str]:
        """Answer a conversation, laid out by the chat template in the GGUF.

        Raises:
            MoneEdgeError: the file has no chat template, or the conversation does not fit.
        """
        self.require_chat_template()
        try:
            events = self._llama.create_chat_completion(
                [dict(message) for message in messages],
                max_tokens=max_tokens,
                temperature=temperature,
                stream=True,
            )
        except Exception as error:  # a template is a program, and may fail like one
            raise MoneEdgeError(
                f"the chat template of {self._path} fails: {reason(error)}; leave --chat out"
            ) from error
        try:
            for event in events:
                yield str(event["choices"][0]["delta"].get("content") or "")
        except ValueError as error:
            if match := TOO_LONG.match(str(error)):
                self._require_room(int(match[1]))
            raise MoneEdgeError(f"no answer to this conversation: {error}") from error

    def require_chat_template(self) -> None:
        """Refuse to guess a layout for a model that was not taught one."""
        if "tokenizer.chat_template" not in self._llama.metadata:
            raise MoneEdgeError(f"{self._path} has no chat template; leave --chat out")

    def speed(self) -> Speed:
        """Speeds since the last call, as llama.cpp counted them; starts counting anew."""
        context = self._llama.ctx
        data = self._api.llama_perf_context(context)
        self._api.llama_perf_context_reset(context)
        return Speed(data.n_p_eval, data.t_p_eval_ms / 1e3, data.n_eval, data.t_eval_ms / 1e3)

    def _require_room(self, tokens: int) -> None:
        if tokens >= self._n_ctx:
            raise MoneEdgeError(
                f"the prompt has {tokens} tokens, the context {self._n_ctx}; "
                f"give -c {tokens + 256} or a shorter prompt"
            )
