"""The objective against closed forms, numeric gradients, and an optimisation that must reach its budgets."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from layerroute.config import RouterConfig
from layerroute.model.router import Routers
from layerroute.training import objective


def test_soft_mean():
    probs = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.25, 0.25]], requires_grad=True)
    loss = objective.soft_mean_penalty(probs)
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    assert torch.equal(probs.grad, torch.full((2, 3), 1 / 6))


def test_skip_sums():
    gates = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    sums, counts = objective.skip_sums(gates, torch.tensor([0, 1, 0]), 3)
    assert sums.tolist() == [0.75, 0.0, 0.0]
    assert counts.tolist() == [2.0, 1.0, 0.0]


def test_running_rates():
    nan = float("nan")
    running = torch.tensor([nan, 0.5, nan])
    mixed = objective.running_rates(running, torch.tensor([0.2, 0.1, 0.9]), torch.tensor([2.0, 1.0, 0.0]), 0.75)
    assert mixed[:2].tolist() == pytest.approx([0.2, 0.75 * 0.5 + 0.25 * 0.1])
    assert mixed[2].isnan()


def test_budget_penalty_value_and_gradient():
    rates = torch.tensor([0.5, 0.0, 0.3], requires_grad=True)
    statistic, budgets = torch.tensor([0.2, 0.1, 0.9]), torch.tensor([0.25, 0.0, 0.1])
    loss = objective.budget_penalty(rates, statistic, budgets, torch.tensor([2.0, 1.0, 0.0]))
    assert loss.item() == pytest.approx(0.05**2 + 0.1**2)
    loss.backward()
    assert rates.grad.tolist() == pytest.approx([2 * (0.2 - 0.25), 2 * 0.1, 0.0])


def test_budget_penalty_of_types_never_seen():
    rates = torch.zeros(3, requires_grad=True)
    never = torch.full((3,), float("nan"))
    loss = objective.budget_penalty(rates, never, torch.ones(3), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(rates.grad, torch.zeros(3))


def test_gradient_through_the_hard_gate_is_the_soft_gates():
    """dL/dlogit = dL/dgate * sigmoid'(logit), the second factor from a numeric derivative of the soft gate."""
    routers = Routers(RouterConfig(protect_first=0, protect_last=0), hidden_size=3, blocks=4).double()
    vector = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    gates = routers.gates(vector, 0, 4)
    sums, counts = objective.skip_sums(gates.hard, torch.tensor([0, 0]), 1)
    rates = sums / counts
    objective.budget_penalty(rates, rates.detach(), torch.tensor([0.25]), counts).backward()
    step = 1e-4
    logit = 1.0  # the initial bias, at every gate
    slope = (1 / (1 + math.exp(-logit - step)) - 1 / (1 + math.exp(-logit + step))) / (2 * step)
    per_gate = 2 * (0.0 - 0.25) * (-1 / 4) / 2 * slope  # skip rate 0, four blocks, two rows
    assert routers.bias.grad.tolist() == pytest.approx([2 * per_gate] * 4, rel=1e-5)


def test_budgets_are_reached_from_router_inputs_alone():
    """Two types told apart by a small part of the vector; a cost on closing; the penalty decides how much closes."""
    generator = torch.Generator().manual_seed(0)
    types = torch.arange(64) % 2
    vectors = torch.randn(64, 16, generator=generator) * 0.3 + 1
    vectors[:, 0] += types * 4 - 2
    cost = torch.linspace(0.05, 0.5, 10)
    routers = Routers(RouterConfig(protect_first=0, protect_last=0), hidden_size=16, blocks=10)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=0.005, weight_decay=0)
    budgets, running = torch.tensor([0.3, 0.0]), torch.full((2,), float("nan"))
    torch.manual_seed(0)
    for step in range(300):
        rows = torch.randint(64, (8,), generator=generator)
        gates = routers.gates(vectors[rows], 0, 10, objective.noise_at(step, 0.5, 200)).hard
        sums, counts = objective.skip_sums(gates, types[rows], 2)
        rates = sums / counts.clamp(min=1)
        running = objective.running_rates(running, rates.detach(), counts, 0.9)
        goal = torch.tensor([objective.budget_at(step, budget, 100) for budget in budgets.tolist()])
        loss = ((1 - gates) * cost).sum(1).mean() + 100 * objective.budget_penalty(rates, running, goal, counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    skipped = 1 - routers.gates(vectors, 0, 10).hard.detach()
    assert skipped[types == 0].mean().item() == pytest.approx(0.3, abs=0.06)
    assert skipped[types == 1].mean().item() <= 0.02
    # and the blocks that cost least are those that close
    assert (skipped[types == 0].mean(0) * cost).sum() < 0.3 * cost.sum()


def test_schedules():
    assert [objective.budget_at(s, 0.4, 4) for s in (0, 1, 4, 9)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert objective.budget_at(0, 0.4, 0) == 0.4
    assert [objective.noise_at(s, 2.0, 4) for s in (0, 1, 4, 9)] == pytest.approx([2, 1.5, 0, 0])
    assert objective.noise_at(0, 2.0, 0) == 0


def test_learning_rate_equals_torchs_cosine():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=750, eta_min=1e-6)
    for step in range(20):
        ours = objective.learning_rate_at(step, 2e-4, 1e-6, 0, 750)
        assert ours == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()
    assert objective.learning_rate_at(750, 2e-4, 1e-6, 0, 750) == pytest.approx(1e-6)


def test_learning_rate_warms_up_and_may_stay():
    rates = [objective.learning_rate_at(step, 1.0, None, 3, 10) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_loss_tokens_and_cross_entropy_equal_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 11, generator=generator)
    labels = torch.full((2, 7), -100)
    labels[0, 3:6], labels[1, 5:] = torch.tensor([1, 2, 3]), torch.tensor([4, 5])
    positions, targets = objective.loss_tokens(labels)
    assert positions.tolist() == [2, 3, 4, 5]
    kept = logits[:, positions]
    ours = objective.cross_entropy_sum(kept.flatten(0, 1), targets.flatten())
    reference = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)


def test_distillation_is_the_divergence_and_stops_at_the_teacher():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    loss = objective.distillation_loss(student, teacher, labels)
    p, q = (torch.distributions.Categorical(logits=x[labels != -100]) for x in (teacher, student))
    assert loss.item() == pytest.approx(torch.distributions.kl_divergence(p, q).sum().item(), rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert torch.equal(student.grad[labels == -100], torch.zeros(3, 5))
    same = objective.distillation_loss(teacher, teacher, labels)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_gate_movement():
    probs = torch.sigmoid(torch.tensor([[9.0, 1.0, -1.0, 9.0], [9.0, 1.0, -1.0, 9.0]]))
    initial = torch.tensor([1.0, -1.0])
    assert objective.gate_movement(probs, initial, [1, 2]).item() == 0
    assert objective.gate_movement(probs, -initial, [1, 2]).item() == pytest.approx(math.tanh(0.5))
