"""The parts of the built-in source: intents, their slots, and ways to draw a value and to say it.

Contract: a sampler gives a value and its spoken form, and the value can be told from the spoken form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import Any

Sampler = Callable[[Random], tuple[Any, str]]
"""Draws a value and how a person says it."""


@dataclass(frozen=True)
class Slot:
    """A parameter: `names[0]` is its place in the wordings, each name may be the parameter's in the schema."""

    names: tuple[str, ...]
    about: str
    schema: dict[str, Any]
    sample: Sampler
    extra: str = ""
    """How an optional slot is asked for, with `{}` for the spoken value; empty for a required slot."""


@dataclass(frozen=True)
class Compare:
    """Two answers of one intent set side by side: `slot` differs, `figure` of the result decides."""

    slot: str
    figure: str
    word: str
    unit: str


@dataclass(frozen=True)
class Intent:
    """Something a person asks for and one tool does."""

    domain: str
    verb: str
    noun: str
    about: str
    slots: tuple[Slot, ...]
    gist: str
    """What is wanted, as a noun phrase."""
    asks: tuple[str, ...]
    results: dict[str, Sampler]
    reply: str
    compare: Compare | None = None

    @property
    def key(self) -> str:
        """Unlike every other intent of the table."""
        return f"{self.domain} {self.verb} {self.noun}"


# not the calendar module's names, which follow the machine's language
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def pick(*values: str) -> Sampler:
    """One of the given texts, said as it is written."""

    def sample(rng: Random) -> tuple[str, str]:
        value = rng.choice(values)
        return value, value

    return sample


def whole(low: int, high: int, step: int = 1) -> Sampler:
    """A whole number from `low` to `high`, both possible."""

    def sample(rng: Random) -> tuple[int, str]:
        value = rng.randrange(low, high + 1, step)
        return value, str(value)

    return sample


def money(low: int, high: int) -> Sampler:
    """An amount from `low` to below `high`, in steps of 0.05, said with two decimals."""

    def sample(rng: Random) -> tuple[float, str]:
        value = rng.randrange(low * 100, high * 100, 5) / 100
        return value, f"{value:.2f}"

    return sample


def code(prefix: str) -> Sampler:
    """An identifier such as `INV-4711`."""

    def sample(rng: Random) -> tuple[str, str]:
        value = f"{prefix}-{rng.randrange(1000, 99999)}"
        return value, value

    return sample


def day(rng: Random) -> tuple[str, str]:
    """A date in 2025 or 2026: ISO 8601, and as people say it."""
    chosen = date(2025, 1, 1) + timedelta(days=rng.randrange(700))
    month = _MONTHS[chosen.month - 1]
    spoken = rng.choice((f"{chosen.day} {month} {chosen.year}", f"{month} {chosen.day}, {chosen.year}"))
    return chosen.isoformat(), spoken


def clock(rng: Random) -> tuple[str, str]:
    """A quarter hour from 07:00 to 21:45: `HH:MM`, and as people say it."""
    hour, minute = rng.randrange(7, 22), rng.choice((0, 15, 30, 45))
    spoken = f"{(hour - 1) % 12 + 1}:{minute:02} {'am' if hour < 12 else 'pm'}"
    return f"{hour:02}:{minute:02}", rng.choice((spoken, f"{hour:02}:{minute:02}"))


def listed(names: list[str]) -> str:
    """Names in running text: `a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def several(*values: str) -> Sampler:
    """Two or three of the given texts, in their order."""

    def sample(rng: Random) -> tuple[list[str], str]:
        chosen = sorted(rng.sample(values, rng.randrange(2, 4)), key=values.index)
        return chosen, listed(chosen)

    return sample


TEXT: dict[str, Any] = {"type": "string"}
DATE: dict[str, Any] = {"type": "string", "format": "date"}
WHOLE: dict[str, Any] = {"type": "integer", "minimum": 1}
NUMBER: dict[str, Any] = {"type": "number"}
LIST: dict[str, Any] = {"type": "array", "items": {"type": "string"}}

CITIES = pick(
    "Lisbon", "Osaka", "Nairobi", "Toronto", "Bergen", "Lima", "Chennai", "Hanoi", "Dublin", "Cairo", "Porto", "Tallinn"
)  # fmt: skip
PEOPLE = pick("Amara", "Jonas", "Mei", "Rafael", "Ingrid", "Yusuf", "Clara", "Dmitri", "Leila", "Tomas", "Priya")
GOODS = pick("desk lamp", "bread knife", "espresso machine", "yoga mat", "rain jacket", "keyboard", "kettle")
CURRENCIES = ("USD", "EUR", "JPY", "GBP", "INR", "BRL", "CHF", "SEK")
SERVICES = pick("billing-api", "auth", "image-resizer", "search-index", "mail-worker", "checkout", "report-builder")


def one_of(*values: str) -> dict[str, Any]:
    """The JSON Schema of a text that is one of the given ones."""
    return {"type": "string", "enum": list(values)}
