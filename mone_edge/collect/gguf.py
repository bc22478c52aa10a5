"""Statistics from a GGUF, quantised or not, through llama.cpp: no PyTorch, no dequantised copy.

In: a GGUF, packed calibration tokens. Out: ExpertStats, of the model as it runs in that file. The
graph is watched while llama.cpp computes it; every architecture whose experts go through
llama.cpp's common MoE function is seen alike. Knows nothing about criteria or plans.
"""

import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mone_edge import __version__
from mone_edge.calibration import Batches
from mone_edge.collect.sums import RoutedSums, Values, squared_columns
from mone_edge.errors import MoneEdgeError
from mone_edge.graph import Node
from mone_edge.llama import GgufModel
from mone_edge.prune import SCALED_GATES
from mone_edge.stats import ExpertStats, LayerStats, LinearStats, Provenance

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")
RAW_OUTPUT = re.compile(r"ffn_moe_down_(?:scaled|biased)-(\d+)")  # replaces that of the product
SCALED_OUTPUT = re.compile(r"ffn_moe_down_scaled-(\d+)")
WEIGHTED = re.compile(r"ffn_moe_weighted-(\d+)")
# What a layer leaves, where it has another name than the usual.
STREAM_NAMES = {"nemotron_h": "nemotron_h_block_out", "nemotron_h_moe": "nemotron_h_block_out"}
ROUTER = re.compile(r"blk\.\d+\.ffn_gate_inp\.weight")
HEADS = ("output.weight", "token_embd.weight")
HEAD_INPUT = "result_norm"

Progress = Callable[[int, int], None]


def collect(
    path: Path,
    calibration: Batches,
    *,
    model: str = "",
    fingerprint: str = "",
    threads: int | None = None,
    exact: bool = True,
    on_progress: Progress | None = None,
) -> ExpertStats:
    """Run calibration tokens through a GGUF and gather every statistic.

    Args:
        path: the file (of a split model its first part).
        calibration: packed sequences of this model's token ids.
        model: the model as the user named it; default `path`.
        fingerprint: of the weights, recorded as given.
        threads: None uses every core.
        exact: keys and values in F32 and plain attention, as PyTorch computes; False: F16 and
            flash attention, as llama.cpp runs by default.
        on_progress: called with (sequences done, sequences in all).

    Raises:
        MoneEdgeError: llama.cpp refuses the file, or its experts cannot be observed.
    """
    observer, tokens = ExpertObserver(), calibration.tokens
    architecture = observe(path, observer, tokens, threads, exact=exact, on_progress=on_progress)
    layers = {
        layer: _checked(path, layer, stats, tokens.size)
        for layer, stats in sorted(observer.layers.items())
    }
    if not layers:
        raise MoneEdgeError(
            f"{path}: no experts were seen at work; {architecture} is not supported"
        )
    made = provenance(model or str(path), fingerprint, architecture, calibration)
    return ExpertStats(made, layers, dict(sorted(observer.linears.items())))


def observe(
    path: Path,
    observer: "ExpertObserver",
    tokens: NDArray[np.int64],
    threads: int | None,
    *,
    exact: bool = True,
    on_progress: Progress | None = None,
) -> str:
    """Show an observer the model at work on sequences [samples, length].

    Args:
        threads, exact, on_progress: as in `collect`.

    Returns:
        The model's architecture.
    """
    with GgufModel(
        path,
        observer=observer,
        n_ctx=tokens.shape[1],
        threads=threads,
        exact=exact,
        run_all=True,
    ) as llama:
        architecture = llama.metadata("general.architecture")
        observer.scaled_gates = architecture in SCALED_GATES
        observer.stream = STREAM_NAMES.get(architecture, "l_out")
        for done, row in enumerate(tokens.tolist(), start=1):
            llama.read(row)
            if on_progress is not None:
                on_progress(done, len(tokens))
    return architecture


def provenance(model: str, fingerprint: str, architecture: str, calibration: Batches) -> Provenance:
    """Where what is measured on this text comes from."""
    from mone_edge import runtime

    version = runtime.load().__version__
    return Provenance(
        model=model,
        fingerprint=fingerprint,
        architecture=architecture,
        data=calibration.specs,
        data_sha256=(calibration.sha256,),
        samples=len(calibration.tokens),
        seq_len=calibration.tokens.shape[1],
        seed=calibration.seed,
        tool=f"mone-edge {__version__}, llama.cpp of llama-cpp-python {version}",
    )


def _checked(path: Path, layer: int, stats: LayerStats, tokens: int) -> LayerStats:
    """The layer's statistics, if it saw every token `top_k` times and stayed finite."""
    if stats.tokens != tokens or stats.count.sum() != tokens * stats.top_k:
        raise MoneEdgeError(
            f"{path}, block {layer}: the experts saw {stats.count.sum()} routed tokens of {tokens} "
            "tokens; this architecture does not run every token through its experts"
        )
    bad = np.flatnonzero(~np.isfinite(stats.norm_sq_sum) | ~np.isfinite(stats.output_m2).all(1))
    if len(bad):
        raise MoneEdgeError(
            f"{path}, block {layer}: the outputs of {len(bad)} experts (first: {bad[0]}) are not "
            "finite; the weights are damaged"
        )
    return stats


class ExpertObserver:
    """A `GraphObserver` that adds what it sees to statistics.

    Of each block: the experts' input and ids at the first product with an expert stack, the inner
    activations at the down projection, the raw output there (or after its scale or bias), and the
    gate weights as the graph multiplies them. Of other products with a weight: their input.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerStats] = {}
        self.linears: dict[str, LinearStats] = {}
        self._routed: dict[int, RoutedSums] = {}  # of this batch's blocks that are not finished
        self._begun: set[int] = set()  # those blocks
        self.scaled_gates = False  # whether a scale of the outputs belongs to their weights
        self.stream = "l_out"  # name of what a layer leaves
        self._scales: dict[int, Values] = {}  # [T, K, 1] of this batch's blocks, where it does
        self._weighted: set[int] = set()  # of this batch, blocks that weight their experts' inputs
        self._inputs: dict[int, LinearStats] = {}  # of this batch, by address of the input's node
        self._seen = 0  # address of the node that was computed last
        self._head = ""  # once known: the weight that nothing but logits comes from

    def start(self) -> None:
        self._routed.clear()
        self._begun.clear()
        self._weighted.clear()
        self._scales.clear()
        self._inputs.clear()

    def wants(self, node: Node) -> bool:
        name = node.name
        if name.startswith("ffn_moe_"):
            if match := WEIGHTED.fullmatch(name):
                if not self.watches(int(match[1])):
                    return False
                if int(match[1]) in self._begun:
                    self._finish(int(match[1]), node)
                else:  # llama4: what experts read is weighted, and an output is a contribution
                    self._weighted.add(int(match[1]))
                return False
            if match := RAW_OUTPUT.fullmatch(name):
                return int(match[1]) in self._begun
        elif name == HEAD_INPUT:
            return bool(self._head)
        elif name.startswith(self.stream):
            return self._stream_layer(name) in self.layers
        if node.op == "MUL_MAT_ID":
            return self._is_new(EXPERTS.fullmatch(_weight(node)))
        return node.op == "MUL_MAT" and self._wants_linear(node)

    def _is_new(self, match: re.Match[str] | None) -> bool:
        """Whether this product of an expert stack tells something that another has not."""
        if match is None or not self.watches(int(match[1])):
            return False
        return match[2] == "down" or int(match[1]) not in self._begun

    def watches(self, layer: int) -> bool:
        """Whether a block is of interest."""
        return True

    def _wants_linear(self, node: Node) -> bool:
        weight, inputs = _weight(node), node.source(1)
        if not weight.endswith(".weight") or ROUTER.fullmatch(weight) or inputs is None:
            return False
        if known := self._inputs.get(inputs.address):  # as for keys what queries have read
            self._add_linear(weight, known)
            return False
        return True

    def see(self, node: Node) -> bool:
        name, op, self._seen = node.name, node.op, node.address
        if op == "MUL_MAT_ID":
            self._see_product(node)
        elif op == "MUL_MAT":
            self._see_linear(node)
        elif self.scaled_gates and (match := SCALED_OUTPUT.fullmatch(name)):
            if scale := node.source(1):
                self._scales[int(match[1])] = scale.values().copy()
        elif name.startswith(self.stream):
            self._add_stream(self._stream_layer(name), node.values())
        elif name == HEAD_INPUT:
            self._add_linear(self._head, _linear(node))
            return False  # logits are not needed, and a large vocabulary makes them dear
        return True

    def _see_product(self, node: Node) -> None:
        match = EXPERTS.fullmatch(_weight(node))
        stack, inputs, ids = (node.source(i) for i in range(3))
        if match is None or stack is None or inputs is None or ids is None:
            return
        layer, values = int(match[1]), inputs.values()
        if layer not in self._begun:
            if values.ndim != 3 or values.shape[1] != 1:
                raise MoneEdgeError(
                    f"block {layer} weights the inputs of several experts a token: not supported"
                )
            self._begun.add(layer)
            self._begin(layer, stack.stacked, ids.values(), values[:, 0])
        if match[2] == "down":
            self._add_inner(layer, values)
            if layer in self._weighted:
                self._begun.discard(layer)
                outputs = node.values()
                self._end(layer, outputs, np.ones((*outputs.shape[:2], 1), np.float32))

    def _begin(self, layer: int, experts: int, ids: Values, inputs: Values) -> None:
        """The ids [T, K] and the input [T, H] of a block's experts, not copied."""
        self._routed[layer] = RoutedSums(experts, ids, inputs)

    def _add_inner(self, layer: int, inner: Values) -> None:
        """The inputs [T, K, I] of its down projection."""
        self._routed[layer].add_inner(inner)

    def _end(self, layer: int, outputs: Values, weights: Values) -> None:
        """The outputs [T, K, D] and what they are multiplied by [T, K, 1]."""
        stats = self._routed.pop(layer).finish(outputs, weights)
        before = self.layers.get(layer)
        self.layers[layer] = before.merge(stats) if before else stats

    def _finish(self, layer: int, node: Node) -> None:
        """Before outputs are multiplied by their weights (in place, as likely as not): read both.

        Raises:
            MoneEdgeError: something else happens to the outputs first.
        """
        outputs, weights = node.source(0), node.source(1)
        self._begun.discard(layer)
        if outputs is None or weights is None or outputs.address != self._seen:
            raise MoneEdgeError(
                f"block {layer} does not weight its experts' outputs: not supported"
            )
        values, gates = outputs.values(), weights.values()
        if (scale := self._scales.pop(layer, None)) is not None:
            values = np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)
            gates = gates * scale
        self._end(layer, values, gates)

    def _stream_layer(self, name: str) -> int:
        """The number behind the name of what a layer leaves; -1 for a copy or a view of it."""
        number = name.removeprefix(self.stream + "-")
        return int(number) if number.isdecimal() else -1

    def _add_stream(self, layer: int, hidden: Values) -> None:
        """What a layer leaves [T, ..., H]."""
        before = self.layers[layer]
        assert before.stream_inverse is not None
        norms = np.square(hidden.reshape(len(hidden), -1)).sum(1)
        inverse = (1 / norms[norms > 0]).sum(dtype=np.float64)
        total = before.stream_inverse + inverse
        self.layers[layer] = replace(before, stream_inverse=total)

    def _see_linear(self, node: Node) -> None:
        inputs, weight = node.source(1), _weight(node)
        if inputs is None:
            return
        self._inputs[inputs.address] = stats = _linear(inputs)
        self._add_linear(weight, stats)
        if weight in HEADS and inputs.name == HEAD_INPUT:
            self._head = weight

    def _add_linear(self, weight: str, stats: LinearStats) -> None:
        before = self.linears.get(weight)
        self.linears[weight] = before.merge(stats) if before else stats


def _weight(node: Node) -> str:
    """Name of the weight that a product reads."""
    first = node.source(0)
    return first.name if first else ""


def _linear(inputs: Node) -> LinearStats:
    values = inputs.values()
    rows = values.reshape(-1, values.shape[-1])
    return LinearStats(len(rows), squared_columns(rows))


class GgufTokenizer:
    """llama.cpp's tokenizer of a GGUF, as `calibration.Tokenizer`."""

    def __init__(self, path: Path) -> None:
        self._model = model = GgufModel(path, vocab_only=True)
        weakref.finalize(self, model.close)

    @property
    def eos_id(self) -> int | None:
        return self._model.eos_id

    def ids(self, text: str) -> list[int]:
        return self._model.plain_ids(text)

    def chat(self, messages: list[Any]) -> str | None:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        model = self._model
        if not model.chat_template:
            return None
        bos, eos = model.token_text(model.bos_id), model.token_text(model.eos_id)
        formatter = Jinja2ChatFormatter(model.chat_template, eos, bos, add_generation_prompt=False)
        return str(formatter(messages=messages).prompt)
