"""What training costs: both arms train what they say, on the same rows, and the report adds up."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerroute.data.builtin import builtin_steps
from layerroute.data.steps import write_steps
from layerroute.errors import ConfigError
from layerroute.evaluation.training_arms import LoraArm, RoutedArm, planned_updates
from layerroute.evaluation.training_cost import Measured, Update, measure_training, summarise
from layerroute.training.recipe import Recipe, load_recipe
from layerroute.training.run import load_parts

BY_RECIPE = {
    "default": {"search.rows": "1", "fit_rows": "3", "fit_length": "null", "protect_first": "1"},
    "end_to_end": {"cost_rows": "1", "protect_first": "1"},
    "paper": {"closed_blocks": "[]", "precision": "fp32", "loss_on": "target", "lora.dropout": "0"},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer, make_config) -> Path:
    """One token per byte; beside it, `rows.jsonl` holds short steps of every kind."""
    folder = tmp_path_factory.mktemp("backbone")
    byte_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = make_config("llama", 5, vocab_size=300, max_position_embeddings=2048, initializer_range=0.02)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    steps = sorted(builtin_steps(100, 0), key=lambda step: len(str(step.to_row())))
    write_steps(folder / "rows.jsonl", steps[:36])
    return folder


def quick_recipe(name: str, **changes: str) -> Recipe:
    common = {"steps": "4", "gradient_accumulation": "2", "batch_size": "2", "max_length": "2048", "window": "8"}
    return load_recipe(name, common | BY_RECIPE[name] | changes)


def first_update(backbone: Path, recipe: Recipe):
    parts = load_parts(str(backbone), [str(backbone / "rows.jsonl")], recipe)
    return parts, next(planned_updates(parts, recipe))


def lora_weights(arm) -> list[torch.Tensor]:
    return [p.detach().clone() for name, p in arm.model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": "true"}])
def test_the_lora_arm_has_the_loss_of_transformers(backbone, tmp_path, changes):
    """Fresh LoRA changes nothing, so the update's loss is the backbone's own, weighted by each row's loss tokens."""
    recipe = quick_recipe("default", **changes)
    parts, batches = first_update(backbone, recipe)
    total = tokens = 0.0
    plain = AutoModelForCausalLM.from_pretrained(backbone)
    with torch.no_grad():
        for batch in batches:
            given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            count = int((batch["labels"][:, 1:] != -100).sum())
            total, tokens = total + float(plain(**given).loss) * count, tokens + count
    arm = LoraArm(parts, recipe, tmp_path)
    before = lora_weights(arm)
    assert arm.once(batches) == 0.0
    assert arm.update(batches) == pytest.approx(total / tokens, rel=1e-5)
    assert any(not torch.equal(old, new) for old, new in zip(before, lora_weights(arm), strict=True))
    assert {name for name, p in arm.model.named_parameters() if p.grad is not None} == set()
    assert not any("router" in name for name, _ in arm.model.named_modules())


def test_at_full_depth_both_arms_make_the_same_update(backbone, tmp_path):
    """Without a budget or a penalty, routed training is LoRA training: the same losses, the same weights after them."""
    nothing = {f"budgets.{kind}": "0" for kind in ("tool_call", "direct_call", "planning", "answer")}
    recipe = quick_recipe("default", **nothing)
    losses, weights = [], []
    for kind in (LoraArm, RoutedArm):
        parts, batches = first_update(backbone, recipe)
        arm = kind(parts, recipe, tmp_path)
        losses.append([arm.update(batches) for _ in range(2)])
        weights.append(lora_weights(arm))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < losses[0][0]
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["default", "end_to_end", "paper"])
def test_the_routed_arm_trains_as_the_last_updates_do(backbone, tmp_path, name):
    recipe = quick_recipe(name)
    parts, batches = first_update(backbone, recipe)
    arm = RoutedArm(parts, recipe, tmp_path)
    bias = arm.trainer.model.routers.bias.detach().clone()
    assert arm.once(batches) > 0
    loss = arm.trainer.routed_loss
    if name == "default":
        assert len(loss.bank.orders["tool_call"]) == 1, "27% of 5 blocks are searched before anything is timed"
        assert not torch.equal(bias, arm.trainer.model.routers.bias), "routers are fitted"
        loss.search = None  # not called again
    if name == "end_to_end":
        assert loss.costs is not None
    before = lora_weights(arm)
    assert arm.update(batches) > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, lora_weights(arm), strict=True))
    if name == "default":
        means = loss.means.read(lambda sums: sums)
        assert means["skip_rate_tool_call"] == pytest.approx(0.2)


def test_the_plan_is_that_of_the_trainer(backbone, tmp_path):
    recipe = quick_recipe("default")
    parts, _ = first_update(backbone, recipe)
    plan = [batch for update in islice(planned_updates(parts, recipe), 3) for batch in update]
    trainer = RoutedArm(parts, recipe, tmp_path).trainer
    for ours, theirs in zip(plan, islice(trainer.get_train_dataloader(), 6), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_figures_by_hand():
    rows = [Update(seconds, tokens, padding, 1.0) for seconds, tokens, padding in ((2, 90, 10), (4, 190, 10))]
    slower = [Update(1.5 * row.seconds, row.tokens, row.padding, row.loss) for row in rows]
    measured = {"lora": Measured(0.0, rows, 1000), "routed": Measured(12.0, slower, 1200)}
    report = summarise(measured, quick_recipe("default"))
    assert report["tokens"] == 280 and report["padding"] == pytest.approx(20 / 300)
    assert report["arms"]["lora"]["tokens_per_second"] == pytest.approx(280 / 6)
    assert report["arms"]["routed"]["seconds"]["median"] == pytest.approx(4.5)
    assert report["ratio"]["ratio"] == pytest.approx(1.5) and report["memory_ratio"] == pytest.approx(1.2)
    # 4 updates of 3 s on average beside 4 of 4.5 s and the 12 s
    assert report["run_ratio"] == pytest.approx((4 * 4.5 + 12) / (4 * 3))
    assert [goal["met"] for goal in report["goals"]] == [False, True]


@pytest.mark.parametrize("updates", [1, 4])
def test_more_updates_than_the_run_has_are_refused(updates):
    with pytest.raises(ConfigError, match=f"updates={updates}: of this recipe's 4 updates, from 2 to 3"):
        measure_training("nowhere", ["builtin"], quick_recipe("default"), updates)


def test_a_depth_that_is_found_by_training_is_refused(backbone, tmp_path):
    accepted = "{tool_call: 0.1, direct_call: 0.1, planning: 0, answer: 0.1}"
    changes = {"objective.budgets": "null", "objective.accepted": accepted, "distillation_weight": "1", "part": "2"}
    recipe = quick_recipe("default", **changes)
    parts, _ = first_update(backbone, recipe)
    with pytest.raises(ConfigError, match="known only after it"):
        RoutedArm(parts, recipe, tmp_path)
