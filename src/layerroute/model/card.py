"""The model card that lies in an adapter folder."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

__all__ = ["model_card"]


def model_card(config: Mapping[str, Any]) -> str:
    """Return Markdown for an adapter's README, from its `router_config.json`."""
    backbone, router = config["backbone"], config["router"]
    data = dict(config["data"])
    files = data.pop("sources", {})
    sources = "\n".join(f"- `{name}` {digest}" for name, digest in files.items())
    rows = "\n".join(f"| {key} | {value} |" for key, value in router.items())
    counts = "\n".join(f"- {name}: {value}" for name, value in data.items())
    settings = yaml.safe_dump(dict(config["recipe"]), sort_keys=False)
    return f"""---
library_name: layerroute
base_model: {backbone["name"]}
tags: [layerroute, peft, lora, conditional-depth]
---

# LayerRoute adapter for {backbone["name"]}

Routers that decide, per input, which of the backbone's {backbone["blocks"]} blocks run, and LoRA on its attention
projections. Made with layerroute {config["layerroute_version"]}, adapter format {config["format_version"]}. It fits
only the weights with fingerprint `{backbone["fingerprint"]}`.

    from layerroute import RoutedModel
    model = RoutedModel.from_pretrained("THIS FOLDER")

## Routers

| setting | value |
|---|---|
{rows}

## Training data (SHA-256)

{sources or "none recorded"}

{counts}

## Recipe

```yaml
{settings}```
{_again(backbone["name"], files, data.get("processes", 1)) if files and config["recipe"] else ""}"""


def _again(model: str, files: Iterable[str], processes: int) -> str:
    program = ["layerroute"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}", "-m", "layerroute"]
    return f"""
Saved as `recipe.yaml`, these settings make the adapter again, in the folder of the data:

    {shlex.join([*program, "train", "--model", model, "--data", *files])} \\
      --recipe recipe.yaml --output my-adapter
"""
