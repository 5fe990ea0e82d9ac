"""Tokens that a backbone never learned: a tokenizer may know `<tool_call>` where the model does not.

The output rows of tokens that training never met are all alike, so that the model cannot write one rather than
another, and no LoRA beside frozen embeddings can change that. Such tokens are written as ordinary text instead.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["spell_out_untrained"]

_LOG = logging.getLogger(__name__)

_ALIKE = 1e-3  # squared relative distance; unused rows of a quantised Qwen2.5-Coder are 3e-6 apart (docs/backbones.md)
_PART = 16384  # rows looked at together, to hold no second copy of the head


def spell_out_untrained(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Have the tokenizer write as ordinary text those of its plain tokens that the model never learned.

    Plain tokens are those that a tokenizer adds without making them special, such as the markers of tool calls. Ids of
    all others stay as they are. A warning names what is spelt out.
    """
    if not tokenizer.is_fast:
        return
    added = {id_: token for id_, token in tokenizer.added_tokens_decoder.items() if not token.special}
    head: Any = model.get_output_embeddings()
    known = [id_ for id_ in added if id_ < len(head.weight)]
    untrained = {id_ for id_, alike in zip(known, _alike(head.weight, known), strict=True) if alike}
    if not untrained:
        return
    core: Any = tokenizer
    parts = json.loads(core.backend_tokenizer.to_str())
    for token in parts["added_tokens"]:
        if token["id"] in untrained:
            token["content"] = f"<|untrained_{token['id']}|>"  # its place is kept, or later ids would move up
    core._tokenizer = Tokenizer.from_str(json.dumps(parts))
    _LOG.warning(
        "the backbone has never learned %s: other tokens have the same output row, so that it could not write one "
        "rather than another; they are spelt out as text",
        ", ".join(sorted(added[id_].content for id_ in untrained)),
    )


@torch.no_grad()
def _alike(rows: Tensor, ids: Sequence[int]) -> list[bool]:
    """Whether each of these rows of `[words, width]` has another one like it."""
    if not ids:
        return []
    chosen = rows[list(ids)].float()
    squares = chosen.square().sum(1, keepdim=True)
    found = torch.zeros(len(ids), dtype=torch.long, device=rows.device)
    for part in rows.split(_PART):
        others = part.float()
        distance = others.square().sum(1) + squares - 2 * chosen @ others.T
        found += (distance <= _ALIKE * squares).sum(1)
    return (found > 1).tolist()
