"""`layerroute ablate`: a recipe, what it is without its parts, and the same over seeds, in one table."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import click

from layerroute.cli.app import print_result
from layerroute.cli.changes import key_values, recipe_changes

__all__ = ["ablate"]

_EPILOG = """\b
Examples:
  layerroute ablate --model smollm2-135m --data train.jsonl --eval-data test.jsonl --seeds 3 \\
    --output grid
  layerroute ablate --model smollm2-135m --data builtin --eval-data test.jsonl --seeds 3 --steps 100 \\
    --limit 200 --sensitivity budgets.tool_call=0.2,0.3,0.4 --output grid
  layerroute report grid --output report.html

An interrupted grid goes on with the same command.
"""


@click.command(epilog=_EPILOG)
@click.option("--model", required=True, help="Backbone: a built-in name, a folder, a .gguf file or a hub id.")
@click.option("--recipe", default="default", show_default=True, help="`default`, `end_to_end`, `paper` or a file.")
@click.option(
    "--data",
    multiple=True,
    required=True,
    help="What is trained on: files of steps, `builtin`, or a hub source; may be repeated.",
)
@click.option("--eval-data", multiple=True, required=True, help="What every variant is measured on; may be repeated.")
@click.option(
    "--seeds", required=True, type=int, help="Runs of each variant; seeds count up from the recipe's. Tests need 3."
)
@click.option("--steps", type=int, help="Length of each training; short for --set training.steps=N.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a recipe value in every variant; see `layerroute info --recipe NAME` for all keys.",
)
@click.option(
    "--sensitivity",
    multiple=True,
    metavar="KEY=V1,V2,...",
    help="Also train the recipe with each of these values; may be repeated.",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many steps per evaluated source.")
@click.option("--output", required=True, type=click.Path(), help="The folder to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as one JSON object on stdout.")
def ablate(
    model: str,
    recipe: str,
    data: tuple[str, ...],
    eval_data: tuple[str, ...],
    seeds: int,
    steps: int | None,
    overrides: tuple[str, ...],
    sensitivity: tuple[str, ...],
    limit: int | None,
    output: str,
    as_json: bool,
) -> None:
    """Train a recipe, LoRA alone and routers alone with several seeds; measure them beside the baselines.

    Ctrl-C leaves a checkpoint; the same command goes on from it.
    """
    import sys

    from layerroute.evaluation.grid import plan_grid

    changes = recipe_changes(overrides, steps)
    grid = plan_grid(
        model,
        recipe,
        data,
        eval_data,
        seeds=seeds,
        limit=limit,
        changes=changes,
        sensitivity=key_values("--sensitivity", sensitivity),
    )

    from layerroute.cli.load import pick_device
    from layerroute.evaluation.ablate import ablate as run
    from layerroute.evaluation.grid_table import markdown

    command = _command(
        {"model": [model], "recipe": [recipe], "data": data, "eval-data": eval_data, "seeds": [seeds]}
        | {"set": [f"{key}={value}" for key, value in changes.items()], "sensitivity": sensitivity}
        | {"limit": [limit] if limit else [], "output": [output]}
    )
    table = run(grid, output, device=pick_device(None), progress=sys.stderr.isatty(), command=command)
    print_result(table, as_json, f"{markdown(table)}\nablation: {output}")


def _command(options: Mapping[str, Sequence[Any]]) -> str:
    """The command that makes this grid again; an option is given once for each of its values."""
    words = [word for name, values in options.items() for value in values for word in (f"--{name}", str(value))]
    return shlex.join(["layerroute", "ablate", *words])
