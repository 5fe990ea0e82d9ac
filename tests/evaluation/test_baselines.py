"""Routes chosen otherwise than by routers: each choice and each figure against plain transformers or brute force."""

import json
import random
from array import array

import numpy as np
import pytest
import torch
from torch.nn import functional

from layerroute import RouterConfig
from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.data.steps import STEP_TYPES
from layerroute.errors import DataError
from layerroute.evaluation.baselines import ARMS, Baselines, choose, measure_baselines, reached_rates
from layerroute.evaluation.influence import block_influence
from layerroute.evaluation.measure import bits
from layerroute.model.deciding import router_vectors
from layerroute.runtime.cost import executed_flops
from layerroute.training.removal import greedy_order, losses_without

BLOCKS = 6
COLLATOR = StepCollator(pad_token_id=0)
RATES = {"all": 0.3, "tool_call": 0.55, "planning": 0.1, "answer": 0.25, "rest": 0.175}


def drawn_samples(count: int, seed: int = 0) -> list[Sample]:
    """Prompts of random tokens that end in a marker of their type; those of tool calls are the longer ones."""
    rng = random.Random(seed)
    samples = []
    for i in range(count):
        kind = STEP_TYPES[i % 3]
        length = rng.randrange(9, 15) if kind == "tool_call" else rng.randrange(4, 9)
        prompt = [rng.randrange(20, 97) for _ in range(length)] + [5 + i % 3] * 3
        target = [rng.randrange(20, 97) for _ in range(2 + i % 4)]
        samples.append(Sample(array("i", prompt + target), len(prompt), kind, "toy", str(i // 3), str(i), False))
    return samples


@pytest.fixture
def model(make_routed):
    return make_routed(blocks=BLOCKS)


@pytest.fixture
def reference(model, delete_blocks):
    """Summed loss of one sample's target and its argmax accuracy, by plain transformers without the closed blocks."""

    @torch.no_grad()
    def measure(sample, route):
        ids = torch.tensor([sample.input_ids.tolist()])
        logits = delete_blocks(model, torch.tensor([bit == "1" for bit in route]))(ids).logits[0]
        new = logits[sample.prompt_length - 1 : -1], ids[0, sample.prompt_length :]
        return float(functional.cross_entropy(*new, reduction="sum")), float(
            (new[0].argmax(1) == new[1]).float().mean()
        )

    return measure


def without(*removed: int) -> str:
    return "".join("0" if block in removed else "1" for block in range(BLOCKS))


@pytest.fixture
def mean_loss(reference):
    def measure(samples, *removed):
        tokens = sum(len(sample.input_ids) - sample.prompt_length for sample in samples)
        return sum(reference(sample, without(*removed))[0] for sample in samples) / tokens

    return measure


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
@torch.no_grad()
def test_block_influence_is_shortgpts(family, make_routed, delete_blocks):
    """Hooks on plain transformers, LoRA merged, row by row without padding."""
    model = make_routed(family, blocks=BLOCKS)
    plain = delete_blocks(model, torch.ones(BLOCKS, dtype=torch.bool))
    samples = drawn_samples(7)
    cosines = [[] for _ in range(BLOCKS)]
    for into, block in zip(cosines, plain.get_decoder().layers, strict=True):
        block.register_forward_hook(
            lambda _, args, out, into=into: into.append(
                (args[0] * out).sum(-1) / (args[0].norm(dim=-1) * out.norm(dim=-1))
            )
        )
    for sample in samples:
        plain(torch.tensor([sample.input_ids.tolist()]))
    expected = torch.stack([1 - torch.cat(of_block, 1).mean() for of_block in cosines])
    torch.testing.assert_close(block_influence(model, samples, COLLATOR).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("removed", [(), (2,), (1, 4)])
def test_losses_are_those_of_the_deleted_blocks(removed, model, mean_loss):
    samples = drawn_samples(4)
    candidates = [block for block in model.routable if block not in removed]
    losses = losses_without(model, [COLLATOR(samples[:3]), COLLATOR(samples[3:])], removed, candidates)
    expected = [mean_loss(samples, *removed, block) for block in candidates]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-4)


def test_every_greedy_step_is_the_best_of_all(model, mean_loss):
    """With no more candidates than are tried, each step must agree with an exhaustive one."""
    samples = drawn_samples(6)
    parts = [samples[:2], samples[2:]]
    mean = torch.stack([losses_without(model, [COLLATOR(part)], (), model.routable) for part in parts]).mean(0)
    alone = dict(zip(model.routable, mean.tolist(), strict=True))
    order = greedy_order(model, [[COLLATOR(part)] for part in parts], alone, depth=3)
    for step, block in enumerate(order):
        costs = {
            other: np.mean([mean_loss(part, *order[:step], other) for part in parts])
            for other in model.routable
            if other not in order[:step]
        }
        assert block == min(costs, key=costs.get)
    everything = greedy_order(model, [[COLLATOR(part)] for part in parts], alone, len(model.routable))
    assert everything[:3] == order and sorted(everything) == model.routable
    assert greedy_order(model, [[COLLATOR(parts[0])]], alone, depth=0) == []


def test_only_the_eight_cheapest_alone_are_tried(make_routed):
    """Whatever their losses are together, the second block to go is one of the nine that rank first."""
    model = make_routed(blocks=14)
    part = [COLLATOR(drawn_samples(2))]
    ranked = list(reversed(model.routable))
    alone = {block: float(ranked.index(block)) for block in model.routable}
    order = greedy_order(model, [part], alone, depth=2)
    losses = losses_without(model, part, order[:1], ranked[1:9])
    assert order == [ranked[0], ranked[1:9][int(losses.argmin())]]


def test_losses_that_are_no_number_are_taken_last(model):
    alone = dict(zip(model.routable, [float("nan"), 3.0, 2.0, float("nan")], strict=True))
    assert greedy_order(model, [[COLLATOR(drawn_samples(1))]], alone, depth=1) == [3]


@pytest.fixture
def chosen(model):
    return choose(model, drawn_samples(24, seed=1), COLLATOR, RATES, seed=3, rows=2)


def test_rates_are_met_in_expectation_by_whole_blocks(chosen):
    kinds = {"oracle": "tool_call", "labels": "rest", "length": "rest"}
    for arm in ARMS:
        rate = RATES[kinds.get(arm, "all")]
        routes = torch.stack([chosen.route(arm, f"row {i}", kinds.get(arm, "all")) for i in range(4000)])
        assert routes[:, [0, -1]].all()  # protected
        skipped = (~routes).sum(1)
        assert set(skipped.tolist()) == {int(rate * BLOCKS), int(rate * BLOCKS) + 1}
        assert float(skipped.float().mean()) == pytest.approx(rate * BLOCKS, abs=0.03)
        again = torch.stack([chosen.route(arm, f"row {i}", kinds.get(arm, "all")) for i in range(50)])
        assert torch.equal(routes[:50], again)
        sets = {bits(route) for route in routes}
        assert len(sets) == (10 if arm == "random" else 2)  # 4 single blocks and 6 pairs


def test_whole_rates_leave_nothing_to_chance(model):
    chosen = choose(model, drawn_samples(6), COLLATOR, dict.fromkeys(RATES, 2 / BLOCKS), rows=1)
    assert (
        {int((~chosen.route(arm, str(i))).sum()) for arm in ARMS for i in range(50)}
        == {len(chosen.orders["all"])}
        == {2}
    )
    still = choose(model, drawn_samples(6), COLLATOR, dict.fromkeys(RATES, 0.0), rows=1)
    assert all(still.route(arm, "x").all() for arm in ARMS)


def test_static_sets_are_by_influence_and_by_loss(model, chosen):
    calibration = drawn_samples(24, seed=1)
    influence = block_influence(model, calibration, COLLATOR).tolist()  # all of them: 8 of each type
    assert chosen.influence == sorted(model.routable, key=lambda block: influence[block])
    again = choose(model, calibration, COLLATOR, RATES, seed=3, rows=2)
    assert again.orders == chosen.orders and again.summary() == chosen.summary()
    summary = json.loads(json.dumps(chosen.summary()))
    assert summary["static_greedy"] == chosen.orders["all"] and len(summary["static_greedy"]) == 2
    assert summary["oracle"].keys() == {*STEP_TYPES, "rest"} and len(summary["oracle"]["tool_call"]) == 4
    assert summary["skip_rate"]["tool_call"] == pytest.approx(55)


def first_vectors(model, batch):
    return router_vectors(model, *(batch[name] for name in ("input_ids", "attention_mask", "context_mask")))[:, 0]


def probed(model, chosen, samples):
    return chosen.probe.predict(first_vectors(model, COLLATOR(samples)).numpy())


def test_the_probe_tells_most_of_what_it_has_not_seen(model, chosen):
    samples = drawn_samples(90, seed=9)
    right = probed(model, chosen, samples) == [sample.step_type == "tool_call" for sample in samples]
    assert right.mean() > 0.8


def test_measured_steps_are_those_of_plain_transformers(model, chosen, reference):
    """Every arm of a batch of unlike lengths, and what each arm takes a step for."""
    samples = drawn_samples(9, seed=5)
    rows = measure_baselines(model, samples, COLLATOR, chosen)
    for sample, row in zip(samples, rows, strict=True):
        assert row["id"] == sample.id and tuple(row["arms"]) == ARMS
        kinds = {
            "oracle": sample.step_type,
            "labels": "tool_call" if probed(model, chosen, [sample])[0] else "rest",
            "length": "tool_call" if sample.step_type == "tool_call" else "rest",  # here, length tells
        }
        for arm, measured in row["arms"].items():
            route = chosen.route(arm, sample.id, kinds.get(arm, "all"))
            assert measured["route"] == bits(route)
            assert measured["skip_rate"] == pytest.approx(100 * measured["route"].count("0") / BLOCKS)
            nll, accuracy = reference(sample, measured["route"])
            assert measured["nll"] == pytest.approx(nll, rel=1e-4) and measured["accuracy"] == pytest.approx(accuracy)
            lengths = sample.prompt_length, len(sample.input_ids) - sample.prompt_length
            cost = executed_flops(model, [(0, route)], *lengths)
            assert measured["flops"] == {"prefill": cost.prefill, "decode": cost.decode}


def test_a_turn_of_several_segments_has_one_route(model, chosen, reference):
    plain = drawn_samples(3, seed=6)
    parted = [
        Sample(**{**vars(sample), "segment_starts": (sample.prompt_length + 1,), "thought_length": 2})
        for sample in plain
    ]
    for sample, row in zip(parted, measure_baselines(model, parted, COLLATOR, chosen), strict=True):
        for measured in row["arms"].values():
            assert measured["nll"] == pytest.approx(reference(sample, measured["route"])[0], rel=1e-4)


ROUTERS = [{}, {"pooling": "joint"}, {"context": "window"}, {"protect_first": 0}]


@pytest.mark.parametrize("router", [*ROUTERS, {"position": "block", "normalize": False}])
def test_the_probe_reads_what_the_routers_read(router, make_routed):
    model = make_routed(config=RouterConfig(**{"protect_first": 1, "window": 4, **router}), blocks=BLOCKS)
    batch = COLLATOR(drawn_samples(5))
    vectors = first_vectors(model, batch)
    with torch.no_grad():
        probs = torch.sigmoid(vectors @ model.routers.weight.T + model.routers.bias)
    inputs = (batch[name] for name in ("input_ids", "attention_mask", "context_mask"))
    gates = model.gate_probs(*inputs)[:, model.routable]
    known = slice(1) if router.get("position") == "block" else slice(None)
    torch.testing.assert_close(probs[:, known], gates[:, known], rtol=1e-4, atol=1e-5)


def test_rates_are_means_over_the_rows_that_a_kind_serves():
    rows = [("tool_call", 30.0), ("tool_call", 10.0), ("planning", 0.0), ("answer", 5.0), ("answer", 10.0)]
    rates = reached_rates({"step_type": kind, "skip_rate": rate} for kind, rate in rows)
    expected = {"all": 0.11, "tool_call": 0.2, "planning": 0.0, "answer": 0.075, "rest": 0.05}
    assert rates == pytest.approx(expected)
    assert reached_rates([{"step_type": "planning", "skip_rate": 20.0}]) == {"all": 0.2, "planning": 0.2, "rest": 0.2}


def test_what_is_absent_falls_back_on_all(model):
    """No tool call was evaluated, and no answer is there to calibrate on."""
    calibration = [sample for sample in drawn_samples(30) if sample.step_type != "answer"]
    rates = {"all": 0.3, "planning": 0.2, "answer": 0.4, "rest": 0.3}
    chosen = choose(model, calibration, COLLATOR, rates, rows=2)
    assert chosen.orders["answer"][:2] == chosen.orders["all"][:2]
    assert chosen.route("labels", "x", "tool_call").tolist() == chosen.route("labels", "x").tolist()
    assert isinstance(chosen, Baselines) and measure_baselines(model, drawn_samples(3), COLLATOR, chosen)


def test_no_sample_is_refused(model):
    with pytest.raises(DataError, match="no calibration step fits"):
        choose(model, [], COLLATOR, RATES)
