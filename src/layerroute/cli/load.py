"""An adapter by name, with its backbone and tokenizer, on a device: how `generate` and `demo` start."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from layerroute.errors import ConfigError
from layerroute.model.adapter import find_adapter, read_config
from layerroute.model.backbone import load_backbone
from layerroute.model.routed import RoutedModel

__all__ = ["load_adapter"]


def load_adapter(name: str, backbone: str | None, device: str | None) -> tuple[RoutedModel, PreTrainedTokenizerBase]:
    """Load an adapter onto the backbone that it names, or onto another copy of it.

    Raises:
        AdapterError, BackboneError: either cannot be loaded, or they do not belong together.
        ConfigError: there is no such device.
    """
    transformers_logging.disable_progress_bar()
    folder = find_adapter(name)
    source = backbone or read_config(folder)["backbone"]["name"]
    target = _device(device)
    model, tokenizer = load_backbone(source, device=target)
    return RoutedModel.from_pretrained(folder, model), tokenizer


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name}: cannot be used here ({error}); cpu always works") from None
    return device
