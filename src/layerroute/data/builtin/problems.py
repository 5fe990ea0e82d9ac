"""Word problems of the built-in source: each draws its numbers and reasons to the right result.

Contract: `word_problem(rng) -> (question, reasoning, result)`; the reasoning ends with the result, and all arithmetic
is exact over whole numbers. Boundary: text only.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

__all__ = ["word_problem"]

Problem = tuple[str, list[str], int]
_NAMES = ("Amara", "Jonas", "Mei", "Rafael", "Ingrid", "Yusuf", "Clara", "Dmitri", "Leila", "Tomas")


def word_problem(rng: Random) -> tuple[str, str, int]:
    """A question, its solution in steps, and the number that it ends with."""
    question, steps, result = rng.choice(_PROBLEMS)(rng)
    style = rng.randrange(3)
    if style == 0:
        lines = [f"Step {number}: {step}" for number, step in enumerate(steps, start=1)]
    elif style == 1:
        lines = [rng.choice(("Let me work through this.", "I will take it one quantity at a time.")), *steps]
    else:
        lines = [" Then ".join([steps[0], *(step[0].lower() + step[1:] for step in steps[1:])])]
    return question, "\n".join([*lines, f"So the answer is {result}."]), result


def _shopping(rng: Random) -> Problem:
    name, item = rng.choice(_NAMES), rng.choice(("notebooks", "mugs", "scarves", "plants"))
    count, price, off = rng.randrange(3, 12), rng.randrange(4, 30), rng.randrange(2, 12)
    return (
        f"{name} buys {count} {item} at ${price} each with a voucher worth ${off}. How many dollars is that?",
        [
            f"The {item} cost {count} * {price} = {count * price} dollars.",
            f"The voucher leaves {count * price} - {off} = {count * price - off} dollars.",
        ],
        count * price - off,
    )


def _journey(rng: Random) -> Problem:
    first, second = rng.randrange(2, 6), rng.randrange(2, 6)
    fast, slow = rng.randrange(70, 120, 5), rng.randrange(30, 65, 5)
    return (
        f"A van drives {first} hours at {fast} km/h on the motorway and {second} hours at {slow} km/h in the hills. "
        "How many kilometres does it cover?",
        [
            f"On the motorway it covers {first} * {fast} = {first * fast} km.",
            f"In the hills it covers {second} * {slow} = {second * slow} km.",
            f"Together that is {first * fast} + {second * slow} = {first * fast + second * slow} km.",
        ],
        first * fast + second * slow,
    )


def _saving(rng: Random) -> Problem:
    name, weekly = rng.choice(_NAMES), rng.randrange(30, 90, 5)
    spent, weeks = rng.randrange(5, 25), rng.randrange(4, 16)
    kept = weekly - spent
    return (
        f"{name} earns ${weekly} a week and spends ${spent} of it. In how many weeks is ${kept * weeks} saved?",
        [
            f"Each week {weekly} - {spent} = {kept} dollars are left.",
            f"Saving {kept * weeks} dollars takes {kept * weeks} / {kept} = {weeks} weeks.",
        ],
        weeks,
    )


def _boxes(rng: Random) -> Problem:
    size, full, rest = rng.randrange(6, 24), rng.randrange(5, 30), rng.randrange(1, 6)
    total, thing = size * full + rest, rng.choice(("jars", "books", "lamps", "tiles"))
    return (
        f"A workshop packs {total} {thing} into boxes that hold {size} each. How many boxes are needed?",
        [
            f"{full} full boxes hold {full} * {size} = {full * size} {thing}.",
            f"{total} - {full * size} = {rest} {thing} are left, and they need one more box.",
            f"In all there are {full} + 1 = {full + 1} boxes.",
        ],
        full + 1,
    )


def _average(rng: Random) -> Problem:
    name, goal = rng.choice(_NAMES), rng.randrange(60, 85)
    scores = [goal + rng.randrange(-9, 10) for _ in range(3)]
    needed, listed = goal * 4 - sum(scores), ", ".join(map(str, scores))
    return (
        f"{name} scored {listed} in three tests. What must the fourth score be for an average of exactly {goal}?",
        [
            f"Four tests with an average of {goal} add up to 4 * {goal} = {goal * 4} points.",
            f"So far there are {' + '.join(map(str, scores))} = {sum(scores)} points.",
            f"The fourth test has to bring {goal * 4} - {sum(scores)} = {needed} points.",
        ],
        needed,
    )


def _recipe(rng: Random) -> Problem:
    people, factor, grams = rng.randrange(2, 6), rng.randrange(2, 6), rng.randrange(40, 160, 10)
    return (
        f"A soup for {people} people needs {grams * people} g of lentils. How many grams does it need for "
        f"{people * factor} people?",
        [
            f"One person gets {grams * people} / {people} = {grams} g.",
            f"For {people * factor} people that is {people * factor} * {grams} = {people * factor * grams} g.",
        ],
        people * factor * grams,
    )


def _ages(rng: Random) -> Problem:
    older, younger = rng.sample(_NAMES, 2)
    gap, later, age = rng.randrange(2, 15), rng.randrange(2, 12), rng.randrange(5, 30)
    total = age + later + age + gap + later
    return (
        f"{older} is {gap} years older than {younger}, who is {age}. How old will they be together in {later} years?",
        [
            f"Today {older} is {age} + {gap} = {age + gap}.",
            f"In {later} years {younger} is {age} + {later} = {age + later} and {older} is {age + gap} + {later} = "
            f"{age + gap + later}.",
            f"Together they are {age + later} + {age + gap + later} = {total}.",
        ],
        total,
    )


def _tank(rng: Random) -> Problem:
    inflow, leak = rng.randrange(12, 40), rng.randrange(2, 9)
    minutes, start = rng.randrange(5, 40), rng.randrange(10, 90, 5)
    full = start + (inflow - leak) * minutes
    return (
        f"A tank holds {start} litres. A pump adds {inflow} litres a minute while {leak} litres a minute leak out. "
        f"After how many minutes does it hold {full} litres?",
        [
            f"Each minute the tank gains {inflow} - {leak} = {inflow - leak} litres.",
            f"It still has to gain {full} - {start} = {full - start} litres.",
            f"That takes {full - start} / {inflow - leak} = {minutes} minutes.",
        ],
        minutes,
    )


def _tickets(rng: Random) -> Problem:
    adult, child = rng.randrange(9, 25), rng.randrange(3, 9)
    adults, children, costs = rng.randrange(40, 160), rng.randrange(20, 90), rng.randrange(50, 300, 10)
    income = adult * adults + child * children
    return (
        f"A theatre sells {adults} tickets at ${adult} and {children} children's tickets at ${child}. The "
        f"evening costs ${costs} to run. How many dollars are left?",
        [
            f"The full tickets bring {adults} * {adult} = {adults * adult} dollars.",
            f"The children's tickets bring {children} * {child} = {children * child} dollars.",
            f"The income is {adults * adult} + {children * child} = {income} dollars.",
            f"After the costs {income} - {costs} = {income - costs} dollars are left.",
        ],
        income - costs,
    )


def _backwards(rng: Random) -> Problem:
    parts = [rng.randrange(10, 50, 5) for _ in range(3)]
    end = rng.randrange(17 * 60, 20 * 60, 15)
    start = end - sum(parts)
    return (
        f"Dinner is at {end // 60}:{end % 60:02}. Shopping takes {parts[0]} minutes, cooking {parts[1]} and laying the "
        f"table {parts[2]}, one after another. How many minutes after 12:00 must one start at the latest?",
        [
            f"Everything takes {parts[0]} + {parts[1]} + {parts[2]} = {sum(parts)} minutes.",
            f"Dinner is {end // 60 - 12} * 60 + {end % 60} = {end - 720} minutes after 12:00.",
            f"Counting back, {end - 720} - {sum(parts)} = {start - 720} minutes remain before the start.",
        ],
        start - 720,
    )


_PROBLEMS: tuple[Callable[[Random], Problem], ...] = (
    _shopping, _journey, _saving, _boxes, _average, _recipe, _ages, _tank, _tickets, _backwards,
)  # fmt: skip
