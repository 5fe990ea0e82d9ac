"""Recipe values from the command line: `KEY=VALUE`, given once each."""

from __future__ import annotations

from collections.abc import Sequence

from layerroute.errors import ConfigError

__all__ = ["key_values", "recipe_changes"]


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
