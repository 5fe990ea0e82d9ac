"""Steps to batches for one pass, read and tokenised as they are needed, with a count of what became of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from layerroute.data.load import StepStream
from layerroute.data.render import Sample, tokenize_step
from layerroute.data.steps import Step
from layerroute.errors import DataError
from layerroute.evaluation.measure import batches

__all__ = ["Counts", "StepReader"]

_CHUNK = 64
"""Steps that are tokenised together, so that steps of like length share a pass."""


@dataclass
class Counts:
    """What became of the steps that were read."""

    read: int = 0
    measured: int = 0
    dropped: int = 0
    """Target and tools alone do not fit."""
    duplicate_ids: int = 0
    """The first step of an id counts; later ones are left out."""


class StepReader:
    """Gives the steps of a stream as samples.

    Args:
        steps: what is read.
        tokenizer: the backbone's.
        max_length: tokens per step.
        boundaries: token-id sequences at which a turn is parted.
        progress: draw a bar on stderr.
    """

    def __init__(
        self,
        steps: StepStream,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        boundaries: Sequence[Sequence[int]],
        progress: bool = False,
    ) -> None:
        self.steps = steps
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.boundaries = boundaries
        self.progress = progress
        self.counts = Counts()
        """Of the last reading that was finished or is under way."""

    def batches(self, done: set[tuple[Any, ...]], what: str) -> Iterator[list[Sample]]:
        """The samples whose `(id,)` is not done, in batches for one pass.

        Raises:
            DataError: a step that the chat template cannot render, or not one step that fits.
        """
        samples = self.samples(done)
        with tqdm(total=self.steps.count, desc=what, unit="step", disable=not self.progress) as bar:
            while chunk := list(islice(samples, _CHUNK)):
                bar.update(self.counts.read - len(chunk) - bar.n)  # done before, left out
                for batch in batches(chunk):
                    yield batch
                    bar.update(len(batch))
        if not self.counts.measured:
            raise DataError(f"none of {self.counts.read} steps fits into {self.max_length} tokens; raise --max-length")

    def samples(self, done: set[tuple[Any, ...]]) -> Iterator[Sample]:
        """The samples whose `(id,)` is not done, one by one."""
        self.counts = counts = Counts()
        seen: set[str] = set()
        for step in self.steps:
            counts.read += 1
            if step.id in seen:
                counts.duplicate_ids += 1
                continue
            seen.add(step.id)
            sample = self._tokenize(step)
            if sample is None:
                counts.dropped += 1
                continue
            counts.measured += 1
            if (step.id,) not in done:
                yield sample

    def _tokenize(self, step: Step) -> Sample | None:
        try:
            return tokenize_step(self.tokenizer, step, self.max_length, self.boundaries)
        except DataError as error:
            raise DataError(f"step {step.id!r} of {step.source!r}: {error}") from None
