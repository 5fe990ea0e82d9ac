"""Depths along a ramp and by accepted loss; gates that no longer choose."""

from __future__ import annotations

import pytest

from layerroute import RouterConfig
from layerroute.training.bank import KINDS
from layerroute.training.collapse import PATIENCE, Collapse
from layerroute.training.depth import AcceptedDepth, RampedDepth, make_depth

ACCEPTED = {
    "part": 2,
    "objective.budgets": "null",
    "distillation_weight": 1,
    "accepted": "{tool_call: 0.1, direct_call: 0.1, planning: 0, answer: 0.02}",
}


@pytest.fixture
def accepting(fast_recipe, make_routed):
    recipe = fast_recipe("default", steps=100, full_depth_share=0.1, **ACCEPTED)
    return make_depth(recipe, make_routed(blocks=8, config=RouterConfig(boundaries=((5,),))))


def test_a_ramp_rises_to_the_budgets_after_the_full_depth(fast_recipe, make_routed):
    budgets = {"tool_call": 0.5, "direct_call": 0.25, "planning": 0.0, "answer": 0.1}
    recipe = fast_recipe("default", steps=100, full_depth_share=0.1, ramp_share=0.4, **budgets)
    depth = make_depth(recipe, make_routed(blocks=8, config=RouterConfig(boundaries=((5,),))))
    assert isinstance(depth, RampedDepth)
    assert set(depth.at(0).values()) == set(depth.at(10).values()) == {0}
    assert depth.at(11)["tool_call"] == 1 and depth.at(30)["tool_call"] == 2
    assert depth.at(50) == depth.at(99) == {"tool_call": 4, "direct_call": 2, "planning": 0, "answer": 1}
    depth.limit({"tool_call": 3, "direct_call": 8, "planning": 8, "answer": 8})
    assert depth.at(99)["tool_call"] == 3


def test_without_boundaries_there_is_no_direct_call(fast_recipe, make_routed):
    depth = make_depth(fast_recipe("default"), make_routed(blocks=8))
    assert depth.at(6)["direct_call"] == 0 < depth.at(6)["tool_call"]


def test_accepted_loss_finds_the_depth_that_costs_it(accepting):
    """Each block costs a call 0.03 nats and an answer 0.015: three blocks and one are what 0.1 and 0.02 allow."""
    assert isinstance(accepting, AcceptedDepth)
    course = []
    for step in range(100):
        depth = accepting.at(step)
        course.append(depth["tool_call"])
        accepting.note({kind: (0.03 * depth[kind] * 10, 10.0) for kind in ("tool_call", "direct_call")})
        accepting.note({"answer": (0.015 * depth["answer"] * 10, 10.0), "planning": (0.0, 10.0)})
    assert course[:10] == [0] * 10 and max(course) == 4
    assert depth == {"tool_call": 3, "direct_call": 3, "planning": 0, "answer": 1}


def test_a_prompt_closes_no_more_than_its_boundary(accepting):
    for step in range(100):
        depth = accepting.at(step)
        accepting.note({"tool_call": (10.0 * depth["tool_call"], 10.0), "direct_call": (0.0, 10.0)})
        assert depth["direct_call"] <= depth["tool_call"] <= 1


def test_a_kind_that_is_not_measured_goes_no_deeper(accepting):
    assert all(set(accepting.at(step).values()) == {0} for step in range(100))


def test_a_run_that_is_too_short_for_its_ramp_is_told(fast_recipe, make_routed, caplog):
    make_depth(fast_recipe("default", steps=1, tool_call=0.5), make_routed(blocks=8))
    assert any("1 updates are too few for the ramp" in text for text in caplog.messages)


def test_a_budget_below_half_a_block_is_told(fast_recipe, make_routed, caplog):
    make_depth(fast_recipe("default", tool_call=0.25, answer=0.1), make_routed(blocks=4))
    assert any("budgets.answer=0.1 is less than half of one of 4 blocks" in text for text in caplog.messages)


def test_a_depth_goes_on_from_its_state(accepting, fast_recipe, make_routed):
    for step in range(40):
        accepting.at(step)
        accepting.note(dict.fromkeys(KINDS, (0.1, 10.0)))
    recipe = fast_recipe("default", steps=100, full_depth_share=0.1, **ACCEPTED)
    other = make_depth(recipe, make_routed(blocks=8, config=RouterConfig(boundaries=((5,),))))
    other.load_state(accepting.state())
    assert [other.at(step) for step in range(40, 60)] == [accepting.at(step) for step in range(40, 60)]


@pytest.mark.parametrize(("share", "state"), [(1.0, "open"), (0.0, "closed")])
def test_gates_that_no_longer_choose_are_named_once(share, state, caplog):
    collapse = Collapse()
    for step in range(2 * PATIENCE + 10):
        collapse.note(share, step, skipping=True)
    assert [f"all gates have been {state} for every input since update 1" in text for text in caplog.messages] == [True]
    assert PATIENCE <= 100


def test_gates_that_choose_or_need_not_are_no_collapse(caplog):
    collapse = Collapse()
    for step in range(2 * PATIENCE):
        collapse.note(1.0, step, skipping=False)
        collapse.note(0.9 if step % 40 == 0 else 0.0, step, skipping=True)
    assert not caplog.messages


@pytest.mark.parametrize(("threshold", "state"), [(0.5, "open"), (0.9, "closed")])
def test_a_run_says_that_its_gates_do_not_choose(threshold, state, make_trainer, fast_recipe, caplog):
    """Under exploration noise, which opens and closes gates at random."""
    changes = {"router_loss_weight": 0, "gate_signal": "straight_through", "cost_rows": "null", "logit_noise": 0.5}
    changes |= {"router_lr": 1e-9, "min_lr": 0, "ramp_share": 0, "save_every": 100, "threshold": threshold}
    make_trainer(fast_recipe(steps=PATIENCE + 5, **changes)).train()
    assert any(f"all gates have been {state}" in text for text in caplog.messages)
