"""Converters from what people have to steps: conversation logs and question/answer rows.

Contract: `converter(rows, source=..., skipped=None) -> Iterator[Step]`, lazily. A malformed row raises `DataError`
with its number, from 1; given a `Counter` as `skipped`, it is counted there by reason and left out instead (public
datasets are known to be dirty, a user's own logs should not be). Every assistant turn becomes a step:

    text alone       answer      planning where the source is a reasoning dataset
    calls alone      tool_call
    text and calls   planning (the text, its turn left open), then tool_call after the partial thought

A conversation that opens with the assistant gives no step for that turn. The conversation forms that keep calls in
text (ShareGPT/Hermes, Glaive) are parsed in `transcripts`. Boundary: reads no files, needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from layerroute.data.chat import Chat, check_tools, kind_of, normalize_message, normalize_tool
from layerroute.data.steps import Step
from layerroute.data.transcripts import parse_glaive, parse_sharegpt
from layerroute.errors import DataError

__all__ = ["CONVERTERS", "DIRTY", "Converter", "glaive_steps", "openai_steps", "qa_steps", "sharegpt_steps"]


class Converter(Protocol):
    """What every converter of this module looks like."""

    def __call__(
        self, rows: Iterable[Mapping[str, Any]], *, source: str = ..., skipped: Counter[str] | None = None
    ) -> Iterator[Step]: ...


def openai_steps(
    rows: Iterable[Mapping[str, Any]], *, source: str = "openai", skipped: Counter[str] | None = None
) -> Iterator[Step]:
    """Steps of OpenAI chat-completions logs: `messages` (with `tool_calls`) and, where tools were given, `tools`.

    The older `functions` and `function_call` are read as well. Requests of one conversation repeat its history: rows
    that open alike share a group, and a turn seen before is not given twice.
    """
    return _convert(rows, parse_openai, source, skipped)


def sharegpt_steps(
    rows: Iterable[Mapping[str, Any]], *, source: str = "sharegpt", skipped: Counter[str] | None = None
) -> Iterator[Step]:
    """Steps of ShareGPT conversations (`from`, `value`) with Hermes' `<tools>`, `<tool_call>`, `<tool_response>`."""
    return _convert(rows, parse_sharegpt, source, skipped)


def glaive_steps(
    rows: Iterable[Mapping[str, Any]], *, source: str = "glaive", skipped: Counter[str] | None = None
) -> Iterator[Step]:
    """Steps of Glaive function calling v2 as published: `system` and `chat` strings."""
    return _convert(rows, parse_glaive, source, skipped)


def qa_steps(
    rows: Iterable[Mapping[str, Any]], *, source: str = "qa", skipped: Counter[str] | None = None
) -> Iterator[Step]:
    """One planning step per `question`/`answer` row (GSM8K, Turing Open Reasoning).

    GSM8K's calculator marks (`<<48/2=24>>`) are dropped; its last line `#### 24` stays. Other columns go to `meta`.
    """

    def convert(row: Mapping[str, Any], number: int) -> list[Step]:
        question, answer = _string(row, "question").strip(), _string(row, "answer").strip()
        group = f"{source}-{number}"
        meta = {key: value for key, value in row.items() if key not in ("question", "answer")}
        fields = {"id": f"{group}#0", "source": source, "group": group, "step_type": "planning", "meta": meta}
        target = {"role": "assistant", "content": re.sub(r"<<[^<>]*>>", "", answer)}
        return [Step.from_row({**fields, "messages": [{"role": "user", "content": question}], "target": target})]

    return _guarded(rows, convert, skipped)


CONVERTERS: dict[str, Converter] = {
    "openai": openai_steps,
    "sharegpt": sharegpt_steps,
    "glaive": glaive_steps,
    "qa": qa_steps,
}
DIRTY = frozenset({"sharegpt", "glaive"})
"""Forms whose calls were written by a model as text: malformed rows are expected, counted and left out on loading."""


def _convert(
    rows: Iterable[Mapping[str, Any]],
    parse: Callable[[Mapping[str, Any]], Chat],
    source: str,
    skipped: Counter[str] | None,
) -> Iterator[Step]:
    seen: set[bytes] = set()

    def convert(row: Mapping[str, Any], number: int) -> list[Step]:
        messages, tools = parse(row)
        check_tools(tools)
        return list(_turns([normalize_message(message) for message in messages], tools, source, number))

    for step in _guarded(rows, convert, skipped):
        key = hashlib.sha256(json.dumps([step.messages, step.tools, step.target]).encode()).digest()
        if key not in seen:
            seen.add(key)
            yield step


def _guarded(
    rows: Iterable[Mapping[str, Any]],
    convert: Callable[[Mapping[str, Any], int], list[Step]],
    skipped: Counter[str] | None,
) -> Iterator[Step]:
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, Mapping):
                raise DataError(f"a row is an object, not {kind_of(row)}")
            steps = convert(row, number)
        except DataError as error:
            if skipped is None:
                raise DataError(f"row {number}: {error}") from None
            skipped[str(error)] += 1
            continue
        yield from steps


def _turns(messages: list[dict[str, Any]], tools: list[dict[str, Any]], source: str, number: int) -> Iterator[Step]:
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("the conversation has no assistant turn")
    opening = [[m["role"], m["content"]] for m in messages if m["role"] in ("system", "user")][:2]
    group = f"{source}-{hashlib.sha256(json.dumps(opening).encode()).hexdigest()[:16]}"
    count = 0

    def step(step_type: str, before: list[dict[str, Any]], target: dict[str, Any]) -> Step:
        nonlocal count
        count += 1
        whole = {"role": "assistant", "content": None, "tool_calls": None, **target}
        return Step(f"{group}-{number}#{count - 1}", source, group, step_type, before, tools or None, whole, {})

    for position, message in enumerate(messages):
        before, text, calls = messages[:position], message["content"].strip(), message.get("tool_calls")
        if message["role"] != "assistant" or not before:
            continue
        if not text and not calls:
            raise DataError(f"messages[{position}]: an assistant turn without text and calls")
        if calls and text:
            yield step("planning", before, {"content": text, "partial": True})
            before = [*before, {"role": "assistant", "content": text, "partial": True}]
        if calls:
            yield step("tool_call", before, {"tool_calls": calls})
        else:
            yield step("answer", before, {"content": text})


def parse_openai(row: Mapping[str, Any]) -> Chat:
    """Messages and tools of one chat-completions log row.

    Raises:
        DataError: no `messages`, or a message or tool that is not in OpenAI's form.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' is a list with at least one message")
    names: dict[str, str] = {}
    tools = [*(row.get("tools") or []), *(row.get("functions") or [])]
    return [_openai_message(m, names) for m in messages], [normalize_tool(tool) for tool in tools]


def _openai_message(message: Any, names: dict[str, str]) -> dict[str, Any]:
    """`names` collects the calls' ids, so that a tool's answer gets the tool's name."""
    if not isinstance(message, Mapping):
        raise DataError(f"a message is an object, not {kind_of(message)}")
    role = {"developer": "system", "function": "tool"}.get(message.get("role", ""), message.get("role"))
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    for call in calls:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            names[call.get("id", "")] = call["function"].get("name", "")
    name = names.get(message.get("tool_call_id", ""), message.get("name"))
    return {
        "role": role,
        "content": message.get("content"),
        **({"tool_calls": calls} if calls else {}),
        **({"name": name} if name else {}),
    }


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name!r} is a text, not {value!r:.60}")
    return value
