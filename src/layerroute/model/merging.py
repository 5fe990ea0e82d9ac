"""LoRA folded into the backbone's weights for inference, and taken out again to the bit.

PEFT's own unmerging subtracts what it added, which leaves rounding behind, and its merged layers still cost a call
each. Here the original weights are kept aside and put back, and while merged the blocks hold plain linear layers.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from layerroute.errors import ConfigError

__all__ = ["MergedLora"]


class MergedLora:
    """The LoRA layers of a model, applied on construction; holds one more copy of the weights that carry LoRA.

    Raises:
        ConfigError: the weights are quantised, so that LoRA cannot be added to them.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        self._places = [
            (parent, name, layer)
            for parent in peft_model.modules()
            for name, layer in parent.named_children()
            if isinstance(layer, LoraLayer)
        ]
        self._weights = [_weight(layer) for _, _, layer in self._places]
        self._aside = [_merged(layer) for _, _, layer in self._places]
        """The weights that the model does not hold now: the merged ones here, the original ones once applied."""
        self.apply()

    def apply(self) -> None:
        """Put the merged weights in place, in plain linear layers."""
        self._swap()
        for parent, name, layer in self._places:
            setattr(parent, name, layer.get_base_layer())

    def restore(self) -> None:
        """Put the LoRA layers and the original weights back."""
        self._swap()
        for (parent, name, layer), weight in zip(self._places, self._weights, strict=True):
            setattr(parent, name, layer.to(weight.device))

    def _swap(self) -> None:
        for position, weight in enumerate(self._weights):
            weight.data, self._aside[position] = self._aside[position].to(weight), weight.data


def _weight(layer: LoraLayer) -> Tensor:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    weight = _weight(layer)
    if not weight.is_floating_point():
        raise ConfigError(f"merge_adapter: weights of type {weight.dtype} are quantised; load the backbone unquantised")
    merged = weight.float()
    for name in layer.active_adapters:
        merged = merged + layer.get_delta_weight(name).float()
    return merged.to(weight.dtype)
