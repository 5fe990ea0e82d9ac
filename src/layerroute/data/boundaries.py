"""Boundary markers as token ids: what a model writes where its turn changes kind, as from a thought to a call.

Contract: training and generation find boundaries with the same functions, in the tokens of the turn alone. A marker may
be several sequences, for its neighbours may share a token with it (`>` and the line break after it). Boundary: a
tokenizer is passed in; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerroute.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["KNOWN_MARKERS", "boundary_ends", "boundary_tokens", "ends_in_boundary"]

KNOWN_MARKERS = (
    "<tool_call>",  # Hermes, Qwen
    "<|python_tag|>",  # Llama 3
    "[TOOL_CALLS]",  # Mistral
    "<|tool_call|>",  # Phi 4 mini, Granite
    "<function=",  # Llama 3 with functions of its user's, Qwen3-Coder
    "<start_function_call>",  # FunctionGemma
    "<｜tool▁calls▁begin｜>",  # DeepSeek  # noqa: RUF001
)
"""What opens a tool call in the chat templates of known families."""

_TEMPLATE = "template"
_BEFORE = ("", "\n", " ", ".")
_AFTER = ("", "\n", " ", "{", "[")


def boundary_tokens(
    tokenizer: PreTrainedTokenizerBase, markers: Sequence[str | Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """The token-id sequences that markers are written with, sorted and distinct.

    Args:
        tokenizer: the backbone's.
        markers: texts, token-id sequences (taken as they are), or the word `template` for those of `KNOWN_MARKERS` that
            stand in the tokenizer's chat template, which may be none.

    Raises:
        ConfigError: an empty marker, a text that the tokenizer cannot write, or ids that it does not have.
    """
    found: set[tuple[int, ...]] = set()
    for marker in markers:
        if not marker:
            raise ConfigError(
                f"boundaries: {marker!r} is an empty marker; give the text that opens a call, such as '<tool_call>', "
                f"its token ids, or {_TEMPLATE!r}; an empty list decides once per turn"
            )
        if not isinstance(marker, str):
            found.add(_checked(tokenizer, marker))
            continue
        for text in _template_markers(tokenizer) if marker == _TEMPLATE else [marker]:
            found |= _spellings(tokenizer, text)
    return tuple(sorted(found))


def ends_in_boundary(ids: Sequence[int], boundaries: Sequence[Sequence[int]]) -> bool:
    """Whether the last token of `ids` completes a boundary."""
    return any(list(ids[-len(boundary) :]) == list(boundary) for boundary in boundaries)


def boundary_ends(ids: Sequence[int], boundaries: Sequence[Sequence[int]], start: int = 0) -> list[int]:
    """The positions, ascending, at which a boundary ends that lies wholly at or after `start`."""
    longest = max(map(len, boundaries), default=0)
    return [
        end
        for end in range(start, len(ids))
        if ends_in_boundary(ids[max(start, end + 1 - longest) : end + 1], boundaries)
    ]


def _checked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[int, ...]:
    outside = [token for token in ids if not 0 <= token < len(tokenizer)]
    if outside:
        raise ConfigError(f"boundaries: {list(ids)} names {outside}; token ids here are 0 to {len(tokenizer) - 1}")
    return tuple(ids)


def _template_markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template = tokenizer.chat_template or ""
    texts = template.values() if isinstance(template, dict) else [template]
    return [marker for marker in KNOWN_MARKERS if any(marker in text for text in texts)]


def _spellings(tokenizer: PreTrainedTokenizerBase, marker: str) -> set[tuple[int, ...]]:
    """The marker's tokens in various surroundings, with those that it shares with its neighbours."""
    texts = (before + marker + after for before in _BEFORE for after in _AFTER)
    spans = {_span(tokenizer, _encode(tokenizer, text), marker) for text in texts}
    written = {span for span in spans if span and tokenizer.unk_token_id not in span}
    if not written:
        raise ConfigError(
            f"boundaries: this tokenizer cannot write {marker!r}, it makes "
            f"{_decode(tokenizer, _encode(tokenizer, marker))!r} of it; give a text that it can, or token ids"
        )
    return written


def _span(tokenizer: PreTrainedTokenizerBase, ids: list[int], marker: str) -> tuple[int, ...]:
    """The shortest of the runs of `ids` that hold the marker and end first; () if none holds it.

    Runs are decoded, for character offsets are not every tokenizer's to give.
    """
    ends = [end for end in range(1, len(ids) + 1) if marker in _decode(tokenizer, ids[:end])]
    starts = [start for start in range(min(ends, default=0)) if marker in _decode(tokenizer, ids[start : ends[0]])]
    return tuple(ids[starts[-1] : ends[0]]) if starts else ()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
