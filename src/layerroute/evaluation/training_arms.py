"""The two ways of training that are compared: plain PEFT LoRA, and a recipe, each an update at a time.

    lora      transformers and PEFT alone: cross-entropy of the loss tokens, AdamW
    routed    the recipe's own loss and trainer, at the depth that its run ends with

Contract: both have the surface of `Arm`, start from a `RunParts` of their own, and are given the same micro-batches.
Boundary: measures nothing but what a run does once; processes and figures are `training_cost.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import set_seed

from layerroute.data.collate import StepCollator, padding_id
from layerroute.errors import ConfigError
from layerroute.model.attach import get_routed_model
from layerroute.model.backbone import checkpoint_activations
from layerroute.model.structure import find_structure
from layerroute.training import objective
from layerroute.training.recipe import Recipe
from layerroute.training.run import RunParts, lora_config
from layerroute.training.trainer import RoutedTrainer, plan_rows

__all__ = ["ARMS", "Arm", "LoraArm", "MicroBatches", "RoutedArm", "planned_updates"]

MicroBatches = Sequence[dict[str, Tensor]]
"""Those of one update, as `StepCollator` makes them."""


class Arm(Protocol):
    """A model, and how it is trained."""

    device: torch.device
    """Where it is."""

    def once(self, batches: MicroBatches) -> float:
        """Do what a run does once, at the first batches of the run; returns the seconds that it took."""

    def update(self, batches: MicroBatches) -> float:
        """Make one optimiser update; returns its loss."""


def planned_updates(parts: RunParts, recipe: Recipe) -> Iterator[MicroBatches]:
    """The micro-batches of every update of the recipe's run, as its trainer draws and pads them."""
    settings, loss = recipe.training, recipe.objective
    collate = StepCollator(padding_id(parts.tokenizer), loss_on=loss.loss_on, pool_over=loss.pool_over)
    rows = iter(plan_rows(parts.train.samples, settings))
    for _ in range(settings.updates):
        drawn = [list(islice(rows, settings.batch_size)) for _ in range(settings.gradient_accumulation)]
        yield [collate([parts.train[row] for row in micro_batch]) for micro_batch in drawn]


class LoraArm:
    """LoRA on the projections that routed training adapts, with no routed code in the forward pass."""

    def __init__(self, parts: RunParts, recipe: Recipe, checkpoints: Path) -> None:
        set_seed(recipe.training.seed)
        lora = lora_config(recipe)
        lora.target_modules = list(find_structure(parts.backbone).projections)
        lora.task_type = "CAUSAL_LM"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if recipe.training.gradient_checkpointing:
            checkpoint_activations(parts.backbone)
        self.model = get_peft_model(parts.backbone, lora).to(self.device).train()
        settings = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=settings.lora_lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.max_grad_norm = settings.max_grad_norm
        self.mixed = recipe.training.precision == "bf16"

    def once(self, batches: MicroBatches) -> float:
        """LoRA alone starts with its first update."""
        return 0.0

    def update(self, batches: MicroBatches) -> float:
        """One update by the mean cross-entropy of its loss tokens."""
        tokens = _loss_tokens(batches)
        return _update(self.optimizer, self.max_grad_norm, [self._backward(batch, tokens) for batch in batches])

    def _backward(self, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        batch = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask", "labels")}
        positions, targets = objective.loss_tokens(batch.pop("labels"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            logits = self.model(**batch, use_cache=False, logits_to_keep=positions).logits
        wanted = targets != -100
        loss = objective.cross_entropy_sum(logits[wanted], targets[wanted]) / tokens
        loss.backward()
        return loss.detach()


class RoutedArm:
    """A recipe's training, as its last updates are: every budget reached, every block that will go gone.

    Args:
        parts: what the run starts from.
        recipe: every setting.
        checkpoints: a folder that exists; nothing is written.

    Raises:
        ConfigError: how deep the recipe ends is found by training alone.
    """

    def __init__(self, parts: RunParts, recipe: Recipe, checkpoints: Path) -> None:
        if recipe.objective.accepted is not None:
            raise ConfigError(
                "objective.accepted: how deep such a run ends is known only after it; set objective.accepted=null, and "
                "objective.budgets to the skip rates that a run ended with"
            )
        set_seed(recipe.training.seed)
        routed = get_routed_model(parts.backbone, parts.router, lora_config(recipe))
        pad = padding_id(parts.tokenizer)
        self.trainer = RoutedTrainer(
            routed,
            recipe,
            parts.train,
            None,
            pad_token_id=pad,
            checkpoints=checkpoints,
            data={},
            fit_dataset=parts.fit,
        )
        self.trainer.current_gradient_accumulation_steps = recipe.training.gradient_accumulation
        self.trainer.state.global_step = recipe.training.updates - 1
        self.model = self.trainer.accelerator.prepare(routed)
        self.device = routed.device
        self.optimizer = self.trainer.create_optimizer()
        self.max_grad_norm = recipe.optimizer.max_grad_norm

    def once(self, batches: MicroBatches) -> float:
        """Search or measure blocks, as the recipe's loss does at its first call, and fit the routers."""
        tokens = _loss_tokens(batches)

        def loss() -> None:
            self.trainer.training_step(self.model, dict(batches[0]), tokens)
            self.optimizer.zero_grad()

        first, second = _seconds(loss), _seconds(loss)
        return max(first - second, 0.0) + _seconds(self.trainer.fit_routers)

    def update(self, batches: MicroBatches) -> float:
        """One update as the trainer makes it."""
        tokens = _loss_tokens(batches).to(self.device)
        losses = [self.trainer.training_step(self.model, dict(batch), tokens) for batch in batches]
        return _update(self.optimizer, self.max_grad_norm, losses)


ARMS: dict[str, Callable[[RunParts, Recipe, Path], Arm]] = {"lora": LoraArm, "routed": RoutedArm}
"""Each by its name, built from what a run starts from, the recipe, and a folder for checkpoints."""


def _loss_tokens(batches: MicroBatches) -> Tensor:
    return torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batches]).sum()


def _update(optimizer: torch.optim.Optimizer, max_grad_norm: float, losses: Sequence[Tensor]) -> float:
    """Take the step for gradients that are there, each group clipped on its own; returns the update's loss."""
    if max_grad_norm:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(torch.stack(list(losses)).sum())


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
