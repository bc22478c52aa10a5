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
from mone_edge.paths import exists, is_file

Logits = NDArray[np.float32]

GGUF_MAGIC = b"GGUF"
MAX_BATCH_TOKENS = 512
ERROR, CONTINUED = 4, 5  # ggml_log_level
GENERIC_FAILURE = "failed to load model"  # llama.cpp's last line, which never tells the reason
NUMPY_TYPES = {0: np.dtype(np.float32), 26: np.dtype(np.int32)}  # by ggml_type


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
        raise MoneEdgeError(f"no file {path}; make one with: mone-edge convert MODEL -o {path}")
    try:
        with path.open("rb") as file:
            start = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise MoneEdgeError(f"cannot read {path}: {error.strerror}") from error
    if start != GGUF_MAGIC:
        raise MoneEdgeError(
            f"{path} is not a GGUF file: it starts with {start!r}, not {GGUF_MAGIC!r}"
        )


def default_threads() -> int:
    """Threads to compute with: the processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
        threads: None uses every processor.
        watcher: sees tensors of every decoded batch (slower: the graph runs piecewise).
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
        exact: bool = False,
    ) -> None:
        check_gguf(path)
        from mone_edge import runtime
        from mone_edge.probe import require_loadable

        require_loadable(path)
        self.path = path
        self._api: Any = runtime.load().llama_cpp
        self._threads = threads or default_threads()
        self._watcher = watcher
        self._exact = exact
        self._failure: BaseException | None = None
        self._eval_callback = self._make_eval_callback() if watcher else None
        self._context: Any = None
        self._cells = n_ctx
        self._sequences = 1
        self._log = LogTail()
        listen(self._api, self._log)
        self._api.llama_backend_init()
        self._model = self._api.llama_model_load_from_file(
            os.fsencode(path), self._api.llama_model_default_params()
        )
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
    def context_length(self) -> int:
        """Tokens of context the model was trained with."""
        return int(self._api.llama_model_n_ctx_train(self._model))

    @property
    def layers(self) -> int:
        """Blocks of the model."""
        return int(self._api.llama_model_n_layer(self._model))

    @property
    def num_experts(self) -> int:
        """Width of the router; 0 for a dense model."""
        architecture = self.metadata("general.architecture")
        return int(self.metadata(f"{architecture}.expert_count") or 0)

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
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            ids = (self._api.llama_token * room)()
            count = self._api.llama_tokenize(self._vocab, data, len(data), ids, room, True, False)
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
            parts.append(self._decode(tokens[part], positions[part], sequences[part], wanted[part]))
        return np.concatenate(parts)

    def _decode(
        self, tokens: list[int], positions: list[int], sequences: list[int], wanted: list[int]
    ) -> Logits:
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, position) in enumerate(zip(tokens, positions, strict=True)):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequences[i], wanted[i]
            listen(self._api, self._log)
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
        shape = (sum(wanted), self.vocab_size)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape).copy()

    def _free_context(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
            self._context = None

    def _make_eval_callback(self) -> Any:
        """A `ggml_backend_sched_eval_callback` that hands wanted tensors to the watcher."""
        reader = TensorReader(self._api)
        watcher = self._watcher
        assert watcher is not None

        def callback(tensor: int, ask: bool, _: int) -> bool:
            try:
                name = reader.name(tensor)
                if ask:
                    return watcher.wants(name)
                watcher.see(name, reader.values(tensor))
            except BaseException as error:  # an exception must not cross C
                self._failure = error
                return False
            return True

        return self._api.ggml_backend_sched_eval_callback(callback)


class _TensorHead(ctypes.Structure):
    """The leading fields of `struct ggml_tensor`."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    ]


class TensorReader:
    """Copies tensors out of a running graph, on whatever device they are."""

    def __init__(self, api: Any) -> None:
        library = api._lib
        self._name = library.ggml_get_name
        self._name.argtypes, self._name.restype = [ctypes.c_void_p], ctypes.c_char_p
        self._bytes = library.ggml_nbytes
        self._bytes.argtypes, self._bytes.restype = [ctypes.c_void_p], ctypes.c_size_t
        self._get = library.ggml_backend_tensor_get
        self._get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._get.restype = None

    def name(self, tensor: int) -> str:
        """The graph's name of a tensor, such as `ffn_moe_topk-3`."""
        return bytes(self._name(tensor)).decode("utf-8", "replace")

    def values(self, tensor: int) -> NDArray[Any]:
        """A copy of an F32 or I32 tensor, views included; GGML's last dimension first."""
        head = _TensorHead.from_address(tensor)
        if head.type not in NUMPY_TYPES:
            name = self.name(tensor)
            raise MoneEdgeError(f"tensor {name} has ggml type {head.type}, not F32 or I32")
        buffer = np.empty(self._bytes(tensor), np.uint8)
        self._get(tensor, buffer.ctypes.data, 0, buffer.nbytes)
        shape, strides = tuple(head.ne)[::-1], tuple(head.nb)[::-1]
        while len(shape) > 2 and shape[0] == 1:
            shape, strides = shape[1:], strides[1:]
        view: NDArray[Any] = np.ndarray(shape, NUMPY_TYPES[head.type], buffer, 0, strides)
        return view.copy()


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
