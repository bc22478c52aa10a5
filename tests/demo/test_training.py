"""The training stages on a tiny random model: each piece against what it should find."""

from dataclasses import replace
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


def test_ridge_regression_finds_a_planted_map():
    generator = torch.Generator().manual_seed(0)
    x, planted = torch.randn(99, 6, generator=generator), torch.randn(4, 6, generator=generator)
    found = layerwise.ridge_regression(x.T @ x, (x @ planted.T).T @ x, 1e-9)
    torch.testing.assert_close(found, planted, rtol=1e-4, atol=1e-5)
    shrunk = layerwise.ridge_regression(x.T @ x, (x @ planted.T).T @ x, 10.0)
    assert shrunk.norm() < 0.2 * planted.norm()


def test_the_ridge_is_the_one_that_is_best_on_text_apart():
    generator = torch.Generator().manual_seed(0)
    x, planted = torch.randn(12, 10, generator=generator), torch.randn(4, 10, generator=generator)
    noise = 2 * torch.randn(12, 4, generator=generator)
    gram, cross = x.T @ x, (x @ planted.T + noise).T @ x
    apart = torch.randn(400, 10, generator=generator)
    ridges = (1e-6, 0.3, 1e6)

    def left(ridge: float) -> float:
        change = layerwise.ridge_regression(gram, cross, ridge)
        return float((apart @ (planted - change).T).square().sum())

    ridge, change = layerwise.best_ridge(gram, cross, ridges, [(apart, apart @ planted.T)])
    assert ridge == min(ridges, key=left) == 0.3
    torch.testing.assert_close(change, layerwise.ridge_regression(gram, cross, ridge))


def test_output_lengths_are_those_of_the_experts_outputs():
    generator = torch.Generator().manual_seed(0)
    hidden, down = torch.randn(5, 12, generator=generator), torch.randn(7, 12, generator=generator)
    outputs = [hidden[:, e : e + 4] @ down[:, e : e + 4].T for e in (0, 4, 8)]
    wanted = torch.stack([output.norm(dim=1) for output in outputs], dim=1)
    torch.testing.assert_close(layerwise.output_lengths(hidden, down, 3), wanted)


def test_router_learns_which_experts_matter():
    """Experts whose output is as long as one input coordinate says: the router must find that."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2000, 16, generator=generator) for _ in range(2)]
    lengths = [(2 * x[:, :8]).exp() for x in inputs]
    settings = layerwise.LayerwiseSettings(logit_deviation=0.05)
    router = layerwise.fit_router(inputs, lengths, settings)
    logits = inputs[0] @ router.T
    kept = lengths[0].gather(1, logits.topk(4).indices).sum() / lengths[0].topk(4).values.sum()
    assert kept > 0.97
    assert logits.std() == pytest.approx(0.05, rel=1e-3)


def test_neurons_are_grouped_by_what_the_input_foretells():
    """Half of a neuron's use follows one of three inputs, half is chance: groups follow inputs."""
    generator = torch.Generator().manual_seed(0)
    shape = replace(tiny_student.SHAPE, neurons=48, experts=3, expert_width=12)
    assert shape.shared == 12
    inputs = torch.randn(4000, 8, generator=generator)
    follows = torch.arange(36) % 3
    use = (inputs[:, follows] + torch.randn(4000, 36, generator=generator)).exp()
    hidden = torch.cat([use, torch.full((4000, 12), 1e3)], dim=1)
    settings = layerwise.LayerwiseSettings()
    order = layerwise.choose_order([inputs], [hidden], torch.ones(4, 48), shape, settings)
    assert set(order[:12].tolist()) == set(range(36, 48))
    groups = follows[order[12:]].view(3, 12)
    assert groups.eq(groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == 3


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
    settings = layerwise.LayerwiseSettings(chunk=4)
    errors = layerwise.convert_layers(student, tokens, 4, settings)
    assert len(errors) == 2
    assert all(error < 1 for error in errors)
    converted = distance()
    assert converted < untrained

    with torch.no_grad():
        student.norms *= 1.2
    disturbed = distance()
    assert disturbed > converted
    checkpoint = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint, student, None, 0, 0.0)
    state = torch.load(checkpoint, weights_only=True)
    fast = DistillSettings(warmup_steps=1, norm_learning_rate=1e-3, head_chunk_tokens=128)
    steps = distill(student, tokens, tokens, fast, checkpoint, 2.0, state)
    assert distance() < disturbed

    state = torch.load(checkpoint, weights_only=True)
    assert distill(student, tokens, tokens, fast, checkpoint, 2.5, state) > steps
