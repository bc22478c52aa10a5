"""Statistics of a model that is larger than the memory: one layer's weights at a time.

In: a checkpoint, packed calibration tokens, a work folder. Out: the same ExpertStats that
`torch_model.collect` gives, to the last bit for the same precision and number of threads.

Layer `l` reads the hidden states that layer `l - 1` left in a file. For every micro-batch the
whole model is called, so that masks and position embeddings are those of the architecture; layers
before `l` pass their input on, and the call ends when `l` has run. What is finished after each
layer: its statistics, its outputs, then the state that says so.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mone_edge.calibration import Batches
from mone_edge.collect.accumulate import LayerAccumulator, LinearAccumulator
from mone_edge.collect.experts import model_type
from mone_edge.collect.hidden import HiddenStates
from mone_edge.collect.loading import (
    MEMORY_SHARE,
    choose_device,
    memory_bytes,
    stored_dtype,
    torch_dtype,
)
from mone_edge.collect.streaming import OUTSIDE, StreamedModel
from mone_edge.collect.torch_model import (
    BATCH_TOKENS,
    by_key,
    checked,
    observe_experts,
    observe_linears,
    provenance,
)
from mone_edge.collect.work import Work, WorkFolder, open_work, run_key
from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError
from mone_edge.source import Checkpoint
from mone_edge.stats import ExpertStats
from mone_edge.transformers_quiet import LOAD_ERRORS

Progress = Callable[[int, int], None]


def collect_sequential(
    source: Checkpoint,
    calibration: Batches,
    work: Work,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Progress | None = None,
) -> ExpertStats:
    """Gather every statistic with one layer's weights in memory.

    Args:
        source: the checkpoint.
        calibration: packed sequences from `mone_edge.calibration.load`.
        work: folder for what is finished; stays until the caller has saved the result.
        device, dtype, batch_tokens: as in `torch_model.collect`.
        on_progress: called with (sequences done in all layers, sequences in all layers).

    Raises:
        MoneEdgeError: the checkpoint or the architecture cannot be streamed, one layer does not
            fit in the memory, the disk is too small, or the work folder is another run's.
    """
    place = choose_device(device)
    precision = torch_dtype(dtype) if dtype != "auto" else _choose_dtype(source, place)
    streamed = StreamedModel(source, place, precision)
    _require_memory(streamed)
    made = provenance(streamed.model, calibration, source.name, source.fingerprint)
    with open_work(work, run_key(made, "sequential", batch_tokens)) as folder:
        run = _Run(streamed, calibration, folder, batch_tokens, on_progress or (lambda d, t: None))
        with ExitStack() as stack:
            run.layer_sums |= stack.enter_context(observe_experts(streamed.model))
            run.linear_sums |= stack.enter_context(observe_linears(streamed.model, record=True))
            stack.enter_context(torch.inference_mode())
            run.all_layers()
        return ExpertStats(made, *run.collected())


class _LayerDone(Exception):
    """Ends a forward pass: the layer that was wanted has run."""


@dataclass
class _Run:
    """One run over all layers, from the first that is not finished."""

    streamed: StreamedModel
    calibration: Batches
    folder: WorkFolder
    batch_tokens: int
    report: Progress
    layer_sums: dict[int, LayerAccumulator] = field(default_factory=dict)
    linear_sums: dict[str, LinearAccumulator] = field(default_factory=dict)

    def all_layers(self) -> None:
        names = list(self.streamed.layers)
        done = int(self.folder.state.get("layers", 0))
        shape = self.folder.state.get("shape")
        self.streamed.load(OUTSIDE)
        for number in range(done, len(names)):
            shape = self._layer(number, names[number], shape)
            self.folder.save(layers=number + 1, shape=shape)
            self._hidden_file(number).unlink(missing_ok=True)
        self._head(names[-1], shape)

    def collected(self) -> tuple[dict[int, Any], dict[str, Any]]:
        """Statistics of all layers, from the files that `_layer` left."""
        layers: dict[int, Any] = {}
        linears: dict[str, Any] = {}
        for number in range(len(self.streamed.layers) + 1):
            part = ExpertStats.load(self._stats_file(number))
            layers |= part.layers
            linears |= part.linears
        return layers, linears

    def _layer(self, number: int, name: str, shape: list[int] | None) -> list[int]:
        """Run one layer over all tokens; returns the shape of a sequence's hidden states."""
        self.streamed.load(name)
        rows = len(self.calibration.tokens)
        written: HiddenStates | None = None
        before = self._hidden(number, shape) if number else None
        with ExitStack() as stack:
            for start, tokens in self._batches():
                hidden = before.read(start, len(tokens)) if before else None
                after = self._one_call(name, tokens, hidden)
                if written is None:
                    written = self._hidden(number + 1, list(after.shape[1:]))
                    written.require_space(rows)
                    stack.enter_context(written.writing())
                written.write(after)
                self._progress(number, start + len(tokens))
        assert written is not None
        self._save_stats(number, name)
        self.streamed.release(name)
        return list(written.shape)

    def _head(self, last: str, shape: list[int] | None) -> None:
        """What follows the last layer: the norm, and the output head's inputs."""
        number = len(self.streamed.layers)
        hidden = self._hidden(number, shape)
        for start, tokens in self._batches():
            states = hidden.read(start, len(tokens)).to(self.streamed.device)
            with _layers_replaced(self.streamed.layers, last, lambda *_, s=states, **__: s):
                self.streamed.model(input_ids=tokens, use_cache=False)
        self._save_stats(number, OUTSIDE)

    def _one_call(self, name: str, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """What layer `name` makes of a micro-batch: [B, S] token ids -> [B, S, H]."""
        layer = self.streamed.layers[name]
        original, result = layer.forward, []

        def run(*args: Any, **kwargs: Any) -> None:
            if hidden is not None:
                moved = hidden.to(self.streamed.device)
                args, kwargs = _with_hidden(moved, args, kwargs)
            result.append(original(*args, **kwargs))
            raise _LayerDone

        try:
            with _layers_replaced(self.streamed.layers, name, run):
                self.streamed.model(input_ids=tokens, use_cache=False)
        except _LayerDone:
            pass
        except LOAD_ERRORS as error:
            raise MoneEdgeError(self._unsuitable(f"{name}: {reason(error)}")) from error
        if not result or not isinstance(result[0], Tensor):
            raise MoneEdgeError(self._unsuitable(f"{name} returns no hidden states"))
        return result[0]

    def _unsuitable(self, why: str) -> str:
        return (
            f"model type {model_type(self.streamed.model)} cannot be measured with --sequential: "
            f"{why}"
        )

    def _save_stats(self, number: int, part: str) -> None:
        """The statistics of one part, in a file; its sums are dropped from memory."""
        tokens = self.calibration.tokens.size
        inside = [n for n in self.linear_sums if self.streamed.part_of(n) == part]
        blocks = [i for i, name in self.streamed.blocks.items() if name == part]
        layers = {
            i: checked(self.streamed.model, i, self.layer_sums.pop(i), tokens) for i in blocks
        }
        linears = by_key(self.streamed.model, {n: self.linear_sums.pop(n) for n in inside})
        made = provenance(self.streamed.model, self.calibration, "", "")
        ExpertStats(made, layers, linears).save(self._stats_file(number))

    def _batches(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, token ids [B, S]): the micro-batches of `torch_model.collect`."""
        tokens = self.calibration.tokens
        step = max(1, self.batch_tokens // tokens.shape[1])
        for start in range(0, len(tokens), step):
            yield start, torch.from_numpy(tokens[start : start + step]).to(self.streamed.device)

    def _progress(self, layers: int, rows: int) -> None:
        total = len(self.calibration.tokens)
        self.report(layers * total + rows, len(self.streamed.layers) * total)

    def _hidden(self, number: int, shape: list[int] | None) -> "HiddenStates":
        assert shape is not None
        return HiddenStates(self._hidden_file(number), tuple(shape), self.streamed.dtype)

    def _hidden_file(self, number: int) -> Path:
        return self.folder.path / f"hidden.{number}.bin"

    def _stats_file(self, number: int) -> Path:
        return self.folder.path / f"layer.{number}.safetensors"


@contextmanager
def _layers_replaced(
    layers: Mapping[str, nn.Module], name: str, function: Callable[..., Any]
) -> Iterator[None]:
    """Layers before `name` return their input, layer `name` calls `function`."""
    replaced: list[nn.Module] = []
    try:
        for key, layer in layers.items():
            replaced.append(layer)
            layer.forward = function if key == name else _pass_on
            if key == name:
                break
        yield
    finally:
        for layer in replaced:
            vars(layer).pop("forward", None)


def _pass_on(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _choose_dtype(source: Checkpoint, device: torch.device) -> torch.dtype:
    """float32 where what must be resident takes at most half of the memory, else the model's."""
    own = torch_dtype(stored_dtype(source.path))
    wide = StreamedModel(source, device, torch.float32)
    return torch.float32 if _resident_bytes(wide) <= memory_bytes(device) / 2 else own


def _resident_bytes(streamed: StreamedModel) -> int:
    """Weights in memory at once: all outside the layers, and a layer twice while it is fused."""
    return streamed.part_bytes(OUTSIDE) + 2 * max(map(streamed.part_bytes, streamed.layers))


def _require_memory(streamed: StreamedModel) -> None:
    needed, limit = _resident_bytes(streamed), memory_bytes(streamed.device)
    if needed > MEMORY_SHARE * limit:
        raise MoneEdgeError(
            f"{streamed.source.name}: one layer and the embeddings need {needed / 2**30:.1f} GiB, "
            f"{streamed.device} has {limit / 2**30:.1f} GiB of memory; collect statistics on a "
            "larger machine and bring the file (--stats FILE)"
        )
