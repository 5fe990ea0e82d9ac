"""One step: from messages and tools to the model's text, with the route that it took and the time that it cost.

Contract: the prompt's tokens are those that training made of the same messages (`encode_prompt`). One row at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from layerroute.data.chat import check_tools
from layerroute.data.render import encode_prompt
from layerroute.errors import GenerationError
from layerroute.model.cache import RoutedCache
from layerroute.model.routed import RoutedModel

__all__ = ["Completion", "Segment", "complete"]


@dataclass(frozen=True)
class Segment:
    """New tokens that came out of one route."""

    start: int
    """The first of them, counted from 0."""
    new_tokens: int
    route: Tensor
    """bool `[blocks]`, True = executed."""

    @property
    def skip_rate(self) -> float:
        """Share of blocks not executed."""
        return float((~self.route).float().mean())

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "route": self.route.tolist(), "skip_rate": self.skip_rate}


@dataclass(frozen=True)
class Completion:
    """A generated step."""

    text: str
    """What was generated, special tokens left out."""
    finished: bool
    """Whether the model ended its turn; otherwise `max_new_tokens` did."""
    segments: tuple[Segment, ...]
    """One, and one more for every boundary that was generated; the first one's route read the prompt, too."""
    prompt_tokens: int
    prefill_seconds: float
    """From the call to the first new token."""
    decode_seconds: float
    """From the first new token to the last."""

    @property
    def new_tokens(self) -> int:
        """Generated tokens."""
        return sum(segment.new_tokens for segment in self.segments)

    @property
    def decode_speed(self) -> float | None:
        """Decoded tokens per second, the first one left out; None where only one was generated."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


def complete(
    model: RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    max_new_tokens: int,
    **generation: Any,
) -> Completion:
    """Generate the next step of a conversation. Within `disable_adapter` the untouched backbone answers.

    Args:
        model: in evaluation mode.
        tokenizer: the backbone's, as `load_backbone` gives it.
        messages: in the chat form.
        tools: in the short or OpenAI's form, or None.
        max_new_tokens: at most this many; fewer if the backbone's context ends before.
        generation: further arguments of `model.generate`.

    Raises:
        DataError: malformed messages, or tools whose parameters are no JSON Schema.
        GenerationError: the prompt is longer than the backbone's context, or an argument that routing cannot serve.
    """
    if tools is not None:
        check_tools(tools)
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens={max_new_tokens}: at least one token has to be generated")
    prompt = torch.tensor([encode_prompt(tokenizer, messages, tools)], device=model.device)
    length = prompt.shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max(1, context - length) if context else max_new_tokens
    clock = _Clock()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(max_new_tokens, room),
        streamer=clock,
        return_dict_in_generate=True,
        **generation,
    )
    new = out.sequences[0, length:].tolist()
    stops = model.backbone.generation_config.eos_token_id
    return Completion(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        finished=new[-1] in (stops if isinstance(stops, list) else [stops]),
        segments=_segments(model, out.past_key_values, length, len(new)),
        prompt_tokens=length,
        prefill_seconds=clock.ticks[1] - clock.ticks[0],
        decode_seconds=clock.ticks[-1] - clock.ticks[1],
    )


def _segments(model: RoutedModel, cache: Any, prompt: int, new_tokens: int) -> tuple[Segment, ...]:
    """What a generation's cache tells of its routes; the untouched backbone's tells nothing and ran everything."""
    if not isinstance(cache, RoutedCache):
        return (Segment(0, new_tokens, torch.ones(model.routers.blocks, dtype=torch.bool)),)
    # the pass over a boundary's last token gives the first token after it
    starts = [0, *(position + 1 - prompt for position, _ in cache.segments[1:])]
    ends = [*starts[1:], new_tokens]
    routes = (routes[0].cpu() for _, routes in cache.segments)
    return tuple(Segment(start, end - start, route) for start, end, route in zip(starts, ends, routes, strict=True))


class _Clock(BaseStreamer):
    """Notes when the generation starts (transformers shows the prompt first) and when each token is there."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: Tensor) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        pass
