"""Samples to padded batches.

Contract: a batch says for every token whether it is there (`attention_mask`), whether it is learned (`labels`) and
whether the route may read it (`context_mask`). Boundary: knows nothing of models or of how text became tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from layerroute.data.render import Sample, tokenize_step
from layerroute.data.steps import STEP_TYPES, Step
from layerroute.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StepCollator", "StepDataset"]

IGNORED = -100
"""The label that cross-entropy leaves out."""


class StepDataset(Dataset[Sample]):
    """Tokenised steps in memory, with the number of those that were cut and of those that did not fit."""

    def __init__(self, samples: Sequence[Sample], dropped: int = 0) -> None:
        self.samples = list(samples)
        self.dropped = dropped
        """Steps left out because target and tools alone exceed the length."""
        self.cut = sum(sample.cut for sample in self.samples)
        """Steps whose messages were cut from the left."""

    @classmethod
    def from_steps(cls, tokenizer: PreTrainedTokenizerBase, steps: Iterable[Step], max_length: int) -> StepDataset:
        """Tokenise steps to at most `max_length` tokens each.

        Raises:
            DataError: a step that the chat template cannot render, or not one step that fits.
        """
        made = [_tokenize(tokenizer, step, max_length) for step in steps]
        samples = [sample for sample in made if sample is not None]
        if not samples:
            raise DataError(f"none of {len(made)} steps fits into {max_length} tokens; raise the maximum length")
        return cls(samples, len(made) - len(samples))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def _tokenize(tokenizer: PreTrainedTokenizerBase, step: Step, max_length: int) -> Sample | None:
    try:
        return tokenize_step(tokenizer, step, max_length)
    except DataError as error:
        raise DataError(f"step {step.id!r} of {step.source!r}: {error}") from None


@dataclass(frozen=True)
class StepCollator:
    """Pads samples to the longest of them; callable as a Trainer's `data_collator`."""

    pad_token_id: int
    loss_on: Literal["target", "all"] = "target"
    """Which tokens are learned: the target's, or every one (the publication)."""
    pool_over: Literal["prompt", "sequence"] = "prompt"
    """What the route may read: the prompt, or every position of the padded row, padding and target too. The latter
    is how the publication trained; such a route is not causal."""
    padding_side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        allowed = {
            "loss_on": ("target", "all"),
            "pool_over": ("prompt", "sequence"),
            "padding_side": ("right", "left"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(values)}")

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A batch of B samples, padded to the longest, T.

        Returns:
            `input_ids`, `attention_mask` and `labels` (-100 outside the loss), int64 `[B, T]`; `context_mask`, bool
            `[B, T]`; `step_types`, int64 `[B]`, index into `STEP_TYPES`.
        """
        shape = len(samples), max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        context_mask = torch.full(shape, self.pool_over == "sequence", dtype=torch.bool)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            start = shape[1] - length if self.padding_side == "left" else 0
            middle, end = start + sample.prompt_length, start + length
            learned = slice(middle if self.loss_on == "target" else start, end)
            input_ids[row, start:end] = torch.tensor(sample.input_ids, dtype=torch.long)
            attention_mask[row, start:end] = 1
            labels[row, learned] = input_ids[row, learned]
            context_mask[row, start:middle] = True
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "context_mask": context_mask,
            "step_types": torch.tensor([STEP_TYPES.index(sample.step_type) for sample in samples]),
        }
