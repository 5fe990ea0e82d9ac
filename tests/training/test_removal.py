"""Measured removal costs against plain transformers with the block deleted."""

import pytest
import torch
from torch.nn import functional

from layerroute.data.collate import StepCollator
from layerroute.data.steps import STEP_TYPES
from layerroute.training import objective
from layerroute.training.removal import choose_rows, removal_costs


def test_costs_are_those_of_the_deleted_block(family, make_routed, delete_blocks, toy_data):
    model = make_routed(family, blocks=5).train()
    rows = choose_rows(toy_data(30).samples, 3, seed=0)
    collator = StepCollator(pad_token_id=0)
    costs = removal_costs(model, rows, collator)
    assert model.training and costs.shape == (3, 5)
    assert costs[:, [0, 4]].eq(0).all()  # the protected blocks

    def loss(route, batch):
        logits = delete_blocks(model, route)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    batch = collator(rows["planning"])
    whole = torch.ones(5, dtype=torch.bool)
    without = torch.tensor([True, True, False, True, True])
    with torch.no_grad():
        expected = (loss(without, batch) - loss(whole, batch)).clamp(min=0)
    torch.testing.assert_close(costs[STEP_TYPES.index("planning"), 2], expected, rtol=1e-4, atol=1e-4)


def test_rows_are_chosen_by_type_and_seed(toy_data):
    samples = toy_data(60).samples
    chosen = choose_rows(samples, 4, seed=1)
    assert {name: len(of_type) for name, of_type in chosen.items()} == dict.fromkeys(STEP_TYPES, 4)
    assert all(sample.step_type == name for name, of_type in chosen.items() for sample in of_type)
    assert chosen == choose_rows(samples, 4, seed=1) != choose_rows(samples, 4, seed=2)


def test_gate_cost_is_the_mean_sum_over_closed_gates():
    gates = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], requires_grad=True)
    costs = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]])
    cost = objective.gate_cost(gates, costs, torch.tensor([0, 1]))
    assert cost.item() == pytest.approx((0.2 + 0.3 + 0.5) / 2)
    cost.backward()
    torch.testing.assert_close(gates.grad, -costs / 2)


def test_without_gate_gradient_the_loss_trains_lora_alone(make_routed, tokens):
    model = make_routed().train()
    ids = tokens(3, 9)
    out = model(ids, labels=torch.where(torch.arange(9) < 4, -100, ids), gate_gradient=False)
    out.loss.backward()
    assert not out.routes.all()
    assert all(parameter.grad is None for parameter in model.router_parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.lora_parameters())
