"""Cut the dense FFNs into experts, layer by layer, each against the dense model's residual stream.

In: a `Student` with dense weights, token sequences. Out: the same `Student` with neurons grouped,
routers that choose experts, and a correction of `down_proj`, all in closed form. The student's own
activations feed every layer, so a layer also corrects what the layers before it got wrong.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_edge.demo.training.model import Shape, Student, reorder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerwiseSettings:
    """How each layer is fitted. Ridges are relative to the mean of the diagonal."""

    ridge: float = 0.01
    down_ridges: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    logit_deviation: float = 0.05
    cluster_rounds: int = 12
    cluster_tokens: int = 8192
    chunk: int = 16


def ridge_regression(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The linear map [out, in] that ridge regression finds.

    Args:
        gram: input times input [in, in]. cross: wanted output times input [out, in].
    """
    gram = gram.double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    root = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(cross.double().T, root).T.float()


def best_ridge(
    gram: Tensor, cross: Tensor, ridges: Iterable[float], held_out: list[tuple[Tensor, Tensor]]
) -> tuple[float, Tensor]:
    """The ridge whose correction leaves least on text it was not fitted on, and that correction.

    Args:
        gram, cross: as of `ridge_regression`. held_out: inputs [tokens, in] and wanted outputs
            [tokens, out], both times the root of a token's weight.
    """
    corrections = {ridge: ridge_regression(gram, cross, ridge) for ridge in ridges}

    def left(ridge: float) -> float:
        errors = [wanted - F.linear(x, corrections[ridge]) for x, wanted in held_out]
        return sum(float(error.square().sum()) for error in errors)

    best = min(corrections, key=left)
    return best, corrections[best]


def balanced_groups(features: Tensor, groups: int, rounds: int) -> Tensor:
    """Group index of every row of `features` [items, dims] (rows of length 1), groups of equal
    size.

    k-means on the sphere in which the best pairs (item, centre) are settled first while a centre
    has room.
    """
    items = features.shape[0]
    room = items // groups
    first = [0]
    nearest = features @ features[0]
    for _ in range(groups - 1):
        first.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, features @ features[first[-1]])
    centres = features[first]
    assigned = torch.full((items,), -1)
    for _ in range(rounds):
        similarity = features @ centres.T
        pairs = (
            (similarity - similarity.mean(dim=1, keepdim=True)).flatten().argsort(descending=True)
        )
        assigned.fill_(-1)
        free = [room] * groups
        for pair in pairs.tolist():
            item, group = divmod(pair, groups)
            if free[group] and assigned[item] < 0:
                assigned[item] = group
                free[group] -= 1
        sums = torch.zeros_like(centres).index_add_(0, assigned, features)
        centres = F.normalize(sums, dim=1)
    return assigned


def choose_order(
    inputs: list[Tensor], hidden: list[Tensor], down: Tensor, shape: Shape, s: LayerwiseSettings
) -> Tensor:
    """Order of neurons [neurons]: the `shared` most used, then groups whose use is foreseen alike.

    A router is linear in the input of the layer, so neurons are grouped by what a linear regression
    foresees of their use, not by the use itself: groups that fire together are of no help if no
    router can tell when.

    Args:
        inputs: of the FFN, [tokens, width] each. hidden: neuron activations, [tokens, neurons]
            each. down: [width, neurons].
    """
    lengths = torch.linalg.vector_norm(down.float(), dim=0)
    use = torch.stack([h.float().abs().mean(dim=0) for h in hidden]).mean(dim=0) * lengths
    ranking = use.argsort(descending=True)
    routed = ranking[shape.shared :]
    roots = (h[:, routed].float().abs().mul_(lengths[routed]).sqrt_() for h in hidden)
    foreseen = regression(inputs, (root - root.mean(dim=0) for root in roots), s.ridge)
    tokens = sum(map(len, inputs))
    sample = torch.cat(inputs)[:: -(-tokens // s.cluster_tokens)].float()
    features = sample @ foreseen.T
    features = F.normalize((features - features.mean(dim=0)).T, dim=1)
    groups = balanced_groups(features, shape.experts, s.cluster_rounds)
    return torch.cat([ranking[: shape.shared], routed[groups.argsort(stable=True)]])


def regression(inputs: list[Tensor], outputs: Iterable[Tensor], ridge: float) -> Tensor:
    """Linear map [out, in] from inputs [tokens, in] to outputs [tokens, out], in parts."""
    moments = [
        (x.float().T @ x.float(), y.T @ x.float()) for x, y in zip(inputs, outputs, strict=True)
    ]
    gram, cross = (torch.stack(parts).sum(dim=0) for parts in zip(*moments, strict=True))
    return ridge_regression(gram, cross, ridge)


def output_lengths(hidden: Tensor, down: Tensor, experts: int) -> Tensor:
    """Lengths of the experts' outputs, [tokens, experts].

    Args:
        hidden, down: of the routed neurons, [tokens, neurons] and [width, neurons].
    """
    activations = hidden.float().view(len(hidden), experts, -1)
    columns = down.float().view(len(down), experts, -1)
    grams = torch.einsum("dei,dej->eij", columns, columns)
    squares = torch.einsum("tei,eij,tej->te", activations, grams, activations)
    return squares.clamp_min(1e-12).sqrt()


def fit_router(inputs: list[Tensor], lengths: list[Tensor], settings: LayerwiseSettings) -> Tensor:
    """Router [experts, width] that foresees the logarithm of each expert's output length.

    The logits are shrunk to a small spread: their order is what counts, and gates that are all near
    1 leave the dense model's sum of experts as it is.

    Args:
        inputs: of the FFN, [tokens, width] each. lengths: of the experts' outputs, [tokens,
            experts] each.
    """
    mean = torch.cat(lengths).log().mean()
    router = regression(inputs, (part.log() - mean for part in lengths), settings.ridge)
    return router * settings.logit_deviation / (inputs[0].float() @ router.T).std()


def _chunks(stream: Tensor, size: int) -> Iterator[slice]:
    return (slice(i, i + size) for i in range(0, stream.shape[0], size))


@torch.no_grad()
def convert_layers(
    student: Student, tokens: Tensor, held_out: int, settings: LayerwiseSettings
) -> list[float]:
    """Run over all layers; returns the relative error of the residual stream after each, on the
    sequences that nothing is fitted on.

    What is fitted on few tokens learns them by heart, and over 30 layers that adds up, so the ridge
    of a layer's correction is the one that is best on those sequences.

    Args:
        tokens: [sequences, length]. held_out: how many of them, the last, are not fitted on.
    """
    s = student.shape
    teacher = student.embed(tokens)
    stream = teacher.clone()
    parts = list(_chunks(stream, settings.chunk))
    fitted = len(parts) - -(-held_out // settings.chunk)
    errors = []
    for layer in range(s.layers):
        inputs, hidden, roots = [], [], []
        typical: Tensor | None = None
        for part in parts:
            stream[part] += student.attention(layer, stream[part])
            teacher[part] += student.attention(layer, teacher[part], dense=True)
            teacher[part] += student.ffn(layer, teacher[part], dense=True)
            inputs.append(student.ffn_input(layer, stream[part]))
            hidden.append(student.activations(layer, inputs[-1], dense=True))
            weight = 1 / teacher[part].flatten(0, 1).square().sum(-1)
            typical = weight.median() if typical is None else typical
            roots.append((weight / typical).clamp_max(4).sqrt().unsqueeze(1))
        down = student.w_down[layer]
        order = choose_order(inputs[:fitted], hidden[:fitted], down, s, settings)
        reorder(student, layer, order)
        hidden = [h[:, order] for h in hidden]
        down = student.w_down[layer]
        lengths = [
            output_lengths(h[:, s.shared :], down[:, s.shared :], s.experts)
            for h in hidden[:fitted]
        ]
        student.router[layer] = fit_router(inputs[:fitted], lengths, settings)

        gram = torch.zeros(s.neurons, s.neurons)
        cross = torch.zeros(s.hidden, s.neurons)
        checks = []
        for i, (part, root) in enumerate(zip(parts, roots, strict=True)):
            gated = student.apply_gates(hidden[i], *student.gates(layer, inputs[i]))
            stream[part] += F.linear(gated, down).view_as(stream[part]).float()
            missing = (teacher[part] - stream[part]).flatten(0, 1) * root
            weighted = (gated.float() * root).to(student.dtype)
            if i < fitted:
                gram += weighted.T @ weighted
                cross += missing.to(student.dtype).T @ weighted
            else:
                checks.append((weighted.float(), missing))
            hidden[i] = gated
        ridge, change = best_ridge(gram, cross, settings.down_ridges, checks)
        student.down_change[layer] = change
        change = (student.fitted_down(layer).float() - down.float()).to(student.dtype)
        for part, gated in zip(parts, hidden, strict=True):
            stream[part] += F.linear(gated, change).view_as(stream[part]).float()
        relative = (teacher - stream).square().sum(-1) / teacher.square().sum(-1)
        errors.append(relative[-held_out:].mean().item())
        log.info(
            "layer %d: ridge %g, relative error of the residual stream %.4f, held out %.4f",
            *(layer, ridge, relative[:-held_out].mean(), errors[-1]),
        )
    return errors
