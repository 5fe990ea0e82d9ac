"""Conversion of small rows in each source's own format."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from layerroute.data import hub
from layerroute.data.hub import hub_steps
from layerroute.data.sources import glaive_steps, openai_steps, qa_steps, sharegpt_steps
from layerroute.data.steps import Step
from layerroute.errors import DataError

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Weather.", "parameters": PARAMETERS}
CALL = {"name": "weather", "arguments": {"city": "Lima"}}

OPENAI = {
    "messages": [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Weather in Lima?"}]},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
    "tools": [{"type": "function", "function": TOOL}],
}
HERMES_SYSTEM = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. "
    f"Here are the available tools: <tools> {[{'type': 'function', 'function': TOOL}]!r} </tools> Use the following "
    "schema. <tool_call>\n{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>"
)
HERMES = {
    "id": "d1",
    "conversations": [
        {"from": "system", "value": HERMES_SYSTEM},
        {"from": "human", "value": "Weather in Lima and Oslo?"},
        {
            "from": "gpt",
            "value": "<tool_call>\n{'arguments': {'city': 'Lima'}, 'name': 'weather'}\n</tool_call>\n"
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        },
        {
            "from": "tool",
            "value": '<tool_response>\n{"name": "weather", "content": "sunny"}\n</tool_response>\n'
            '<tool_response>\n{"name": "weather", "content": "snow"}\n</tool_response>',
        },
        {"from": "gpt", "value": "Sunny, and snow."},
    ],
    "category": "Weather",
}
GLAIVE = {
    "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    + json.dumps(TOOL, indent=4)
    + "\n"
    + json.dumps({"name": "news", "description": "News."}, indent=4)
    + "\n",
    "chat": 'USER: It\'s Lima I ask about.\n\n\nASSISTANT: <functioncall> {"name": "weather", '
    '"arguments": \'{"city": "Lima", "note": "it\\\'s: urgent"}\'} <|endoftext|>\n\n\n'
    'FUNCTION RESPONSE: {"sky": "sunny"}\n\n\nASSISTANT: It is sunny. <|endoftext|>\n\n\n'
    "USER: Thanks.\n\n\nASSISTANT: You are welcome. <|endoftext|>\n\n\n",
}


def shapes(steps: list[Step]) -> list[tuple[str, list[str]]]:
    return [(step.step_type, [message["role"] for message in step.messages]) for step in steps]


def check(steps: list[Step]) -> None:
    """Whatever a converter gives can be written and read back."""
    assert len({step.id for step in steps}) == len(steps)
    for step in steps:
        assert Step.from_row(json.loads(json.dumps(step.to_row()))) == step


def test_openai_turn_with_text_and_call_is_two_steps():
    steps = list(openai_steps([OPENAI]))
    check(steps)
    assert shapes(steps) == [
        ("planning", ["system", "user"]),
        ("tool_call", ["system", "user", "assistant"]),
        ("answer", ["system", "user", "assistant", "tool"]),
    ]
    thought, call, answer = steps
    assert thought.target == {"role": "assistant", "content": "Let me look.", "tool_calls": None, "partial": True}
    assert call.messages[-1] == {"role": "assistant", "content": "Let me look.", "partial": True}
    assert call.target["tool_calls"] == [CALL] and call.target["content"] is None
    assert answer.messages[2] == {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}
    assert answer.messages[3] == {"role": "tool", "content": "sunny", "name": "weather"}
    assert answer.tools == [TOOL] and len({step.group for step in steps}) == 1


def test_openai_requests_that_repeat_a_history_give_each_turn_once():
    rows = [{**OPENAI, "messages": OPENAI["messages"][:3]}, OPENAI]
    assert [s.target for s in openai_steps(rows)] == [s.target for s in openai_steps([OPENAI])]


def test_openai_functions_of_the_older_api():
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Lima"}'},
            },
            {"role": "function", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ],
        "functions": [TOOL],
    }
    steps = list(openai_steps([row]))
    assert [s.step_type for s in steps] == ["tool_call", "answer"]
    assert steps[0].target["tool_calls"] == [CALL] and steps[1].messages[-1]["name"] == "weather"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "'messages' is a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, "without text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'content' is text"),
        ({**OPENAI, "tools": [{"type": "function"}]}, "a tool is an object"),
        ({**OPENAI, "tools": [{"name": "f", "parameters": {"type": "dict"}}]}, "no valid JSON Schema"),
        ("text", "a row is an object"),
    ],
)
def test_a_malformed_log_row_raises_with_its_number_or_is_counted(row, message):
    with pytest.raises(DataError) as caught:
        list(openai_steps([OPENAI, row]))
    assert str(caught.value).startswith("row 2: ") and message in str(caught.value)
    skipped: Counter[str] = Counter()
    assert len(list(openai_steps([row, OPENAI], skipped=skipped))) == 3
    assert sum(skipped.values()) == 1 and message in next(iter(skipped))


def test_hermes_tools_calls_and_responses():
    steps = list(sharegpt_steps([HERMES], source="hermes"))
    check(steps)
    assert shapes(steps) == [("tool_call", ["user"]), ("answer", ["user", "assistant", "tool", "tool"])]
    assert steps[0].tools == [TOOL]
    assert steps[0].target["tool_calls"] == [CALL, {"name": "weather", "arguments": {"city": "Oslo"}}]
    assert [m["name"] for m in steps[1].messages[2:]] == ["weather", "weather"]
    assert "snow" in steps[1].messages[3]["content"] and "<tool_response>" not in steps[1].messages[3]["content"]


def test_sharegpt_with_a_tools_column_and_calls_of_their_own_speaker():
    row = {
        "system": "Be kind.",
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
    }
    steps = list(sharegpt_steps([row]))
    assert shapes(steps) == [
        ("tool_call", ["system", "user"]),
        ("answer", ["system", "user", "assistant", "tool"]),
    ]
    assert steps[0].target["tool_calls"] == [CALL] and steps[0].tools == [TOOL]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "gpt", "value": "<tool_call>\n{'name': weather}\n</tool_call>"}, "neither JSON nor a Python"),
        ({"from": "gpt", "value": "<tool_call>\n{}"}, "not closed"),
        ({"from": "robot", "value": "x"}, "'from'"),
        ({"from": "gpt", "value": "<tool_call>[1]</tool_call>"}, "a call is an object"),
    ],
)
def test_malformed_sharegpt_turns(turn, message):
    row = {"conversations": [{"from": "human", "value": "x"}, turn]}
    with pytest.raises(DataError, match=message):
        list(sharegpt_steps([row]))


def test_glaive_strings():
    steps = list(glaive_steps([GLAIVE]))
    check(steps)
    assert shapes(steps) == [
        ("tool_call", ["user"]),
        ("answer", ["user", "assistant", "tool"]),
        ("answer", ["user", "assistant", "tool", "assistant", "user"]),
    ]
    assert steps[0].messages[0]["content"] == "It's Lima I ask about."
    assert steps[0].target["tool_calls"] == [{"name": "weather", "arguments": {"city": "Lima", "note": "it's: urgent"}}]
    assert [tool["name"] for tool in steps[0].tools] == ["weather", "news"]
    assert steps[1].messages[-1] == {"role": "tool", "content": '{"sky": "sunny"}', "name": "weather"}
    assert steps[1].target["content"] == "It is sunny."


def test_glaive_without_functions_keeps_its_system_text_and_a_thought_before_a_call_is_a_step():
    plain = {
        "system": "SYSTEM: You are a helpful assistant, with no access to external functions.\n",
        "chat": "USER: Hi\n\n\nASSISTANT: Hello. <|endoftext|>",
    }
    assert next(glaive_steps([plain])).messages[0]["content"].startswith("You are a helpful assistant")
    chat = 'USER: Weather?\n\n\nASSISTANT: One moment. <functioncall> {"name": "weather"} <|endoftext|>'
    steps = list(glaive_steps([{**GLAIVE, "chat": chat}]))
    assert [s.step_type for s in steps] == ["planning", "tool_call"]
    assert steps[1].target["tool_calls"] == [{"name": "weather", "arguments": {}}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"system": "SYSTEM: x"}, "'chat' is a text"),
        ({"system": "", "chat": "hello"}, "'chat' starts with"),
        ({"system": "SYSTEM: {broken", "chat": GLAIVE["chat"]}, "tools cannot be read"),
        ({"system": "", "chat": "USER: a\nASSISTANT: <functioncall> nothing"}, "cannot be read"),
        ({"system": "", "chat": 'USER: a\nASSISTANT: <functioncall> {"name": "f", "arguments": \'[1]\'}'}, "no object"),
    ],
)
def test_malformed_glaive_rows(row, message):
    with pytest.raises(DataError, match=message):
        list(glaive_steps([row]))


def test_question_and_answer_rows_are_planning():
    rows = [
        {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"},
        {"conversation_id": "7", "domain": "Physics", "question": "Q?", "answer": "A."},
    ]
    first, second = qa_steps(rows, source="gsm8k")
    check([first, second])
    assert first.step_type == "planning" and first.tools is None
    assert first.target["content"] == "48/2 = 24 clips.\n#### 24"
    assert second.meta == {"conversation_id": "7", "domain": "Physics"} and second.group != first.group
    with pytest.raises(DataError, match="row 1: 'answer'"):
        list(qa_steps([{"question": "Q?", "answer": None}]))


def test_a_hub_dataset_is_read_through_datasets_and_dirty_rows_are_counted(tmp_path, monkeypatch):
    broken = {**GLAIVE, "chat": "nothing"}
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [GLAIVE, broken])))
    monkeypatch.setitem(hub.HUB, "glaive", hub.HubSource(str(tmp_path), (None,), glaive_steps))
    for streaming in (False, True):
        skipped: Counter[str] = Counter()
        steps = list(hub_steps("glaive", skipped, streaming=streaming))
        assert [s.step_type for s in steps] == ["tool_call", "answer", "answer"]
        assert {s.source for s in steps} == {"glaive"} and sum(skipped.values()) == 1


@pytest.mark.parametrize("name", sorted(hub.HUB))
def test_a_hub_out_of_reach_is_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.setitem(
        hub.HUB, name, hub.HubSource(str(tmp_path / "nothing"), hub.HUB[name].configs, hub.HUB[name].convert)
    )
    with pytest.raises(DataError, match=rf"dataset '{name}' .* cannot be read from the hub: .*'builtin'"):
        list(hub_steps(name))
