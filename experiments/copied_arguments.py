"""Direct calls of made-up tools whose arguments are copied from the request: `copied_arguments.py ROWS SEED > FILE`.

Rows in the format of `docs/data.md`. Every value stands in the user's message as it is spoken (5% for 0.05, a list with
commas and `and`), is of the type that the schema says, and belongs to no fixed vocabulary: it can only be copied. One
request in five asks for two calls of the same tool. All words and values are drawn here; no data set was read.
"""

from __future__ import annotations

import json
import string
import sys
from random import Random
from typing import Any


def words(listed: str) -> list[str]:
    return [" ".join(item.split()) for item in listed.split(",")]


VERBS = words(
    """
    get, find, calculate, compute, search, list, book, create, update, convert, fetch, check, analyze, estimate,
    schedule, track, validate, compare, generate, predict
    """
)
THINGS = words(
    """
    distance, interest, sales tax, energy bill, loan payment, recipe, court case, patient record, train route,
    stock price, orbit period, soil moisture, museum ticket, game score, song lyrics, exam grade, file checksum,
    server status, flight seat, paint volume, reaction rate, bond yield, wind load, tree height, crop yield, art
    auction, chess rating, parking permit, traffic delay, cell growth, gene sequence, population growth, shipping
    cost, hotel deposit, marathon pace, water pressure, heat loss, lens focus, magnetic flux, queue length, cache
    entry, form field, event handler, database row, sensor reading, bus lane, insurance quote, tennis match,
    volcano alert, poem title, currency rate, calorie intake, mortgage balance, battery charge
    """
)
PLACES = words(
    """
    math, finance, law, travel, health, geo, sports, music, store, lab, sys, media, city, farm, space, school
    """
)
WHOLES = words(
    """
    count, years, quantity, limit, year, room, floor, age, port, retries, days, level, radius, width, charge,
    score
    """
)
REALS = words(
    """
    rate, ratio, speed, mass, height, temperature, price, voltage, discount, weight, angle, tolerance
    """
)
TEXTS = words(
    """
    title, owner, city, street, company, author, customer, team, product, species, handler, variable, label,
    reference, case
    """
)
FLAGS = words("include_history, is_active, verbose, round_trip, use_cache, recursive, with_tax, is_complete")
LISTS = words("names, values, tags, scores, stops, colors, ids")
CHOICES = {
    "unit": words("metric, imperial, kelvin"),
    "mode": words("fast, safe, exact"),
    "size": words("small, medium, large"),
    "order": words("ascending, descending"),
    "format": words("json, csv, pdf"),
}
SYLLABLES = words(
    """
    ba, cor, del, fen, gra, hol, ist, jun, kel, lor, man, nev, ost, par, quin, ros, sal, tor, ul, ven, wes, yar,
    zo, mi, ra, tin, sha
    """
)


def word(rng: Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()


def text(rng: Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        letters = rng.choices(string.ascii_uppercase, k=3)
        return "".join(letters + rng.choices(string.digits, k=rng.randint(3, 8)))
    if kind == 1:
        return word(rng).lower() + "".join(word(rng) for _ in range(rng.randint(1, 2)))
    return " ".join(word(rng) for _ in range(rng.randint(1, 3)))


def number(rng: Random) -> int:
    return rng.choice((1, 1, 1, -1)) * rng.choice((rng.randint(1, 12), rng.randint(10, 999), 50 * rng.randint(1, 2000)))


def joined(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def parameter(rng: Random, name: str) -> tuple[dict[str, Any], Any, str]:
    """Its schema, a value and how the value is spoken."""
    about = f"The {name.replace('_', ' ')}."
    if name in WHOLES:
        value = number(rng)
        return {"type": "integer", "description": about}, value, str(value)
    if name in REALS:
        if rng.random() < 0.3:
            percent = rng.randint(1, 40)
            return {"type": "number", "description": f"{about} As a fraction."}, percent / 100, f"{percent}%"
        real = round(rng.uniform(-50, 500), rng.randint(1, 2))
        return {"type": "number", "description": about}, real, str(real)
    if name in CHOICES:
        chosen = rng.choice(CHOICES[name])
        return {"type": "string", "enum": CHOICES[name], "description": about}, chosen, chosen
    if name in LISTS:
        if rng.random() < 0.5:
            numbers = [number(rng) for _ in range(rng.randint(2, 4))]
            schema = {"type": "array", "items": {"type": "integer"}, "description": about}
            return schema, numbers, joined([str(item) for item in numbers])
        words = [text(rng) for _ in range(rng.randint(2, 3))]
        return {"type": "array", "items": {"type": "string"}, "description": about}, words, joined(words)
    named = text(rng)
    return {"type": "string", "description": about}, named, rng.choice(("{}", "'{}'", '"{}"')).format(named)


def tool(rng: Random) -> tuple[dict[str, Any], str, list[str]]:
    """A tool, what it does in words, and the parameters that it must have."""
    verb, thing = rng.choice(VERBS), rng.choice(THINGS)
    snake = f"{verb}_{thing.replace(' ', '_')}"
    camel = verb + thing.title().replace(" ", "")
    dotted, method = f"{rng.choice(PLACES)}.{snake}", f"{thing.title().replace(' ', '')}.{verb}"
    name = rng.choice((snake, snake, camel, dotted, method))
    pools = (WHOLES, WHOLES, REALS, TEXTS, TEXTS, FLAGS, LISTS, list(CHOICES))
    names = list(dict.fromkeys(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 4))))
    needed = [item for item in names if rng.random() < 0.75] or names[:1]
    does = f"{verb} the {thing}"
    return {"name": name, "description": f"{does.capitalize()}.", "names": names}, does, needed


def spoken(rng: Random, name: str, said: str) -> str:
    shown = name.replace("_", " ")
    return rng.choice((f"{shown} {said}", f"the {shown} is {said}", f"a {shown} of {said}", f"{said} as the {shown}"))


def row(number_of: int, seed: int, rng: Random) -> dict[str, Any]:
    tools, chosen = [], None
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        made, does, needed = tool(rng)
        calls = 2 if rng.random() < 0.2 else 1
        schemas: dict[str, Any] = {}
        arguments: list[dict[str, Any]] = [{} for _ in range(calls)]
        parts: list[list[str]] = [[] for _ in range(calls)]
        asked = [item for item in made["names"] if item in needed or rng.random() < 0.5]
        for name in made["names"]:
            for place in range(calls):
                if name in FLAGS:
                    schemas[name] = {"type": "boolean", "description": f"Whether to {name.replace('_', ' ')}."}
                    value: Any = rng.random() < 0.5
                    said = f"{name.replace('_', ' ')} {'on' if value else 'off'}"
                else:
                    schemas[name], value, said = parameter(rng, name) if place == 0 else again(rng, name, schemas[name])
                    said = spoken(rng, name, said)
                if name in asked:
                    arguments[place][name] = value
                    parts[place].append(said)
        schema = {"type": "object", "properties": schemas, "required": needed}
        tools.append({"name": made["name"], "description": made["description"], "parameters": schema})
        if chosen is None:
            chosen = (made["name"], does, arguments, parts)
    assert chosen is not None
    name, does, arguments, parts = chosen
    opening = rng.choice(("Please {}", "Can you {}", "I need you to {}", "{}", "Could you {} for me")).format(does)
    ask = f"{opening}: {' and once more with '.join(', '.join(part) for part in parts)}."
    rng.shuffle(tools)
    calls_made = [{"name": name, "arguments": each} for each in arguments]
    return {
        "id": f"copied-{seed}-{number_of}",
        "source": f"copied-{seed}",
        "group": f"copied-{seed}-{number_of}",
        "step_type": "tool_call",
        "messages": [{"role": "user", "content": ask[0].upper() + ask[1:]}],
        "tools": tools,
        "target": {"role": "assistant", "content": None, "tool_calls": calls_made},
        "meta": {},
    }


def again(rng: Random, name: str, schema: dict[str, Any]) -> tuple[dict[str, Any], Any, str]:
    """Another value under the same schema."""
    while True:
        made, value, said = parameter(rng, name)
        if made == schema:
            return made, value, said


def main() -> None:
    rows, seed = map(int, sys.argv[1:])
    rng = Random(f"copied-{seed}")
    for index in range(rows):
        print(json.dumps(row(index, seed, rng), ensure_ascii=False))


if __name__ == "__main__":
    main()
