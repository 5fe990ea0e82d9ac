"""`layerroute train`: backbone, data and recipe to an adapter folder."""

from __future__ import annotations

import logging
import os
import sys

import click

from layerroute.cli.app import print_result
from layerroute.cli.changes import recipe_changes, training_options

__all__ = ["train"]

_EPILOG = """\b
Examples:
  layerroute train --model smollm2-135m --data builtin --steps 20 --output my-adapter
  layerroute train --model ./my-model --data calls.jsonl.gz plans.jsonl --output my-adapter
  layerroute train --model smollm2-135m --data builtin --recipe paper --output paper-adapter
  layerroute train --model smollm2-135m --data builtin --set budgets.tool_call=0.3 --output out
  layerroute train --model smollm2-135m --data builtin --steps 20 --output my-adapter --resume
"""


@click.command(epilog=_EPILOG)
@training_options
@click.option("--steps", type=int, help="Length of the run; short for --set training.steps=N.")
@click.option("--output", required=True, type=click.Path(), help="The adapter folder to write.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run in the output folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def train(
    model: str,
    first_data: tuple[str, ...],
    more_data: tuple[str, ...],
    recipe: str,
    steps: int | None,
    overrides: tuple[str, ...],
    output: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Train routers and LoRA beside a frozen backbone.

    Ctrl-C leaves a checkpoint; the same command with --resume goes on from it.
    """
    changes = recipe_changes(overrides, steps)
    first = int(os.environ.get("RANK", "0")) == 0  # of several processes, which all do the same
    if not first:
        logging.getLogger("layerroute").setLevel(logging.ERROR)

    from layerroute.training.recipe import load_recipe

    settings = load_recipe(recipe, changes)

    from transformers.utils import logging as transformers_logging

    from layerroute.training.run import train as run

    transformers_logging.disable_progress_bar()
    result = run(model, [*first_data, *more_data], settings, output, resume=resume, progress=sys.stderr.isatty())
    if first:
        print_result(result.as_dict(), as_json, result.summary())
