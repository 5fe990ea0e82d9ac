"""What a route is decided from, and its gates where they are known before the backbone runs.

A route may depend on a context, one per segment. It is known beforehand if a caller forces it, or if the routers read a
window on its own; otherwise it is decided on the way, or by a probe that runs nothing above the decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerroute.errors import ConfigError
from layerroute.model.router import Gates, Routers, tail_mask
from layerroute.model.routing import RouteProbe, stack_segments

if TYPE_CHECKING:
    from layerroute.model.routed import RoutedModel

__all__ = [
    "attended_segments",
    "forced_gates",
    "known_gates",
    "probed_gates",
    "prompt_context",
    "router_vectors",
    "segment_contexts",
]


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


def attended_segments(segment_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Segment ids `[batch, seq]` with 0 at padding, whatever stood there."""
    if segment_ids is None or attention_mask is None:
        return segment_ids
    return segment_ids.masked_fill(attention_mask == 0, 0)


def segment_contexts(
    model: RoutedModel, first: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None
) -> list[Tensor]:
    """What the route of each segment may depend on: bool `[batch, seq]`, one per segment.

    Args:
        model: whose routers decide.
        first: bool `[batch, seq]`, the first segment's context.
        attention_mask: `[batch, seq]`, 0 at padding.
        segment_ids: int64 `[batch, seq]`, 0 at padding. A later segment's context is everything up to and with its
            first token.

    Raises:
        ConfigError: several segments, and routers that sit at each block.
    """
    last = 0 if segment_ids is None else int(segment_ids.max())
    if last and model.router_config.position == "block":
        raise ConfigError("segment_ids with position='block': routers that sit at each block decide once")
    contexts = [first]
    for segment in range(1, last + 1):
        assert segment_ids is not None
        seen = (segment_ids >= segment).long().cumsum(1) <= 1
        contexts.append(seen if attention_mask is None else seen & attention_mask.bool())
    return contexts


def known_gates(
    model: RoutedModel,
    input_ids: Tensor,
    contexts: Sequence[Tensor],
    routes: Tensor | None = None,
    *,
    noise: float = 0.0,
    threshold: float | None = None,
    segment_ids: Tensor | None = None,
) -> Gates | None:
    """Gates `[batch, segments, blocks]` known before the backbone runs, a forced route's or a window's; or None."""
    if routes is not None:
        return forced_gates(routes, (len(input_ids), len(contexts), model.routers.blocks), input_ids.device)
    if model.router_config.context == "full":
        return None
    decisions = []
    for context in contexts:
        ids, mask = last_tokens(input_ids, context, model.router_config.window)
        gates = _run(model, ids, mask, RouteProbe(model.routers, [mask.bool()], noise=noise, threshold=threshold))
        decisions.append(Gates(gates.hard[:, 0], gates.prob[:, 0]))
    return stack_segments(decisions, segment_ids)


def probed_gates(
    model: RoutedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    context_mask: Tensor | None,
    segment_ids: Tensor | None,
    threshold: float | None,
) -> Gates:
    """Gates `[batch, segments, blocks]` as inference would decide them, with nothing run above the decision."""
    first = prompt_context(input_ids, attention_mask, None) if context_mask is None else context_mask.bool()
    segment_ids = attended_segments(segment_ids, attention_mask)
    contexts = segment_contexts(model, first, attention_mask, segment_ids)
    known = known_gates(model, input_ids, contexts, threshold=threshold, segment_ids=segment_ids)
    if known is not None:
        return known
    probe = RouteProbe(model.routers, contexts, threshold=threshold, segment_ids=segment_ids)
    return _run(model, input_ids, attention_mask, probe)


@torch.no_grad()
def router_vectors(
    model: RoutedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """What the routers read at every decision, float32 `[batch, segments, width]`; nothing above the decision is run.

    Routers that sit at each block read another vector each; of those it is the first router's. A segment that a row
    does not have gets a vector without meaning.
    """
    first = prompt_context(input_ids, attention_mask, None) if context_mask is None else context_mask.bool()
    contexts = segment_contexts(model, first, attention_mask, attended_segments(segment_ids, attention_mask))
    if model.router_config.context == "full":
        reader = _Reader(model.routers, contexts)
        model.structure.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, routing=reader)
        return reader.vectors
    vectors = []
    for context in contexts:
        ids, mask = last_tokens(input_ids, context, model.router_config.window)
        reader = _Reader(model.routers, [mask.bool()])
        model.structure.decoder(input_ids=ids, attention_mask=mask, use_cache=False, routing=reader)
        vectors.append(reader.vectors)
    return torch.cat(vectors, dim=1)


class _Reader:
    """Runs the blocks below the first router, and keeps what it reads."""

    def __init__(self, routers: Routers, contexts: Sequence[Tensor]) -> None:
        self.routers = routers
        self.contexts = contexts
        self.vectors = torch.empty(0)

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index > self.routers.routable[0]:
            return hidden
        if index == self.routers.routable[0]:
            self.vectors = torch.stack([self.routers.read(hidden, context) for context in self.contexts], 1).float()
            return hidden
        output: Tensor = block(hidden, **kwargs)
        return output


def _run(model: RoutedModel, input_ids: Tensor, attention_mask: Tensor | None, probe: RouteProbe) -> Gates:
    model.structure.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, routing=probe)
    return probe.gates


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
