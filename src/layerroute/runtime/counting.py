"""FLOPs of real generations as torch's counter sees them, beside the closed form of `cost.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from layerroute.model.routed import RoutedModel
from layerroute.runtime.arms import Arm, routed_arm
from layerroute.runtime.cost import executed_flops

__all__ = ["count_flops"]


def count_flops(model: RoutedModel, closed: Sequence[int], ids: Tensor, new_tokens: int) -> dict[str, Any]:
    """Count a generation that runs every block (`open`) and one that skips `closed` (`routed`).

    Args:
        model: in evaluation mode.
        closed: routable blocks.
        ids: int64 `[1, prompt]`.
        new_tokens: 2 at least.

    Returns:
        JSON-able: FLOPs per generation, and what is left of the open one's, beside the share of executed blocks.
    """
    prompt, blocks = ids.shape[1], model.routers.blocks
    flops: dict[str, Any] = {"prompt_tokens": prompt, "new_tokens": new_tokens}
    for name, skipped in (("open", ()), ("routed", closed)):
        route = torch.ones(blocks, dtype=torch.bool)
        route[list(skipped)] = False
        flops[name] = {
            "counted": _counted(routed_arm(name, model, skipped), model, ids, new_tokens),
            "closed_form": executed_flops(model, [(0, route)], prompt, new_tokens).total,
        }
    flops["routed_share"] = {
        **{how: flops["routed"][how] / flops["open"][how] for how in ("counted", "closed_form")},
        "blocks": 1 - len(closed) / blocks,
    }
    return flops


def _counted(arm: Arm, model: RoutedModel, ids: Tensor, new_tokens: int) -> int:
    """Matrix products that torch sees in a generation, those of the rotary embedding left out."""
    with _eager_attention(model.backbone), arm.within(), FlopCounterMode(display=False) as counter:
        arm.generate(ids, new_tokens)
    rotary = (ops for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return int(counter.get_total_flops()) - sum(sum(ops.values()) for ops in rotary)


@contextmanager
def _eager_attention(backbone: Any) -> Iterator[None]:
    """Attention as plain matrix products, which the counter knows on every device."""
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)
