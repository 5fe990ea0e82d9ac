"""Search, heal, route on a tiny model: the bank, its search against plain transformers, told routes, fitted routers."""

from __future__ import annotations

import itertools
import random
from array import array
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from layerroute import RouterConfig, get_routed_model
from layerroute.data.collate import StepCollator, StepDataset
from layerroute.data.render import Sample
from layerroute.data.steps import STEP_TYPES
from layerroute.model.calibration import calibrate
from layerroute.training.bank import DIRECT, KINDS, Bank, decision_kinds, depths
from layerroute.training.fit import fit_routers, read_decisions
from layerroute.training.removal import losses_without
from layerroute.training.search import _as_served, extend_bank, kinds_of, rows_of_kind
from layerroute.training.settings import Budgets

MARKER = 9
"""The token that opens a call, here."""


def turn(index: int, rng: random.Random) -> Sample:
    """A call after a thought, a direct call, a plan or an answer; the prompt's last tokens tell which."""
    kind = ("tool_call", "tool_call", "planning", "answer")[index % 4]
    direct = index % 4 == 1
    prompt = [rng.randrange(20, 22) for _ in range(rng.randrange(4, 6))] + [10 + (2 if direct else index % 4) % 4] * 3
    if direct:
        prompt[-3:] = [14] * 3
    thought = [rng.randrange(20, 22) for _ in range(3)] if index % 4 == 0 else []
    start = len(prompt) + len(thought)
    call = [MARKER, 15, 15, 2]
    target = call if kind == "tool_call" else [16 + index % 2, 17, 2]
    return Sample(
        array("i", prompt + thought + target),
        start,
        kind,
        f"source-{index % 2}",
        str(index // 4),
        str(index),
        False,
        thought_length=len(thought),
        segment_starts=(start,) if kind == "tool_call" else (),
    )


@pytest.fixture
def kinds_data():
    def make(rows: int = 80, seed: int = 0) -> StepDataset:
        rng = random.Random(seed)
        return StepDataset([turn(i, rng) for i in range(rows)])

    return make


def test_decisions_have_kinds():
    tool, planning, answer = (STEP_TYPES.index(name) for name in ("tool_call", "planning", "answer"))
    types = torch.tensor([[planning, tool, -1], [tool, tool, -1], [tool, tool, tool], [answer, -1, -1], [tool, -1, -1]])
    expected = [[planning, tool, -1], [DIRECT, tool, -1], [DIRECT, tool, tool], [answer, -1, -1], [tool, -1, -1]]
    assert decision_kinds(types).tolist() == expected


def test_depths_are_budgets_of_all_blocks():
    budgets = Budgets(tool_call=0.4, direct_call=None, planning=0.0, answer=0.1)
    assert depths(budgets, 30) == {"tool_call": 12, "planning": 0, "answer": 3, "direct_call": 12}


def test_turn_routes_only_close_and_repeat_the_last():
    bank = Bank(5, {"tool_call": [1, 3], "direct_call": [3], "answer": [1]})
    kinds = torch.tensor([[DIRECT, 0, -1], [2, 0, -1], [1, -1, -1]])
    routes = bank.turn_routes(kinds)
    closed = [[[b for b in range(5) if not route[b]] for route in row] for row in routes]
    assert closed == [[[3], [1, 3], [1, 3]], [[1], [1, 3], [1, 3]], [[], [], []]]
    shallow = bank.turn_routes(kinds, {"tool_call": 1, "planning": 0, "answer": 0, "direct_call": 0})
    assert (~shallow).sum().item() == 4


def test_search_takes_the_cheapest_pair_as_served(make_routed, kinds_data, delete_blocks):
    """Each step against plain models with blocks deleted; a kind that is decided at the prompt skips throughout."""
    config = RouterConfig(protect_first=1, protect_last=1, window=1)
    model = make_routed(blocks=6, config=config).train()
    samples = kinds_data(24).samples
    bank = Bank(6)
    extend_bank(
        model,
        bank,
        {"tool_call": 0, "planning": 0, "answer": 2, "direct_call": 0},
        samples,
        StepCollator(0),
        rows=3,
        seed=0,
    )
    assert model.training and bank.orders["tool_call"] == []
    rows = rows_of_kind(samples, "answer", 3, 0)

    def loss(removed):
        route = torch.ones(6, dtype=torch.bool)
        route[list(removed)] = False
        plain, total, tokens = delete_blocks(model, route), 0.0, 0
        for sample in rows:
            ids = torch.tensor([list(sample.input_ids)])
            logits = plain(ids).logits[0, sample.prompt_length - 1 : -1]
            total += functional.cross_entropy(logits, ids[0, sample.prompt_length :], reduction="sum").item()
            tokens += len(sample.input_ids) - sample.prompt_length
        return total / tokens

    with torch.no_grad():
        first = min(range(1, 5), key=lambda block: loss([block]))
        second = min((b for b in range(1, 5) if b != first), key=lambda block: loss([first, block]))
    assert bank.orders["answer"] == [first, second]


def test_a_call_is_measured_behind_its_boundary(family, make_routed, kinds_data):
    """Against whole passes under forced routes: the tokens up to the boundary run every block, the others do not."""
    model = make_routed(family, blocks=6, config=RouterConfig(protect_first=1, protect_last=1, window=1)).eval()
    samples = [sample for sample in kinds_data(24).samples if sample.segment_starts]
    part = list(_as_served(model, samples, StepCollator(0), "tool_call", ["tool_call"]))
    losses = losses_without(model, part, [2], [1, 4])
    for loss, block in zip(losses.tolist(), (1, 4), strict=True):
        total, tokens = 0.0, 0
        for sample in samples:
            batch = StepCollator(0)([sample])
            routes = torch.ones(1, 2, 6, dtype=torch.bool)
            routes[0, 1, [2, block]] = False
            with torch.no_grad():
                logits = model(batch["input_ids"], segment_ids=batch["segment_ids"], routes=routes).logits[0]
            start = sample.segment_starts[0]
            total += functional.cross_entropy(
                logits[start:-1], batch["input_ids"][0, start + 1 :], reduction="sum"
            ).item()
            tokens += len(sample.input_ids) - start - 1
        assert loss == pytest.approx(total / tokens, rel=1e-4)


def test_other_kinds_choose_within_the_deepest(make_routed, kinds_data):
    model = make_routed(blocks=8, config=RouterConfig(protect_first=1, protect_last=1, window=1))
    bank = Bank(8)
    depth = {"tool_call": 3, "planning": 0, "answer": 2, "direct_call": 2}
    extend_bank(model, bank, depth, kinds_data(24).samples, StepCollator(0), rows=3, seed=0)
    assert {kind: len(order) for kind, order in bank.orders.items()} == depth
    assert set(bank.orders["answer"]) | set(bank.orders["direct_call"]) <= set(bank.orders["tool_call"])
    reachable = {
        tuple(bank.turn_routes(torch.tensor([[a, b]]))[0, -1].tolist())
        for a, b in itertools.product(range(4), repeat=2)
    }
    assert len(reachable) <= len(KINDS)


@pytest.mark.parametrize("seed", range(3))
def test_sets_stay_within_the_deepest_when_searched_in_parts(seed, make_routed, kinds_data):
    model = make_routed(blocks=10, config=RouterConfig(protect_first=1, protect_last=1, window=1))
    bank = Bank(10)
    for calls, answers in ((2, 2), (4, 4), (6, 4)):
        depth = {"tool_call": calls, "planning": 0, "answer": answers, "direct_call": 2}
        extend_bank(model, bank, depth, kinds_data(24, seed).samples, StepCollator(0), rows=2, seed=seed)
    assert [len(bank.orders[kind]) for kind in KINDS] == [6, 0, 4, 2]
    assert set(bank.orders["answer"]) | set(bank.orders["direct_call"]) <= set(bank.orders["tool_call"])


def test_kinds_of_one_depth_share_a_route(make_routed, kinds_data):
    model = make_routed(blocks=6, config=RouterConfig(protect_first=1, protect_last=1, window=1))
    bank = Bank(6)
    extend_bank(model, bank, dict.fromkeys(KINDS, 2), kinds_data(24).samples, StepCollator(0), rows=3, seed=0)
    assert len({tuple(order) for order in bank.orders.values()}) == 1
    assert len(bank.orders["planning"]) == 2


def test_a_kind_that_the_data_lacks_is_named(make_routed, kinds_data, caplog):
    model = make_routed(blocks=6, config=RouterConfig(protect_first=1, protect_last=1, window=1))
    samples = [sample for sample in kinds_data(24).samples if sample.step_type != "answer"]
    bank = Bank(6)
    depth = {"tool_call": 1, "planning": 0, "answer": 2, "direct_call": 1}
    extend_bank(model, bank, depth, samples, StepCollator(0), rows=3, seed=0)
    assert bank.orders["answer"] == [] and len(bank.orders["tool_call"]) == 1
    assert any("the data holds no answer" in text for text in caplog.messages)


def test_rows_of_a_kind_take_sources_in_turn(kinds_data):
    samples = kinds_data(40).samples
    chosen = rows_of_kind(samples, "tool_call", 6, 0)
    assert [sample.source for sample in chosen].count("source-0") == 3
    assert all("direct_call" in kinds_of(sample) for sample in rows_of_kind(samples, "direct_call", 6, 0))
    assert rows_of_kind(samples, "tool_call", 6, 0) != rows_of_kind(samples, "tool_call", 6, 1)


def test_decisions_hold_seldom_sources_and_kinds(make_routed, kinds_data):
    """One row in twenty is of another source: the fit reads all of them, and each source counts alike in its kind."""
    common = kinds_data(160).samples
    seldom = [replace(sample, source="seldom") for sample in kinds_data(8, seed=1).samples]
    model = make_routed(blocks=6, config=RouterConfig(protect_first=1, protect_last=1, window=1))
    decisions = read_decisions(model, [*common, *seldom], StepCollator(0), rows=12, seed=0)
    calls = decisions.kinds == KINDS.index("tool_call")
    direct = decisions.kinds == DIRECT
    assert direct.sum() >= 12 and calls.sum() >= direct.sum()  # a direct call holds a decision of each kind
    weights = decisions.weights[decisions.kinds == KINDS.index("planning")]
    seldom_ones = weights[weights == weights.max()]
    assert len(seldom_ones) < len(weights) / 2
    assert seldom_ones.sum() == pytest.approx(1 / (len(KINDS) * 2))  # one of two sources of plans here


def test_routers_learn_the_bank_and_give_no_other_route(make_routed, kinds_data):
    model = make_routed(blocks=6, config=RouterConfig(protect_first=1, protect_last=1, window=1))
    bank = Bank(6, {"tool_call": [4, 2, 3], "direct_call": [4], "answer": [4, 2]})
    train, held = kinds_data(160), kinds_data(40, seed=1)
    collator = StepCollator(0)
    decisions = read_decisions(model, train.samples, collator, rows=160, seed=0)
    assert decisions.weights.sum().item() == pytest.approx(1)
    fit_routers(model, decisions, bank, decay=0.01, open_weight=1.0)
    model.eval()
    batch = collator(held.samples)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "context_mask", "segment_ids")}
    routes = model(**inputs).routes
    told = bank.turn_routes(decision_kinds(batch["segment_types"]))
    assert (routes == told).all(-1).float().mean() > 0.9
    assert len(routes.flatten(0, 1).unique(dim=0)) <= len(KINDS)


@pytest.mark.parametrize("threshold", [0.1, 0.9])
def test_any_threshold_gives_the_same_routes(threshold, make_backbone, kinds_data):
    data, collator, routes = kinds_data(40), StepCollator(0), []
    for value in (0.5, threshold):
        config = RouterConfig(protect_first=1, protect_last=1, window=1, threshold=value)
        model = get_routed_model(make_backbone(blocks=6), config).eval()
        decisions = read_decisions(model, data.samples, collator, rows=40, seed=0)
        fit_routers(model, decisions, Bank(6, {"tool_call": [2, 3], "answer": [3]}), decay=0.01, open_weight=2.0)
        batch = collator(data.samples)
        routes.append(model(batch["input_ids"], attention_mask=batch["attention_mask"]).routes)
    assert torch.equal(*routes) and not routes[0].all()


@pytest.mark.parametrize(
    ("open_weight", "message"), [(100.0, "lower search.open_weight"), (0.01, "higher search.open_w")]
)
def test_a_kind_that_routers_do_not_recognise_is_named(open_weight, message, make_routed, kinds_data, caplog):
    model = make_routed(blocks=6, config=RouterConfig(protect_first=1, protect_last=1, window=1)).eval()
    decisions = read_decisions(model, kinds_data(40).samples, StepCollator(0), rows=40, seed=0)
    alike = replace(decisions, vectors=torch.ones_like(decisions.vectors))
    fit_routers(model, alike, Bank(6, {"tool_call": [2, 3]}), decay=0.01, open_weight=open_weight)
    assert any(message in text for text in caplog.messages)


def test_no_calibrated_budget_closes_what_training_never_left_out(make_routed, kinds_data):
    model = make_routed(blocks=6, config=RouterConfig(protect_first=1, protect_last=1, window=1)).eval()
    data, collator = kinds_data(40), StepCollator(0)
    decisions = read_decisions(model, data.samples, collator, rows=40, seed=0)
    fit_routers(model, decisions, Bank(6, {"tool_call": [2, 3], "answer": [3]}), decay=0.01, open_weight=2.0)
    batch = collator(data.samples)
    probs = model.gate_probs(batch["input_ids"], batch["attention_mask"])[:, model.routable]
    table = calibrate(probs, [sample.step_type for sample in data.samples], 6, routers="", data={})
    assert table.budgets[-1] == pytest.approx(2 / 6)
    closed = probs <= table.threshold(table.budgets[-1])
    assert closed[:, [1, 2]].all() and not closed[:, [0, 3]].any()


def test_what_all_kinds_leave_out_is_closed_for_all(make_routed, kinds_data):
    model = make_routed(blocks=6, config=RouterConfig(protect_first=1, protect_last=1, window=1)).eval()
    data = kinds_data(40)
    decisions = read_decisions(model, data.samples, StepCollator(0), rows=10, seed=0)
    fit_routers(model, decisions, Bank(6, {kind: [2, 4] for kind in KINDS}), decay=0.1, open_weight=4.0)
    batch = StepCollator(0)(data.samples)
    routes = model(batch["input_ids"], attention_mask=batch["attention_mask"]).routes
    assert routes.tolist() == [[True, True, False, True, False, True]] * 40


def test_direct_calls_alone_hold_calls_to_what_is_accepted(make_trainer, fast_recipe, kinds_data):
    """Their divergence is that of both their decisions: neither may go on where it costs more than is accepted."""
    losses = "{tool_call: 1e-6, direct_call: 1e-6, planning: 0, answer: 0}"
    changes = {"objective.budgets": "null", "accepted": losses, "distillation_weight": 1, "window": 1, "part": 2}
    recipe = fast_recipe("default", steps=30, boundaries="[[9]]", fit_rows=40, batch_size=2, save_every=50, **changes)

    def direct(rows: int = 40, seed: int = 0) -> StepDataset:
        return StepDataset([sample for sample in kinds_data(rows, seed).samples if len(kinds_of(sample)) == 2])

    trainer = make_trainer(recipe, rows=direct)
    trainer.train()
    asked = [line["budget_tool_call"] for line in trainer.state.log_history if "budget_tool_call" in line]
    assert 0 < max(asked) <= 0.25  # one block of four is tried, and given back
    assert trainer.left_out["tool_call"] == trainer.left_out["direct_call"] == []


def test_training_ends_in_routers_that_keep_the_budgets(make_trainer, fast_recipe, kinds_data):
    recipe = fast_recipe(
        "default",
        steps=12,
        window=1,
        boundaries="[[9]]",
        tool_call=0.5,
        direct_call=0.25,
        answer=0.25,
        fit_rows=80,
        batch_size=4,
        gradient_accumulation=2,
    )
    trainer = make_trainer(recipe, evaluate=True, rows=kinds_data)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[0]["skip_rate_tool_call"] == 0  # the warm-up
    assert lines[-1]["skip_rate_tool_call"] == 0.5 and lines[-1]["budget_direct_call"] == 0.25
    final = (
        trainer.state.log_history[-1] if "eval_loss" in trainer.state.log_history[-1] else trainer.state.log_history[-2]
    )
    assert final["eval_skip_rate_tool_call"] == pytest.approx(0.5, abs=0.1)
    assert final["eval_skip_rate_planning"] <= 0.05
    assert not any(parameter.grad is not None for parameter in trainer.model.router_parameters())
    assert {kind: len(blocks) for kind, blocks in trainer.left_out.items()} == {
        "tool_call": 2,
        "planning": 0,
        "answer": 1,
        "direct_call": 1,
    }


def test_accepted_loss_ends_in_routers_of_the_last_depth(make_trainer, fast_recipe, kinds_data):
    """The search has gone further than the last update did: the routers follow the update."""
    losses = "{tool_call: 1e-9, direct_call: 0, planning: 0, answer: 0}"
    changes = {"objective.budgets": "null", "accepted": losses, "distillation_weight": 1, "window": 1}
    recipe = fast_recipe("default", steps=20, boundaries="[[9]]", fit_rows=80, part=2, batch_size=4, **changes)
    trainer = make_trainer(recipe, rows=kinds_data)
    trainer.train()
    assert len(trainer.routed_loss.bank.orders["tool_call"]) == 2
    assert trainer.left_out == {"tool_call": [], "planning": [], "answer": [], "direct_call": []}
    batch = StepCollator(0)(kinds_data(20).samples)
    assert trainer.model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).routes.all()


def test_what_a_prompt_is_told_does_not_give_away_what_comes_next(make_trainer, fast_recipe, kinds_data):
    """A call, an answer and a plan after one prompt are told one route, a different one from update to update."""
    recipe = fast_recipe("default", steps=8, boundaries="[[9]]", tool_call=0.5, direct_call=0.25, answer=0.25)
    trainer = make_trainer(recipe, rows=kinds_data)
    loss, model = trainer.routed_loss, trainer.model
    loss.bank = Bank(4, {"tool_call": [1, 2], "direct_call": [2], "answer": [1]})
    prompt = [20, 21, 20, 14]
    targets = {"tool_call": [MARKER, 15, 15, 2], "answer": [16, 17, 2], "planning": [17, 17, 2]}
    rows = [
        Sample(array("i", prompt + target), 4, kind, "toy", kind, kind, False, 0, (4,) if kind == "tool_call" else ())
        for kind, target in targets.items()
    ]
    firsts = set()
    for step in range(4, 8):
        for longest in (0, 3):  # padding does not matter
            padding = [replace(rows[1], input_ids=array("i", prompt + [16] * 8))] if longest else []
            batch = StepCollator(0)([*rows, *padding])
            routes = loss(model, model, batch, step, None, 1)[1].routes[: len(rows)]
            assert len(routes[:, 0].unique(dim=0)) == 1
            assert routes[0, -1].tolist() == [True, False, False, True]
            firsts.add(tuple(routes[0, 0].tolist()))
    assert firsts == {(True, True, False, True), (True, False, True, True), (True, True, True, True)}
