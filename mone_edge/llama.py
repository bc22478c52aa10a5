"""A GGUF through the patched llama.cpp: text to token ids, token ids to logits.

In: a GGUF file. Out: ids as llama.cpp's tokenizer gives them, logits [tokens, vocabulary] in
float32, and on request any tensor of the graph by name. Knows nothing about perplexity, tasks or
sampling. Only llama.cpp's C interface is used, through the ctypes declarations of llama-cpp-python.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mone_edge.errors import MoneEdgeError
from mone_edge.graph import GraphObserver, Node
from mone_edge.machine import cores
from mone_edge.paths import exists, is_file

Logits = NDArray[np.float32]

GGUF_MAGIC = b"GGUF"
MAX_BATCH_TOKENS = 512
ERROR, CONTINUED = 4, 5  # ggml_log_level
GENERIC_FAILURE = "failed to load model"  # llama.cpp's last line, which never tells the reason


class TensorWatcher(Protocol):
    """Reads tensors while llama.cpp computes."""

    def wants(self, name: str) -> bool:
        """Whether `see` is to be called with the tensor of this name (`ffn_moe_topk-3`)."""

    def see(self, name: str, values: NDArray[Any]) -> None:
        """The values, a copy in NumPy's axis order: GGML's last dimension first."""


def check_gguf(path: Path) -> None:
    """Refuse what is not a GGUF file before anything heavy is loaded.

    Raises:
        MoneEdgeError: there is no such file, it cannot be read, or it is something else.
    """
    if exists(path) and path.is_dir():
        raise MoneEdgeError(f"{path} is a folder; name a .gguf file")
    if not is_file(path):
        raise MoneEdgeError(f"no file {path}; make a GGUF with: mone-edge convert MODEL")
    try:
        with path.open("rb") as file:
            start = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise MoneEdgeError(f"cannot read {path}: {error.strerror}") from error
    if start != GGUF_MAGIC:
        raise MoneEdgeError(
            f"{path} is not a GGUF file: it starts with {start!r}, not {GGUF_MAGIC!r}"
        )


class LogTail:
    """Keeps llama.cpp's error lines, for messages; everything else it logs is dropped."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._in_error = False

    def add(self, level: int, text: bytes) -> None:
        """One event of `llama_log_callback`; a continuation belongs to the line before it."""
        self._in_error = level == ERROR or (level == CONTINUED and self._in_error)
        if self._in_error:
            line = text.decode("utf-8", "replace")
            if level == CONTINUED and self.errors:
                self.errors[-1] += line
            else:
                self.errors.append(line)

    def reason(self) -> str:
        """The last error that says why, without the names of C++ functions before it."""
        lines = [" ".join(line.split()) for line in self.errors]
        telling = [line for line in lines if line and GENERIC_FAILURE not in line]
        reason = (telling or lines or ["no reason given"])[-1]
        head, found, tail = reason.partition("error loading model: ")
        return tail if found else head.split(": ", 1)[-1]


class GgufModel:
    """A GGUF opened for scoring. A context manager; `close` frees the memory.

    Args:
        path: the file (of a split model: its first part).
        n_ctx: tokens of context to reserve at once; it grows when a sequence needs more.
        threads: None uses every core (`machine.cores`).
        watcher: sees tensors of every decoded batch (slower: the graph runs piecewise).
        observer: the same with the nodes of the graph themselves; one of the two.
        vocab_only: for token ids only; no weights are loaded.
        run_all: no expert is skipped, whatever threshold the file has (`skipping`).
        exact: keep keys and values in F32 and use plain attention, to compare with torch; the
            default is llama.cpp's own (F16, flash attention), as models run in use.

    Raises:
        MoneEdgeError: the file is missing, damaged, or llama.cpp refuses it (with its reason).
        RuntimeMissing: the patched llama.cpp is not built.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        threads: int | None = None,
        watcher: TensorWatcher | None = None,
        observer: GraphObserver | None = None,
        exact: bool = False,
        vocab_only: bool = False,
        run_all: bool = False,
    ) -> None:
        check_gguf(path)
        from mone_edge import runtime, skipping
        from mone_edge.probe import require_loadable

        require_loadable(path)
        self.path = path
        self._api: Any = runtime.load().llama_cpp
        self._threads = threads or cores()
        self._watcher = watcher
        self._observer = observer
        self._exact = exact
        self._failure: BaseException | None = None
        self._eval_callback = self._make_eval_callback() if watcher or observer else None
        self._context: Any = None
        self._cells = n_ctx
        self._sequences = 1
        self._log = LogTail()
        listen(self._api, self._log)
        self._api.llama_backend_init()
        params = self._api.llama_model_default_params()
        params.vocab_only = vocab_only
        if run_all and skipping.threshold_of(path):
            params.kv_overrides = skipping.never(self._api, path)
        self._model = self._api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise MoneEdgeError(f"llama.cpp cannot load {path}: {self._log.reason()}")
        self._vocab = self._api.llama_model_get_vocab(self._model)

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
        """Free the model and its context; calling it again does nothing."""
        self._free_context()
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None

    @property
    def vocab_size(self) -> int:
        """Columns of `logits`."""
        return int(self._api.llama_vocab_n_tokens(self._vocab))

    @property
    def bos_id(self) -> int | None:
        """The id that starts every sequence, or None if this model's tokenizer adds none."""
        if not self._api.llama_vocab_get_add_bos(self._vocab):
            return None
        return int(self._api.llama_vocab_bos(self._vocab))

    @property
    def start_id(self) -> int | None:
        """BOS, whether the tokenizer adds it or not; without one EOS."""
        found = int(self._api.llama_vocab_bos(self._vocab))
        return found if found >= 0 else self.eos_id

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, or None if the model has none."""
        found = int(self._api.llama_vocab_eos(self._vocab))
        return found if found >= 0 else None

    def token_text(self, token: int | None) -> str:
        """How the vocabulary writes a token; empty for None."""
        if token is None:
            return ""
        return bytes(self._api.llama_vocab_get_text(self._vocab, token)).decode("utf-8", "replace")

    @property
    def chat_template(self) -> str:
        """The model's Jinja template, empty if it has none."""
        found = self._api.llama_model_chat_template(self._model, None)
        return bytes(found).decode("utf-8", "replace") if found else ""

    @property
    def context_length(self) -> int:
        """Tokens of context the model was trained with."""
        return int(self._api.llama_model_n_ctx_train(self._model))

    @property
    def layers(self) -> int:
        """Blocks of the model."""
        return int(self._api.llama_model_n_layer(self._model))

    def metadata(self, key: str) -> str:
        """A scalar of the GGUF's header as text, empty where there is none (or it is an array)."""
        buffer = ctypes.create_string_buffer(1024)
        size = self._api.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if size >= 0 else ""

    def kept_experts(self, layer: int) -> int:
        """Experts with weights in a block; 0 for a block without experts."""
        count = self._api._lib.llama_model_n_expert_kept
        count.argtypes, count.restype = [ctypes.c_void_p, ctypes.c_int32], ctypes.c_int32
        return max(0, int(count(self._model, layer)))

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text as `llama-perplexity` makes them: BOS if the model says so, no markup."""
        return self._tokenize(text, special=True, markup=False)

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a piece of text: nothing added at its ends, special tokens in it recognised."""
        return self._tokenize(text, special=False, markup=True)

    def _tokenize(self, text: str, *, special: bool, markup: bool) -> list[int]:
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            ids = (self._api.llama_token * room)()
            count = self._api.llama_tokenize(
                self._vocab, data, len(data), ids, room, special, markup
            )
            if count >= 0:
                return list(ids[:count])
            room = -count

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """Next-token logits of one sequence, read from its start.

        Args:
            tokens: ids, BOS included where the model wants one.
            first: the first position of interest; earlier ones are computed but not returned.

        Returns:
            float32 [len(tokens) - first, vocabulary]; row `i` predicts position `first + i + 1`.
        """
        self._prepare(len(tokens), 1)
        return self._feed([(tokens, 0, 0, first)])

    def read(self, tokens: Sequence[int]) -> None:
        """Run one sequence from its start, for an observer: every position in every block.

        llama.cpp leaves positions that nobody asks the logits of out of the last block, so they
        are all asked for; none are copied. Batches are of equal size: of a single token, tensors
        have an axis less.
        """
        self._prepare(len(tokens), 1)
        batches = -(-len(tokens) // min(self._cells, MAX_BATCH_TOKENS))
        for positions in np.array_split(np.arange(len(tokens)), batches):
            part = [tokens[i] for i in positions]
            self._decode(part, positions.tolist(), [0] * len(part), [1] * len(part))

    def branch_logits(
        self, prefix: Sequence[int], branches: Sequence[Sequence[int]]
    ) -> list[Logits]:
        """Logits that predict each of several continuations of one prefix, which is read once.

        Returns:
            For each branch float32 [len(branch), vocabulary]; row `i` predicts `branch[i]`.
        """
        self._prepare(len(prefix) + sum(map(len, branches)), len(branches) + 1)
        start = self._feed([(prefix, 0, 0, len(prefix) - 1)])
        memory = self._api.llama_get_memory(self._context)
        runs = []
        for number, branch in enumerate(branches, start=1):
            self._api.llama_memory_seq_cp(memory, 0, number, -1, -1)
            runs.append((branch[:-1], len(prefix), number, 0))
        rows = self._feed([run for run in runs if run[0]])
        ends = np.cumsum([len(branch) - 1 for branch in branches])
        return [np.concatenate([start, part]) for part in np.split(rows, ends[:-1])]

    def _prepare(self, cells: int, sequences: int) -> None:
        """Make the context large enough, and empty."""
        if self._context and cells <= self._cells and sequences <= self._sequences:
            self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
            return
        self._free_context()
        self._cells = max(self._cells, -(-cells // 256) * 256)
        self._sequences = max(self._sequences, sequences)
        params = self._api.llama_context_default_params()
        params.n_ctx = self._cells
        params.n_batch = params.n_ubatch = min(self._cells, MAX_BATCH_TOKENS)
        params.n_seq_max = self._sequences
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self._threads
        if self._exact:
            params.type_k = params.type_v = self._api.GGML_TYPE_F32
            params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self._eval_callback:
            params.cb_eval = self._eval_callback
        listen(self._api, self._log)
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise MoneEdgeError(
                f"llama.cpp cannot open a context of {self._cells} tokens for {self.path}: "
                f"{self._log.reason()}"
            )

    def _feed(self, runs: Sequence[tuple[Sequence[int], int, int, int]]) -> Logits:
        """Decode runs of (tokens, position of the first, sequence, first index of interest)."""
        tokens = [token for ids, _, _, _ in runs for token in ids]
        positions = [start + i for ids, start, _, _ in runs for i in range(len(ids))]
        sequences = [sequence for ids, _, sequence, _ in runs for _ in ids]
        wanted = [int(i >= first) for ids, _, _, first in runs for i in range(len(ids))]
        parts = [np.empty((0, self.vocab_size), np.float32)]
        size = min(self._cells, MAX_BATCH_TOKENS)
        for begin in range(0, len(tokens), size):
            part = slice(begin, begin + size)
            self._decode(tokens[part], positions[part], sequences[part], wanted[part])
            parts.append(self._decoded_logits(sum(wanted[part])))
        return np.concatenate(parts)

    def _decode(
        self, tokens: list[int], positions: list[int], sequences: list[int], wanted: list[int]
    ) -> None:
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, position) in enumerate(zip(tokens, positions, strict=True)):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequences[i], wanted[i]
            listen(self._api, self._log)
            if self._observer:
                self._observer.start()
            status = self._api.llama_decode(self._context, batch)
        finally:
            self._api.llama_batch_free(batch)
        if self._failure:
            raise self._failure
        if status:
            raise MoneEdgeError(
                f"llama.cpp failed on {len(tokens)} tokens of {self.path} (status {status}): "
                f"{self._log.reason()}"
            )

    def _decoded_logits(self, rows: int) -> Logits:
        """The logits of the last decoded batch [rows, vocabulary]."""
        shape = (rows, self.vocab_size)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape).copy()

    def _free_context(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
            self._context = None

    def _make_eval_callback(self) -> Any:
        """A `ggml_backend_sched_eval_callback` that hands wanted tensors to watcher or observer."""
        observer = self._observer or _Watching(self._watcher)
        library = self._api._lib

        def callback(tensor: int, ask: bool, _: int) -> bool:
            try:
                node = Node(library, tensor)
                return observer.wants(node) if ask else observer.see(node)
            except BaseException as error:  # an exception must not cross C
                self._failure = error
                return False

        return self._api.ggml_backend_sched_eval_callback(callback)


class _Watching:
    """A `TensorWatcher` as a `GraphObserver`."""

    def __init__(self, watcher: TensorWatcher | None) -> None:
        assert watcher is not None
        self._watcher = watcher

    def start(self) -> None:
        pass

    def wants(self, node: Node) -> bool:
        return self._watcher.wants(node.name)

    def see(self, node: Node) -> bool:
        self._watcher.see(node.name, node.values().copy())
        return True


class _LogRoute:
    """llama.cpp has one log for the process; this sends it to whoever listens."""

    target: LogTail | None = None
    callback: Any = None


def listen(api: Any, log: LogTail) -> None:
    """Send what llama.cpp logs from here on to `log`, emptied, instead of stderr."""
    log.errors.clear()
    _LogRoute.target = log
    if _LogRoute.callback is None:

        def callback(level: int, text: bytes, _: int) -> None:
            if _LogRoute.target is not None:
                _LogRoute.target.add(level, text)

        _LogRoute.callback = api.llama_log_callback(callback)
    api.llama_log_set(_LogRoute.callback, None)
