"""`layerroute info`: what an adapter is, or would be on a backbone, without loading weights."""

from __future__ import annotations

from typing import Any

import click

from layerroute.cli.app import print_result
from layerroute.errors import ConfigError

__all__ = ["info"]

_EPILOG = """\b
Examples:
  layerroute info --adapter smollm2-135m
  layerroute info --model Qwen/Qwen2.5-0.5B-Instruct --recipe paper --json
  layerroute info --model FOLDER          (a folder that holds only config.json will do)
  layerroute info --recipe default        (every key of a recipe with its value)
"""


@click.command(epilog=_EPILOG)
@click.option("--adapter", help="An adapter folder, or a built-in name.")
@click.option("--model", help="A backbone: a built-in name, a folder, a .gguf file or a hub id.")
@click.option("--recipe", help="`default`, `end_to_end`, `paper`, or a YAML file; with --model, what it would attach.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def info(adapter: str | None, model: str | None, recipe: str | None, as_json: bool) -> None:
    """Show blocks, what is routable, parameters per part, and the recipe."""
    if adapter and (model or recipe):
        other = "--model" if model else "--recipe"
        raise ConfigError(f"--adapter and {other} are given both; an adapter knows its backbone and recipe")
    if not (adapter or model or recipe):
        raise ConfigError("nothing to show; give --adapter, --model or --recipe")
    if adapter:
        from layerroute.model.describe import describe_adapter

        facts = describe_adapter(adapter)
    else:
        facts = _planned(model, recipe or "default")
    print_result(facts, as_json, _text(facts))


def _planned(model: str | None, recipe: str) -> dict[str, Any]:
    from layerroute.training.recipe import load_recipe

    settings = load_recipe(recipe)
    facts: dict[str, Any] = {}
    if model:
        from layerroute.model.describe import describe_backbone
        from layerroute.training.run import lora_config

        facts = describe_backbone(model, settings.router, lora_config(settings))
        settings.check_blocks(facts["blocks"])
    return {**facts, "recipe": settings.model_dump(mode="json")}


def _text(facts: dict[str, Any]) -> str:
    lines = [f"{name}: {facts[name]}" for name in ("adapter", "backbone", "fingerprint", "model_type") if name in facts]
    if "blocks" in facts:
        routable = facts["routable"]
        lines.append(f"blocks: {facts['blocks']}, routable: {len(routable)} ({routable[0]} to {routable[-1]})")
        lines += [f"{name} parameters: {count:,}" for name, count in facts["parameters"].items()]
        lines.append(f"trained share: {100 * facts['trained_share']:.3f}%")
    lines += [f"data: {name} {digest}" for name, digest in facts.get("data", {}).get("sources", {}).items()]
    lines += _flat(facts["recipe"], "recipe: ")
    return "\n".join(lines)


def _flat(values: dict[str, Any], prefix: str) -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} = {value}")
    return lines
