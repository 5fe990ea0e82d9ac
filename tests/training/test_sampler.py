"""The plan of a run's micro-batches."""

from __future__ import annotations

import random
from collections import Counter

from layerroute.training.sampler import StepSampler

TYPES = ["tool_call"] * 10 + ["planning"] * 30 + ["answer"] * 20
SOURCES = ["a" if i % 3 else "b" for i in range(60)]
LENGTHS = [random.Random(i).randrange(10, 500) for i in range(60)]


def plan(**changes):
    settings = {"batch_size": 3, "batches": 40, "seed": 7, "balance": True, "length_window": 8, "mixed": True} | changes
    sampler = StepSampler(TYPES, SOURCES, LENGTHS, **settings)
    rows = list(sampler)
    assert len(rows) == len(sampler)
    return [rows[i : i + settings["batch_size"]] for i in range(0, len(rows), settings["batch_size"])]


def padding(batches):
    return sum(max(LENGTHS[r] for r in batch) * len(batch) - sum(LENGTHS[r] for r in batch) for batch in batches)


def test_same_seed_same_plan():
    assert plan() == plan()
    assert plan() != plan(seed=8)


def test_balanced_micro_batches_hold_every_type():
    for batch in plan():
        assert Counter(TYPES[row] for row in batch) == {"tool_call": 1, "planning": 1, "answer": 1}


def test_balance_over_time_when_types_do_not_divide_the_batch():
    rows = [row for batch in plan(batch_size=4, batches=30) for row in batch]
    assert Counter(TYPES[row] for row in rows) == {"tool_call": 40, "planning": 40, "answer": 40}


def test_unbalanced_passes_use_every_row_once():
    rows = [row for batch in plan(balance=False, length_window=1) for row in batch]
    assert sorted(rows[:60]) == list(range(60))
    assert sorted(rows[60:]) == list(range(60))
    assert rows[:60] != rows[60:]


def test_every_row_of_a_type_before_any_twice():
    rows = [row for batch in plan(length_window=1) for row in batch if TYPES[row] == "tool_call"]
    for source in "ab":
        own = [row for row in range(10) if SOURCES[row] == source]
        assert sorted([row for row in rows if row in own][: len(own)]) == own


def test_sources_of_a_type_take_turns():
    rows = [row for batch in plan(length_window=1) for row in batch if TYPES[row] == "planning"]
    assert Counter(SOURCES[row] for row in rows[:20]) == {"a": 10, "b": 10}


def test_length_window_pads_less():
    assert padding(plan()) < 0.6 * padding(plan(length_window=1))


def test_like_lengths_pad_least():
    assert padding(plan(mixed=False)) < 0.6 * padding(plan())


def test_a_type_that_is_missing_is_no_pool():
    sampler = StepSampler(
        ["planning"] * 5, ["a"] * 5, [1] * 5, batch_size=2, batches=3, seed=0, balance=True, length_window=4, mixed=True
    )
    assert len(list(sampler)) == 6
