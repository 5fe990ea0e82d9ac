"""Free running: which steps are generated, under which routes, and what is refused before anything is."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerroute import RouterConfig, get_routed_model
from layerroute.data.collate import StepCollator
from layerroute.data.load import open_steps
from layerroute.data.steps import Step, write_steps
from layerroute.errors import DataError
from layerroute.evaluation import baselines
from layerroute.evaluation.generations import choose_steps, fill, grade, task_of
from layerroute.evaluation.reading import StepReader
from layerroute.evaluation.samples import RowFile, read_rows

TOOLS = [{"name": "add", "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]


def make_step(id_, text=None, last=None, said=None, **meta):
    """A call of `add`, or a text where one is given."""
    calls = None if text else [{"name": "add", "arguments": {"a": 1}}]
    return Step.from_row(
        {
            "id": id_, "source": "s", "group": id_, "step_type": "planning" if text else "tool_call",
            "messages": [said or {"role": "user", "content": "hi"}, *([last] if last else [])],
            "tools": TOOLS, "target": {"role": "assistant", "content": text, "tool_calls": calls}, "meta": meta,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("so\n#### 18", "gsm8k"),
        ("####18\n", "gsm8k"),
        ("#### $1,234.50", "gsm8k"),
        ("#### -3.", "gsm8k"),
        ("#### Steps\n1. add\n#### 7", "gsm8k"),
        ("#### Steps\n1. add", None),
        ("#### 1. Steps", None),
        ("#### 18\nDone.", None),
        ("####\n18", None),
        ("#### ...", None),
    ],
)
def test_only_a_number_at_the_end_is_an_answer_to_grade(text, task):
    step = make_step("a", text)
    assert task_of(step) == task
    if task:
        assert grade(step, text[text.rfind("####") :])["correct"]
        assert not grade(step, "#### 19")["correct"]


def test_a_repeated_id_counts_once_and_the_draw_does_not_hang_on_order():
    steps = [make_step(f"x{number}") for number in range(20)]
    repeated = [*steps, steps[3], make_step("x3", last={"role": "user", "content": "other"})]
    whole = choose_steps(repeated, 50, 0, whole_turns=False)
    assert sorted(step.id for step in whole.steps) == sorted(step.id for step in steps) and whole.unfinished_turns == 0
    few = choose_steps(repeated, 5, 0, whole_turns=False).steps
    assert few == choose_steps(steps[::-1], 5, 0, whole_turns=False).steps and len(few) == 5
    assert few != choose_steps(steps, 5, 1, whole_turns=False).steps


def test_steps_within_a_turn_are_left_out_where_turns_must_be_whole():
    thought = {"role": "assistant", "content": "I add.", "partial": True}
    steps = [make_step("a"), make_step("b", last=thought), make_step("c", "text", last=thought)]
    assert len(choose_steps(steps, 9, 0, whole_turns=False).steps) == 2
    choice = choose_steps(steps, 9, 0, whole_turns=True)
    assert [step.id for step in choice.steps] == ["a"] and choice.unfinished_turns == 1


@pytest.mark.parametrize("accepted", [{"x": 1}, [], [1], "a", [{"add": 1}], [{"add": {"a": 1}}], [{}], 0])
def test_malformed_accepted_values_are_named(accepted):
    with pytest.raises(DataError, match=r"step 'bad' of 's': meta.accepted is .*give a list with one \{NAME"):
        grade(make_step("bad", accepted=accepted), "")


def test_accepted_values_replace_the_steps_own():
    call = '<tool_call>{"name": "add", "arguments": {"a": %d}}</tool_call>'
    plain, wider = make_step("a", accepted=None), make_step("a", accepted=[{"add": {"a": [1, 2]}}])
    assert [grade(step, call % 2)["correct"] for step in (plain, wider)] == [False, True]


@pytest.fixture
def fill_steps(routed_bytes, tmp_path):
    """Generate steps into a file, under a static arm of 20 points on planning and 40 on tool calls."""
    model, tokenizer = routed_bytes

    def call(steps, max_length=2048, batch_size=8, name="generations.jsonl"):
        write_steps(tmp_path / "steps.jsonl", steps)
        reader = StepReader(open_steps([str(tmp_path / "steps.jsonl")]), tokenizer, max_length, ())
        few = list(StepReader(reader.steps, tokenizer, 2048, ()).samples(set()))
        rates = {"all": 0.3, "tool_call": 0.4, "planning": 0.2, "rest": 0.2}
        chosen = baselines.choose(model, few, StepCollator(tokenizer.pad_token_id), rates, rows=1)
        file = RowFile(tmp_path / name)
        too_long = fill(model, reader, steps, lambda: chosen, file, max_new_tokens=2, batch_size=batch_size)
        return too_long, list(read_rows(file.path))

    return call


@pytest.fixture
def routed_bytes(byte_tokenizer, make_config):
    """A tiny routed model that reads bytes, and its tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (files("layerroute") / "templates" / "hermes.jinja").read_text()
    torch.manual_seed(0)
    config = make_config("llama", 5, vocab_size=300, max_position_embeddings=4096)
    model = get_routed_model(AutoModelForCausalLM.from_config(config), RouterConfig(protect_first=1, window=8))
    return model.eval().requires_grad_(False), tokenizer


def test_the_static_arm_skips_as_much_as_routing_did_on_that_step_type(fill_steps):
    steps = [make_step("call"), make_step("plan", "#### 7")]
    too_long, rows = fill_steps(steps)
    assert too_long == 0 and len(rows) == 8
    rates = {row["id"]: row["skip_rate"] for row in rows if row["arm"] == "static"}
    assert rates == {"call": pytest.approx(40), "plan": pytest.approx(20)}


def test_answers_do_not_hang_on_what_is_generated_beside_them(fill_steps, tmp_path):
    steps = [make_step(f"call{number}", said={"role": "user", "content": "x" * number}) for number in range(5)]

    def by_key(rows):
        return {(row["id"], row["arm"]): row for row in rows}

    alone, together = fill_steps(steps, batch_size=1, name="alone.jsonl")[1], fill_steps(steps, batch_size=3)[1]
    assert len(alone) == len(together) == 20 and by_key(alone) == by_key(together)
    file = tmp_path / "generations.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:7]))  # killed within a batch
    assert by_key(fill_steps(steps, batch_size=3)[1]) == by_key(together)
    assert len(file.read_text().splitlines()) == 20


def test_prompts_that_do_not_fit_are_counted_and_nothing_is_generated(fill_steps):
    assert fill_steps([make_step("call"), make_step("plan", "#### 7")], max_length=50) == (2, [])


def test_malformed_accepted_values_stop_before_the_first_step_is_generated(fill_steps, tmp_path):
    with pytest.raises(DataError, match="step 'bad'"):
        fill_steps([make_step("good"), make_step("bad", accepted=[1])])
    assert not (tmp_path / "generations.jsonl").exists()
