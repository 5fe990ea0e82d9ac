"""Measuring the dial: the gates that inference decides, and budgets met on steps that were not measured."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerroute import RouterConfig, get_routed_model
from layerroute.data.collate import StepCollator, StepDataset
from layerroute.data.load import Loaded
from layerroute.data.steps import STEP_TYPES, Step
from layerroute.errors import ConfigError, DataError
from layerroute.runtime.calibrate import measure_gates, run

BLOCKS, LENGTH = 6, 256


@pytest.fixture(scope="module")
def tokenizer(hermes_tokenizer):
    return hermes_tokenizer


@pytest.fixture
def make_model(make_config):
    """A tiny model that reads bytes, with routers whose gates differ from row to row."""

    def make(**router):
        torch.manual_seed(0)
        config = make_config("llama", BLOCKS, vocab_size=300, max_position_embeddings=LENGTH)
        model = get_routed_model(
            AutoModelForCausalLM.from_config(config), RouterConfig(**{"protect_first": 1, "window": 48, **router})
        )
        with torch.no_grad():
            model.routers.weight.copy_(torch.randn(model.routers.weight.shape))
        return model.eval()

    return make


def drawn_steps(count: int, seed: int) -> list[Step]:
    """Short prompts of random letters, by which the step types differ; two steps make a group."""
    rng = random.Random(seed)
    letters = {"tool_call": "abcdefgh", "planning": "efghijkl", "answer": "ijklmnop"}
    steps = []
    for i in range(count):
        kind = STEP_TYPES[i % 3]
        is_call = kind == "tool_call"
        row = {"id": f"{seed}-{i}", "source": "drawn", "group": f"{seed}-{i // 2}", "step_type": kind}
        row["messages"] = [{"role": "user", "content": "".join(rng.choices(letters[kind], k=30))}]
        calls = [{"name": "f", "arguments": {}}] if is_call else None
        row["target"] = {"role": "assistant", "content": None if is_call else "Well.", "tool_calls": calls}
        steps.append(Step.from_row(row))
    return steps


@pytest.fixture(scope="module")
def loaded():
    return Loaded(drawn_steps(600, 0), {"drawn": "ff"})


def measure(model, tokenizer, steps, batch_size=8):
    dataset = StepDataset.from_steps(tokenizer, steps, LENGTH)
    return dataset, *measure_gates(model, dataset, StepCollator(tokenizer.pad_token_id), batch_size)


@pytest.mark.parametrize("context", ["full", "window"])
def test_the_gates_are_those_that_inference_decides(context, make_model, tokenizer):
    """Row by row, from the prompt alone, without padding."""
    model = make_model(context=context)
    dataset, probs, types = measure(model, tokenizer, drawn_steps(9, 1), batch_size=4)
    samples = sorted(dataset.samples, key=lambda sample: len(sample.input_ids))
    assert types == [sample.step_type for sample in samples] and probs.dtype == torch.float32
    for row, sample in zip(probs, samples, strict=True):
        prompt = torch.tensor([list(sample.input_ids[: sample.prompt_length])])
        torch.testing.assert_close(row, model(prompt).gate_probs[0, model.routable], rtol=0, atol=1e-5)


def test_the_last_segment_that_a_row_has_counts_with_those_before_it():
    """What an earlier segment closed stays closed: its lower probability holds; absent segments do not count."""
    probs = torch.tensor([
        [[1.0, 0.9, 0.3], [1.0, 0.4, 0.8], [1.0, 0.1, 0.1]],
        [[1.0, 0.9, 0.3], [1.0, 0.4, 0.8], [1.0, 0.5, 0.2]],
        [[1.0, 0.9, 0.3], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
    ])  # fmt: skip
    batch = {"segment_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2], [0, 0, 0, 0]])}
    batch |= {name: torch.ones(3, 4) for name in ("input_ids", "attention_mask", "context_mask")}
    model = SimpleNamespace(device="cpu", routable=[1, 2], gate_probs=lambda *_: probs)
    samples = [SimpleNamespace(input_ids=[0] * 4, step_type="tool_call")] * 3
    measured, _ = measure_gates(model, SimpleNamespace(samples=samples), lambda rows: batch, 8)
    assert torch.equal(measured, torch.tensor([[0.4, 0.3], [0.4, 0.2], [0.9, 0.3]]))


def test_budgets_are_met_on_the_other_half(make_model, tokenizer, loaded):
    report = run(make_model(), tokenizer, loaded, routers="00", max_length=LENGTH)
    assert report.calibration.routers == "00" and report.calibration.data == {"drawn": "ff"}
    assert report.calibration.budgets[-1] == 4 / BLOCKS
    assert report.calibration.rows["all"] + report.checked_rows["all"] + report.dropped == len(loaded.steps)
    assert [check.skip_budget for check in report.checks[:4]] == [0.1, 0.2, 0.3, {"tool_call": 0.1}]
    assert len(report.checks) == 3 * 4
    for check in report.checks:
        name, share = next(iter(check.skip_budget.items())) if isinstance(check.skip_budget, dict) else ("all", None)
        assert check.skip_rate[name] == pytest.approx(share or check.skip_budget, abs=0.03)
    table = report.table().splitlines()
    assert table[0].startswith(f"measured on {report.calibration.rows['all']} steps (")
    assert table[1].split() == ["skip", "budget", "threshold", "all", "tool_call", "planning", "answer"]
    assert len(table) == 2 + 12 and table[2].startswith("0.1 ")


def test_a_budget_moves_the_routes_of_inference(make_model, tokenizer, loaded):
    model = make_model()
    report = run(model, tokenizer, loaded, routers="00", max_length=LENGTH)
    model.calibration = report.calibration
    steps = drawn_steps(300, 5)
    samples = StepDataset.from_steps(tokenizer, steps, LENGTH).samples
    prompts = [torch.tensor([list(sample.input_ids[: sample.prompt_length])]) for sample in samples]
    for budget in (0.0, 0.3, 4 / BLOCKS):
        routes = torch.cat([model.route(prompt, skip_budget=budget) for prompt in prompts])
        assert float((~routes).float().mean()) == pytest.approx(budget, abs=0.03 if budget == 0.3 else 1e-6)


def test_the_seed_fixes_the_halves(make_model, tokenizer, loaded):
    model = make_model()
    first, again, other = (
        run(model, tokenizer, loaded, routers="00", max_length=LENGTH, seed=seed).as_dict() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_only_reachable_budgets_are_checked(make_model, tokenizer, loaded):
    report = run(make_model(protect_first=4), tokenizer, loaded, routers="00", max_length=LENGTH)
    assert {str(check.skip_budget) for check in report.checks if isinstance(check.skip_budget, float)} == {"0.1"}


def test_routers_at_each_block_are_refused(make_model, tokenizer, loaded):
    with pytest.raises(ConfigError, match=r"position='block' cannot be calibrated: .*train with position='early'"):
        run(make_model(position="block"), tokenizer, loaded, routers="00", max_length=LENGTH)


def test_more_tokens_than_the_backbone_reads_are_refused(make_model, tokenizer, loaded):
    with pytest.raises(ConfigError, match="max_length=512: this backbone reads at most 256 tokens"):
        run(make_model(), tokenizer, loaded, routers="00", max_length=512)


def test_one_group_cannot_be_halved(make_model, tokenizer, loaded):
    group = [step for step in loaded.steps if step.group == loaded.steps[0].group]
    with pytest.raises(DataError, match=r"are of one group; .* give steps of two or more"):
        run(make_model(), tokenizer, Loaded(group, {}), routers="00", max_length=LENGTH)
