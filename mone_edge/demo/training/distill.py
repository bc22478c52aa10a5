"""End-to-end distillation: the student's predictions pulled to the dense model's, token by token.

Loss: Kullback-Leibler divergence of the student from the dense model over the whole vocabulary,
plus the relative error of the residual stream after every layer. Restartable: all state is in one
checkpoint file.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_edge.demo.training.model import Student

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillSettings:
    """Schedule of the end-to-end stage. Learning rates are of Adam."""

    sequences_per_step: int = 4
    warmup_steps: int = 8
    factor_learning_rate: float = 2e-4
    router_learning_rate: float = 8e-6
    shared_gate_learning_rate: float = 1e-5
    norm_learning_rate: float = 6e-5
    stream_weight: float = 2.0
    head_chunk_tokens: int = 512
    save_every: int = 40


def divergence(
    student: Tensor, teacher: Tensor, embedding: Tensor, chunk: int
) -> tuple[float, Tensor]:
    """Mean KL(teacher || student) of the next-token distributions, and its gradient for `student`.

    Logits are made and dropped `chunk` tokens at a time: all of them would take gigabytes.

    Args:
        student, teacher: last hidden states [tokens, hidden]. embedding: [vocabulary, hidden].
    """
    total = 0.0
    gradients = []
    for s, t in zip(torch.split(student, chunk), torch.split(teacher, chunk), strict=True):
        wanted = F.linear(t, embedding).float().log_softmax(-1)
        logits = F.linear(s, embedding).float().log_softmax(-1)
        probability = wanted.exp()
        total += float((probability * wanted.sub_(logits)).sum())
        gradients.append(logits.exp_().sub_(probability).to(embedding.dtype) @ embedding)
    return total / len(student), torch.cat(gradients) / len(student)


def stream_error(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Relative squared error of the residual stream, mean over tokens and layers."""
    errors = [
        ((s - t).square().sum(-1) / t.square().sum(-1)).clamp_max(4).mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


def optimiser_for(student: Student, settings: DistillSettings) -> torch.optim.Adam:
    special = {
        "router": settings.router_learning_rate,
        "shared_gate": settings.shared_gate_learning_rate,
        "norms": settings.norm_learning_rate,
        "final_norm": settings.norm_learning_rate,
    }
    groups = [
        {"params": [parameter], "lr": special.get(name, settings.factor_learning_rate)}
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
    ]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-10)


def schedule(step: int, progress: float, settings: DistillSettings) -> float:
    """Learning-rate factor: linear warm-up by steps, then a cosine over `progress` (0 to 1) down to
    2 %."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train_step(
    student: Student, optimiser: torch.optim.Adam, tokens: Tensor, settings: DistillSettings
) -> tuple[float, float]:
    """One update on tokens [sequences, length]; returns divergence and stream error before it."""
    with torch.no_grad():
        teacher_last, teacher_streams = student(tokens, dense=True)
    last, streams = student(tokens)
    kl, gradient = divergence(
        last.detach(), teacher_last, student.embedding, settings.head_chunk_tokens
    )
    error = stream_error(streams, teacher_streams)
    optimiser.zero_grad()
    torch.autograd.backward([last, error * settings.stream_weight], [gradient, None])
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimiser.step()
    return kl, error.item()


@torch.no_grad()
def mean_divergence(student: Student, tokens: Tensor, settings: DistillSettings) -> float:
    """KL divergence from the dense model, mean over tokens [sequences, length], nats."""
    total = 0.0
    for batch in torch.split(tokens, settings.sequences_per_step):
        teacher, last = student(batch, dense=True)[0], student(batch)[0]
        kl, _ = divergence(last, teacher, student.embedding, settings.head_chunk_tokens)
        total += kl * len(batch)
    return total / len(tokens)


def save_checkpoint(
    path: Path, student: Student, optimiser: torch.optim.Adam | None, step: int, seconds: float
) -> None:
    """Everything but the dense weights, atomically."""
    state: dict[str, Any] = {"step": step, "seconds": seconds, "order": student.order}
    state["parameters"] = {
        name: parameter.detach() for name, parameter in student.named_parameters()
    }
    if optimiser is not None:
        state["optimiser"] = optimiser.state_dict()
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def distill(
    student: Student,
    tokens: Tensor,
    held_out: Tensor,
    settings: DistillSettings,
    checkpoint: Path,
    seconds: float,
    resume: dict[str, Any],
) -> int:
    """Train for `seconds` in all, over which the learning rate falls; returns the number of steps
    done.

    Args:
        tokens: [sequences, length], taken in order and from the start again.
        held_out: [sequences, length], whose divergence is logged with each checkpoint.
        resume: a checkpoint; without an optimiser in it (as `layerwise` leaves it) training begins.
    """
    optimiser = optimiser_for(student, settings)
    if "optimiser" in resume:
        optimiser.load_state_dict(resume["optimiser"])
    step, before = int(resume["step"]), float(resume["seconds"])
    started = time.monotonic() - before
    size = settings.sequences_per_step
    while (elapsed := time.monotonic() - started) < seconds:
        batch = tokens[torch.arange(step * size, (step + 1) * size) % len(tokens)]
        factor = schedule(step, elapsed / seconds, settings)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        kl, error = train_step(student, optimiser, batch, settings)
        step += 1
        log.info("step %d: divergence %.4f, stream %.4f, %.0f s", step, kl, error, elapsed)
        if step % settings.save_every == 0:
            save_checkpoint(checkpoint, student, optimiser, step, elapsed)
            log.info("held out: %.4f", mean_divergence(student, held_out, settings))
    save_checkpoint(checkpoint, student, optimiser, step, seconds)
    log.info("held out: %.4f", mean_divergence(student, held_out, settings))
    return step
