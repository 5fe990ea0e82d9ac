"""Executed FLOPs of a generation, in closed form: matrix products of blocks, attention, head, LoRA and routers.

A product of `[m, k]` and `[k, n]` costs `2 m k n`. Attention is counted over all keys that a query is multiplied with,
masked ones too, which is how torch's `FlopCounterMode` counts it. Norms, activations, rotary embedding and pooling hold
no matrix products worth the name and are left out. Prefill and decode are kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerroute.model.routed import RoutedModel

__all__ = ["Flops", "Segments", "backbone_flops", "executed_flops", "lora_flops"]

Segments = Sequence[tuple[int, Tensor]]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one row's generation."""

    prefill: int
    """Reading the prompt, deciding the route, and the logits of the first new token."""
    decode: int
    """Every new token after the first."""

    @property
    def total(self) -> int:
        """Prefill and decode."""
        return self.prefill + self.decode


def executed_flops(model: RoutedModel, segments: Segments, prompt_tokens: int, new_tokens: int) -> Flops:
    """FLOPs of generating `new_tokens` from a prompt, the routers included, and LoRA unless it is merged.

    Args:
        model: the routed model.
        segments: `(start, route)` of every segment: the first new token that it gives, 0 for the first segment, and
            bool `[blocks]`, True = executed.
        prompt_tokens: tokens of the prompt, padding left out.
        new_tokens: generated tokens, at least 1; the last one is never fed back.
    """
    flops = _generation(model, segments, prompt_tokens, new_tokens, lora=True)
    again = sum(_decision(model, prompt_tokens + start) for start, _ in segments[1:])
    return Flops(flops.prefill + _decision(model, prompt_tokens), flops.decode + again)


def lora_flops(model: RoutedModel, prompt_tokens: int, new_tokens: int) -> Flops:
    """FLOPs of the same generation with every block, LoRA beside the weights, and no routers."""
    return _generation(model, [(0, _every(model))], prompt_tokens, new_tokens, lora=True)


def backbone_flops(model: RoutedModel, prompt_tokens: int, new_tokens: int) -> Flops:
    """FLOPs of the same generation by the untouched backbone: every block, no LoRA, no routers."""
    return _generation(model, [(0, _every(model))], prompt_tokens, new_tokens, lora=False)


def _every(model: RoutedModel) -> Tensor:
    return torch.ones(model.routers.blocks, dtype=torch.bool)


def _generation(model: RoutedModel, segments: Segments, prompt_tokens: int, new_tokens: int, lora: bool) -> Flops:
    config: Any = model.config.get_text_config()
    backbone: Any = model.backbone
    head = 2 * backbone.get_output_embeddings().weight.numel()
    prefill = head  # of the prompt's last position alone
    decode = (new_tokens - 1) * head
    ends = [*(start for start, _ in segments[1:]), new_tokens]
    for (start, route), end in zip(segments, ends, strict=True):
        for index, block in enumerate(model.structure.blocks):
            if not route[index]:
                continue
            if start == 0:
                prefill += _whole_prompt(config, block, prompt_tokens, lora)
            steps = range(max(start, 1), end)  # the prompt's own pass gives the first token
            window = _window(config, index)
            keys = sum(min(prompt_tokens + step, window) for step in steps)
            decode += len(steps) * _per_token(block, lora) + keys * _per_pair(config, block)
    return Flops(prefill, decode)


def _decision(model: RoutedModel, prompt_tokens: int) -> int:
    """The routers, and the pass over the window that `context="window"` puts in front of the prefill."""
    flops = 2 * model.routers.weight.numel()
    if model.router_config.context == "window":
        below = list(model.structure.blocks)[: model.router_config.protect_first]
        tokens = min(prompt_tokens, model.router_config.window)
        flops += sum(_whole_prompt(model.config.get_text_config(), block, tokens, lora=True) for block in below)
    return flops


def _whole_prompt(config: Any, block: nn.Module, tokens: int, lora: bool) -> int:
    return tokens * _per_token(block, lora) + tokens**2 * _per_pair(config, block)


def _per_token(block: nn.Module, lora: bool) -> int:
    """FLOPs of a block's linear layers; each of LoRA's two factors is one."""
    layers = ((name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear))
    return sum(2 * module.weight.numel() for name, module in layers if lora or "lora_" not in name)


def _per_pair(config: Any, block: Any) -> int:
    """FLOPs of a query with a key, and of its weight with a value, over all heads."""
    return 4 * int(config.num_attention_heads) * int(block.self_attn.head_dim)


def _window(config: Any, index: int) -> int:
    """Keys that a decoded token of block `index` is multiplied with at most."""
    size = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    slides = types[index] == "sliding_attention" if types else bool(size)
    return int(size) if size and slides else 2**62
