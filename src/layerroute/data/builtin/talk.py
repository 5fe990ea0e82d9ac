"""A conversation in the making: its tools under one style of names, its messages, and the steps taken from it.

Contract: `Talk` appends to its messages what it gives as a step, so that a later step sees the earlier ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

from layerroute.data.builtin.intents import INTENTS
from layerroute.data.builtin.slots import Intent, Slot, listed
from layerroute.data.steps import Step

__all__ = ["BRISK", "CAREFUL", "Request", "Talk", "Tool"]

BRISK = (
    "You are an assistant with tools. Act at once and do not explain what you are going to do.",
    "Help the user. When a tool is needed, call it directly; keep answers short.",
    "You are a helpful assistant that calls tools without comment.",
)
CAREFUL = (
    "You are an assistant with tools. Before every call and every answer, say what you are thinking.",
    "Help the user. Think before you act: first the reasoning, then the tool or the answer.",
    "You work for a busy person. Reason step by step, and never invent a value.",
)


@dataclass
class Request:
    """One intent with drawn values: what the user says, the call that serves it, and what comes back."""

    intent: Intent
    tool: str
    arguments: dict[str, Any]
    spoken: dict[str, str]
    extra: str
    result: dict[str, Any]

    def say(self, template: str) -> str:
        return template.format(**self.spoken)

    @property
    def call(self) -> dict[str, Any]:
        return {"name": self.tool, "arguments": self.arguments}

    @property
    def reply(self) -> str:
        return self.say(self.intent.reply)


@dataclass
class Talk:
    """A conversation in the making: messages so far, and the steps taken from it."""

    group: str
    rng: Random
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        self.case = rng.choice((_snake, _snake, _camel, _pascal, _dotted, _kebab))
        self.parameter_case = rng.choice((_snake, _camel))
        self.terse = rng.random() < 0.75  # parameters without descriptions

    def system(self, wordings: tuple[str, ...]) -> None:
        """Most conversations have a system message, which sets the manner."""
        if self.rng.random() < 0.7:
            self.messages.append({"role": "system", "content": self.rng.choice(wordings)})

    def user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def text(self, step_type: str, text: str) -> None:
        """A whole turn of text."""
        self._step(step_type, {"content": text})
        self.messages.append({"role": "assistant", "content": text})

    def think(self, text: str) -> None:
        """The start of a turn that goes on with `call` or `answer`."""
        self._step("planning", {"content": text, "partial": True})
        self.messages.append({"role": "assistant", "content": text, "partial": True})

    def call(self, *requests: Request) -> None:
        """One turn with a call for each request, and the tools' results."""
        calls = [request.call for request in requests]
        self._step("tool_call", {"content": None, "tool_calls": calls})
        thought = self.messages.pop()["content"] if self.messages[-1].get("partial") else ""
        self.messages.append({"role": "assistant", "content": thought, "tool_calls": calls})
        for request in requests:
            content = json.dumps(request.result, ensure_ascii=False)
            self.messages.append({"role": "tool", "content": content, "name": request.tool})

    def answer(self, text: str) -> None:
        """The user's answer, in a turn of its own or after `think`."""
        self._step("answer", {"content": text})
        thought = f"{self.messages.pop()['content']}\n" if self.messages[-1].get("partial") else ""
        self.messages.append({"role": "assistant", "content": thought + text})

    def _step(self, step_type: str, target: dict[str, Any]) -> None:
        whole = {"role": "assistant", "content": None, "tool_calls": None, **target}
        name = f"{self.group}#{len(self.steps)}"
        self.steps.append(
            Step(name, "builtin", self.group, step_type, list(self.messages), self.tools or None, whole, {})
        )

    def equip(self, *intents: Intent) -> dict[str, Tool]:
        """Choose the tools: those of the intents among up to six, in random order; by the intents' tool names."""
        rng = self.rng
        others = [intent for intent in INTENTS if intent not in intents]
        total = max(len(intents), rng.choices(range(1, 7), (10, 6, 3, 1, 1, 1))[0])
        chosen = [*intents, *rng.sample(others, total - len(intents))]
        rng.shuffle(chosen)
        tools = {intent.key: Tool.make(intent, self) for intent in chosen}
        self.tools = [tool.schema for tool in tools.values()]
        return tools

    def others(self, *used: Tool) -> str:
        names = [tool["name"] for tool in self.tools if tool["name"] not in {tool.name for tool in used}]
        if not names:
            return "It is the only tool I have."
        return self.rng.choice(
            (
                f"{listed(names)} would not help here.",
                f"Nothing else in the list ({', '.join(names)}) does this.",
                f"I can leave {listed(names)} aside.",
            )
        )


@dataclass(frozen=True)
class Tool:
    """An intent as a tool under this conversation's names."""

    intent: Intent
    name: str
    parameters: tuple[tuple[Slot, str], ...]
    schema: dict[str, Any]

    @classmethod
    def make(cls, intent: Intent, talk: Talk) -> Tool:
        rng = talk.rng
        slots = [slot for slot in intent.slots if not slot.extra or rng.random() < 0.7]
        parameters: list[tuple[Slot, str]] = []
        for slot in slots:
            taken = {name for _, name in parameters}
            names = [name for name in (talk.parameter_case(n.split("_")) for n in slot.names) if name not in taken]
            parameters.append((slot, rng.choice(names)))
        name = talk.case([intent.domain, intent.verb, *intent.noun.split()])
        schema = {
            "type": "object",
            "properties": {
                name: dict(slot.schema) if talk.terse else {**slot.schema, "description": slot.about}
                for slot, name in parameters
            },
            "required": [name for slot, name in parameters if not slot.extra],
        }
        return cls(intent, name, tuple(parameters), {"name": name, "description": intent.about, "parameters": schema})

    def request(self, rng: Random, unlike: Request | None = None, differ: str | None = None) -> Request:
        """Draw a request; `unlike` another one, only the slot `differ` is drawn anew, to another value."""
        arguments, spoken, extra = {}, {}, ""
        for slot, name in self.parameters:
            key = slot.names[0]
            if unlike and key != differ:
                if name in unlike.arguments:
                    arguments[name], spoken[key] = unlike.arguments[name], unlike.spoken[key]
                continue
            if slot.extra and rng.random() < 0.5:
                continue
            arguments[name], spoken[key] = slot.sample(rng)
            while unlike and arguments[name] == unlike.arguments[name]:
                arguments[name], spoken[key] = slot.sample(rng)
            extra += slot.extra.format(spoken[key])
        result = {}
        for key, sample in self.intent.results.items():
            result[key], spoken[key] = sample(rng)
        return Request(self.intent, self.name, arguments, spoken, extra, result)


def _snake(words: list[str]) -> str:
    return "_".join(words)


def _camel(words: list[str]) -> str:
    return words[0] + "".join(word.capitalize() for word in words[1:])


def _pascal(words: list[str]) -> str:
    return "".join(word.capitalize() for word in words)


def _dotted(words: list[str]) -> str:
    return f"{words[0]}.{'_'.join(words[1:])}" if len(words) > 1 else words[0]


def _kebab(words: list[str]) -> str:
    return "-".join(words)
