"""A model kept loaded and timed on request: `python -m benchmarks.skip_worker GGUF THREADS TOP_K`.

In: lines "prefill N", "decode N", "share N" on stdin. Out: a number a line on stdout: seconds for N
tokens at once, or one after the other; or the share of slots of N tokens that went to novices.
LLAMA_CPP_LIB_PATH chooses the build of llama.cpp, which may be an unpatched one.
"""

import ctypes
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

from mone_edge.graph import Node

N_CTX, N_BATCH = 1024, 512


class Worker:
    """One model and one context, one thread.

    Args:
        path: the GGUF, an `olmoe`.
        threads: of llama.cpp.
        top_k: experts that a token is sent to, whatever the file says.
    """

    def __init__(self, path: str, threads: int, top_k: int) -> None:
        self.hits = self.slots = 0
        self.watching = False
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        overrides = (llama_cpp.llama_model_kv_override * 2)()  # the last one is empty
        overrides[0].key = b"olmoe.expert_used_count"
        overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
        overrides[0].value.val_i64 = top_k
        model_params = llama_cpp.llama_model_default_params()
        model_params.kv_overrides = overrides
        model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        assert model, path
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = N_CTX, N_BATCH, N_BATCH
        params.n_threads = params.n_threads_batch = threads
        self._model, self._params = model, params
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def run(self, context: Any, sizes: list[int]) -> float:
        """Seconds for batches of these sizes, from an empty context on."""
        memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(memory, True)
        tokens = np.random.default_rng(3).integers(0, self.vocabulary, sum(sizes))
        array = (ctypes.c_int32 * len(tokens))(*tokens.tolist())
        begin, at = time.perf_counter(), 0
        for size in sizes:
            part = ctypes.cast(ctypes.byref(array, 4 * at), ctypes.POINTER(ctypes.c_int32))
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(part, size)) == 0
            at += size
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - begin

    def share(self, tokens: int) -> float:
        """Share of the slots that MUL_MAT_ID had no matrix for."""
        library = llama_cpp.llama_cpp._lib
        hits = slots = 0

        def see(tensor: int, ask: bool, _: int) -> bool:
            nonlocal hits, slots
            node = Node(library, tensor)
            if ask:
                return node.name.startswith("ffn_moe_down-")
            weights, ids = node.source(0), node.source(2)
            assert weights
            assert ids
            hits += int((ids.values() >= weights.stacked).sum())
            slots += ids.values().size
            return True

        self._params.cb_eval = callback = llama_cpp.ggml_backend_sched_eval_callback(see)
        context = llama_cpp.llama_init_from_model(self._model, self._params)
        self.run(context, [tokens])
        llama_cpp.llama_free(context)
        del callback
        return hits / slots


def main() -> None:
    """Answer until stdin ends."""
    worker = Worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    for line in sys.stdin:
        what, count = line.split()
        if what == "share":
            answer = worker.share(int(count))
        else:
            sizes = [int(count)] if what == "prefill" else [1] * int(count)
            answer = worker.run(worker.context, sizes)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
