"""Cut the dense FFNs into experts, layer by layer, each against the dense model's residual stream.

In: a `Student` with dense weights, token sequences. Out: the same `Student` with neurons grouped,
routers that choose experts, and a first low-rank correction of `down_proj`. The student's own
activations feed every layer, so a layer also corrects what the layers before it got wrong.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_edge.demo.training.model import Student, expert_mask, reorder, set_down_correction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerwiseSettings:
    """How long and how hard each layer is fitted."""

    router_steps: int = 200
    router_batch_tokens: int = 1024
    router_learning_rate: float = 0.01
    ridge: float = 0.01
    cluster_rounds: int = 12
    cluster_tokens: int = 8192
    chunk: int = 16


def neuron_use(hidden: Tensor, down: Tensor) -> Tensor:
    """Size of each neuron's contribution, [tokens, neurons]: activation times length of its
    column."""
    lengths: Tensor = torch.linalg.vector_norm(down.float(), dim=0)
    return hidden.float().abs() * lengths


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


def choose_order(hidden: Tensor, down: Tensor, shared: int, experts: int, rounds: int) -> Tensor:
    """Order of neurons [neurons]: the `shared` most used, then `experts` groups that fire
    together."""
    use = neuron_use(hidden, down)
    ranking = use.mean(dim=0).argsort(descending=True)
    routed = ranking[shared:]
    features = use[:, routed].sqrt()
    features = F.normalize((features - features.mean(dim=0)).T, dim=1)
    groups = balanced_groups(features, experts, rounds)
    return torch.cat([ranking[:shared], routed[groups.argsort(stable=True)]])


def expert_grams(hidden: Tensor, down: Tensor, experts: int) -> Tensor:
    """Inner products of the experts' outputs, [tokens, experts, experts]."""
    width = hidden.shape[1] // experts
    outputs = torch.stack(
        [
            hidden[:, e * width : (e + 1) * width] @ down[:, e * width : (e + 1) * width].T
            for e in range(experts)
        ],
        1,
    )
    return (outputs @ outputs.transpose(1, 2)).float()


@torch.enable_grad()
def fit_router(
    x: Tensor,
    grams: Tensor,
    weight: Tensor,
    top_k: int,
    settings: LayerwiseSettings,
    generator: torch.Generator,
) -> Tensor:
    """Router [experts, hidden] whose gated choice best keeps the sum of all experts.

    Fitted on FFN inputs x [tokens, hidden]; `weight` [tokens] is how much a token's squared error
    counts. Starts from a ridge regression of the logarithm of each expert's output length.
    """
    experts = grams.shape[1]
    x = x.float()
    size = grams.diagonal(dim1=1, dim2=2).clamp_min(1e-12).sqrt()
    target = size.log()
    target = target - target.mean()
    covariance = x.T @ x
    covariance.diagonal().add_(settings.ridge * covariance.diagonal().mean())
    router: Tensor = torch.linalg.solve(covariance, x.T @ target).T.contiguous()
    router = (router * 0.4 / (x[:2048] @ router.T).std()).requires_grad_(True)
    optimiser = torch.optim.Adam([router], lr=settings.router_learning_rate * router.std().item())
    total = (weight * grams.sum(dim=(1, 2))).mean().item()
    for step in range(settings.router_steps):
        for group in optimiser.param_groups:
            group["lr"] *= 0.1 ** (1 / settings.router_steps)
        chosen = torch.randint(0, x.shape[0], (settings.router_batch_tokens,), generator=generator)
        logits = x[chosen] @ router.T
        gate = experts * logits.softmax(dim=-1) * expert_mask(logits, top_k) - 1
        error = (gate.unsqueeze(1) @ grams[chosen] @ gate.unsqueeze(2)).flatten()
        loss = (weight[chosen] * error).mean() / total
        optimiser.zero_grad()
        torch.autograd.backward([loss])
        optimiser.step()
        if step in (0, settings.router_steps - 1):
            log.info("  router step %d: relative error %.4f", step, loss.item())
    fitted: Tensor = router.detach()
    return fitted


def reduced_rank(gram: Tensor, cross: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Best correction up @ down [out, in] of a linear map, in the metric of its input.

    The rows of `down` have length 1, as those of a fresh correction: Adam's steps then fit both.

    Args:
        gram: input times input [in, in]. cross: wanted change of the output times input [out, in].
    """
    gram = gram.double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    root = torch.linalg.cholesky(gram)
    # full solution in whitened coordinates: cross @ gram^-1 @ root = cross @ root^-T
    whitened = torch.linalg.solve_triangular(root, cross.double().T, upper=False).T
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    down = torch.linalg.solve_triangular(root.T, right[:rank].T, upper=True).T
    length = down.norm(dim=1)
    return (left[:, :rank] * values[:rank] * length).float(), (down / length[:, None]).float()


def full_rank(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The correction [out, in] that ridge regression finds; arguments as of `reduced_rank`."""
    gram = gram.double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    root = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(cross.double().T, root).T.float()


def four_bits(correction: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from -7 to 7 (int8, same shape) and one scale (bf16) for each column."""
    scale = (correction.abs().amax(dim=0) / 7).clamp_min(1e-12).to(torch.bfloat16)
    codes = (correction / scale.float()).round().clamp(-7, 7).to(torch.int8)
    return codes, scale


def _chunks(stream: Tensor, size: int) -> Iterator[slice]:
    return (slice(i, i + size) for i in range(0, stream.shape[0], size))


@torch.no_grad()
def convert_layers(
    student: Student, tokens: Tensor, settings: LayerwiseSettings, seed: int
) -> list[float]:
    """Run over all layers; returns the relative error of the residual stream after each, a weighted
    mean.

    Args:
        tokens: [sequences, length].
    """
    s = student.shape
    generator = torch.Generator().manual_seed(seed)
    teacher = student.embed(tokens)
    stream = teacher.clone()
    errors = []
    for layer in range(s.layers):
        for part in _chunks(stream, settings.chunk):
            stream[part] += student.attention(layer, stream[part])
            teacher[part] += student.attention(layer, teacher[part], dense=True)
            teacher[part] += student.ffn(layer, teacher[part], dense=True)
        weight = 1 / teacher.flatten(0, 1).square().sum(-1)
        weight = (weight / weight.median()).clamp_max(4)
        x = torch.cat(
            [student.ffn_input(layer, stream[part]) for part in _chunks(stream, settings.chunk)]
        )
        sample = torch.randperm(x.shape[0], generator=generator)[: settings.cluster_tokens]
        hidden = student.activations(layer, x[sample], dense=True)
        order = choose_order(
            hidden, student.w_down[layer], s.shared, s.experts, settings.cluster_rounds
        )
        reorder(student, layer, order)

        down = student.w_down[layer]
        hidden = torch.cat(
            [student.activations(layer, part, dense=True) for part in torch.split(x, 4096)]
        )
        grams = torch.cat(
            [
                expert_grams(h[:, s.shared :], down[:, s.shared :], s.experts)
                for h in torch.split(hidden, 2048)
            ]
        )
        student.router[layer] = fit_router(x, grams, weight, s.top_k, settings, generator)
        del grams

        wanted = (teacher - stream).flatten(0, 1)
        gram = torch.zeros(s.neurons, s.neurons)
        cross = torch.zeros(s.hidden, s.neurons)
        for rows in torch.split(torch.arange(x.shape[0]), 4096):
            gated = student.apply_gates(hidden[rows], *student.gates(layer, x[rows]))
            missing = (wanted[rows] - F.linear(gated, down).float()) * weight[rows, None]
            weighted = (gated.float() * weight[rows, None].sqrt()).to(student.dtype)
            gram += weighted.T @ weighted
            cross += missing.to(student.dtype).T @ gated
        del hidden
        up, across = reduced_rank(gram, cross, s.first_fit_rank, settings.ridge)
        student.w_down_fitted[layer] = (down.float() + up @ across).to(student.dtype)
        for part in _chunks(stream, settings.chunk):
            stream[part] += student.ffn(layer, stream[part])
        left = (teacher - stream).flatten(0, 1).square().sum(-1) * weight
        errors.append(float(left.mean() / (teacher.flatten(0, 1).square().sum(-1) * weight).mean()))
        log.info("layer %d: relative error of the residual stream %.4f", layer, errors[-1])
    return errors


@torch.no_grad()
def refit_down(student: Student, tokens: Tensor, settings: LayerwiseSettings) -> list[float]:
    """Fit every layer's correction of `down_proj` anew, on more text; experts and routers stay.

    One pass over the layers as in `convert_layers`, without what takes memory there: the first fit,
    on few tokens, learns some of them by heart. Returns the same errors.

    Args:
        tokens: [sequences, length].
    """
    s = student.shape
    teacher = student.embed(tokens)
    stream = teacher.clone()
    errors = []
    for layer in range(s.layers):
        down = student.w_down[layer]
        gram = torch.zeros(s.neurons, s.neurons)
        cross = torch.zeros(s.hidden, s.neurons)
        kept = []
        typical: Tensor | None = None
        for part in _chunks(stream, settings.chunk):
            stream[part] += student.attention(layer, stream[part])
            teacher[part] += student.attention(layer, teacher[part], dense=True)
            teacher[part] += student.ffn(layer, teacher[part], dense=True)
            weight = 1 / teacher[part].flatten(0, 1).square().sum(-1)
            typical = weight.median() if typical is None else typical
            root = (weight / typical).clamp_max(4).sqrt().unsqueeze(1)
            x = student.ffn_input(layer, stream[part])
            gated = student.apply_gates(student.activations(layer, x), *student.gates(layer, x))
            stream[part] += F.linear(gated, down).view_as(stream[part]).float()
            missing = (teacher[part] - stream[part]).flatten(0, 1)
            weighted = gated.float() * root
            gram.addmm_(weighted.T, weighted)
            cross.addmm_((missing * root).T, weighted)
            kept.append(gated)
        codes, scale = four_bits(full_rank(gram, cross, settings.ridge))
        set_down_correction(student, layer, codes, scale)
        change_of_down = (codes.float() * scale.float()).to(student.dtype)
        for part, gated in zip(_chunks(stream, settings.chunk), kept, strict=True):
            change = F.linear(gated, change_of_down)
            stream[part] += change.view_as(stream[part]).float()
        relative = (teacher - stream).square().sum(-1) / teacher.square().sum(-1)
        errors.append(relative.mean().item())
        log.info("layer %d: relative error of the residual stream %.4f", layer, errors[-1])
    return errors
