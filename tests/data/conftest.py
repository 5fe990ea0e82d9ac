"""A small byte-level tokenizer with a ChatML template that knows tools, and steps to render with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from layerroute.data.steps import Step

CHATML = """
{%- if messages[0].role == 'system' or tools %}
{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'Default.') }}
{%- if tools %}{{- '\n<tools>\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
{{- '</tools>' }}{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
{{- '\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def build_step(
    step_type: str = "answer",
    messages: list[dict[str, Any]] | None = None,
    target: dict[str, Any] | None = None,
    tools: list[dict[str, Any]] | None = None,
    **fields: Any,
) -> Step:
    """A step with everything left out filled in."""
    targets = {
        "answer": {"role": "assistant", "content": "It is sunny."},
        "planning": {"role": "assistant", "content": "I should look it up."},
        "tool_call": {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"name": "get_weather", "arguments": {"city": "Lima"}}],
        },
    }
    row = {
        "id": "a#0",
        "source": "test",
        "group": "a",
        "step_type": step_type,
        "messages": messages or [{"role": "user", "content": "How is the weather in Lima?"}],
        "tools": tools,
        "target": target or targets[step_type],
        **fields,
    }
    return Step.from_row(row)


@pytest.fixture(scope="session")
def make_tokenizer(byte_tokenizer) -> Callable[..., PreTrainedTokenizerFast]:
    def make(template: str = CHATML) -> PreTrainedTokenizerFast:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def make_step() -> Callable[..., Step]:
    return build_step


@pytest.fixture
def weather() -> dict[str, Any]:
    return WEATHER


@pytest.fixture
def chatml() -> str:
    return CHATML
