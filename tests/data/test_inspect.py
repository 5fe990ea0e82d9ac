"""What steps are like: counts, lengths, pairing, shortcuts and warnings, on steps made to have them."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from layerroute.data.builtin import builtin_steps
from layerroute.data.inspect import FEW_CONVERSATIONS, auc, inspect_steps
from layerroute.data.render import encode, render_step, tokenize_step
from layerroute.errors import DataError
from layerroute.evaluation.stats import MIN_GROUPS

THOUGHT = {"role": "assistant", "content": "I should look it up.", "partial": True}


@pytest.fixture
def conversation(make_step, weather):
    """A thought, the call that goes on from it, and an answer, under the same tools."""

    def make(number: int, group: str | None = None, source: str = "test", question: str = "And Lima?"):
        user = [{"role": "user", "content": f"{number}: {question}"}]
        fields = {"group": group or f"g{number}", "source": source, "tools": [weather]}
        return [
            make_step("planning", user, THOUGHT, id=f"{number}#0", **fields),
            make_step("tool_call", [*user, THOUGHT], id=f"{number}#1", **fields),
            make_step("answer", user, id=f"{number}#2", **fields),
        ]

    return make


def warnings_of(steps, *args) -> str:
    return "\n".join(inspect_steps(steps, *args)["warnings"])


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_mann_and_whitneys_u_over_the_pairs(seed):
    rng = np.random.default_rng(seed)
    values, positive = rng.integers(0, 6, 60), rng.random(60) < 0.4
    expected = mannwhitneyu(values[positive], values[~positive]).statistic / (positive.sum() * (~positive).sum())
    assert auc(values, positive) == pytest.approx(expected)
    assert auc(values, np.zeros(60, dtype=bool)) is None


@pytest.mark.parametrize("seed", range(5))
def test_within_conversations_only_their_own_rows_are_compared(seed):
    rng = np.random.default_rng(seed)
    values, positive, group = rng.integers(0, 6, 60), rng.random(60) < 0.4, rng.integers(0, 12, 60)
    pairs = [
        (values[i] > values[j]) + (values[i] == values[j]) / 2
        for i, j in itertools.product(range(60), repeat=2)
        if positive[i] and not positive[j] and group[i] == group[j]
    ]
    assert auc(values, positive, group) == pytest.approx(np.mean(pairs))
    assert auc(values, positive, np.arange(60)) is None


def test_counts_by_type_and_source(conversation):
    facts = inspect_steps([*conversation(1), *conversation(2), *conversation(3, source="other")[2:]])
    assert (facts["rows"], facts["conversations"]) == (7, 3)
    assert facts["types"]["answer"] == {"rows": 3, "conversations": 3}
    assert facts["sources"]["test"] == {"rows": 6, "conversations": 2, "tool_call": 2, "planning": 2, "answer": 2}
    assert facts["sources"]["other"] == {"rows": 1, "conversations": 1, "tool_call": 0, "planning": 0, "answer": 1}
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_pairing_counts_conversations_that_hold_both_types(conversation, make_step):
    lonely = make_step("planning", id="x", group="alone")
    elsewhere = make_step("planning", id="y", group="g9", source="other")  # a group of that name in another source
    facts = inspect_steps([*conversation(1), *conversation(2), lonely, elsewhere, conversation(9)[1]])
    pairing = facts["pairing"]
    assert (pairing["conversations"], pairing["rows"]) == (2, 4)
    assert pairing["sources"] == {"test": {"conversations": 2, "rows": 4}, "other": {"conversations": 0, "rows": 0}}
    assert "only 2 conversations hold both" in "\n".join(facts["warnings"])


def test_calls_are_direct_or_go_on_from_a_thought(conversation, make_step):
    steps = [*conversation(1), *conversation(2), make_step("tool_call", id="direct")]
    assert inspect_steps(steps)["tool_calls"] == {"after_thought": 2, "direct": 1}


def test_lengths_in_characters_leave_the_template_out(make_step, weather):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": "é"}}]}
    step = make_step("tool_call", [{"role": "user", "content": "Hello"}], call, [weather])
    bare = make_step("answer", [{"role": "user", "content": "Hi"}], id="b")
    lengths = inspect_steps([step, bare])["lengths"]
    tools, calls = json.dumps([weather]), '[{"arguments": {"a": "é"}, "name": "f"}]'
    assert lengths["tool_call"]["prompt_characters"] == dict.fromkeys(("10%", "50%", "90%", "max"), 5 + len(tools))
    assert lengths["tool_call"]["target_characters"]["max"] == len(calls)
    assert lengths["answer"]["prompt_characters"]["50%"] == 2
    assert set(lengths) == {"tool_call", "answer"} and "prompt_tokens" not in lengths["answer"]


def test_lengths_in_tokens_are_those_of_training(tokenizer):
    steps, limit = builtin_steps(90, seed=3), 1200
    facts = inspect_steps(steps, tokenizer, limit)
    for kind, lengths in facts["lengths"].items():
        chosen = [step for step in steps if step.step_type == kind]
        tokens = sorted(len(encode(tokenizer, render_step(tokenizer, step)[0])) for step in chosen)
        found = lengths["prompt_tokens"]
        assert found["max"] == tokens[-1] and found["50%"] in tokens
        assert sum(t <= found["90%"] for t in tokens) >= 0.9 * len(tokens) > sum(t < found["90%"] for t in tokens)
        samples = [tokenize_step(tokenizer, step, limit) for step in chosen]
        assert lengths["dropped"] == samples.count(None)
        assert lengths["cut"] == sum(sample.cut for sample in samples if sample)
    assert sum(lengths["cut"] for lengths in facts["lengths"].values()) > 0
    assert facts["shortcuts"]["length_unit"] == "tokens"


def test_a_length_at_which_many_rows_are_dropped_is_warned_about(conversation, tokenizer):
    steps = [step for i in range(4) for step in conversation(i)]
    assert "4 of 4 tool_call rows would be dropped" in warnings_of(steps, tokenizer, 60)
    assert "dropped" not in warnings_of(steps, tokenizer, 2000)


def test_shortcuts_pooled_and_within_conversations(make_step, weather):
    """Calls have longer prompts because their source has; within a conversation it is the other way round."""
    long, short = ([{"role": "user", "content": "x" * n}] for n in (100, 10))
    steps = [make_step("tool_call", long, id=f"c{i}", group=f"c{i}", source="calls", tools=[weather]) for i in range(8)]
    steps += [make_step("planning", short, id=f"p{i}", group=f"p{i}", source="plans") for i in range(4)]
    steps += [make_step("tool_call", short, id="a", group="both"), make_step("planning", long, id="b", group="both")]
    shortcuts = inspect_steps(steps)["shortcuts"]
    pooled, paired = shortcuts["pooled"], shortcuts["paired"]
    assert pooled["prompt_length"] == pytest.approx((8 * (4 + 1) + 2) / 45)  # the ninth call ties with four plans
    assert pooled["tools"] == pytest.approx((8 * 5 + 5 / 2) / 45) and pooled["messages"] == 0.5
    assert pooled["source"] == {"accuracy": pytest.approx(13 / 14), "majority": pytest.approx(9 / 14)}
    assert paired == {"prompt_length": 0, "tools": 0.5, "messages": 0.5, "source": {"accuracy": 0.5, "majority": 0.5}}


def test_the_thought_of_a_turn_is_no_message(conversation):
    paired = inspect_steps([step for i in range(3) for step in conversation(i)])["shortcuts"]["paired"]
    assert paired["messages"] == 0.5 and paired["prompt_length"] == 1  # but it is in the prompt


def test_enough_even_steps_give_no_warning(make_step):
    """Prompts of any length, both types in every conversation, and nothing twice."""
    lengths = iter(random.Random(0).sample(range(9000), 180))
    steps = [
        make_step(kind, [{"role": "user", "content": "x" * next(lengths)}], id=f"{i}{kind}", group=f"g{i % 20}")
        for i in range(60)
        for kind in ("planning", "tool_call", "answer")
    ]
    assert inspect_steps(steps)["warnings"] == []


def test_a_missing_type_and_few_rows_are_warned_about(conversation):
    steps = [step for i in range(60) for step in conversation(i, group=f"g{i % 9}")[:2]]
    text = warnings_of(steps)
    assert "no answer rows" in text
    assert "few tool_call rows: 60 in 9 conversations" in text
    assert "few planning rows: 49 in 49 conversations" in warnings_of([conversation(i)[0] for i in range(49)])
    assert "few" not in warnings_of([conversation(i)[0] for i in range(50)])
    assert FEW_CONVERSATIONS == MIN_GROUPS  # what an evaluation asks for


def test_types_that_never_share_a_conversation_are_warned_about(conversation):
    steps = [conversation(i)[i % 2] for i in range(40)]
    facts = inspect_steps(steps)
    assert "no conversation holds both tool_call and planning steps" in "\n".join(facts["warnings"])
    assert facts["shortcuts"]["paired"] is None
    alone = inspect_steps([conversation(i)[0] for i in range(40)])
    assert alone["shortcuts"]["pooled"] is None and "no conversation" not in "\n".join(alone["warnings"])


def test_length_that_gives_the_type_away_is_warned_about_either_way(make_step):
    def steps(call, plan):
        both = (("tool_call", call), ("planning", plan))
        return [
            make_step(kind, [{"role": "user", "content": "x" * n}], id=f"{i}{kind}", group=f"g{i}")
            for i in range(60)
            for kind, n in both
        ]

    assert "over all steps (AUC 1.00)" in warnings_of(steps(90, 10))
    assert "within conversations (AUC 0.00)" in warnings_of(steps(10, 90))
    assert "length" not in warnings_of(steps(50, 50))


def test_tools_that_only_calls_have_are_warned_about(make_step, weather):
    calls = [make_step("tool_call", id=f"c{i}", group=f"g{i}", tools=[weather]) for i in range(3)]
    plans = [make_step("planning", id=f"p{i}", group=f"g{i}") for i in range(3)]
    assert "tools are present on tool_call steps and on no planning step" in warnings_of(calls + plans)
    with_tools = make_step("planning", id="p", group="g1", tools=[weather])
    assert "tools are present" not in warnings_of([*calls, *plans, with_tools])
    assert "tools are present" not in warnings_of(calls)


def test_duplicates_by_id_and_by_content(conversation, make_step):
    steps = conversation(1)
    again = conversation(1)[0]
    renamed = make_step("answer", [{"role": "user", "content": "1: And Lima?"}], id="new", tools=steps[2].tools)
    facts = inspect_steps([*steps, again, renamed])
    assert facts["duplicates"] == {"ids": 1, "contents": 2}
    text = "\n".join(facts["warnings"])
    assert "1 rows repeat the id of another row" in text and "2 rows repeat the prompt and target" in text


def test_no_steps_and_steps_that_cannot_be_rendered_are_refused(make_tokenizer, conversation):
    with pytest.raises(DataError, match="no steps to inspect"):
        inspect_steps([])
    refusing = make_tokenizer("{{ raise_exception('never') }}")
    with pytest.raises(DataError, match=r"step '1#0' of 'test': .*never"):
        inspect_steps(conversation(1), refusing)
