"""LoRA healed of missing blocks for some updates, on calls alone: what the experiments on healing share."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from trained import arguments

from layerroute import RoutedModel
from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.training import objective
from layerroute.training.bank import Bank, decision_kinds
from layerroute.training.loss import MODEL_INPUTS
from layerroute.training.search import rows_of_kind

Teacher = Callable[[dict[str, Tensor], Tensor], Tensor]
"""What the model takes, and int64 `[P]` positions: logits `[B, P, V]` to learn from."""

Weigh = Callable[[Tensor], Tensor]
"""Nats of a batch's loss tokens, float `[T]`: their weights, `[T]`."""


def healing_arguments(description: str, *, updates: int, rows: int) -> argparse.ArgumentParser:
    """The options of every experiment that heals, with its defaults."""
    parser = arguments(description)
    parser.add_argument("--updates", type=int, default=updates)
    parser.add_argument("--rows", type=int, default=rows, help="calls that are measured")
    parser.add_argument("--learning-rate", type=float, default=0.001)
    return parser


def batches_of_calls(samples: Sequence[Sample], updates: int, *, rows: int = 600) -> list[list[Sample]]:
    """Six calls for every update, the same for every arm: of so many drawn, those of at most 256 tokens."""
    calls = [s for s in rows_of_kind(samples, "tool_call", rows, 7) if len(s.input_ids) <= 256]
    if len(calls) < 6:
        raise SystemExit("--data: fewer than six calls of at most 256 tokens")
    rng = random.Random(0)
    batches: list[list[Sample]] = []
    while len(batches) < updates:
        rng.shuffle(calls)
        batches += [calls[start : start + 6] for start in range(0, len(calls) - 5, 6)]
    return batches[:updates]


def heal(
    model: RoutedModel,
    batches: Sequence[Sequence[Sample]],
    collator: StepCollator,
    bank: Bank,
    learning_rate: float,
    teacher: Teacher | None = None,
    weigh: Weigh | None = None,
) -> None:
    """An update a batch, under the bank's routes.

    Args:
        teacher: its divergence, weight 1, beside cross-entropy.
        weigh: the tokens' weights in the cross-entropy, in place of 1.
    """
    lora = list(model.lora_parameters())
    optimizer = torch.optim.AdamW(lora, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0)
    model.train()
    for update, rows in enumerate(batches):
        batch = collator(rows)
        inputs = {key: batch[key] for key in MODEL_INPUTS}
        kept, targets = objective.loss_tokens(batch["labels"])
        wanted = targets != -100
        routes = bank.turn_routes(decision_kinds(batch["segment_types"]))
        with torch.no_grad():  # first, for a teacher may put other weights in place
            learned_from = None if teacher is None else teacher(inputs, kept)
        logits = model(**inputs, routes=routes, logits_to_keep=kept).logits
        nats = functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none")
        loss = (nats if weigh is None else nats * weigh(nats.detach())).sum()
        if learned_from is not None:
            loss = loss + objective.distillation_loss(logits, learned_from, targets)
        (loss / wanted.sum()).backward()
        apply_gradients(optimizer, lora, learning_rate, update, len(batches))
    model.eval()


def apply_gradients(
    optimizer: torch.optim.Optimizer, lora: list[nn.Parameter], learning_rate: float, update: int, updates: int
) -> None:
    """An update, its learning rate warmed up over five and then falling to 0; the gradients are cleared."""
    torch.nn.utils.clip_grad_norm_(lora, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * min(1, (update + 1) / 5) * (1 - update / updates)
    optimizer.step()
    optimizer.zero_grad()


def outputs_under(
    bank: Bank, model: RoutedModel, rows: Sequence[Sample], collator: StepCollator
) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]` and targets, int64 `[T]`, of the rows' loss tokens under the bank's routes."""
    batch = collator(rows)
    kept, targets = objective.loss_tokens(batch["labels"])
    routes = bank.turn_routes(decision_kinds(batch["segment_types"]))
    logits = model(**{key: batch[key] for key in MODEL_INPUTS}, routes=routes, logits_to_keep=kept).logits
    wanted = targets != -100
    return logits[wanted], targets[wanted]


def set_lora(model: RoutedModel, values: Sequence[Tensor]) -> list[Tensor]:
    """Put values in place of LoRA's; returns those that were there."""
    lora = list(model.lora_parameters())
    before = [value.detach().clone() for value in lora]
    with torch.no_grad():
        for parameter, value in zip(lora, values, strict=True):
            parameter.copy_(value)
    return before


@torch.no_grad()
def measured(model: RoutedModel, samples: list[Sample], collator: StepCollator, bank: Bank) -> np.ndarray:
    """Nats a token, token accuracy, and whether every token is right: float64 `[samples, 3]`."""
    found = []
    for sample in samples:
        logits, targets = outputs_under(bank, model, [sample], collator)
        right = logits.argmax(-1) == targets
        nats = objective.cross_entropy_sum(logits, targets) / len(targets)
        found.append([float(nats), float(right.float().mean()), float(right.all())])
    return np.array(found)


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Mean of `ours - theirs`, float64 `[samples]` each, with its 95% bootstrap interval."""
    drawn = np.random.default_rng(0).integers(len(ours), size=(5000, len(ours)))
    low, high = np.percentile((ours - theirs)[drawn].mean(1), [2.5, 97.5])
    return f"{(ours - theirs).mean():+.3f} ({low:+.3f} to {high:+.3f})"


def said(figures: np.ndarray, base: np.ndarray) -> str:
    """What `measured` found, beside another arm's on the same samples."""
    nats, accuracy, _ = figures.mean(0)
    whole = f"whole {figures[:, 2].sum():.0f} of {len(figures)}"
    return f"{nats:.3f} {difference(figures[:, 0], base[:, 0])}, accuracy {accuracy:.4f}, {whole}"
