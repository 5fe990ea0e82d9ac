"""Does a route hang on wording that the routers should not care about?

What stands before the routers' window is reworded as a paraphrase would (contractions, everyday synonyms, courtesies,
number words), the window itself is kept token for token, and the route is decided again. Paraphrase-like, not a
paraphrase: a small table of English phrases, so that no second model is needed and the change is the same everywhere.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from layerroute.data.render import Sample, encode
from layerroute.model.routed import RoutedModel

__all__ = ["measure_stability", "reword"]

_PAIRS = (
    ("can you", "could you"), ("do not", "don't"), ("does not", "doesn't"), ("is not", "isn't"), ("cannot", "can't"),
    ("it is", "it's"), ("that is", "that's"), ("you are", "you're"), ("i am", "i'm"), ("i have", "i've"),
    ("need to", "have to"), ("want to", "would like to"), ("find", "look up"), ("search", "look"), ("get", "obtain"),
    ("provide", "give"), ("return", "give back"), ("use", "make use of"), ("show", "display"), ("help", "assist"),
    ("how many", "what number of"), ("each", "every"), ("about", "regarding"), ("also", "in addition"),
    ("answer", "reply"), ("big", "large"), ("buy", "purchase"), ("start", "begin"), ("end", "finish"),
    ("total", "overall"), ("current", "present"), ("function", "routine"), ("list", "listing"), ("name", "title"),
    ("two", "2"), ("three", "3"), ("four", "4"), ("five", "5"), ("ten", "10"), ("please", "kindly"),
)  # fmt: skip
_OTHER = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
_PHRASE = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _OTHER), key=len, reverse=True)) + r")\b", re.IGNORECASE)
_SHARE = 0.5
"""Of the phrases found, so many are changed."""


def reword(text: str, seed: int | str) -> str:
    """Change about half of the known phrases in a text, keeping capitals; the same seed changes the same ones."""
    rng = random.Random(seed)

    def other(match: re.Match[str]) -> str:
        found = match.group()
        if rng.random() >= _SHARE:
            return found
        new = _OTHER[found.lower()]
        return new.capitalize() if found[0].isupper() else new

    return _PHRASE.sub(other, text)


@torch.no_grad()
def measure_stability(
    model: RoutedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], seed: int
) -> list[dict[str, Any] | None]:
    """Decide each sample's first route on its context and on a reworded one, and compare.

    Args:
        model: in evaluation mode.
        tokenizer: the backbone's.
        samples: a batch.
        seed: of the choice of phrases, with each sample's id.

    Returns:
        Per sample `flips` (points of the routable gates that changed) and `same_route`; None where nothing stands
        before the window, or none of it could be reworded.
    """
    results: list[dict[str, Any] | None] = []
    for sample in samples:
        context = sample.input_ids[: sample.context_length].tolist()
        changed = _reworded(tokenizer, context, model.router_config.window, f"{seed}:{sample.id}")
        results.append(None if changed is None else _compare(model, context, changed))
    return results


def _reworded(tokenizer: PreTrainedTokenizerBase, context: list[int], window: int, seed: str) -> list[int] | None:
    """The context with everything before its last `window` tokens reworded; None where that changes nothing."""
    text = tokenizer.decode(context[:-window], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    new = reword(text, seed) if isinstance(text, str) else ""
    return None if new == text or not new else [*encode(tokenizer, new), *context[-window:]]


def _compare(model: RoutedModel, context: list[int], changed: list[int]) -> dict[str, Any]:
    first, second = (model.route(torch.tensor([ids], device=model.device))[0] for ids in (context, changed))
    flips = (first != second)[model.routable].double().mean()
    return {"flips": 100 * float(flips), "same_route": bool((first == second).all())}
