"""Samples to padded batches.

Contract: a batch says for every token whether it is there (`attention_mask`), whether it is learned (`labels`), whether
the first route may read it (`context_mask`) and which route governs it (`segment_ids`). Boundary: knows nothing of
models or of how text became tokens.
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

__all__ = ["StepCollator", "StepDataset", "padding_id"]

IGNORED = -100
"""The label that cross-entropy leaves out."""


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with, or that of the end of text: any will do, for the attention mask hides it."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


class StepDataset(Dataset[Sample]):
    """Tokenised steps in memory, with the number of those that were cut and of those that did not fit."""

    def __init__(self, samples: Sequence[Sample], dropped: int = 0) -> None:
        self.samples = list(samples)
        self.dropped = dropped
        """Steps left out because target and tools alone exceed the length."""
        self.cut = sum(sample.cut for sample in self.samples)
        """Steps whose messages were cut from the left."""

    @classmethod
    def from_steps(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        steps: Iterable[Step],
        max_length: int,
        boundaries: Sequence[Sequence[int]] = (),
    ) -> StepDataset:
        """Tokenise steps to at most `max_length` tokens each, their turns parted at `boundaries` (token-id sequences).

        Raises:
            DataError: a step that the chat template cannot render, or not one step that fits.
        """
        made = [_tokenize(tokenizer, step, max_length, boundaries) for step in steps]
        samples = [sample for sample in made if sample is not None]
        if not samples:
            raise DataError(f"none of {len(made)} steps fits into {max_length} tokens; raise the maximum length")
        return cls(samples, len(made) - len(samples))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, step: Step, max_length: int, boundaries: Sequence[Sequence[int]]
) -> Sample | None:
    try:
        return tokenize_step(tokenizer, step, max_length, boundaries)
    except DataError as error:
        raise DataError(f"step {step.id!r} of {step.source!r}: {error}") from None


@dataclass(frozen=True)
class StepCollator:
    """Pads samples to the longest of them; callable as a Trainer's `data_collator`."""

    pad_token_id: int
    loss_on: Literal["target", "all"] = "target"
    """Which tokens are learned: the target's, or every one (the publication)."""
    pool_over: Literal["prompt", "sequence"] = "prompt"
    """What the first route may read: the prompt without the turn's own thought, or every position of the padded row,
    padding and target too. The latter is how the publication trained; such a route is not causal."""
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
        """A batch of B samples, padded to the longest, T, whose turns have at most K segments.

        Returns:
            `input_ids`, `attention_mask` and `labels` (-100 outside the loss), int64 `[B, T]`; `context_mask`, bool
            `[B, T]`; `segment_ids`, int64 `[B, T]`, k from the k-th boundary on and 0 before the first and at padding;
            `segment_types`, int64 `[B, K]`, index into `STEP_TYPES`, -1 where a row has no such segment;
            `step_types`, int64 `[B]`, that of each row's last segment.
        """
        shape = len(samples), max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        context_mask = torch.full(shape, self.pool_over == "sequence", dtype=torch.bool)
        segment_ids = torch.zeros(shape, dtype=torch.long)
        types = [_segment_types(sample) for sample in samples]
        segment_types = torch.full((len(samples), max(map(len, types))), -1, dtype=torch.long)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            start = shape[1] - length if self.padding_side == "left" else 0
            middle, end = start + sample.prompt_length, start + length
            learned = slice(middle if self.loss_on == "target" else start, end)
            input_ids[row, start:end] = torch.tensor(sample.input_ids, dtype=torch.long)
            attention_mask[row, start:end] = 1
            labels[row, learned] = input_ids[row, learned]
            context_mask[row, start : start + sample.context_length] = True
            for segment, begin in enumerate(sample.segment_starts, start=1):
                segment_ids[row, start + begin : end] = segment
            segment_types[row, : len(types[row])] = torch.tensor(types[row])
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "context_mask": context_mask,
            "segment_ids": segment_ids,
            "segment_types": segment_types,
            "step_types": torch.tensor([STEP_TYPES.index(sample.step_type) for sample in samples]),
        }


def _segment_types(sample: Sample) -> list[int]:
    """Each segment's step type: the step's own, but that a segment which governs the thought before it is planning."""
    types = [sample.step_type] * (1 + len(sample.segment_starts))
    if sample.thought_length and sample.segment_starts:
        types[0] = "planning"
    return [STEP_TYPES.index(name) for name in types]
