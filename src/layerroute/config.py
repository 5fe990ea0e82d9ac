"""Settings, as frozen pydantic models that refuse unknown keys with the nearest right name.

Knows nothing of torch or transformers, so that a settings mistake is reported before anything heavy is imported.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from layerroute.errors import ConfigError

__all__ = ["RouterConfig", "Settings", "nearest"]


def nearest(name: str, known: list[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


class Settings(BaseModel):
    """Base of all settings: immutable, keyword-only, unknown keys refused.

    Raises:
        ConfigError: naming the first field that is wrong, its value, and what would work.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(type(self), error)) from None


def _one_line(cls: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = sorted(cls.model_fields)
        return f"unknown setting {field!r}{nearest(field, known)}; known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return message if not field else f"{field}={first['input']!r}: {message}"


class RouterConfig(Settings):
    """How a route is decided: what the routers read, where they sit, and which blocks they may close."""

    position: Literal["early", "block"] = "early"
    """`early`: every router reads one vector, the pooled input of the first routable block, so that the whole route is
    known before most of the work. `block`: each router reads the pooled input of its own block (the publication)."""

    context: Literal["full", "window"] = "full"
    """What the routers' vector is computed from. `full`: the hidden states of the whole prompt. `window`: the last
    `window` tokens alone, run through the first blocks as if nothing stood before them (needs `position="early"`)."""

    pooling: Literal["mean", "tail", "last", "joint"] = "tail"
    """How tokens become one vector: the mean over the prompt, the mean of its last `window` tokens, its last token, or
    tail beside mean (twice as wide)."""

    window: int = Field(32, ge=1)
    """Tokens in the tail, and in the `window` context."""

    protect_first: int = Field(2, ge=0)
    """Blocks at the bottom that always run and carry no router."""

    protect_last: int = Field(1, ge=0)
    """Blocks at the top that always run and carry no router."""

    normalize: bool = True
    """Scale the routers' vector to unit root mean square, in float32."""

    threshold: float = Field(0.5, gt=0.0, lt=1.0)
    """A gate is open (1: the block runs) where its probability exceeds this."""

    init_bias: float = Field(1.0, gt=0.0)
    """A fresh router's bias. Its weight is zero, so a fresh gate has probability sigmoid(init_bias) on any input."""

    closed_blocks: tuple[int, ...] = ()
    """Blocks whose router starts at minus `init_bias`, that is closed (the publication: 8 to 16)."""

    boundaries: tuple[str | tuple[int, ...], ...] = ()
    """Markers after which the route is decided again within a turn: texts, token-id sequences, or the word `template`
    for those that the chat template knows. A model holds them as token ids (`layerroute.data.boundaries`); () decides
    once, at the end of the prompt."""

    @model_validator(mode="after")
    def _consistent(self) -> RouterConfig:
        if self.context == "window" and self.position == "block":
            raise ValueError("context='window' needs position='early': a window is read before the blocks run")
        if self.context == "window" and self.pooling == "joint":
            raise ValueError("pooling='joint' needs context='full': within a window, tail and mean are the same")
        if self.boundaries and self.position == "block":
            raise ValueError(
                f"boundaries={list(self.boundaries)} needs position='early': routers that sit at each block decide once"
            )
        return self

    def routable(self, blocks: int) -> list[int]:
        """Return the indices of the blocks that carry a router, for a backbone of `blocks` blocks.

        Raises:
            ConfigError: if no block is left to route, or `closed_blocks` names one that is not routable.
        """
        indices = list(range(self.protect_first, blocks - self.protect_last))
        if not indices:
            raise ConfigError(
                f"protect_first={self.protect_first} and protect_last={self.protect_last} leave none of the "
                f"backbone's {blocks} blocks to route"
            )
        outside = sorted(set(self.closed_blocks) - set(indices))
        if outside:
            raise ConfigError(
                f"closed_blocks names {outside}, but the routable blocks of this backbone are "
                f"{indices[0]} to {indices[-1]}"
            )
        return indices
