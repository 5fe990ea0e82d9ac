"""`RoutedTrainer` on a tiny model: what it changes, what it reaches, what it logs, and how it stops and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

from layerroute import RoutedModel
from layerroute.errors import ConfigError, TrainingError
from layerroute.training.callbacks import LogFile
from layerroute.training.checkpoints import last_checkpoint


def trained_state(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


class At(TrainerCallback):
    """Does something when an update begins."""

    def __init__(self, update: int, action) -> None:
        self.update, self.action = update, action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.update:
            self.action(model)


def stop_here(model) -> None:
    raise ConnectionError("the machine went away")


def test_only_routers_and_lora_change(make_trainer, fast_recipe):
    trainer = make_trainer(fast_recipe())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name or name.startswith("routers.")}


def test_cross_entropy_falls_and_budgets_are_reached(make_trainer, fast_recipe):
    recipe = fast_recipe(steps=120, log_every=20, save_every=200, answer=0.0, distillation_weight=0)
    trainer = make_trainer(recipe, evaluate=True)
    trainer.train()
    lines = [event for event in trainer.state.log_history if "cross_entropy" in event]
    assert lines[-1]["cross_entropy"] < 0.5 * lines[0]["cross_entropy"]
    final = next(event for event in trainer.state.log_history if "eval_loss" in event)
    assert final["eval_skip_rate_tool_call"] == pytest.approx(0.5, abs=0.1)
    assert final["eval_skip_rate_planning"] <= 0.15  # one of five rows, by one of four blocks, is 0.05
    assert final["eval_skip_rate_answer"] <= 0.15
    assert lines[-1]["gate_movement"] > 0.1 > lines[0]["gate_movement"]


def test_paper_trains_in_bf16(make_trainer, fast_recipe):
    recipe = fast_recipe("paper", steps=8, closed_blocks="[1, 2]", protect_first=0, protect_last=0)
    trainer = make_trainer(recipe, evaluate=True)
    trainer.train()
    assert trainer.state.global_step == recipe.training.updates == 2
    first = trainer.state.log_history[0]
    open_gate, closed_gate = 0.7310585786300049, 0.2689414213699951
    assert first["penalty"] == pytest.approx((open_gate + closed_gate) / 2, abs=0.01)
    assert first["loss"] == pytest.approx(first["cross_entropy"] + first["penalty"], rel=1e-3)
    assert first["gate_movement"] == pytest.approx(0, abs=0.01)
    assert "budget_tool_call" not in first
    assert all(p.dtype == torch.float32 for p in trainer.model.router_parameters())


def test_two_learning_rates_on_one_course(make_trainer, fast_recipe):
    recipe = fast_recipe(steps=5, router_lr=0.02, lora_lr=0.001, warmup_share=0.2, min_lr=0.0005)
    trainer = make_trainer(recipe)
    trainer.train()
    routers, lora = trainer.optimizer.param_groups
    assert {id(p) for p in routers["params"]} == {id(p) for p in trainer.model.router_parameters()}
    assert {id(p) for p in lora["params"]} == {id(p) for p in trainer.model.lora_parameters()}
    assert routers["lr"] == pytest.approx(0.0005) and lora["lr"] == pytest.approx(0.0005)
    lines = [event for event in trainer.state.log_history if "router_lr" in event]
    assert [line["router_lr"] for line in lines[:2]] == pytest.approx([0.01, 0.02])
    assert [line["lora_lr"] for line in lines[:2]] == pytest.approx([0.0005, 0.001])


def test_accumulation_changes_nothing(make_trainer, fast_recipe):
    """Two micro-batches of two give the loss and gradient of one of four, though their targets differ in length."""
    results = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        recipe = fast_recipe(
            steps=1,
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            penalty="soft_mean",
            dropout=0,
            logit_noise=0,
            balance_types="false",
            length_window=1,
            budgets="null",
        )
        trainer = make_trainer(recipe, folder=f"accumulate-{accumulation}")
        trainer.train()
        results.append(trainer.state.log_history[0])
    for name in ("loss", "cross_entropy", "penalty", "grad_norm"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5), name


def test_gradient_checkpointing_changes_nothing(make_trainer, fast_recipe):
    plain = make_trainer(fast_recipe(steps=3), folder="plain")
    plain.train()
    saving = make_trainer(fast_recipe(steps=3, gradient_checkpointing="true"), folder="saving")
    saving.train()
    ours, theirs = trained_state(plain), trained_state(saving)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


def test_evaluation_is_what_inference_does(make_trainer, fast_recipe):
    trainer = make_trainer(fast_recipe(), evaluate=True)
    with torch.no_grad():
        trainer.model.routers.weight.normal_(generator=torch.Generator().manual_seed(0))
        trainer.model.routers.bias.zero_()
    metrics = trainer.evaluate()
    model, nats, full, tokens, skipped = trainer.model.eval(), 0.0, 0.0, 0, []
    for sample in trainer.eval_dataset:
        ids = torch.tensor([list(sample.input_ids)])
        prompt, target = ids[:, : sample.prompt_length], ids[0, sample.prompt_length :]
        route = model.route(prompt)
        skipped.append((~route).float().mean().item())
        with torch.no_grad():
            for routes in (route, torch.ones_like(route)):
                logits = model(ids, routes=routes).logits[0, sample.prompt_length - 1 : -1]
                loss = functional.cross_entropy(logits, target, reduction="sum").item()
                nats, full = (nats + loss, full) if routes is route else (nats, full + loss)
        tokens += len(target)
    assert sum(skipped) > 0
    assert metrics["eval_loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert metrics["eval_full_loss"] == pytest.approx(full / tokens, rel=1e-4)
    assert metrics["eval_skip_rate"] == pytest.approx(sum(skipped) / len(skipped))


def test_resume_reaches_the_same_weights(make_trainer, fast_recipe, tmp_path: Path):
    """Noise, dropout, distillation, accumulation, evaluations and the running skip rates go on where they were."""
    recipe = fast_recipe(steps=7, dropout=0.3, eval_every=3)
    whole = make_trainer(recipe, folder="whole", evaluate=True)
    whole.train()
    broken = make_trainer(recipe, folder="broken", evaluate=True, callbacks=[At(6, stop_here)])
    with pytest.raises(ConnectionError):
        broken.train()
    checkpoint = last_checkpoint(tmp_path / "broken")
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    torch.manual_seed(99)
    resumed = make_trainer(recipe, folder="broken", evaluate=True)
    with torch.no_grad():  # whatever the fresh model held, the checkpoint decides
        for parameter in trained_state(resumed):
            resumed.model.get_parameter(parameter).add_(1.0)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(trained_state(whole), trained_state(resumed))
    assert torch.equal(whole.routed_loss.running, resumed.routed_loss.running)


def test_checkpoint_is_an_adapter_folder_without_pickled_weights(make_trainer, fast_recipe, make_backbone, tmp_path):
    trainer = make_trainer(fast_recipe(steps=2))
    trainer.train()
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    assert not (checkpoint / "training_args.bin").exists()
    loaded = RoutedModel.from_pretrained(checkpoint, make_backbone(blocks=4))
    ours = trained_state(trainer)
    assert torch.equal(loaded.routers.weight, ours["routers.weight"])
    recorded = json.loads((checkpoint / "router_config.json").read_text())
    assert recorded["recipe"]["training"]["steps"] == 2
    assert recorded["data"] == {"toy": "0"}


@pytest.mark.parametrize("part", ["weights", "gradient"])
def test_not_a_number_stops_before_it_is_saved(make_trainer, fast_recipe, part, tmp_path):
    def spoil(model) -> None:
        parameter = next(iter(model.lora_parameters()))
        if part == "weights":
            parameter.data.fill_(float("nan"))
        else:
            parameter.register_hook(lambda gradient: gradient * float("nan"))

    trainer = make_trainer(fast_recipe(), callbacks=[At(4, spoil)])
    what = "loss" if part == "weights" else "gradient norm"
    with pytest.raises(TrainingError, match=rf"the {what} became nan in update 4; last good .*checkpoint-2;"):
        trainer.train()
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"


def test_log_file_is_one_curve_over_a_break(make_trainer, fast_recipe, tmp_path):
    recipe, log = fast_recipe(), tmp_path / "log.jsonl"
    broken = make_trainer(recipe, callbacks=[LogFile(log), At(6, stop_here)])
    with pytest.raises(ConnectionError):
        broken.train()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5]
    resumed = make_trainer(recipe, callbacks=[LogFile(log)])
    resumed.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "checkpoints")))
    events = [json.loads(line) for line in log.read_text().splitlines()]
    curve = [event for event in events if "loss" in event]
    assert [event["step"] for event in curve] == [1, 2, 3, 4, 5, 6]
    figures = {"cross_entropy", "penalty", "distillation", "gate_movement", "budget_tool_call", "router_lr", "lora_lr"}
    assert figures | {"skip_rate_tool_call", "skip_rate_planning", "skip_rate_answer"} <= curve[0].keys()
    assert "epoch" not in curve[0]


def test_a_half_written_checkpoint_does_not_count(make_trainer, fast_recipe, tmp_path):
    make_trainer(fast_recipe(steps=4)).train()
    folder = tmp_path / "checkpoints"
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert last_checkpoint(folder).name == "checkpoint-2"
    (folder / "checkpoint-2" / "optimizer.pt").unlink()
    assert last_checkpoint(folder) is None


def test_impossible_budget_is_refused(make_trainer, fast_recipe):
    with pytest.raises(ConfigError, match=r"budgets\.tool_call=0\.75: only 2 of this backbone's 4 blocks"):
        make_trainer(fast_recipe(tool_call=0.75))
