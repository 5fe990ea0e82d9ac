"""Views of a backbone: shallow copies that share every weight, with blocks left out or attention exchanged."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

__all__ = ["decoding_block", "without_blocks"]


def without_blocks(backbone: PreTrainedModel, decoder: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """A view of `backbone` whose decoder runs `blocks` alone; it shares every module, and the original is untouched."""
    path = next(name for name, module in backbone.named_modules() if module is decoder).split(".")
    view = parent = _shallow(backbone)
    for name in path:
        child = _shallow(parent._modules[name])
        parent._modules[name] = child
        parent = child
    parent._modules["layers"] = nn.ModuleList(blocks)
    return view


def _shallow(module: nn.Module | None) -> nn.Module:
    copied = copy.copy(module)
    assert copied is not None
    copied._modules = dict(copied._modules)
    return copied


def decoding_block(block: nn.Module) -> nn.Module:
    """A view of a block with attention made for one query."""
    view = _shallow(block)
    attention: Any = _shallow(block._modules["self_attn"])
    config = copy.copy(attention.config)
    config._attn_implementation = _ATTENTION
    attention.config = config
    view._modules["self_attn"] = attention
    return view


def _decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one query `[rows, heads, 1, dim]` over keys `[rows, key heads, capacity, dim]`.

    Heads that share a key stand side by side as queries; transformers' own would repeat the keys for each inside a
    graph, which costs more than the rest of a small model's attention.
    """
    rows, heads, _, dim = query.shape
    if attention_mask is not None:  # the mask may end before the capacity does
        key, value = key[:, :, : attention_mask.shape[-1]], value[:, :, : attention_mask.shape[-1]]
    packed = query.reshape(rows, key.shape[1], heads // key.shape[1], dim)
    out = functional.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, out.shape[-1]), None


_ATTENTION = "layerroute_decode"
AttentionInterface.register(_ATTENTION, _decode_attention)
