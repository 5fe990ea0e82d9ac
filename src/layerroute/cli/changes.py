"""What commands that train take: backbone, data, recipe, and recipe values as `KEY=VALUE`, given once each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from layerroute.errors import ConfigError

__all__ = ["key_values", "recipe_changes", "training_options"]


def key_values(option: str, given: Sequence[str]) -> dict[str, str]:
    """What an option that may be repeated says.

    Raises:
        ConfigError: one that is no KEY=VALUE, or a key that is given twice.
    """
    pairs: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} {text!r}: expected KEY=VALUE, such as {option} router_lr=0.001")
        if key in pairs:
            raise ConfigError(f"{option} {key} is given twice")
        pairs[key] = value
    return pairs


def recipe_changes(overrides: Sequence[str], steps: int | None) -> dict[str, str]:
    """The changes that `--set` and `--steps` make to a recipe.

    Raises:
        ConfigError: as for `key_values`, or both say how many steps.
    """
    changes = key_values("--set", overrides)
    if steps is not None:
        if {"steps", "training.steps"} & set(changes):
            raise ConfigError("--steps and --set steps are given both; give one")
        changes["training.steps"] = str(steps)
    return changes


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command that trains takes: backbone, data, recipe and changes of it."""
    options = [
        click.option("--model", required=True, help="Backbone: a built-in name, a folder, a .gguf file or a hub id."),
        click.option(
            "--data",
            "first_data",
            multiple=True,
            required=True,
            help="Files of steps, `builtin`, or a hub source; several.",
        ),
        click.argument("more_data", nargs=-1, metavar="[MORE DATA]..."),
        click.option(
            "--recipe", default="default", show_default=True, help="`default`, `end_to_end`, `paper` or a file."
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a recipe value, by path or by bare name; see `layerroute info --recipe NAME` for all keys.",
        ),
    ]
    for option in reversed(options):  # as decorators stand, the last is applied first
        command = option(command)
    return command
