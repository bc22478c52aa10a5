"""What stands in for a pruned expert: its vectors for a file, or a torch model that uses them.

In: a plan, the statistics it was made from or the novices that were fitted for it, and (for
`apply`) a transformers model in memory. Out: novice vectors in the plan's order, or the same model
pruned, the oracle for the patched llama.cpp. Knows nothing about files or quantising.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mone_edge.errors import MoneEdgeError
from mone_edge.low_rank import LayerNovices, LowRankNovices
from mone_edge.plan import PrunePlan
from mone_edge.recipe import MEASURED, low_rank
from mone_edge.stats import ExpertStats

if TYPE_CHECKING:
    from torch import Tensor

IMPLEMENTATION = "mone-edge-novices"
# Names of a novice's parts in a checkpoint, as <expert>.approx_value
NOVICE_PARTS = APPROX_VALUE, APPROX_DOWN, APPROX_UP = ("approx_value", "approx_down", "approx_up")
_NOVICES = "_mone_edge_novices"
# [experts, ...] -> [kept, ...]; the name is that of a parameter of the experts, or empty
Cut = Callable[["Tensor", str], "Tensor"]


def vectors(
    plan: PrunePlan,
    stats: ExpertStats | None,
    layer: int,
    fitted: LowRankNovices | None = None,
) -> NDArray[np.float32]:
    """What each expert id of the pruned layer adds to its output before the gate weight.

    Returns:
        [experts, D] in `plan.order(layer)`: zero rows for kept experts; for pruned ones
        `sum f / n` under "mean" (MoNE, arXiv 2507.00390), `sum g^2 f / sum g^2` under "gate2-mean"
        (the constant that minimises `sum g^2 ||f - c||^2`, what the layer's output loses), the bias
        of the fitted novice under "rank", zeros under "zero" and for an expert that no token
        reached.

    Raises:
        MoneEdgeError: the plan drops or merges experts, or what its novices come from is missing or
            of another model.
    """
    if plan.cuts:
        raise MoneEdgeError(f"a plan with --replacement {plan.replacement} has no novices")
    if low_rank(plan.replacement):
        rows = require_fitted(plan, fitted).layers[layer].bias
        kept = np.zeros((len(plan.kept[layer]), rows.shape[1]), dtype=np.float32)
        return np.concatenate([kept, rows])
    if stats is None:
        raise MoneEdgeError("novices come from statistics: give them with --stats")
    require_match(plan, stats)
    measured = stats.layers[layer]
    novices = np.zeros(measured.output_mean.shape, dtype=np.float32)
    if plan.replacement in MEASURED:
        means = measured.output_mean if plan.replacement == "mean" else measured.gate_sq_mean
        novices[len(plan.kept[layer]) :] = means[list(plan.pruned(layer))]
    return novices


def matrices(plan: PrunePlan, fitted: LowRankNovices | None, layer: int) -> LayerNovices | None:
    """The low-rank novices of a layer, in the order of `plan.pruned(layer)`.

    None where its novices are constants, or it has none.
    """
    if not low_rank(plan.replacement) or not plan.pruned(layer):
        return None
    found = require_fitted(plan, fitted).layers[layer]
    return found if found.width else None


def require_fitted(plan: PrunePlan, fitted: LowRankNovices | None) -> LowRankNovices:
    """The fitted novices of a plan that needs them.

    Raises:
        MoneEdgeError: there are none, or they are of another plan.
    """
    if fitted is None:
        raise MoneEdgeError(
            f"--replacement {plan.replacement} needs fitted novices: make them with mone-edge fit "
            "MODEL --plan FILE, and give them with --novices"
        )
    fitted.require_match(plan)
    return fitted


def require_match(plan: PrunePlan, stats: ExpertStats) -> None:
    """Refuse statistics that do not belong to the plan.

    Raises:
        MoneEdgeError: another model, or other layers or numbers of experts.
    """
    if plan.fingerprint != stats.provenance.fingerprint:
        raise MoneEdgeError(
            f"the plan is for {plan.model} ({plan.fingerprint[:12]}), the statistics are of "
            f"{stats.provenance.model} ({stats.provenance.fingerprint[:12]})"
        )
    measured = {index: layer.num_experts for index, layer in stats.layers.items()}
    require_shape(plan, measured, "the statistics are of")


def require_shape(plan: PrunePlan, experts: dict[int, int], other: str) -> None:
    """Refuse a plan that was made for other layers or numbers of experts."""
    if experts != dict(plan.num_experts):
        wanted, found = (
            f"{len(layers)} MoE layers of {sorted(set(layers.values()))} experts"
            for layers in (plan.num_experts, experts)
        )
        raise MoneEdgeError(f"the plan is for {wanted}, {other} {found}")


def apply(
    model: Any,
    plan: PrunePlan,
    stats: ExpertStats | None,
    fitted: LowRankNovices | None = None,
) -> Any:
    """Prune a transformers model in memory, in place, and return it.

    All but "drop" keep the router whole: a routed pruned expert adds its gate weight times its
    novice. "drop" cuts the router's rows and the experts' parameters, so that the model selects
    among the kept experts only; "merge" makes one of those of each group.

    Raises:
        MoneEdgeError: the plan does not fit the model, the statistics or the fitted novices.
    """
    from mone_edge.collect.experts import experts_modules, num_experts, set_implementation

    if stats is not None:
        require_match(plan, stats)
    modules = experts_modules(model)
    found = {index: num_experts(module) for index, (_, module) in modules.items()}
    require_shape(plan, found, "the model has")
    for index, (name, module) in modules.items():
        if plan.cuts:
            vars(module).pop(_NOVICES, None)  # of an earlier plan
            _cut(model, name, module, plan, index)
        else:
            pruned, biases = plan.pruned(index), np.zeros((0, 1), np.float32)
            if pruned:
                biases = vectors(plan, stats, index, fitted)[len(plan.kept[index]) :]
            install(module, pruned, biases, matrices(plan, fitted, index))
    if not plan.cuts:
        set_implementation(model, implementation())
    return model


@dataclass(frozen=True)
class Novice:
    """What a pruned expert makes of its inputs [n, H]: `bias + up @ down @ x`, or the bias."""

    bias: "Tensor"  # [D]
    down: "Tensor | None" = None  # [r, H]
    up: "Tensor | None" = None  # [D, r]

    def __call__(self, inputs: "Tensor") -> "Tensor":
        """[n, D], or [1, D] for a constant."""
        if self.down is None or self.up is None:
            return self.bias[None]
        return self.bias + (inputs @ self.down.T) @ self.up.T


def install(
    module: Any,
    pruned: tuple[int, ...],
    biases: NDArray[np.float32],
    matrices: LayerNovices | None,
    *,
    dtype: Any = None,
) -> None:
    """Give an experts module its novices, by original id.

    Args:
        biases: [P, D] in the order of `pruned`.
        matrices: the same experts', if they are more than constants.
        dtype: default: that of the experts.
    """
    import torch

    like = module.down_proj

    def tensors(values: NDArray[np.float32]) -> "Tensor":
        return torch.from_numpy(np.array(values)).to(like.device, dtype or like.dtype)

    columns = [tensors(biases)]
    if matrices is not None:
        columns += [tensors(matrices.down), tensors(matrices.up)]
    novices = [Novice(*parts) for parts in zip(*columns, strict=True)]
    setattr(module, _NOVICES, dict(zip(pruned, novices, strict=True)))


def implementation() -> str:
    """Name of the experts function that runs modules which `install` was called on."""
    from mone_edge.collect.experts import register

    register(IMPLEMENTATION, experts_with_novices)
    return IMPLEMENTATION


def experts_with_novices(
    module: Any, hidden: "Tensor", index: "Tensor", weights: "Tensor"
) -> "Tensor":
    """Eager experts with novices for the pruned ones: [T,H], [T,K], [T,K] -> [T,H]."""
    from mone_edge.collect.experts import output_width, routed, routed_inputs, run_expert

    novices: dict[int, Novice] = getattr(module, _NOVICES, {})
    result = hidden.new_zeros(len(hidden), output_width(module))
    for expert, token, slot in routed(index):
        inputs, gate = routed_inputs(module, hidden[token], weights[token, slot])
        novice = novices.get(expert)
        output = run_expert(module, expert, inputs)[1] if novice is None else novice(inputs)
        result.index_add_(0, token, (output * gate[:, None]).to(result.dtype))
    return result


def grouped_routing(name: str, plan: PrunePlan) -> str:
    """Why a block cannot lose rows of its router."""
    done, other = ("merge", "--method mone") if plan.groups else ("drop", "mean")
    return f"{name}: group-limited routing cannot {done} experts; use {other}"


def _cut(model: Any, name: str, experts: Any, plan: PrunePlan, layer: int) -> None:
    """Make a block one of fewer experts: expert parameters, router rows, counts.

    In the block, its experts and its router (everything but shared experts), every parameter or
    buffer with one row (or, if it is a single row, one column) per expert is sliced or merged: gate
    weights, gate biases and correction biases of any name. A router that groups its experts cannot
    be cut.
    """
    from torch import nn

    from mone_edge.collect.experts import expert_parameters, num_experts

    total, kept = num_experts(experts), plan.kept[layer]
    if plan.groups:
        from mone_edge.merged_model import Merge

        cut: Cut = Merge(experts, plan, layer)
    else:
        cut = lambda rows, name: rows[list(kept)]  # noqa: E731
    new = {
        (owner, key): cut(getattr(owner, key).data.unflatten(0, (total, rows)), key).flatten(0, 1)
        for owner, key, rows in expert_parameters(experts)
    }
    for (owner, key), values in new.items():
        setattr(owner, key, nn.Parameter(values, requires_grad=False))
    block = model.get_submodule(name.rpartition(".")[0])
    owners = [module for key, module in block.named_modules() if "shared" not in key]
    for owner in owners:
        if getattr(owner, "n_group", None) not in (None, 0, 1):
            raise MoneEdgeError(grouped_routing(name, plan))
        _cut_rows(owner, total, cut)
        for attribute, value in list(vars(owner).items()):
            counts = "expert" in attribute or attribute == "out_features"
            if counts and type(value) is int and value == total:
                setattr(owner, attribute, len(kept))


def _cut_rows(module: Any, total: int, cut: "Cut") -> None:
    """Cut the module's own tensors that have one row or column per expert."""
    from torch import nn

    for name, parameter in list(module.named_parameters(recurse=False)):
        rows = _rows(parameter.data, total, cut)
        if rows is not None:
            setattr(module, name, nn.Parameter(rows, requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        rows = _rows(buffer, total, cut)
        if rows is not None:
            setattr(module, name, rows)


def _rows(tensor: "Tensor", total: int, cut: "Cut") -> "Tensor | None":
    if tensor.ndim and len(tensor) == total:
        return cut(tensor, "")
    if tuple(tensor.shape) == (1, total):
        return cut(tensor[0], "")[None]
    return None
