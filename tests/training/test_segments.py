"""Turns of several segments in training: each token under its own route, each decision under its own step type."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from layerroute import RouterConfig
from layerroute.data.boundaries import boundary_ends
from layerroute.data.collate import StepCollator, StepDataset
from layerroute.data.render import Sample
from layerroute.data.steps import STEP_TYPES
from layerroute.training.loss import MODEL_INPUTS, RoutedLoss
from layerroute.training.meter import Means
from layerroute.training.validation import measure_batch

MARKER = (90, 91)
KINDS = ("thought and call", "call", "planning", "answer")


def turn(index: int, rng: random.Random) -> Sample:
    """The last tokens of the prompt tell what the turn starts with; a marker tells that a call comes."""
    kind = KINDS[index % 4]
    step_type = "tool_call" if index % 4 < 2 else kind
    start = {"call": 5, "answer": 7}.get(kind, 6)
    prompt = [rng.randrange(20, 90) for _ in range(rng.randrange(4, 12))] + [start] * 3
    thought = [16] * (1 + index % 3) if kind == "thought and call" else []
    target = [*MARKER] * (step_type == "tool_call") + [10 + STEP_TYPES.index(step_type)] * (2 + index % 3) + [2]
    ids = prompt + thought + target
    starts = tuple(boundary_ends(ids, [MARKER], len(prompt)))
    length = len(prompt + thought)
    return Sample(array("i", ids), length, step_type, "toy", str(index // 4), str(index), False, len(thought), starts)


@pytest.fixture
def turns() -> Callable[..., StepDataset]:
    def make(rows: int = 60, seed: int = 0) -> StepDataset:
        rng = random.Random(seed)
        return StepDataset([turn(i, rng) for i in range(rows)])

    return make


def own_routes(model, sample: Sample) -> torch.Tensor:
    """bool `[segments, blocks]`, one prefix of the row after the other: what generation would decide."""
    prefixes = [sample.context_length, *(start + 1 for start in sample.segment_starts)]
    ids = torch.tensor([list(sample.input_ids)])
    return torch.cat([model.route(ids[:, :length]) for length in prefixes]).long().cumprod(0).bool()


def plain_logits(plain, sample: Sample, routes: torch.Tensor) -> torch.Tensor:
    """Plain transformers on one row alone; a hook undoes a block on the tokens whose segment skips it."""
    segment = [sum(position >= start for start in sample.segment_starts) for position in range(len(sample.input_ids))]
    handles = []
    for index, block in enumerate(plain.get_decoder().layers):
        runs = routes[segment, index].unsqueeze(-1)

        def undo(module, args, output, runs=runs):
            return torch.where(runs, output, args[0])

        handles.append(block.register_forward_hook(undo))
    with torch.no_grad():
        logits = plain(torch.tensor([list(sample.input_ids)]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("read", [{"pooling": "tail"}, {"pooling": "joint"}, {"context": "window"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_padded_training_batch_gives_each_row_what_it_gives_alone(
    make_routed, delete_blocks, turns, family, read, side
):
    """Prompt, thought, marker and call in one row, beside rows of one segment; against plain transformers."""
    model = make_routed(family, RouterConfig(protect_first=1, protect_last=0, window=4, **read), blocks=5)
    samples, seen = turns(8).samples, []
    routes = [own_routes(model, sample) for sample in samples]
    plain = delete_blocks(model, torch.ones(5, dtype=torch.bool))
    batch = StepCollator(0, padding_side=side)(samples)
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    out = model(**{name: batch[name] for name in MODEL_INPUTS})
    there, present = batch["attention_mask"].bool(), batch["segment_types"] >= 0
    for row, sample in enumerate(samples):
        assert torch.equal(out.routes[row, present[row]], routes[row]), row
        expected = plain_logits(plain, sample, routes[row])
        torch.testing.assert_close(out.logits[row, there[row]], expected, rtol=1e-4, atol=1e-4)
        seen += [not torch.equal(part, routes[row][0]) for part in routes[row][1:]]
    assert any(seen) and len({tuple(route.flatten().tolist()) for route in routes}) > 3


def budget_loss(recipe, costs: torch.Tensor) -> RoutedLoss:
    loss = RoutedLoss(recipe, lambda rows: costs, lambda sums: sums, 1, torch.device("cpu"))
    return loss


def test_every_decision_counts_under_its_own_type(make_routed, turns, fast_recipe):
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=0, window=4)).train()
    recipe = fast_recipe(logit_noise=0, planning=0.25)
    costs = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    loss = budget_loss(recipe, costs)
    samples = turns(8).samples
    batch = StepCollator(0)(samples)
    loss(model, model, batch, recipe.training.updates, None, 1)
    logged = loss.means.read(lambda sums: sums)
    model.eval()
    skipped: dict[str, list[float]] = {name: [] for name in STEP_TYPES}
    closed = []
    for sample in samples:
        routes = own_routes(model, sample)
        types = ["planning" if sample.thought_length else sample.step_type, *[sample.step_type] * (len(routes) - 1)]
        for route, name in zip(routes, types, strict=True):
            skipped[name].append((~route).float().mean().item())
            closed.append(costs[STEP_TYPES.index(name)][~route].sum().item())
    rates = {name: sum(values) / len(values) for name, values in skipped.items()}
    assert [len(skipped[name]) for name in STEP_TYPES] == [6, 4, 2]  # two rows of each kind
    for name, rate in rates.items():
        assert logged[f"skip_rate_{name}"] == pytest.approx(rate), name
    budgets = {"tool_call": 0.5, "planning": 0.25, "answer": 0.1}
    assert logged["penalty"] == pytest.approx(sum((rates[name] - budgets[name]) ** 2 for name in STEP_TYPES))
    assert logged["gate_cost"] == pytest.approx(sum(closed) / len(closed))


def test_rows_that_skip_only_in_a_later_segment_are_distilled(make_routed, turns, fast_recipe):
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=0, window=4)).train()
    samples = [sample for sample in turns(40).samples if sample.thought_length]
    later = [s for s in samples if (routes := own_routes(model.eval(), s))[0].all() and not routes[1].all()]
    model.train()
    loss = budget_loss(fast_recipe(logit_noise=0), torch.zeros(3, 4))
    loss(model, model, StepCollator(0)(later), 0, None, 1)
    assert later and loss.means.read(lambda sums: sums)["distillation"] > 0


def test_both_segments_reach_their_budgets(make_trainer, turns, fast_recipe):
    recipe = fast_recipe(steps=150, log_every=30, save_every=200, answer=0.0, distillation_weight=0)
    trainer = make_trainer(recipe, evaluate=True, rows=turns)
    trainer.train()
    final = next(event for event in trainer.state.log_history if "eval_loss" in event)
    assert final["eval_skip_rate_tool_call"] == pytest.approx(0.5, abs=0.1)
    assert final["eval_first_segment_skip_rate_planning"] <= 0.15  # the thought before the very calls above
    assert final["eval_skip_rate_planning"] <= 0.15 and final["eval_skip_rate_answer"] <= 0.15
    assert "eval_first_segment_skip_rate_answer" not in final


def test_validation_reports_the_two_segments_apart(make_routed, turns):
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=0, window=4))
    samples, means = turns(16).samples, Means()
    for start in (0, 8):
        measure_batch(model, StepCollator(0)(samples[start : start + 8]), means)
    figures = means.read(lambda sums: sums)
    last: dict[str, list[float]] = {}
    first: dict[str, list[float]] = {}
    nats, tokens, closes_more = 0.0, 0, False
    for sample in samples:
        routes = own_routes(model, sample)
        skipped = (~routes).float().mean(1).tolist()
        closes_more |= skipped[-1] > skipped[0]
        for suffix in ("", f"_{sample.step_type}"):
            last.setdefault(f"skip_rate{suffix}", []).append(skipped[-1])
        for suffix in ("", "_planning" if sample.thought_length else "_tool_call") if len(routes) > 1 else ():
            first.setdefault(f"first_segment_skip_rate{suffix}", []).append(skipped[0])
        ids = torch.tensor([list(sample.input_ids)])
        segment_ids = torch.zeros_like(ids)
        for begin in sample.segment_starts:
            segment_ids[:, begin:] += 1
        with torch.no_grad():
            logits = model(ids, segment_ids=segment_ids, routes=routes[None]).logits[0]
        target = ids[0, sample.prompt_length :]
        nats += functional.cross_entropy(logits[sample.prompt_length - 1 : -1], target, reduction="sum").item()
        tokens += len(target)
    expected = {name: sum(values) / len(values) for name, values in (last | first).items()}
    assert {name: value for name, value in figures.items() if "skip_rate" in name} == pytest.approx(expected)
    assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert closes_more
