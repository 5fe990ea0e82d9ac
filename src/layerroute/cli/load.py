"""An adapter by name, with its backbone and tokenizer, on a device: how commands that run a model start."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from layerroute.errors import ConfigError
from layerroute.model.adapter import find_adapter, load, read_config
from layerroute.model.backbone import load_backbone
from layerroute.model.routed import RoutedModel

__all__ = ["load_adapter", "pick_device"]


def load_adapter(
    name: str, backbone: str | None, device: str | None, calibrated: bool = True
) -> tuple[RoutedModel, PreTrainedTokenizerBase]:
    """Load an adapter onto the backbone that it names, or onto another copy of it.

    Without `calibrated` its calibration is not read, not even one that no longer fits: a new one is about to be made.

    Raises:
        AdapterError, BackboneError: either cannot be loaded, or they do not belong together.
        ConfigError: there is no such device.
    """
    transformers_logging.disable_progress_bar()
    folder = find_adapter(name)
    source = backbone or read_config(folder)["backbone"]["name"]
    target = pick_device(device)
    model, tokenizer = load_backbone(source, device=target)
    if not calibrated:
        return RoutedModel(*load(folder, model, is_trainable=False)).eval(), tokenizer
    routed = RoutedModel.from_pretrained(folder, model)
    routed.merge_adapter()
    return routed, tokenizer


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or cuda where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name}: cannot be used here ({error}); cpu always works") from None
    return device
