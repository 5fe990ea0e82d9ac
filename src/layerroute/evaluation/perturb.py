"""Does a route hang on wording that the routers should not care about?

What stands before the routers' window is reworded as a paraphrase would (contractions, everyday synonyms,
courtesies), the window itself is kept token for token, and the route is decided again. Paraphrase-like, not a
paraphrase: a small table of English phrases, so that no second model is needed and the change is the same everywhere.
Only words that stand free are changed, so that keys, types, figures and names of one word stay, in JSON or in code.
"""

from __future__ import annotations

import random
import re
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from layerroute.data.render import Sample, encode
from layerroute.evaluation.measure import bits
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
    ("please", "kindly"),
)  # fmt: skip
_OTHER = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
_WORDS = "|".join(sorted(map(re.escape, _OTHER), key=len, reverse=True))
# between white space or a sentence's commas and brackets: beside quotes, backslashes, dots, underscores, hyphens or
# digits stand names of tools and parameters, and escapes
_PHRASE = re.compile(rf"(?<![^\s(])({_WORDS})(?![^\s,;?!)])", re.IGNORECASE)
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
    model: RoutedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, route: str, seed: int
) -> dict[str, Any] | None:
    """Decide a sample's first route again on a reworded context, and compare.

    Args:
        model: in evaluation mode.
        tokenizer: the backbone's.
        sample: the step.
        route: what was decided on its own context, as `bits`.
        seed: of the choice of phrases, with the sample's id.

    Returns:
        `flips` (points of the routable gates that changed) and `same_route`; None where nothing stands before the
        window, or none of it could be reworded.
    """
    window = model.router_config.window
    context = sample.input_ids[: sample.context_length].tolist()
    text = tokenizer.decode(context[:-window], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    changed = reword(text, f"{seed}:{sample.id}")
    if changed == text:
        return None
    ids = torch.tensor([[*encode(tokenizer, changed), *context[-window:]]], device=model.device)
    again = bits(model.route(ids)[0])
    flips = sum(route[block] != again[block] for block in model.routable)
    return {"flips": 100 * flips / len(model.routable), "same_route": again == route}
