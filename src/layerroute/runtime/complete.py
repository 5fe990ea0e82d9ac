"""From messages and tools to the model's text, with the route that it took and the time that it cost.

Contract: the prompt's tokens are those that training made of the same messages (`encode_prompt`).
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

from layerroute.data.boundaries import ends_in_boundary
from layerroute.data.chat import check_tools
from layerroute.data.render import encode_prompt
from layerroute.errors import GenerationError
from layerroute.model.cache import RoutedCache
from layerroute.model.routed import RoutedModel

__all__ = ["Completion", "Request", "Segment", "complete", "complete_all"]

Request = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]
"""Messages in the chat form, and tools in the short or OpenAI's form, or None."""


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
    """What was generated, special tokens left out but for the adapter's boundary markers."""
    finished: bool
    """Whether the model ended its turn; otherwise `max_new_tokens` did."""
    segments: tuple[Segment, ...]
    """One, and one more for every boundary that was generated; the first one's route read the prompt, too."""
    prompt_tokens: int
    prefill_seconds: float
    """From the call to the first new token; of all rows that were generated side by side."""
    decode_seconds: float
    """From the first new token to the last, of all these rows."""

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
    return complete_all(model, tokenizer, [(messages, tools)], max_new_tokens=max_new_tokens, **generation)[0]


def complete_all(
    model: RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    **generation: Any,
) -> list[Completion]:
    """Generate the next step of several conversations side by side, as `complete` does of one.

    Reading all weights costs a token as much time for one row as for a few. Sums of floats depend on the rows beside
    them in the last digits, so that a token that is as likely as another may differ from that of `complete`.

    Args and errors are those of `complete`; the longest prompt must leave room for a token.
    """
    for _, tools in requests:
        if tools is not None:
            check_tools(tools)
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens={max_new_tokens}: at least one token has to be generated")
    prompts = [encode_prompt(tokenizer, messages, tools) for messages, tools in requests]
    rows = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    width = rows["input_ids"].shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max(1, context - width) if context else max_new_tokens
    clock = _Clock()
    out = model.generate(
        rows["input_ids"],
        attention_mask=rows["attention_mask"],
        max_new_tokens=min(max_new_tokens, room),
        streamer=clock,
        return_dict_in_generate=True,
        **generation,
    )
    stop = model.backbone.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [stop]
    markers: Sequence[Any] = generation.get("boundaries") or model.router_config.boundaries
    hidden = _hidden_tokens(tokenizer, markers)
    completions = []
    for row, prompt in enumerate(prompts):
        new = _own_tokens(out.sequences[row, width:].tolist(), stops)
        completions.append(
            Completion(
                text=str(tokenizer.decode([token for token in new if token not in hidden])),
                finished=new[-1] in stops,
                segments=_segments(model, out.past_key_values, row, width, new, markers),
                prompt_tokens=len(prompt),
                prefill_seconds=clock.ticks[1] - clock.ticks[0],
                decode_seconds=clock.ticks[-1] - clock.ticks[1],
            )
        )
    return completions


def _hidden_tokens(tokenizer: PreTrainedTokenizerBase, markers: Sequence[Sequence[int]]) -> set[int]:
    """Special tokens, less those of markers: without `<|python_tag|>` a call could not be told from text."""
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (special | set(tokenizer.all_special_ids)) - {token for marker in markers for token in marker}


def _own_tokens(new: list[int], stops: Sequence[int | None]) -> list[int]:
    """A row's tokens up to its end of turn; what follows is padding, while other rows go on."""
    end = next((index for index, token in enumerate(new) if token in stops), len(new) - 1)
    return new[: end + 1]


def _segments(
    model: RoutedModel, cache: Any, row: int, prompt: int, new: list[int], markers: Sequence[Sequence[int]]
) -> tuple[Segment, ...]:
    """What a generation's cache tells of a row's routes; the untouched backbone's tells nothing and ran everything."""
    if not isinstance(cache, RoutedCache):
        return (Segment(0, len(new), torch.ones(model.routers.blocks, dtype=torch.bool)),)
    decided = [(0, cache.segments[0][1])]
    for position, routes in cache.segments[1:]:
        start = position + 1 - prompt  # the pass over a boundary's last token gives the first token after it
        if start < len(new) and ends_in_boundary(new[:start], markers):  # otherwise another row's boundary
            decided.append((start, routes))
    ends = [*(start for start, _ in decided[1:]), len(new)]
    return tuple(
        Segment(start, end - start, routes[row].cpu()) for (start, routes), end in zip(decided, ends, strict=True)
    )


class _Clock(BaseStreamer):
    """Notes when the generation starts (transformers shows the prompt first) and when each token is there."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: Tensor) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        pass
