"""Batches: what is there, what is learned, what the route may read."""

from __future__ import annotations

import pickle
from array import array

import pytest
import torch

from layerroute.data.builtin import builtin_steps
from layerroute.data.collate import StepCollator, StepDataset
from layerroute.data.render import Sample
from layerroute.errors import ConfigError, DataError

PAD = 99


def sample(ids, prompt, step_type="answer"):
    return Sample(array("i", ids), prompt, step_type, "s", "g", "g#0", False)


SAMPLES = [sample([1, 2, 3, 4], 3, "planning"), sample([5, 6], 1, "tool_call")]


def test_right_padding_loss_on_the_target():
    batch = StepCollator(PAD)(SAMPLES)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4], [-100, 6, -100, -100]]
    assert batch["context_mask"].tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch["step_types"].tolist() == [1, 0]
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "context_mask": torch.bool,
        "step_types": torch.int64,
    }


def test_left_padding():
    batch = StepCollator(PAD, padding_side="left")(SAMPLES)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [PAD, PAD, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4], [-100, -100, -100, 6]]
    assert batch["context_mask"].tolist() == [[True, True, True, False], [False, False, True, False]]


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
