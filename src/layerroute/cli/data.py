"""`layerroute data`: a person's own logs to steps, and what those steps are like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerroute.cli.app import print_result
from layerroute.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerroute.data.load import StepStream

__all__ = ["data"]

_CONVERT_EPILOG = """\b
Examples:
  layerroute data convert openai:logs.jsonl --output steps.jsonl.gz
  layerroute data convert sharegpt:chats.json qa:problems.jsonl --output steps.jsonl

SPEC is what --data of other commands takes: FORMAT:FILE with openai, sharegpt, glaive or qa, a file
of steps, `builtin`, or a hub source. Rows of other formats are for you to write: see docs/data.md.
"""
_INSPECT_EPILOG = """\b
Examples:
  layerroute data inspect steps.jsonl.gz
  layerroute data inspect steps.jsonl.gz --model smollm2-135m --max-length 1024
  layerroute data inspect openai:logs.jsonl builtin:600 --limit 500 --json

AUC: how often a tool call has the larger value of a tool call and a planning step; 0.5 tells
nothing, 0 and 1 everything.
"""
_SHORTCUTS = {"prompt_length": "prompt length", "tools": "presence of tools", "messages": "number of messages"}


@click.group()
def data() -> None:
    """Convert your agent's logs to steps, and look at what you have."""


@data.command(epilog=_CONVERT_EPILOG)
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
@click.option("--output", required=True, help="The file to write, .jsonl or .jsonl.gz; must not exist.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def convert(specs: tuple[str, ...], output: str, as_json: bool) -> None:
    """Write the steps of logs in the row format that every other command reads."""
    path = Path(output)
    _check(path)

    from layerroute.data.load import open_steps

    steps = open_steps(specs)
    counts, conversations = _write(path, steps)
    result = {
        "output": output,
        "rows": steps.count,
        "conversations": conversations,
        "types": counts,
        "left_out": steps.skipped,
        "data": steps.digests,
    }
    lines = [
        f"{steps.count} steps in {conversations} conversations: "
        + ", ".join(f"{count} {name}" for name, count in counts.items()),
        *_left_out(steps.skipped),
        f"steps: {output}",
    ]
    print_result(result, as_json, "\n".join(lines))


@data.command(epilog=_INSPECT_EPILOG)
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
@click.option("--model", help="A backbone, whose tokenizer counts tokens: a built-in name, a folder, or a hub id.")
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="With --model: count rows that are cut or dropped at so many tokens.",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many steps per source, drawn by whole groups.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect(
    specs: tuple[str, ...], model: str | None, max_length: int | None, limit: int | None, as_json: bool
) -> None:
    """Show counts, lengths and pairing, and what a gate could learn instead of the step type."""
    if max_length is not None and model is None:
        raise ConfigError(f"--max-length {max_length} counts tokens; give --model, whose tokenizer makes them")

    from layerroute.data.inspect import inspect_steps
    from layerroute.data.load import open_steps

    steps = open_steps(specs, limit_per_source=limit)
    facts = inspect_steps(steps, _tokenizer(model) if model else None, max_length)
    result = {"data": steps.digests, "left_out": steps.skipped, **facts}
    print_result(result, as_json, "\n".join(_text(result)))


def _check(path: Path) -> None:
    """Before anything is read."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"--output {path}: steps are .jsonl or .jsonl.gz files; give such a name")
    if path.exists():
        raise ConfigError(f"--output {path}: exists already; give another name, or remove it first")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}")


def _write(path: Path, steps: StepStream) -> tuple[dict[str, int], int]:
    """Write steps beside their place, and move them there once all are written; counts by type, and conversations."""
    import os

    from layerroute.data.steps import STEP_TYPES, Step, write_steps

    counts = dict.fromkeys(STEP_TYPES, 0)
    conversations = set()

    def counted() -> Iterator[Step]:
        for step in steps:
            counts[step.step_type] += 1
            conversations.add((step.source, step.group))
            yield step

    new = path.with_name(f".new.{path.name}")
    try:
        try:
            write_steps(new, counted())
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror or error})") from None
    return counts, len(conversations)


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    from transformers.utils import logging as transformers_logging

    from layerroute.model.backbone import load_backbone

    transformers_logging.disable_progress_bar()
    return load_backbone(model)[1]


def _left_out(skipped: Mapping[str, int]) -> list[str]:
    return [f"left out: {count} rows of {spec}, which cannot be converted" for spec, count in skipped.items()]


def _text(facts: Mapping[str, Any]) -> Iterator[str]:
    """The lines for people."""
    yield from (f"WARNING: {warning}" for warning in facts["warnings"])
    yield from _left_out(facts["left_out"])
    yield f"{facts['rows']} steps in {facts['conversations']} conversations\n"
    types, sources = facts["types"], facts["sources"]
    width = max(len(name) for name in ("number of messages", *sources))
    yield f"{'steps':<{width}}" + "".join(f"{name:>14}" for name in types) + f"{'conversations':>16}{'with both':>14}"
    for source, counts in sources.items():
        row = [f"{source:<{width}}", *(f"{counts[name]:>14}" for name in types), f"{counts['conversations']:>16}"]
        yield "".join(row) + f"{facts['pairing']['sources'][source]['conversations']:>14}"
    pairing, calls = facts["pairing"], facts["tool_calls"]
    yield f"with both: {pairing['conversations']} conversations, with {pairing['rows']} tool_call and planning steps"
    yield f"tool calls: {calls['after_thought']} go on from a thought, {calls['direct']} are direct\n"
    yield from _lengths(facts["lengths"], width)
    yield from _shortcuts(facts["shortcuts"], width)


def _lengths(lengths: Mapping[str, Any], width: int) -> Iterator[str]:
    quantiles = ("10%", "50%", "90%", "max")
    yield f"{'lengths':<{width}}{'':<20}" + "".join(f"{name:>9}" for name in quantiles)
    for kind, parts in lengths.items():
        for part, values in parts.items():
            if isinstance(values, dict):
                row = "".join(f"{values[name]:>9}" for name in quantiles)
                yield f"{kind:<{width}}{part.replace('_', ', '):<20}{row}"
        if "cut" in parts:
            yield f"{kind:<{width}}cut to fit {parts['cut']}, dropped {parts['dropped']}"
    yield ""


def _shortcuts(shortcuts: Mapping[str, Any], width: int) -> Iterator[str]:
    pooled, paired = shortcuts["pooled"], shortcuts["paired"]
    if pooled is None:
        yield "what tells tool_call from planning: not given, for one of the two is absent"
        return
    yield "what tells tool_call from planning (AUC: 0.5 nothing; 1 more on every call, 0 less)"
    yield f"{'':<{width}}{'all steps':>20}{'within conversations':>24}"
    for key, name in _SHORTCUTS.items():
        yield f"{name:<{width}}{pooled[key]:>20.2f}{f'{paired[key]:.2f}' if paired else '-':>24}"
    guesses = [_guess(part["source"]) if part else "-" for part in (pooled, paired)]
    yield f"{'source, guessed':<{width}}{guesses[0]:>20}{guesses[1]:>24}"
    yield f"prompt length is in {shortcuts['length_unit']}; in brackets: guessing the commoner type alone"


def _guess(source: Mapping[str, float]) -> str:
    return f"{100 * source['accuracy']:.0f}% ({100 * source['majority']:.0f}%)"
