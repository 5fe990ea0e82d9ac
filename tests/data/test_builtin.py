"""The built-in source: deterministic, well formed, and true to its own words."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter, defaultdict

import pytest
from jsonschema import Draft202012Validator

from layerroute.data.builtin import builtin_steps
from layerroute.data.builtin.problems import word_problem
from layerroute.data.steps import STEP_TYPES, Step

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return builtin_steps(1500, seed=0)


def test_the_seed_decides_everything():
    assert builtin_steps(200, seed=3) == builtin_steps(200, seed=3)
    assert builtin_steps(100, seed=3) == builtin_steps(200, seed=3)[:100]
    assert builtin_steps(200, seed=3) != builtin_steps(200, seed=4)
    assert builtin_steps(0, seed=3) == []


def test_rows_are_well_formed_and_unlike(steps):
    assert len(steps) == 1500 and len({s.id for s in steps}) == 1500
    for step in steps:
        assert Step.from_row(json.loads(json.dumps(step.to_row()))) == step
    assert len({json.dumps([s.messages, s.tools, s.target]) for s in steps}) > 1480


def test_types_are_balanced_and_share_their_contexts(steps):
    counts = Counter(s.step_type for s in steps)
    assert all(counts[t] > 0.25 * len(steps) for t in STEP_TYPES)
    by_group = defaultdict(set)
    for step in steps:
        by_group[step.group].add(step.step_type)
    assert sum(types == set(STEP_TYPES) for types in by_group.values()) > 0.35 * len(by_group)
    with_tools = Counter(s.step_type for s in steps if s.tools)
    assert all(with_tools[t] > 0.85 * counts[t] for t in STEP_TYPES)
    assert {len(s.tools or []) for s in steps} == set(range(7))
    lengths = {t: sorted(len(json.dumps([s.messages, s.tools])) for s in steps if s.step_type == t) for t in STEP_TYPES}
    medians = [values[len(values) // 2] for values in lengths.values()]
    assert max(medians) < 1.5 * min(medians)


def test_calls_obey_their_schemas_and_some_are_parallel(steps):
    calls = [(step, call) for step in steps for call in step.target["tool_calls"] or []]
    assert len(calls) > sum(s.step_type == "tool_call" for s in steps)
    for step, call in calls:
        schema = next(t["parameters"] for t in step.tools if t["name"] == call["name"])
        Draft202012Validator({**schema, "additionalProperties": False}).validate(call["arguments"])


def spoken_forms(value) -> list[str]:
    """How a value may stand in the user's words, worked out from the value alone."""
    if value is True:
        return ["with breakfast"]
    if isinstance(value, list):
        return [f"{', '.join(value[:-1])} and {value[-1]}"]
    if isinstance(value, float):
        return [f"{value:.2f}"]
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        year, month, day = map(int, value.split("-"))
        return [f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}"]
    if isinstance(value, str) and re.fullmatch(r"\d\d:\d\d", value):
        hour = int(value[:2])
        return [value, f"{(hour + 11) % 12 + 1}{value[2:]} {'am' if hour < 12 else 'pm'}"]
    return [str(value)]


def test_arguments_follow_from_the_users_words(steps):
    for step in steps:
        said = "\n".join(m["content"] for m in step.messages if m["role"] == "user")
        for call in step.target["tool_calls"] or []:
            for value in call["arguments"].values():
                assert any(form in said for form in spoken_forms(value)), (step.id, value, said)


def test_a_thought_that_a_call_follows_is_taken_up_by_the_next_step(steps):
    for step, after in itertools.pairwise(steps):
        if step.target.get("partial"):
            assert after.group == step.group
            assert after.messages[-1] == {"role": "assistant", "content": step.target["content"], "partial": True}
            assert after.messages[:-1] == step.messages


def test_all_arithmetic_is_right(steps):
    checked = 0
    for step in steps:
        text = step.target["content"] or ""
        for left, right in re.findall(r"((?:\(?-?\d[\d.]*\)? [-+*/] )+\(?-?\d[\d.]*\)?) = (-?\d+(?:\.\d+)?)", text):
            assert eval(left) == pytest.approx(float(right)), text
            checked += 1
    assert checked > 200


def test_word_problems_end_with_their_result():
    rng = random.Random(0)
    for _ in range(300):
        question, reasoning, result = word_problem(rng)
        assert question.endswith("?") and reasoning.endswith(f"So the answer is {result}.")
        assert reasoning.splitlines()[-2].rstrip(".").find(str(result)) >= 0
