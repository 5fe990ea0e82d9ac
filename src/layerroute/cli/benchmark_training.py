"""`layerroute benchmark-training`: what training a recipe costs beside plain PEFT LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from layerroute.cli.app import print_result
from layerroute.cli.changes import recipe_changes, training_options
from layerroute.cli.measured import goal_line, machine_lines, ratio_text, spread_text

__all__ = ["benchmark_training", "report_lines"]

_EPILOG = """\b
Examples:
  layerroute benchmark-training --model smollm2-135m --data builtin
  layerroute benchmark-training --model smollm2-135m --data calls.jsonl.gz plans.jsonl --threads 1
  layerroute benchmark-training --model ./my-model --data builtin --recipe end_to_end \\
    --set max_length=1024 --updates 40 --json > training.json

Trains both for a few updates and keeps neither. Two models are in memory at once.
"""


@click.command(epilog=_EPILOG)
@training_options
@click.option("--updates", type=click.IntRange(min=2), default=20, show_default=True, help="Measured of each, in turn.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's, the physical cores]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def benchmark_training(
    model: str,
    first_data: tuple[str, ...],
    more_data: tuple[str, ...],
    recipe: str,
    overrides: tuple[str, ...],
    updates: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time training with a recipe beside plain PEFT LoRA on the same rows."""
    changes = recipe_changes(overrides, None)

    from layerroute.training.recipe import load_recipe

    settings = load_recipe(recipe, changes)

    from layerroute.evaluation.training_cost import measure_training

    measured = measure_training(model, [*first_data, *more_data], settings, updates, threads)
    report = {"model": model, "recipe": recipe, "changes": changes, **measured}
    print_result(report, as_json, "\n".join(report_lines(report)))


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people."""
    changes = "".join(f", {key}={value}" for key, value in report["changes"].items())
    yield from machine_lines(f"{report['model']}, recipe {report['recipe']}{changes}", report["machine"])
    shape = f"{report['gradient_accumulation']} micro-batches of {report['batch_size']} rows"
    yield f"{report['updates']} updates of {shape}, {report['tokens']:,} tokens, {report['padding']:.1%} padding"
    yield f"\n{'arm':<12}{'tokens/s':>12}{'seconds per update':>28}{'peak memory':>16}{'once, s':>12}"
    for name, arm in report["arms"].items():
        peak = f"{arm['peak_bytes'] / 2**20:,.0f} MiB"
        speed = f"{arm['tokens_per_second']:>12,.1f}{spread_text(arm['seconds']):>28}"
        yield f"  {name:<10}{speed}{peak:>16}{arm['once_s']:>12.1f}"
    yield "\nrouted/lora"
    yield f"  update time    {ratio_text(report['ratio'])}"
    yield f"  whole run      {report['run_ratio']:.3f}, of {report['run_updates']} updates and what is done once"
    yield f"  peak memory    {report['memory_ratio']:.3f}"
    yield "\ngoals (met or missed where the whole 95% interval says so)"
    for goal in report["goals"]:
        yield goal_line(goal)
