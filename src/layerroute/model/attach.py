"""Attaching: fresh routers and LoRA onto a backbone that has none."""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from layerroute.config import RouterConfig
from layerroute.errors import ConfigError
from layerroute.model.routed import RoutedModel
from layerroute.model.router import Routers
from layerroute.model.structure import find_structure

__all__ = ["get_routed_model"]


def get_routed_model(
    backbone: PreTrainedModel, router_config: RouterConfig | None = None, lora_config: LoraConfig | None = None
) -> RoutedModel:
    """Attach fresh routers and LoRA to `backbone`, in place as PEFT does, and freeze everything else.

    A `lora_config` without `target_modules` gets the backbone's q, k, v and o projections; the default has rank 8,
    alpha 16 and dropout 0.05. With the default `RouterConfig` every gate starts open, so that the logits are the
    backbone's.

    Raises:
        BackboneError: the backbone has no structure that can be routed, or is routed already.
        ConfigError: the routers' settings do not fit the backbone, or `lora_config` is not a LoraConfig.
    """
    config = RouterConfig() if router_config is None else router_config
    structure = find_structure(backbone)
    structure.require_unrouted()
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05) if lora_config is None else copy.deepcopy(lora_config)
    _check_lora(lora)
    if lora.target_modules is None:
        lora.target_modules = list(structure.projections)
    lora.task_type = "CAUSAL_LM"
    routers = Routers(config, int(backbone.config.get_text_config().hidden_size), len(structure.blocks))
    return RoutedModel(get_peft_model(backbone, lora), routers)


def _check_lora(lora: Any) -> None:
    """Refuse what would change the backbone itself: with the adapter off, it must be the untouched one."""
    if not isinstance(lora, LoraConfig):
        raise ConfigError(f"lora_config={type(lora).__name__}: expected a peft.LoraConfig")
    harmless: dict[str, tuple[Any, ...]] = {
        "bias": ("none",),
        "modules_to_save": (None, []),
        "trainable_token_indices": (None,),
        "init_lora_weights": (True, False, "gaussian"),
    }
    for name, values in harmless.items():
        value = getattr(lora, name, None)
        if value not in values:
            works = " or ".join(repr(value) for value in values)
            raise ConfigError(f"lora_config.{name}={value!r} would change the backbone's own weights; use {works}")
