"""`layerroute demo`: a tool-call prompt and a planning prompt, each under its own route, beside the backbone."""

from __future__ import annotations

import logging
import statistics
from typing import TYPE_CHECKING, Any

import click

from layerroute.cli.app import print_result
from layerroute.cli.generate import draw_route

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerroute.model.routed import RoutedModel
    from layerroute.runtime.complete import Completion

__all__ = ["demo"]

_TOOLS = [
    {
        "name": "get_weather",
        "description": "Current weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["city"],
        },
    }
]
_PROMPTS: dict[str, dict[str, Any]] = {
    "tool call": {
        "messages": [{"role": "user", "content": "What is the weather in Oslo right now, in celsius?"}],
        "tools": _TOOLS,
    },
    "planning": {
        "messages": [
            {
                "role": "user",
                "content": "A baker makes 48 rolls and packs 6 in a bag. Each bag sells for 3 dollars, and 2 bags are "
                "left over in the evening. How much money did the baker take? Think step by step.",
            }
        ],
        "tools": None,
    },
}
_REPETITIONS = 3

_LOG = logging.getLogger(__name__)


@click.command(epilog="Example: layerroute demo --adapter smollm2-135m --json")
@click.option("--adapter", default="smollm2-135m", show_default=True, help="An adapter folder, or a built-in name.")
@click.option("--max-new-tokens", default=48, show_default=True, type=click.IntRange(min=2))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def demo(adapter: str, max_new_tokens: int, as_json: bool) -> None:
    """Answer a tool-call prompt and a planning prompt, and show route, cost and speed beside the backbone's."""
    from layerroute.cli.load import load_adapter

    model, tokenizer = load_adapter(adapter, None, None)
    _LOG.info("answering two prompts, routed and untouched in turn, %d times each; about a minute", 1 + _REPETITIONS)
    result = {
        name: _measure(model, tokenizer, max_new_tokens=max_new_tokens, **prompt) for name, prompt in _PROMPTS.items()
    }
    print_result(result, as_json, "\n\n".join(_section(name, figures) for name, figures in result.items()))


def _measure(model: RoutedModel, tokenizer: PreTrainedTokenizerBase, **request: Any) -> dict[str, Any]:
    """Both sides in turn, after one round that warms up; speeds are medians."""
    from layerroute.runtime.complete import complete
    from layerroute.runtime.cost import backbone_flops, executed_flops

    routed: list[Completion] = []
    plain: list[Completion] = []
    for _ in range(1 + _REPETITIONS):
        routed.append(complete(model, tokenizer, **request, do_sample=False))
        with model.disable_adapter():
            plain.append(complete(model, tokenizer, **request, do_sample=False))
    step = routed[0]
    tokens = (step.prompt_tokens, step.new_tokens)
    segments = [(segment.start, segment.route) for segment in step.segments]
    executed, whole = executed_flops(model, segments, *tokens), backbone_flops(model, *tokens)
    return {
        "text": step.text,
        "backbone_text": plain[0].text,
        "segments": [segment.as_dict() for segment in step.segments],
        "flops_share": {
            "prefill": executed.prefill / whole.prefill,
            "decode": executed.decode / whole.decode if whole.decode else None,
            "total": executed.total / whole.total,
        },
        "tokens_per_second": _speed(routed[1:]),
        "backbone_tokens_per_second": _speed(plain[1:]),
    }


def _speed(runs: list[Completion]) -> float | None:
    speeds = [run.decode_speed for run in runs if run.decode_speed is not None]
    return statistics.median(speeds) if speeds else None


def _section(name: str, figures: dict[str, Any]) -> str:
    share = figures["flops_share"]
    speed, plain = figures["tokens_per_second"], figures["backbone_tokens_per_second"]
    prompt = _PROMPTS[name]
    tools = "".join(f"  [tool: {tool['name']}]" for tool in prompt["tools"] or [])
    return "\n".join(
        [
            click.style(f"{name.upper()}", bold=True) + f"  {prompt['messages'][-1]['content']}{tools}",
            f"  answer        {_indented(figures['text'])}",
            *(_segment(segment) for segment in figures["segments"]),
            f"  FLOPs         {100 * share['total']:.1f}% of the backbone's (prefill {_percent(share['prefill'])}, "
            f"decode {_percent(share['decode'])}; head and routers included)",
            f"  tokens/s      {_number(speed)} decoding, the untouched backbone {_number(plain)} in the same run",
        ]
    )


def _segment(segment: dict[str, Any]) -> str:
    route = segment["route"]
    skipped = [str(index) for index, is_open in enumerate(route) if not is_open]
    return (
        f"  route         {draw_route(route)}  {100 * segment['skip_rate']:.0f}% of {len(route)} blocks skipped: "
        f"{', '.join(skipped) or 'none'}"
    )


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n" + " " * 16)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
