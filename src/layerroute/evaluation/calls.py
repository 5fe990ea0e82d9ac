"""From a model's generated text to the calls in it.

Three ways of writing calls are read, the first that the text contains:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>    what the chat templates ask for; one call or a list each
    {"name": ..., "arguments": {...}}                           bare: one call or a list, and nothing else
    ```json ... ```                                             a fence, with a call or a list of calls

What stands outside tags or fences is prose and ignored. The last tag or fence may be left open, as at a limit of new
tokens, if its JSON is complete. A reply is taken or refused as a whole: with one broken call there are no calls, as an
agent could not run it. Boundary: grades nothing (`grading`), needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from layerroute.data.chat import normalize_call, normalize_tool
from layerroute.errors import DataError

__all__ = ["parse_calls", "schema_valid"]

_END = "</tool_call>"
_TAGGED = re.compile(rf"<tool_call>(.*?)(?:{_END}|(?=<tool_call>)|\Z)", re.DOTALL)
_FENCED = re.compile(r"```[a-z_]*\s+(.*?)\s*(?:```|\Z)", re.DOTALL)


def parse_calls(text: str) -> tuple[list[dict[str, Any]], bool]:
    """Read the calls of a generated reply; never raises, whatever the text.

    Returns:
        The calls, `{"name", "arguments": object}` each, none where any part is broken; and whether something stands
        where calls do and all of it is JSON (which need not be a call).
    """
    try:
        values = [_DECODER.decode(part) for part in _parts(text)]
        calls = [call for value in values for call in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return [], False
    try:
        return [normalize_call(call) for call in calls], bool(values)
    except (DataError, RecursionError):
        return [], True


def schema_valid(call: dict[str, Any], tools: Sequence[Any]) -> bool:
    """Whether the call names a listed tool and its arguments satisfy that tool's JSON Schema.

    Args:
        call: `{"name", "arguments": object}`.
        tools: in the short or OpenAI's form, their schemas valid (`data.chat.check_tools`).

    Raises:
        DataError: the schema refers to something that it does not hold; nothing is fetched.
    """
    schema = next((tool["parameters"] for tool in map(normalize_tool, tools) if tool["name"] == call["name"]), None)
    if schema is None:
        return False
    validator = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())
    try:
        return validator.is_valid(call["arguments"])
    except Unresolvable as error:
        raise DataError(
            f"tool {call['name']!r}: 'parameters' refers to {error.ref!r}, which is not in the schema"
        ) from error


def _parts(text: str) -> list[str]:
    """The pieces of the text that should be JSON."""
    if "<tool_call>" in text:
        return [_without_partial_end(part) for part in _TAGGED.findall(text)]
    bare = text.strip()
    return [bare] if bare.startswith(("{", "[")) else _FENCED.findall(text)


def _without_partial_end(part: str) -> str:
    """Without the first characters of an end tag, which a limit of new tokens may have cut."""
    part = part.strip()
    cut = part.rfind("<")
    return part[:cut].strip() if cut >= 0 and _END.startswith(part[cut:]) else part


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
"""Python's reader also takes NaN and Infinity; JSON has neither."""
