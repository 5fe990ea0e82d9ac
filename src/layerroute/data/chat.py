"""The chat form that rows, converters and prompts share: messages, calls and tools, checked and made uniform.

Contract: what comes out has text as its content and calls as `{"name", "arguments": object}`, so that two spellings of
one conversation render to one prompt. Boundary: knows no files, no chat templates, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerroute.errors import DataError

__all__ = ["ROLES", "Chat", "check_tools", "kind_of", "normalize_call", "normalize_message", "normalize_tool"]

ROLES = ("system", "user", "assistant", "tool")

Chat = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Messages and tools of one conversation."""

_checked_schemas: dict[str, str | None] = {}


def kind_of(value: object) -> str:
    """A JSON value's kind in words, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def normalize_message(message: Any) -> dict[str, Any]:
    """One chat message with text as its content and calls as `{"name", "arguments": object}`.

    Takes content given as a string, null or a list of text parts, and calls in the short form or in OpenAI's
    `{"type": "function", "function": {...}}`.

    Raises:
        DataError: an unknown role, content that is not text, or a malformed call.
    """
    if not isinstance(message, Mapping):
        raise DataError(f"a message is an object, not {kind_of(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"'role' is {role!r}; use one of {', '.join(ROLES)}")
    result: dict[str, Any] = {"role": role, "content": _text(message.get("content"))}
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise DataError("'tool_calls' is a list, and stands in assistant messages only")
        result["tool_calls"] = [normalize_call(call) for call in calls]
    if message.get("name"):
        result["name"] = message["name"]
    if message.get("partial"):
        if role != "assistant" or calls:
            raise DataError("'partial' is for an assistant message without calls")
        result["partial"] = True
    return result


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise DataError(f"'content' is text, null or a list of text parts, not {content!r:.60}")


def normalize_call(call: Any) -> dict[str, Any]:
    """`{"name", "arguments"}` of a call in the short or OpenAI's form; arguments become an object.

    Raises:
        DataError: no name, or arguments that are neither an object nor the JSON text of one.
    """
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise DataError(f"a call is an object with 'name' and 'arguments', not {call!r:.80}")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise DataError(
            f"arguments of {inner['name']!r} are neither an object nor a JSON string of one: "
            f"{inner.get('arguments')!r:.80}"
        )
    return {"name": inner["name"], "arguments": arguments}


def normalize_tool(tool: Any) -> dict[str, Any]:
    """`{"name", "description", "parameters"}` of a tool in the short or OpenAI's form; left out, the latter are empty.

    Raises:
        DataError: not an object with a name.
    """
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"a tool is an object with 'name', 'description' and 'parameters', not {tool!r:.80}")
    return {
        "name": inner["name"],
        "description": inner.get("description") or "",
        "parameters": inner.get("parameters") or {"type": "object", "properties": {}},
    }


def check_tools(tools: Any) -> None:
    """Refuse a tool list whose `parameters` are no JSON Schemas; OpenAI's wrapped form is accepted too.

    Raises:
        DataError: the first tool that cannot be used, by name.
    """
    if not isinstance(tools, list):
        raise DataError(f"'tools' is a list or null, not {kind_of(tools)}")
    for position, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError(f"tools[{position}] is an object with 'name', 'description' and 'parameters'")
        fault = _schema_fault(inner.get("parameters"))
        if fault:
            raise DataError(f"tool {inner['name']!r}: 'parameters' is no valid JSON Schema: {fault}")


def _schema_fault(schema: Any) -> str | None:
    if not isinstance(schema, dict):
        return f"an object is needed, not {kind_of(schema)}"
    key = json.dumps(schema, sort_keys=True)
    if key not in _checked_schemas:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for

        try:
            validator_for(schema, default=Draft202012Validator).check_schema(schema)
            _checked_schemas[key] = None
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path))
            _checked_schemas[key] = error.message.splitlines()[0] + (f" (at {where})" if where else "")
    return _checked_schemas[key]
