"""What a route is decided from: contexts by segment, the last tokens of a window, or a route that a caller forces."""

from __future__ import annotations

import torch
from torch import Tensor

from layerroute.errors import ConfigError
from layerroute.model.router import Gates, tail_mask

__all__ = ["forced_gates", "last_tokens", "prompt_context", "segment_contexts"]


def segment_contexts(first: Tensor, attended: Tensor, segment_ids: Tensor) -> list[Tensor]:
    """What the route of each segment may depend on: bool `[batch, seq]`, one per segment.

    Args:
        first: bool `[batch, seq]`, the first segment's context.
        attended: bool `[batch, seq]`, padding left out.
        segment_ids: int64 `[batch, seq]`. A later segment's context is everything up to and with its first token.
    """
    contexts = [first]
    for segment in range(1, int(segment_ids.max()) + 1):
        begun = (segment_ids >= segment).long().cumsum(1)
        contexts.append(attended & (begun <= 1))
    return contexts


def prompt_context(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """bool `[batch, seq]`: the attended tokens before the first label, or all attended tokens without labels."""
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if labels is None:
        return attended.bool()
    context = attended.bool() & ((labels != -100).long().cumsum(1) == 0)
    if not bool(context.any(1).all()):
        raise ConfigError(
            "labels: a row's first token is in the loss, so no token precedes the segment that the route governs; set "
            "the prompt's labels to -100, or pass context_mask"
        )
    return context


def forced_gates(routes: Tensor, shape: tuple[int, int, int], device: torch.device) -> Gates:
    """Gates `[batch, segments, blocks]`, the given shape, of a route that a caller forces.

    Raises:
        ConfigError: `routes` is not bool of a shape that fits, or a later segment opens a block.
    """
    batch, segments, blocks = shape
    gates = torch.as_tensor(routes, device=device)
    if gates.dtype != torch.bool or gates.shape not in {(blocks,), (batch, blocks), shape}:
        by_segment = f" or {shape}" if segments > 1 else ""
        raise ConfigError(
            f"routes: got {str(gates.dtype).removeprefix('torch.')} of shape {tuple(gates.shape)}; expected bool of "
            f"shape ({blocks},) or ({batch}, {blocks}){by_segment}"
        )
    if gates.ndim == 3 and bool((gates[:, 1:] & ~gates[:, :-1]).any()):
        raise ConfigError("routes: a later segment opens a block that an earlier one closed; it may only close blocks")
    hard = (gates if gates.ndim == 3 else gates.expand(batch, blocks).unsqueeze(1)).float().expand(shape)
    return Gates(hard=hard, prob=hard)


def last_tokens(input_ids: Tensor, context: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The last `window` context tokens of each row, right-aligned: int64 ids and mask, each `[batch, <= window]`."""
    tail = tail_mask(context, window)
    order = torch.argsort(tail.long(), dim=1, stable=True)[:, -window:]
    return input_ids.gather(1, order), tail.gather(1, order).long()
