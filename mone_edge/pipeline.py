"""The stages joined: model -> statistics -> plan -> GGUF, as `convert` runs them.

In: a `Source` and a `Recipe`. Out: what each stage makes. Statistics are kept in the cache by
what they were measured on, so that another ratio, method or type needs no new calibration.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mone_edge import __version__, convert, quantize
from mone_edge.conversion import open_checkpoint
from mone_edge.model_file import ModelFile
from mone_edge.paths import cache_dir
from mone_edge.plan import PrunePlan, make_plan
from mone_edge.recipe import Calibration, Recipe
from mone_edge.source import Source
from mone_edge.stats import ExpertStats, LayerStats, Provenance, file_sha256

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


def calibrate(
    source: Source,
    calibration: Calibration,
    *,
    device: str = "auto",
    offline: bool = False,
    progress: Progress | None = None,
    warn: Say = lambda message: None,
) -> ExpertStats:
    """Measure every expert on calibration text (torch)."""
    from mone_edge import calibration as text
    from mone_edge.collect.loading import choose_device
    from mone_edge.collect.torch_model import collect

    choose_device(device)
    batches = text.load(
        calibration.data,
        text.load_tokenizer(source.path),
        samples=calibration.samples,
        seq_len=calibration.seq_len,
        seed=calibration.seed,
        offline=offline,
    )
    if batches.short:
        warn(batches.short)
    stats = collect(
        source.path,
        batches,
        model=source.name,
        fingerprint=source.fingerprint,
        device=device,
        on_progress=progress,
    )
    if unseen := stats.unseen():
        experts = sum(layer.num_experts for layer in stats.layers.values())
        warn(
            f"{unseen} of {experts} experts saw none of the {stats.tokens} calibration tokens; "
            "they count as redundant: calibrate on more or other text (--samples, --data)"
        )
    return stats


def cached_stats(source: Source, calibration: Calibration) -> Path:
    """Where the statistics of this model on this text are kept."""
    digest = hashlib.sha256(f"{__version__} {source.fingerprint} {calibration}".encode())
    for spec in calibration.data:
        if Path(spec).is_file():
            digest.update(file_sha256(Path(spec)).encode())
    return cache_dir() / "stats" / f"{source.label}-{digest.hexdigest()[:16]}.safetensors"


def plan_from_stats(recipe: Recipe, stats: ExpertStats, path: Path) -> PrunePlan:
    """The plan that a recipe asks for, with the statistics file it rests on recorded."""
    return make_plan(
        stats,
        prune_ratio=recipe.prune_ratio,
        method=recipe.method,
        scope=recipe.scope,
        replacement=recipe.replacement,
        seed=recipe.calibration.seed,
        protect=recipe.protect,
        stats_path=str(path.resolve()),
        stats_sha256=file_sha256(path),
    )


def rehearse(source: Source, recipe: Recipe, outfiles: dict[str, Path]) -> list[convert.Job]:
    """All that `convert` does before it reads weights, on statistics of the right shape.

    Sizes are those of the real run (with `--scope model`, of the same number of experts), and
    what cannot work is refused here, before minutes of calibration.
    """
    model = open_checkpoint(source, tokenizer_pre=recipe.tokenizer_pre)
    stats = _shape_of_stats(source, model)
    plan = None
    if recipe.prune_ratio:
        plan = make_plan(
            stats,
            prune_ratio=recipe.prune_ratio,
            method=recipe.method,
            scope=recipe.scope,
            replacement=recipe.replacement,
            protect=recipe.protect,
        )
    jobs = convert.prepare(source, recipe, outfiles, plan=plan, stats=stats if plan else None)
    quantize.require_loadable(jobs[0].model, source.name)
    return jobs


def _shape_of_stats(source: Source, model: ModelFile) -> ExpertStats:
    layers: dict[int, LayerStats] = {}
    for layer in range(model.num_layers):
        down = model.tensors.get(convert.EXPERT_TENSOR.format(layer=layer, part="down"))
        if down is not None:
            layers[layer] = _empty_layer(*down.shape, top_k=source.top_k)
    return ExpertStats(Provenance(source.name, source.fingerprint, source.architecture), layers)


def _empty_layer(experts: int, width: int, inner: int, *, top_k: int) -> LayerStats:
    columns = {
        "output_mean": width,
        "output_m2": width,
        "gate_sq_mean": width,
        "input_sq_sum": width,
        "inner_sq_sum": inner,
    }
    arrays = {
        f.name: np.zeros((experts, columns[f.name]) if f.name in columns else experts)
        for f in dataclasses.fields(LayerStats)
        if f.name not in ("tokens", "top_k", "count")
    }
    return LayerStats(tokens=0, top_k=top_k, count=np.zeros(experts, dtype=np.int64), **arrays)
