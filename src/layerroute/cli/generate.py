"""`layerroute generate`: one step of a conversation, with the route that it took."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerroute.cli.app import print_result
from layerroute.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["generate"]

_EPILOG = """\b
Examples:
  layerroute generate --adapter smollm2-135m --prompt "Plan a birthday party for ten."
  layerroute generate --adapter smollm2-135m --prompt "Weather in Oslo?" --tools tools.json
  layerroute generate --adapter my-adapter --messages chat.json --temperature 0.7 --seed 1 --json
  layerroute generate --adapter my-adapter --prompt "Weather in Oslo?" --skip-budget tool_call=0.2
  cat chat.json | layerroute generate --adapter my-adapter --messages -

tools.json holds a list of {"name", "description", "parameters": JSON Schema}, or OpenAI's form of
it; chat.json a list of {"role", "content"} messages.
"""


@click.command(epilog=_EPILOG)
@click.option("--adapter", required=True, help="An adapter folder, or a built-in name such as smollm2-135m.")
@click.option("--prompt", help="One user message.")
@click.option("--messages", help="JSON file with a conversation; - reads stdin.")
@click.option("--tools", help="JSON file with the tools that the model may call.")
@click.option("--backbone", help="Where the backbone is, if not under the name that the adapter records.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option(
    "--skip-budget", help="Average share of blocks to skip, such as 0.2, or tool_call=0.2 over one step type."
)
@click.option(
    "--boundary",
    multiple=True,
    metavar="TEXT",
    help="Decide the route again once this is generated; `template` for the marks that the chat template knows, "
    "`none` for once only.  [default: the adapter's]",
)
@click.option("--compiled", is_flag=True, help="Decode in compiled graphs: slow to start, then faster.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of sampling.")
@click.option("--device", help="Such as cuda or cpu.  [default: cuda if there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def generate(
    adapter: str,
    prompt: str | None,
    messages: str | None,
    tools: str | None,
    backbone: str | None,
    max_new_tokens: int,
    temperature: float,
    skip_budget: str | None,
    boundary: tuple[str, ...],
    compiled: bool,
    seed: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Generate the next step. The text goes to stdout, the route and its cost to stderr."""
    conversation = _conversation(prompt, messages)
    schemas = _read_json(tools, "--tools") if tools else None
    budget = None if skip_budget is None else _skip_budget(skip_budget)

    from transformers import set_seed

    from layerroute.cli.load import load_adapter
    from layerroute.data.chat import check_tools
    from layerroute.runtime.complete import complete
    from layerroute.runtime.cost import backbone_flops, executed_flops

    if schemas is not None:
        check_tools(schemas)
    model, tokenizer = load_adapter(adapter, backbone, device)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    request: dict[str, Any] = {"skip_budget": budget, "compiled": compiled, **sampling}
    if boundary:
        request["boundaries"] = _boundaries(tokenizer, boundary)
    step = complete(model, tokenizer, conversation, schemas, max_new_tokens=max_new_tokens, **request)

    segments = [(segment.start, segment.route) for segment in step.segments]
    executed = executed_flops(model, segments, step.prompt_tokens, step.new_tokens)
    whole = backbone_flops(model, step.prompt_tokens, step.new_tokens)
    result = {
        "text": step.text,
        "finished": step.finished,
        "route": step.segments[0].route.tolist(),
        "skip_rate": step.segments[0].skip_rate,
        "segments": [segment.as_dict() for segment in step.segments],
        "prompt_tokens": step.prompt_tokens,
        "new_tokens": step.new_tokens,
        "flops": {"prefill": executed.prefill, "decode": executed.decode},
        "backbone_flops": {"prefill": whole.prefill, "decode": whole.decode},
        "seconds": {"prefill": step.prefill_seconds, "decode": step.decode_seconds},
    }
    if not as_json:
        for segment in step.segments:
            click.echo(
                f"route {draw_route(segment.route.tolist())}  {100 * segment.skip_rate:.0f}% of blocks skipped, "
                f"{segment.new_tokens} tokens",
                err=True,
            )
        click.echo(f"{100 * executed.total / whole.total:.0f}% of the backbone's FLOPs", err=True)
    print_result(result, as_json, step.text)


def draw_route(route: list[bool]) -> str:
    """A row of blocks, the first on the left: full where executed, a dot where skipped."""
    return "".join("█" if is_open else "·" for is_open in route)


def _conversation(prompt: str | None, messages: str | None) -> list[dict[str, Any]]:
    if (prompt is None) == (messages is None):
        raise ConfigError("give either --prompt TEXT or --messages FILE")
    if prompt is not None:
        return [{"role": "user", "content": prompt}]
    loaded = _read_json(str(messages), "--messages")
    if not isinstance(loaded, list) or not loaded:
        raise DataError(f"--messages {messages}: expected a list of messages")
    return loaded


def _boundaries(tokenizer: PreTrainedTokenizerBase, markers: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    from layerroute.data.boundaries import boundary_tokens

    if "none" not in markers:
        found = boundary_tokens(tokenizer, markers)
        if not found:
            raise ConfigError("--boundary template: the chat template knows none of the marks; give the text itself")
        return found
    if len(markers) > 1:
        raise ConfigError(f"--boundary none is given beside {len(markers) - 1} others; give one or the other")
    return ()


def _skip_budget(text: str) -> float | dict[str, float]:
    """A share, or a step type's share; both are checked where the threshold is looked up."""
    step_type, equals, share = text.rpartition("=")
    try:
        number = float(share)
    except ValueError:
        raise ConfigError(
            f"--skip-budget {text!r}: expected a share of all blocks such as 0.2, or of one step type such as "
            "tool_call=0.2"
        ) from None
    return {step_type: number} if equals else number


def _read_json(name: str, option: str) -> Any:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        return json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {name}: cannot be read: {error}") from None
    except ValueError as error:
        raise DataError(f"{option} {name}: not valid JSON: {error}") from None
