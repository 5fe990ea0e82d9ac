"""Conversations whose calls and tools are written into the text: ShareGPT/Hermes and Glaive v2.

Contract: each parser takes one row and gives `(messages, tools)` in the chat form of `chat`, or raises `DataError`.
The part of a system prompt that explains the calling protocol goes away with the tools it lists: the chat template of
the backbone writes its own. Models wrote these texts, so JSON and Python literals are both read, as are Glaive's
single-quoted arguments. Boundary: no files, no steps.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from layerroute.data.chat import Chat, normalize_tool
from layerroute.errors import DataError

__all__ = ["parse_glaive", "parse_sharegpt"]

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_TOOLS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_GLAIVE_TURN = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_CALL = re.compile(r'\{\s*"name"\s*:\s*"([^"]+)"\s*(?:,\s*"arguments"\s*:\s*(.*))?\}', re.DOTALL)


def parse_sharegpt(row: Mapping[str, Any]) -> Chat:
    """`conversations` of `{"from", "value"}`; tools from a `tools` column or from `<tools>` in the system text.

    A system text that lists tools is dropped: in these datasets it is the calling protocol and nothing else.

    Raises:
        DataError: no conversation, an unknown speaker, or a call or tool list that cannot be read.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("'conversations' is a list with at least one turn")
    tools = _tool_list(row.get("tools") or [])
    messages: list[dict[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns = [{"from": "system", "value": row["system"]}, *turns]
    for turn in turns:
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if speaker not in _SPEAKERS or not isinstance(value, str):
            raise DataError(f"a turn has 'from' (one of {', '.join(_SPEAKERS)}) and a text 'value', not {turn!r:.80}")
        if speaker == "system":
            listed = [block for block in _TOOLS.findall(value) if block.strip()]
            if listed:
                tools = tools or _tool_list(listed[-1])
            elif value.strip():
                messages.append({"role": "system", "content": value.strip()})
        else:
            messages.extend(_sharegpt_turn(speaker, value))
    return messages, tools


def _sharegpt_turn(speaker: str, value: str) -> list[dict[str, Any]]:
    role = _SPEAKERS[speaker]
    if role == "user":
        return [{"role": "user", "content": value}]
    if role == "tool":
        return [_tool_message(text) for text in _RESPONSE.findall(value) or [value]]
    if speaker == "function_call":
        calls = _literal(value, "function_call")
        return [{"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}]
    calls = [_literal(text, "<tool_call>") for text in _CALL.findall(value)]
    text = _CALL.sub("", value).strip()
    if "<tool_call>" in text:
        raise DataError(f"a <tool_call> is not closed: {text!r:.80}")
    return [{"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}]


def _tool_message(text: str) -> dict[str, Any]:
    message = {"role": "tool", "content": text.strip()}
    named = re.match(r"""\s*\{\s*["']name["']\s*:\s*["']([^"']+)["']""", text)
    return {**message, "name": named.group(1)} if named else message


def _tool_list(listed: Any) -> list[dict[str, Any]]:
    """Tools from a list, or from text: a JSON or Python list, or objects one after another."""
    if isinstance(listed, str):
        listed = _literal(listed, "tools") if listed.strip().startswith("[") else _objects(listed)
    if not isinstance(listed, list):
        raise DataError(f"tools are a list of objects, not {listed!r:.80}")
    return [normalize_tool(tool) for tool in listed]


def _literal(text: str, what: str) -> Any:
    text = text.strip()
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise DataError(f"{what} is neither JSON nor a Python literal: {text!r:.80}") from None


def _objects(text: str) -> list[Any]:
    decoder, found, position = json.JSONDecoder(), [], text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError as error:
            raise DataError(f"tools cannot be read: {error}") from None
        found.append(value)
        position = text.find("{", end)
    return found


def parse_glaive(row: Mapping[str, Any]) -> Chat:
    """`system` ("SYSTEM: ... functions ... {...}") and `chat` ("USER: ... ASSISTANT: ... <|endoftext|> ...").

    Raises:
        DataError: a missing string, text before the first speaker, or functions or a call that cannot be read.
    """
    for name in ("system", "chat"):
        if not isinstance(row.get(name), str):
            raise DataError(f"{name!r} is a text, not {row.get(name)!r:.60}")
    system = re.sub(r"^\s*SYSTEM:\s*", "", row["system"]).strip()
    tools = _tool_list(_objects(system))
    messages = [{"role": "system", "content": system}] if system and not tools else []
    pieces = _GLAIVE_TURN.split(row["chat"].strip())
    if pieces[0].strip() or len(pieces) == 1:
        raise DataError(f"'chat' starts with USER: or ASSISTANT:, not {row['chat']!r:.60}")
    for speaker, text in zip(pieces[1::2], pieces[2::2], strict=True):
        messages.append(_glaive_turn(speaker, text.replace("<|endoftext|>", "").strip(), messages))
    return messages, tools


def _glaive_turn(speaker: str, text: str, before: list[dict[str, Any]]) -> dict[str, Any]:
    if speaker == "USER":
        return {"role": "user", "content": text}
    if speaker == "FUNCTION RESPONSE":
        calls = before[-1].get("tool_calls") if before else None
        return {"role": "tool", "content": text, **({"name": calls[0]["name"]} if calls else {})}
    thought, marker, call = text.partition("<functioncall>")
    if not marker:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": thought.strip(), "tool_calls": [_glaive_call(call)]}


def _glaive_call(text: str) -> dict[str, Any]:
    found = _GLAIVE_CALL.search(text)
    if not found:
        raise DataError(f"<functioncall> cannot be read: {text!r:.80}")
    arguments = (found.group(2) or "{}").strip()
    if arguments[:1] == "'" == arguments[-1:]:
        # quoted for a shell more than for JSON: the only escape within is that of the quote itself
        arguments = arguments[1:-1].replace("\\'", "'")
    value = _literal(arguments, "<functioncall> arguments")
    if not isinstance(value, dict):
        raise DataError(f"<functioncall> arguments are no object: {arguments!r:.80}")
    return {"name": found.group(1), "arguments": value}
