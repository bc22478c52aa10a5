"""Statistics from a checkpoint folder, or a model in memory, through PyTorch and transformers.

In: a folder of config and safetensors (or the model), packed calibration tokens. Out: ExpertStats.
One experts function sees every architecture; there is no code per model. Knows nothing about
hubs, criteria or plans, and keeps no hidden states (`sequential` does).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mone_edge import __version__
from mone_edge.calibration import Batches
from mone_edge.collect import sampling
from mone_edge.collect.accumulate import BatchSums, LayerAccumulator, LinearAccumulator
from mone_edge.collect.experts import (
    experts_implementation,
    experts_modules,
    model_type,
    num_experts,
    output_width,
    register,
    routed,
    routed_inputs,
    run_expert,
    weighs_inputs,
)
from mone_edge.collect.loading import checkpoint_names, load_model
from mone_edge.collect.partial import PartialSums
from mone_edge.collect.work import Work, open_work, run_key
from mone_edge.errors import MoneEdgeError
from mone_edge.stats import ExpertStats, LayerStats, LinearStats, Provenance

IMPLEMENTATION = "mone-edge-collect"
BATCH_TOKENS = 4096
_ACCUMULATOR = "_mone_edge_accumulator"
LAYER = re.compile(r".*?\.\d+(?=\.)")  # the layer, in the name of a module of it

Progress = Callable[[int, int], None]


def collect(
    model_dir: Path,
    calibration: Batches,
    *,
    model: str = "",
    fingerprint: str = "",
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    linears: bool = True,
    work: Work | None = None,
    on_progress: Progress | None = None,
) -> ExpertStats:
    """Run calibration tokens through a checkpoint and gather every statistic.

    Args:
        model_dir: folder with config.json and safetensors.
        calibration: packed sequences from `mone_edge.calibration.load`.
        model: the model as the user named it; default `model_dir`.
        fingerprint: of the weights, recorded as given.
        device: a torch device, or "auto" (CUDA if there is one, else the CPU).
        dtype: a torch dtype's name, or "auto" (see `loading.choose_dtype`).
        batch_tokens: tokens per forward call; at least one sequence.
        linears: gather input moments of the ordinary linear layers too.
        work: where long runs keep their sums, so that a killed one can go on.
        on_progress: called with (sequences done, sequences in all).

    Raises:
        MoneEdgeError: the folder cannot be loaded, or the architecture cannot be observed.
    """
    loaded = load_model(model_dir, device=device, dtype=dtype)
    return collect_loaded(
        loaded,
        calibration,
        model=model or str(model_dir),
        fingerprint=fingerprint,
        batch_tokens=batch_tokens,
        linears=linears,
        work=work,
        on_progress=on_progress,
    )


def collect_loaded(
    loaded: Any,
    calibration: Batches,
    *,
    model: str = "",
    fingerprint: str = "",
    batch_tokens: int = BATCH_TOKENS,
    linears: bool = True,
    work: Work | None = None,
    on_progress: Progress | None = None,
) -> ExpertStats:
    """`collect` for a transformers model that is in memory; the model is left as it was."""
    tokens = calibration.tokens
    made = provenance(loaded, calibration, model, fingerprint)
    step = max(1, batch_tokens // tokens.shape[1])
    with ExitStack() as stack:
        partial = None
        if work is not None:
            key = run_key(made, "in memory", batch_tokens)
            partial = PartialSums(stack.enter_context(open_work(work, key)))
        layer_sums = stack.enter_context(observe_experts(loaded, sampled(calibration)))
        stack.enter_context(_observe_streams(loaded, layer_sums))
        linear_sums = stack.enter_context(observe_linears(loaded, record=linears))
        stack.enter_context(torch.inference_mode())
        first = partial.restore(layer_sums, linear_sums) if partial else 0
        for start in range(first, len(tokens), step):
            part = torch.from_numpy(tokens[start : start + step]).to(loaded.device)
            loaded(input_ids=part, use_cache=False)
            done = min(start + step, len(tokens))
            if partial and done < len(tokens):
                partial.keep(done, layer_sums, linear_sums)
            if on_progress is not None:
                on_progress(done, len(tokens))
    layers = {
        index: checked(loaded, index, sums, tokens.size) for index, sums in layer_sums.items()
    }
    return ExpertStats(made, layers, by_key(loaded, linear_sums))


def sampled(calibration: Batches) -> sampling.Positions:
    """Which tokens all experts of a layer run on."""
    return sampling.positions(calibration.tokens.size, calibration.seed)


@contextmanager
def observe_experts(
    model: Any, sample: sampling.Positions | None = None
) -> Iterator[dict[int, LayerAccumulator]]:
    """While open, every forward pass of `model` adds to the yielded sums, by block index.

    Args:
        sample: numbers of the tokens, in the order of all passes, whose inputs are kept.
    """
    modules = experts_modules(model)
    sums = {
        index: LayerAccumulator(
            num_experts(module), None if sample is None else sampling.Sample(sample)
        )
        for index, (_, module) in modules.items()
    }
    with experts_implementation(model, IMPLEMENTATION):
        try:
            for index, (_, module) in modules.items():
                setattr(module, _ACCUMULATOR, sums[index])
            yield sums
        finally:
            for _, module in modules.values():
                vars(module).pop(_ACCUMULATOR, None)


@contextmanager
def _observe_streams(model: Any, sums: dict[int, LayerAccumulator]) -> Iterator[None]:
    """While open, what every layer with experts leaves is added to its sums."""
    handles = []
    for index, (name, _) in experts_modules(model).items():
        layer = LAYER.match(name)
        if layer is not None:
            module = model.get_submodule(layer[0])
            handles.append(module.register_forward_hook(_stream_recorder(sums[index])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stream_recorder(sums: LayerAccumulator) -> Callable[[nn.Module, Any, Any], None]:
    def record(_: nn.Module, _inputs: Any, output: Any) -> None:
        sums.add_stream(output[0] if isinstance(output, tuple) else output)

    return record


def _collecting_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Eager experts that also add to their module's sums: [T,H], [T,K], [T,K] -> [T,H]."""
    accumulator: LayerAccumulator = getattr(module, _ACCUMULATOR)
    scaled = weighs_inputs(module)
    batch = BatchSums(accumulator.num_experts, hidden, index, weights, weighs_inputs=scaled)
    result = hidden.new_zeros(len(hidden), output_width(module))
    for expert, token, slot in routed(index):
        inputs, gate = routed_inputs(module, hidden[token], weights[token, slot])
        inner, output = run_expert(module, expert, inputs)
        batch.add_expert(expert, token, slot, gate, inner, output)
        result.index_add_(0, token, (output * gate[:, None]).to(result.dtype))
    accumulator.add(batch, hidden)
    return result


register(IMPLEMENTATION, _collecting_experts)


@contextmanager
def observe_linears(model: Any, *, record: bool) -> Iterator[dict[str, LinearAccumulator]]:
    """Sums of the inputs of linear layers outside experts, by module name.

    The output head reads every position but computes logits for the last one only: nobody needs
    them, and a large vocabulary makes them the most expensive layer.
    """
    head = model.get_output_embeddings()
    sums: dict[str, LinearAccumulator] = {}
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or _inside_experts_or_router(name):
            continue
        if record:
            sums[name] = LinearAccumulator()
            handles.append(module.register_forward_pre_hook(_recorder(sums[name])))
        if module is head:
            handles.append(module.register_forward_pre_hook(_last_position))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _inside_experts_or_router(name: str) -> bool:
    parts = name.split(".")
    return not {"experts", "gate", "router"}.isdisjoint(parts)


def _recorder(sums: LinearAccumulator) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def record(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        sums.add(inputs[0])

    return record


def _last_position(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0][..., -1:, :], *inputs[1:])


def checked(model: Any, index: int, sums: LayerAccumulator, tokens: int) -> LayerStats:
    """The layer's statistics, if it saw every token `top_k` times and stayed finite.

    Its weights must be in memory: all experts run on the sampled tokens now.
    """
    stats = sums.total
    kind = model_type(model)
    if stats is None or stats.tokens != tokens or stats.count.sum() != tokens * stats.top_k:
        seen = 0 if stats is None else int(stats.count.sum())
        raise MoneEdgeError(
            f"model type {kind}, block {index}: the experts saw {seen} routed tokens of {tokens} "
            "tokens; this architecture does not route through the common experts interface"
        )
    bad = np.flatnonzero(~np.isfinite(stats.norm_sq_sum) | ~np.isfinite(stats.output_m2).all(1))
    if len(bad):
        raise MoneEdgeError(
            f"block {index}: the outputs of {len(bad)} experts (first: {bad[0]}) are not finite; "
            f"the weights are damaged, or overflow in {_dtype_name(model)}"
        )
    if sums.sample is None:
        return stats
    with torch.inference_mode():
        found = sampling.sums(model, experts_modules(model)[index][0], sums.sample.inputs)
    return replace(stats, **found)


def by_key(model: Any, sums: dict[str, LinearAccumulator]) -> dict[str, LinearStats]:
    """Finished sums by the names of the checkpoint's weights."""
    measured = {name: s.total for name, s in sums.items() if s.total is not None}
    for name, stats in measured.items():
        if not np.isfinite(stats.input_sq_sum).all():
            raise MoneEdgeError(f"the inputs of {name} are not finite; the weights are damaged")
    names = checkpoint_names(model, measured)
    return {key: stats for name, stats in measured.items() for key in names[name]}


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def provenance(model: Any, calibration: Batches, name: str, fingerprint: str) -> Provenance:
    """Where statistics of this model on this text come from."""
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return Provenance(
        model=name,
        fingerprint=fingerprint,
        architecture=model_type(model),
        data=calibration.specs,
        data_sha256=(calibration.sha256,),
        samples=len(calibration.tokens),
        seq_len=calibration.tokens.shape[1],
        seed=calibration.seed,
        tool=f"mone-edge {__version__}, {versions}, {_dtype_name(model)}",
    )
