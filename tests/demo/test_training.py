"""The training stages on a tiny random model: each piece against what it should find."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from mone_edge.demo.training import layerwise
from mone_edge.demo.training.distill import (
    DistillSettings,
    distill,
    divergence,
    save_checkpoint,
    schedule,
)
from mone_edge.demo.training.model import expert_mask, reorder
from tests.demo import tiny_student


def test_dense_mode_is_transformers_llama():
    shape = tiny_student.SHAPE
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        rms_norm_eps=shape.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
    )
    weights = tiny_student.dense_weights(shape)
    reference = LlamaForCausalLM(config)
    reference.load_state_dict(weights, strict=False)
    tokens = tiny_student.tokens(2, 12)
    student = tiny_student.student()
    with torch.no_grad():
        last, _ = student(tokens, dense=True)
        wanted = reference(tokens).logits
    found = F.linear(last, student.embedding).view_as(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_reorder_changes_nothing_for_the_dense_model():
    student, tokens = tiny_student.student(), tiny_student.tokens(1, 8)
    with torch.no_grad():
        before, _ = student(tokens, dense=True)
        reorder(student, 1, torch.randperm(student.shape.neurons))
        after, _ = student(tokens, dense=True)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_mask_takes_the_largest_and_tells_the_others_what_they_miss():
    logits = torch.randn(50, 24, requires_grad=True)
    mask = expert_mask(logits, 12)
    chosen = torch.zeros(50, 24).scatter_(1, logits.topk(12).indices, 1)
    torch.testing.assert_close(mask, chosen)
    mask.sum().backward()
    assert (logits.grad[chosen == 0] > 0).any()


def test_balanced_groups_are_equal_and_find_planted_ones():
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(6, 40, generator=generator), dim=1)
    planted = torch.arange(6).repeat(8)
    noise = 0.03 * torch.randn(48, 40, generator=generator)
    groups = layerwise.balanced_groups(F.normalize(centres[planted] + noise, dim=1), 6, 10)
    assert torch.bincount(groups).tolist() == [8] * 6
    assert len({(int(a), int(b)) for a, b in zip(groups, planted, strict=True)}) == 6


def test_reduced_rank_recovers_a_planted_correction():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 20, generator=generator) * torch.linspace(0.1, 3, 20)
    planted = torch.randn(7, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    up, down = layerwise.reduced_rank(x.T @ x, (x @ planted.T).T @ x, 3, 1e-9)
    torch.testing.assert_close(up @ down, planted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(down.norm(dim=1), torch.ones(3))


def test_full_rank_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    x, planted = torch.randn(99, 6, generator=generator), torch.randn(4, 6, generator=generator)
    found = layerwise.full_rank(x.T @ x, (x @ planted.T).T @ x, 1e-9)
    torch.testing.assert_close(found, planted, rtol=1e-4, atol=1e-5)
    shrunk = layerwise.full_rank(x.T @ x, (x @ planted.T).T @ x, 10.0)
    assert shrunk.norm() < 0.2 * planted.norm()


def test_router_learns_which_experts_matter():
    """Experts whose output is as large as one input coordinate says: the router must find that."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator)
    size = (2 * x[:, :8]).exp()
    grams = torch.diag_embed(size.square())
    settings = layerwise.LayerwiseSettings(router_steps=20)
    router = layerwise.fit_router(x, grams, torch.ones(4000), 4, settings, generator)
    found = (x @ router.T).topk(4).indices
    kept = size.gather(1, found).sum() / size.topk(4).values.sum()
    assert kept > 0.97


def test_divergence_and_its_gradient_are_autograds():
    generator = torch.Generator().manual_seed(0)
    teacher, embedding = (
        torch.randn(10, 8, generator=generator),
        torch.randn(30, 8, generator=generator),
    )
    student = torch.randn(10, 8, generator=generator, requires_grad=True)
    wanted = F.kl_div(
        F.linear(student, embedding).log_softmax(-1),
        F.linear(teacher, embedding).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    wanted.backward()
    value, gradient = divergence(student.detach(), teacher, embedding, 4)
    assert value == pytest.approx(wanted.item(), rel=1e-4)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-4, atol=1e-6)


def test_learning_rate_rises_then_falls():
    settings = DistillSettings(warmup_steps=4)
    assert [schedule(step, 0, settings) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert schedule(9, 0.5, settings) == pytest.approx(0.51)
    assert schedule(9, 1, settings) == pytest.approx(0.02)


def test_layerwise_then_distillation_bring_the_student_nearer(tmp_path: Path):
    torch.manual_seed(0)
    student, tokens = tiny_student.student(), tiny_student.tokens(16, 32)

    def distance() -> float:
        with torch.no_grad():
            teacher, found = student(tokens, dense=True)[0], student(tokens)[0]
        return divergence(found, teacher, student.embedding, 128)[0]

    untrained = distance()
    settings = layerwise.LayerwiseSettings(router_steps=10, router_batch_tokens=128)
    errors = layerwise.convert_layers(student, tokens, settings, 0)
    assert len(errors) == 2
    assert all(error < 1 for error in errors)
    assert distance() < untrained
    layerwise.refit_down(student, tokens, settings)
    assert student.down_codes.abs().max() == 7
    refitted = distance()
    assert refitted < untrained

    with torch.no_grad():
        student.norms *= 1.2
    disturbed = distance()
    assert disturbed > refitted
    checkpoint = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint, student, None, 0, 0.0)
    state = torch.load(checkpoint, weights_only=True)
    fast = DistillSettings(warmup_steps=1, learning_rate=1e-3, head_chunk_tokens=128)
    steps = distill(student, tokens, fast, checkpoint, 2.0, state)
    assert distance() < disturbed

    state = torch.load(checkpoint, weights_only=True)
    assert distill(student, tokens, fast, checkpoint, 2.5, state) > steps
