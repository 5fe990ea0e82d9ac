"""What an adapter is, or would be, in figures: counted on the meta device, or read off a folder."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from layerroute.config import RouterConfig
from layerroute.errors import AdapterError, BackboneError
from layerroute.model import adapter
from layerroute.model.attach import get_routed_model
from layerroute.model.backbone import backbone_config

__all__ = ["describe_adapter", "describe_backbone"]


def describe_backbone(name: str | os.PathLike[str], router: RouterConfig, lora: LoraConfig) -> dict[str, Any]:
    """Describe the adapter that these settings would attach to a backbone, of which a `config.json` is enough.

    Returns:
        JSON-able: `backbone`, `model_type`, `blocks`, `routable` (indices), `parameters` (`backbone`, `router`, `lora`,
        `trained`, `total`) and `trained_share`.

    Raises:
        BackboneError: the configuration cannot be found, or has no structure that can be routed.
        ConfigError: the settings do not fit the backbone.
    """
    config = backbone_config(name)
    with torch.device("meta"):
        try:
            backbone = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError) as error:
            raise BackboneError(f"backbone {os.fspath(name)!r} is no causal language model: {error}") from error
        own = sum(parameter.numel() for parameter in backbone.parameters())
        model = get_routed_model(backbone, router, lora)
    counts = {
        "backbone": own,
        "router": sum(parameter.numel() for parameter in model.router_parameters()),
        "lora": sum(parameter.numel() for parameter in model.lora_parameters()),
    }
    facts = {"backbone": os.fspath(name), "model_type": config.model_type, "blocks": model.routers.blocks}
    return {**facts, "routable": model.routable, **_totals(counts)}


def describe_adapter(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a trained adapter from its folder alone; the backbone is not needed.

    Returns:
        As `describe_backbone`, with `adapter`, `fingerprint`, `router`, `recipe` and `data` (what it was trained on).

    Raises:
        AdapterError: there is no such adapter, or its folder is incomplete or damaged.
    """
    folder = adapter.find_adapter(name)
    config = adapter.read_config(folder)
    backbone = config["backbone"]
    router = RouterConfig(**config["router"])
    counts = {
        "backbone": backbone["parameters"],
        "router": _stored(folder / "router_model.safetensors"),
        "lora": _stored(folder / "adapter_model.safetensors"),
    }
    return {
        "adapter": os.fspath(name),
        "backbone": backbone["name"],
        "fingerprint": backbone["fingerprint"],
        "model_type": backbone["model_type"],
        "blocks": backbone["blocks"],
        "routable": router.routable(backbone["blocks"]),
        **_totals(counts),
        "router": config["router"],
        "recipe": config["recipe"],
        "data": config["data"],
    }


def _stored(path: os.PathLike[str]) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{os.fspath(path)} cannot be read: {error}") from error


def _totals(counts: dict[str, int]) -> dict[str, Any]:
    trained = counts["router"] + counts["lora"]
    total = counts["backbone"] + trained
    return {"parameters": {**counts, "trained": trained, "total": total}, "trained_share": trained / total}
