"""Batches: what is there, what is learned, what the route may read."""

from __future__ import annotations

import pickle
from array import array

import pytest
import torch

from layerroute.data.builtin import builtin_steps
from layerroute.data.collate import StepCollator, StepDataset
from layerroute.data.render import Sample
from layerroute.data.steps import STEP_TYPES
from layerroute.errors import ConfigError, DataError

PAD = 99


def sample(ids, prompt, step_type="answer", thought=0, starts=()):
    return Sample(array("i", ids), prompt, step_type, "s", "g", "g#0", False, thought, starts)


SAMPLES = [sample([1, 2, 3, 4], 3, "planning"), sample([5, 6], 1, "tool_call")]


def test_right_padding_loss_on_the_target():
    batch = StepCollator(PAD)(SAMPLES)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4], [-100, 6, -100, -100]]
    assert batch["context_mask"].tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch["step_types"].tolist() == [1, 0]
    assert batch["segment_ids"].tolist() == [[0] * 4] * 2 and batch["segment_types"].tolist() == [[1], [0]]
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "context_mask": torch.bool,
        "segment_ids": torch.int64,
        "segment_types": torch.int64,
        "step_types": torch.int64,
    }


def test_left_padding():
    batch = StepCollator(PAD, padding_side="left")(SAMPLES)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [PAD, PAD, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4], [-100, -100, -100, 6]]
    assert batch["context_mask"].tolist() == [[True, True, True, False], [False, False, True, False]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_segments_of_a_turn(side):
    rows = [
        sample([1, 2, 3, 4, 5, 6], 4, "tool_call", thought=2, starts=(4,)),  # a thought, then its call
        sample([1, 2, 3, 4, 5], 2, "tool_call", starts=(2, 4)),  # two calls at once
        sample([1, 2, 3], 2, "answer", thought=1),  # a thought, then no boundary
    ]
    batch = StepCollator(PAD, padding_side=side)(rows)
    call, planning, answer = (STEP_TYPES.index(name) for name in ("tool_call", "planning", "answer"))
    assert batch["segment_types"].tolist() == [[planning, call, -1], [call, call, call], [answer, -1, -1]]
    assert batch["step_types"].tolist() == [call, call, answer]
    there = batch["attention_mask"].bool()
    segments = [row[mask].tolist() for row, mask in zip(batch["segment_ids"], there, strict=True)]
    assert segments == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2], [0, 0, 0]]
    contexts = [row[mask].sum().item() for row, mask in zip(batch["context_mask"], there, strict=True)]
    assert contexts == [2, 2, 1] and not (batch["context_mask"] & ~there).any()
    assert (batch["labels"] != -100).sum(1).tolist() == [2, 3, 1]


def test_as_the_publication_trained():
    batch = StepCollator(PAD, loss_on="all", pool_over="sequence")(SAMPLES)
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [5, 6, -100, -100]]
    assert batch["context_mask"].all()


def test_a_collator_can_be_pickled_and_refuses_unknown_values():
    assert pickle.loads(pickle.dumps(StepCollator(PAD))) == StepCollator(PAD)
    with pytest.raises(ConfigError, match="loss_on is 'some'; use one of target, all"):
        StepCollator(PAD, loss_on="some")


def test_a_dataset_counts_what_was_cut_and_dropped(tokenizer):
    steps = builtin_steps(60, seed=0)
    dataset = StepDataset.from_steps(tokenizer, steps, max_length=1500)
    assert len(dataset) + dataset.dropped == 60
    assert dataset.cut == sum(s.cut for s in dataset.samples) > 0 and dataset.dropped > 0
    assert max(len(s.input_ids) for s in dataset.samples) <= 1500
    whole = StepDataset.from_steps(tokenizer, steps, max_length=10**6)
    assert (whole.cut, whole.dropped, [s.id for s in whole.samples]) == (0, 0, [s.id for s in steps])
    with pytest.raises(DataError, match="none of 60 steps fits into 10 tokens"):
        StepDataset.from_steps(tokenizer, steps, max_length=10)


def test_the_dataset_works_with_a_loader(tokenizer):
    dataset = StepDataset.from_steps(tokenizer, builtin_steps(6, seed=0), max_length=10**6)
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=StepCollator(tokenizer.pad_token_id))
    for batch in loader:
        assert batch["input_ids"].shape == batch["labels"].shape
        learned = batch["labels"] != -100
        assert not (learned & batch["context_mask"]).any()
        assert ((learned | batch["context_mask"]) == batch["attention_mask"].bool()).all()
