"""The courses that a built-in conversation can take, and how often each is taken.

Contract: a script fills a `Talk`. Planning, tool_call and answer steps come out of the same contexts: a thought and
its call share their messages, and so do a plan asked for and a call asked for. Whether a
turn starts with a thought is no coin toss: the system message, where there is one, says which manner is wanted.
"""

from __future__ import annotations

from collections.abc import Callable

from layerroute.data.builtin.intents import INTENTS
from layerroute.data.builtin.problems import word_problem
from layerroute.data.builtin.slots import Compare, Intent, listed
from layerroute.data.builtin.talk import BRISK, CAREFUL, Request, Talk, Tool

__all__ = ["SCRIPTS"]

_OFF_TOPIC = (
    ("knit me a scarf", "knitting"), ("tell me who will win the next election", "predicting elections"),
    ("repair the dishwasher", "repairing machines"), ("diagnose my rash from a photo", "medical diagnoses"),
    ("name my cat", "naming pets"), ("taste this sauce", "tasting food"), ("walk the dog", "walking dogs"),
    ("write a symphony", "composing"), ("guess my age", "guessing ages"), ("paint the fence", "painting"),
)  # fmt: skip


def _direct(talk: Talk) -> None:
    """The call at once, then the answer."""
    talk.system(BRISK)
    intent = talk.rng.choice(INTENTS)
    request = talk.equip(intent)[intent.key].request(talk.rng)
    talk.user(_asked(talk, request))
    talk.call(request)
    talk.text("answer", request.reply)


def _thoughtful(talk: Talk) -> None:
    """A thought and a call in one turn, for one or two wishes after each other."""
    talk.system(CAREFUL)
    intents = talk.rng.sample(INTENTS, talk.rng.choice((1, 1, 1, 1, 2)))
    tools = talk.equip(*intents)
    for intent in intents:
        tool = tools[intent.key]
        request = tool.request(talk.rng)
        talk.user(_asked(talk, request))
        talk.think(_thought(talk, tool, request))
        talk.call(request)
        if talk.rng.random() < 0.4:
            talk.think(_reflection(talk, request))
            talk.answer(request.reply)
        else:
            talk.text("answer", request.reply)


def _compare(talk: Talk) -> None:
    """Two calls, one after the other or at once, whose results are then set side by side."""
    rng = talk.rng
    talk.system(CAREFUL)
    intent = rng.choice([intent for intent in INTENTS if intent.compare])
    compare = intent.compare
    assert compare is not None
    tool = talk.equip(intent)[intent.key]
    first = tool.request(rng)
    second = tool.request(rng, unlike=first, differ=compare.slot)
    one, other = first.spoken[compare.slot], second.spoken[compare.slot]
    talk.user(f"{_asked(talk, first)} And the same for {other}: which of the two is {compare.word}, and by how much?")
    if rng.random() < 0.5:
        talk.think(
            f"This takes three steps: ask {tool.name} about {one}, ask it about {other}, then compare the "
            f"{_words(compare.figure)} of both. I start with {one}."
        )
        talk.call(first)
        talk.think(
            f"For {one} the result says {_words(compare.figure)}: {first.spoken[compare.figure]}. Before I can "
            f"compare, I need the same for {other}, so I call {tool.name} again with everything else unchanged."
        )
        talk.call(second)
    else:
        talk.think(f"The two questions do not depend on each other, so I can ask {tool.name} about both at once.")
        talk.call(first, second)
    reasoning, answer = _difference(compare, first, second)
    talk.think(reasoning)
    talk.answer(answer)


def _difference(compare: Compare, first: Request, second: Request) -> tuple[str, str]:
    (one, a), (other, b) = ((r.spoken[compare.slot], r.result[compare.figure]) for r in (first, second))
    if a == b:
        return (
            f"Both results say {first.spoken[compare.figure]}, so the difference is 0.",
            f"There is no difference: both stand at {first.spoken[compare.figure]} {compare.unit}.",
        )
    high, low = max(a, b), min(a, b)
    gap = f"{high - low:.2f}" if isinstance(high, float) else str(high - low)
    winner, shown = (one, first) if a > b else (other, second)
    lower = second if shown is first else first
    sums = f"{shown.spoken[compare.figure]} - {_bracketed(lower.spoken[compare.figure])} = {gap}"
    return (
        f"I have both results now. {_words(compare.figure).capitalize()}: {first.spoken[compare.figure]} for {one}, "
        f"{second.spoken[compare.figure]} for {other}. The difference is {sums}.",
        f"{winner[0].upper()}{winner[1:]} is {compare.word}, by {gap} {compare.unit}.",
    )


def _parallel(talk: Talk) -> None:
    """Two different wishes in one message, two calls in one turn."""
    thinks = talk.rng.random() < 0.4
    talk.system(CAREFUL if thinks else BRISK)
    pair = talk.rng.sample(INTENTS, 2)
    tools = talk.equip(*pair)
    requests = [tools[intent.key].request(talk.rng) for intent in pair]
    talk.user(" And another thing: ".join(_asked(talk, request) for request in requests))
    if thinks:
        names = listed([request.tool for request in requests])
        talk.think(f"Two separate wishes, neither needs the other's result. I can call {names} in one go.")
    talk.call(*requests)
    talk.text("answer", "\n".join(request.reply for request in requests))


def _plan_first(talk: Talk) -> None:
    """A plan that was asked for, under tools, as a turn of its own; the calls follow when the user agrees."""
    rng = talk.rng
    talk.system(BRISK)
    intents = rng.sample(INTENTS, rng.choice((2, 2, 2, 3)))
    tools = talk.equip(*intents)
    requests = [tools[intent.key].request(rng) for intent in intents]
    wishes = " ".join(_asked(talk, request) for request in requests)
    talk.user(f"{wishes} {rng.choice(('Tell me your plan first.', 'Before you start: how will you go about it?'))}")
    lines = [
        f"{number}. {request.say(request.intent.gist)}: call {request.tool} with {_values(request)}."
        for number, request in enumerate(requests, start=1)
    ]
    closing = rng.choice(
        (
            "None of these steps waits for another, so the order is free.",
            "I report after the last step. If one of them fails, I say so and go on with the next.",
        )
    )
    used = talk.others(*(tools[intent.key] for intent in intents)) if rng.random() < 0.5 else ""
    opening = f"There are {len(requests)} things to do."
    talk.text("planning", "\n".join([opening, *lines, f"{closing} {used}".strip()]))
    talk.user(rng.choice(("Go ahead.", "Good, do it.", "Fine. Start with the first one.")))
    talk.call(requests[0])
    talk.text("answer", requests[0].reply)


def _clarify(talk: Talk) -> None:
    """A required value is missing: the assistant asks for it, then calls."""
    rng = talk.rng
    thinks = rng.random() < 0.4
    talk.system(CAREFUL if thinks else BRISK)
    intent = rng.choice(INTENTS)
    tool = talk.equip(intent)[intent.key]
    request = tool.request(rng)
    slot, name = rng.choice([pair for pair in tool.parameters if not pair[0].extra])
    known = [
        f"{_words(n)}: {request.spoken[s.names[0]]}" for s, n in tool.parameters if n in request.arguments and n != name
    ]
    talk.user("\n".join([f"Please {_wish(intent)} for me.", *known]))
    about = slot.about.rstrip(".").lower()
    talk.text("answer", f"Happy to. One thing is missing: the {_words(name)} ({about}). What should it be?")
    talk.user(rng.choice(("It's {}.", "{}", "Take {}.", "Sorry, I forgot: {}.")).format(request.spoken[slot.names[0]]))
    if thinks:
        talk.think(f"Now I have all that {tool.name} requires: {_values(request)}.")
    talk.call(request)
    talk.text("answer", request.reply)


def _decline(talk: Talk) -> None:
    """No tool can do it: an answer, with or without a thought before it."""
    thinks = talk.rng.random() < 0.5
    talk.system(CAREFUL if thinks else BRISK)
    wish, what = talk.rng.choice(_OFF_TOPIC)
    tools = talk.equip()
    names = listed([tool["name"] for tool in talk.tools])
    talk.user(talk.rng.choice(("Can you {}?", "Please {}.", "I need you to {}.")).format(wish))
    if thinks:
        talk.think(f"The user asks me to {wish}. My tools are {names}; none has to do with {what}, so I must decline.")
    gists = listed([_wish(tool.intent) for tool in tools.values()])
    talk.answer(f"I am afraid I cannot help with {what}. What I can do for you: {gists}.")


def _problem(talk: Talk) -> None:
    """A word problem reasoned out, with tools that it does not need or with none; a whole turn or before an answer."""
    talk.system(CAREFUL)
    if talk.rng.random() < 0.5:
        talk.equip()
    question, reasoning, result = word_problem(talk.rng)
    talk.user(question)
    if talk.rng.random() < 0.6:
        talk.text("planning", reasoning)
    else:
        talk.think(reasoning)
        talk.answer(f"The result is {result}.")


SCRIPTS: dict[Callable[[Talk], None], float] = {
    _direct: 2.0,
    _thoughtful: 3.0,
    _compare: 2.0,
    _parallel: 1.0,
    _plan_first: 3.0,
    _clarify: 1.0,
    _decline: 1.0,
    _problem: 3.0,
}
"""Script to weight; chosen so that about every third step is of each type."""


def _asked(talk: Talk, request: Request) -> str:
    return request.say(talk.rng.choice(request.intent.asks)) + request.extra


def _thought(talk: Talk, tool: Tool, request: Request) -> str:
    gist = request.say(request.intent.gist)
    opening = talk.rng.choice(
        (
            f"The user wants {gist}.",
            f"So this is about {gist}.",
            f"What is needed here: {gist}.",
        )
    )
    fit = talk.rng.choice(
        (
            f"{tool.name} fits: {request.intent.about[0].lower()}{request.intent.about[1:]}",
            f"For that I have {tool.name}.",
            f"The tool for it is {tool.name}, and the message gives all that it requires.",
        )
    )
    parts = [opening, fit]
    if talk.rng.random() < 0.7:
        parts.append(f"From the message I take {_values(request)}.")
    if talk.rng.random() < 0.5:
        parts.append(talk.others(tool))
    return " ".join(parts)


def _reflection(talk: Talk, request: Request) -> str:
    shown = ", ".join(f"{_words(key)} is {request.spoken[key]}" for key in request.result)
    return talk.rng.choice(
        (
            f"The call went through: {shown}. That settles it, no further call is needed.",
            f"{request.tool} reports that {shown}. This is all the user asked for.",
        )
    )


def _wish(intent: Intent) -> str:
    article = "an" if intent.noun[0] in "aeiou" else "a"
    return f"{intent.verb} {intent.noun}" if intent.noun.endswith("s") else f"{intent.verb} {article} {intent.noun}"


def _values(request: Request) -> str:
    return listed([f"{_words(name)} {value!r}" for name, value in request.arguments.items()])


def _words(name: str) -> str:
    """A parameter's name in words: `checkIn` and `check_in` are both 'check in'."""
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).replace("_", " ").strip()


def _bracketed(number: str) -> str:
    return f"({number})" if number.startswith("-") else number
