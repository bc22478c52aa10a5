"""One layer of a streamed model at a time, called on hidden states from elsewhere.

In: a checkpoint, packed tokens, what the layer before left. Out: what a layer makes of it. For
every micro-batch the whole model is called, so that masks and position embeddings are those of the
architecture; layers before the one that is wanted pass their input on, and the call ends when it
has run. Knows nothing about statistics, and keeps nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mone_edge.calibration import Batches
from mone_edge.collect.experts import model_type
from mone_edge.collect.loading import (
    MEMORY_SHARE,
    choose_device,
    memory_bytes,
    stored_dtype,
    torch_dtype,
)
from mone_edge.collect.streaming import OUTSIDE, StreamedModel
from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError
from mone_edge.source import Checkpoint
from mone_edge.transformers_quiet import LOAD_ERRORS


def open_streamed(source: Checkpoint, device: str, dtype: str) -> StreamedModel:
    """A checkpoint on meta, in a precision that one layer of it has room for.

    Args:
        device, dtype: as in `torch_model.collect`; dtype "auto" is float32 where what must be
            resident takes at most half of the memory, else the model's own.

    Raises:
        MoneEdgeError: it cannot be streamed, or one layer does not fit in the memory.
    """
    place = choose_device(device)
    precision = torch_dtype(dtype) if dtype != "auto" else _choose_dtype(source, place)
    streamed = StreamedModel(source, place, precision)
    _require_memory(streamed)
    return streamed


@dataclass(frozen=True)
class LayerCalls:
    """The layers of a streamed model, on the micro-batches of `torch_model.collect`."""

    streamed: StreamedModel
    calibration: Batches
    batch_tokens: int

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, token ids [B, S])."""
        tokens = self.calibration.tokens
        step = max(1, self.batch_tokens // tokens.shape[1])
        for start in range(0, len(tokens), step):
            yield start, torch.from_numpy(tokens[start : start + step]).to(self.streamed.device)

    def layer(self, name: str, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """What layer `name` makes of a micro-batch: [B, S] token ids -> [B, S, H].

        Args:
            hidden: its input [B, S, H]; None for the embeddings.

        Raises:
            MoneEdgeError: the architecture's layers cannot be called like this.
        """
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

    def after_layers(self, tokens: Tensor, hidden: Tensor) -> None:
        """Run what follows the last layer on its output [B, S, H]."""
        states = hidden.to(self.streamed.device)
        last = list(self.streamed.layers)[-1]
        with _layers_replaced(self.streamed.layers, last, lambda *_, **__: states):
            self.streamed.model(input_ids=tokens, use_cache=False)

    def _unsuitable(self, why: str) -> str:
        kind = model_type(self.streamed.model)
        return f"model type {kind} cannot be run layer by layer: {why}"


class _LayerDone(Exception):
    """Ends a forward pass: the layer that was wanted has run."""


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
