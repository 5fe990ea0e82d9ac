"""Calls read from generated text: tags, bare JSON, fences; what is broken, and what a tool's schema says of it."""

import json
import random
from importlib.resources import files

import pytest

from layerroute.data.chat import normalize_message
from layerroute.data.render import render_step
from layerroute.data.steps import Step
from layerroute.errors import DataError
from layerroute.evaluation.calls import parse_calls, schema_valid

A = {"name": "search", "arguments": {"query": "tea"}}
B = {"name": "add.up", "arguments": {"numbers": [1, 2.5], "note": "a </b> \n <c>"}}
ONE, TWO = json.dumps(A), json.dumps(B)


@pytest.mark.parametrize(
    "text, calls",
    [
        (f"<tool_call>\n{ONE}\n</tool_call>", [A]),
        (f"I look it up.\n<tool_call>{ONE}</tool_call>\n<tool_call>\n{TWO}\n</tool_call> Done.", [A, B]),
        (f"<tool_call>[{ONE}, {TWO}]</tool_call>", [A, B]),
        (f"<tool_call>{TWO}</tool_call><tool_call>{ONE}", [B, A]),
        (f"<tool_call>{TWO}<tool_call>{ONE}\n</tool_c", [B, A]),
        (f" {ONE}\n", [A]),
        (f"[{ONE}, {TWO}]", [A, B]),
        (f"```json\n{ONE}\n```", [A]),
        (f"Here:\n```json\n[{ONE}]\n```\nand\n```\n{TWO}", [A, B]),
        (
            '{"name": "run", "arguments": {"code": "```sh\\nls\\n```"}}',
            [{"name": "run", "arguments": {"code": "```sh\nls\n```"}}],
        ),
        (
            '{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}',
            [{"name": "f", "arguments": {"x": 1}}],
        ),
    ],
)
def test_every_way_of_writing_calls_is_read(text, calls):
    assert parse_calls(text) == (calls, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is 4.",
        "<tool_call>",
        "<tool_call></tool_call>",
        ONE[:-1],
        f"<tool_call>{ONE[:-3]}",
        f"<tool_call>{ONE}}}</tool_call>",
        f"<tool_call>{ONE}</tool_call><tool_call>{TWO[:20]}</tool_call>",
        f"<tool_call>{ONE} and so on",
        f"{ONE} is the call",
        "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
        '{"name": "f", "arguments": {"x": NaN}}',
        "[" * 100_000,
        "<tool_call>" * 2_000,
        '{"name": "f", "arguments": {"x": ' + "9" * 10_000 + "}}",
    ],
    ids=range(15),
)
def test_what_is_no_json_gives_no_calls(text):
    assert parse_calls(text) == ([], False)


@pytest.mark.parametrize("text", ["{}", "[3]", '{"name": "f"}', '{"name": "f", "arguments": 3}', f"[{ONE}, null]"])
def test_json_that_is_no_call_is_valid_json_all_the_same(text):
    """One broken call refuses the whole reply."""
    assert parse_calls(text) == ([], True)
    assert parse_calls(f"<tool_call>{text}</tool_call>") == ([], True)


def test_an_empty_list_is_json_without_calls():
    assert parse_calls("[]") == ([], True)


@pytest.mark.parametrize("calls", [[A], [A, B]])
def test_what_the_templates_write_is_read_back(calls, byte_tokenizer):
    """The target of a tool call step, as a model is trained to write it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (files("layerroute") / "templates" / "hermes.jinja").read_text()
    message = normalize_message({"role": "assistant", "content": None, "tool_calls": calls})
    row = {"id": "a", "source": "s", "group": "g", "step_type": "tool_call"}
    row |= {"messages": [{"role": "user", "content": "tea?"}], "target": message}
    assert parse_calls(render_step(tokenizer, Step.from_row(row))[1].replace("<|im_end|>", "")) == (calls, True)


def test_cut_and_damaged_texts_never_raise():
    """Every beginning of a reply, and replies with characters taken from one another."""
    rng = random.Random(0)
    whole = f"Well.\n<tool_call>\n[{ONE}, {TWO}]\n</tool_call>\n```json\n{ONE}\n```"
    for text in (whole, whole[6:], whole[18:], TWO, f"```json\n{TWO}\n```"):
        for end in range(len(text)):
            letters = list(text[:end])
            for _ in range(rng.randint(0, 2)):
                letters.insert(rng.randint(0, len(letters)), rng.choice(text))
            calls, is_json = parse_calls("".join(letters))
            assert is_json or not calls


SCHEMA = {
    "type": "object",
    "properties": {"query": {"type": "string"}, "count": {"type": "integer", "minimum": 1}},
    "required": ["query"],
}
TOOL = {"name": "search", "description": "", "parameters": SCHEMA}


@pytest.mark.parametrize("tools", [[TOOL], [{"type": "function", "function": TOOL}]])
@pytest.mark.parametrize(
    "name, arguments, valid",
    [
        ("search", {"query": "tea"}, True),
        ("search", {"query": "tea", "count": 2}, True),
        ("search", {"query": "tea", "count": 0}, False),
        ("search", {"query": "tea", "count": "2"}, False),
        ("search", {"count": 2}, False),
        ("find", {"query": "tea"}, False),
    ],
)
def test_a_call_satisfies_its_tools_schema(name, arguments, valid, tools):
    assert schema_valid({"name": name, "arguments": arguments}, tools) is valid


def test_a_schema_that_refers_elsewhere_is_said_and_not_fetched():
    inside = {"$defs": {"text": {"type": "string"}}, "type": "object", "properties": {"q": {"$ref": "#/$defs/text"}}}
    outside = {"type": "object", "properties": {"q": {"$ref": "http://example.com/text.json"}}}
    call = {"name": "f", "arguments": {"q": 1}}
    assert not schema_valid(call, [{"name": "f", "parameters": inside}])
    with pytest.raises(DataError, match=r"'f'.*http://example.com/text.json"):
        schema_valid(call, [{"name": "f", "parameters": outside}])
