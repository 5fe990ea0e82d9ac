"""Grades of free-running replies: calls as the Berkeley Function Calling Leaderboard does, numbers as GSM8K does.

Calls are graded by the rules of the leaderboard's AST checker for Python functions (Patil et al., "The Berkeley
Function Calling Leaderboard", ICML 2025; package `bfcl-eval`), written anew and compared with that checker, row by row
on its own data, by the tests. The expected answer lists, per call and parameter, the values that are accepted:
`[{"name": {"parameter": [value, ...]}}]`. A reply is correct if

1.  it makes as many calls as are expected, and every expected call finds one that fits, in any order. Each takes the
    first that fits and is not taken;
2.  the name is the tool's, exactly. (The leaderboard writes `a.b` as `a_b` for interfaces that forbid dots and then
    expects that; a prompt of ours shows `a.b`.)
3.  every required parameter is given, none that is unknown to the schema or to the answer, and any other may be left
    out only if "" is among its accepted values;
4.  a value has the declared type: `integer`, `number` (`float`), `string`, `boolean`, `array` (`tuple`), `object`
    (`dict`); undeclared or `any` counts as a string. An integer may stand for a float, a boolean never for a number.
    The type of the first accepted value is right as well: where an answer names a variable in place of a list, say,
    or is null. Such a value must then be equal to an accepted one as it stands;
5.  strings are equal after dropping spaces and any of `, . / - _ * ^`, in lower case, with " for ';
6.  lists are equal item by item, in order, and objects key by key. The accepted form of an object lists the accepted
    values of each key, with "" for a key that may be left out. Items have the declared type, or that of an accepted
    list's first item (an integer is no float here); types inside an object are not checked, and 1, 1.0 and true are
    one value there. Strings directly inside are compared by rule 5, whatever lies deeper as it stands.

Java and JavaScript: for these two subsets the leaderboard asks for every value as a string of that language's source
and converts it. The tools read here declare JSON types, so their calls are graded by the rules above like any others;
figures on those subsets do not compare with the leaderboard's.

Boundary: reads no text but numbers (`calls` finds the calls), needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from layerroute.data.chat import normalize_tool
from layerroute.errors import DataError

__all__ = ["Accepted", "Grade", "accepted_from_gold", "grade_calls", "grade_number", "last_number_is"]

Accepted = dict[str, dict[str, list[Any]]]
"""One expected call: its name, and the accepted values of each parameter; "" among them: may be left out."""

_KINDS: dict[str, type] = {
    "string": str,
    "integer": int,
    "number": float,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "object": dict,
    "dict": dict,
}
_IGNORED = re.compile(r"[ ,./\-_*^]")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)")
_NUMBER_INSIDE = re.compile(r"((?<![\w)])-)?\$?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
"""Sign, where it is no minus between two terms, and digits with or without thousands' commas."""


@dataclass(frozen=True)
class Grade:
    """Whether a reply is correct, and if not, the first fault found."""

    correct: bool
    error: str | None = None


def grade_calls(calls: Sequence[Mapping[str, Any]], expected: Sequence[Accepted], tools: Sequence[Any]) -> Grade:
    """Grade calls against an answer by the rules of this module.

    Args:
        calls: `{"name", "arguments": object}` each, of JSON values.
        expected: one item per call, as in the leaderboard's `possible_answer` files.
        tools: in the short or OpenAI's form; `parameters` in JSON Schema's types or the leaderboard's.
    """
    if len(calls) != len(expected):
        return Grade(False, f"{len(calls)} calls instead of {len(expected)}")
    schemas = _schemas(tools)
    left = list(calls)
    for answer in expected:
        ((name, accepted),) = answer.items()
        faults: list[str] = []
        for position, call in enumerate(left):
            if call["name"] != name:
                continue
            fault = _call_fault(call["arguments"], accepted, schemas.get(name, {}))
            if fault is None:
                del left[position]
                break
            faults.append(f"{name}: {fault}")
        else:
            others = ", ".join(sorted({call["name"] for call in left}))
            return Grade(False, faults[0] if faults else f"no call of {name} (but of {others})")
    return Grade(True)


def accepted_from_gold(gold_calls: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[Accepted]:
    """Accepted values of an answer that is known as plain calls: each value of the gold call and no other.

    A parameter that the schema does not require and the gold call leaves out may be left out, equal its `default` or,
    as a string or list, be empty; where the gold call gives just that default, it may be left out as well. Gold calls
    that contradict their tools (an unknown tool, an undeclared or a missing parameter) make an answer that no reply can
    give: `grade_calls(gold_calls, ...)` tells.
    """
    schemas = _schemas(tools)
    answers = []
    for call in gold_calls:
        schema, given = schemas.get(call["name"], {}), call["arguments"]
        accepted: dict[str, list[Any]] = {}
        for name, declared in _properties(schema).items():
            default = [declared["default"]] if isinstance(declared, Mapping) and "default" in declared else []
            optional = name not in schema.get("required", [])
            if name in given:
                may_lack = optional and given[name] in default
                accepted[name] = [_accepted_form(given[name], declared), *([""] if may_lack else [])]
            elif optional:
                accepted[name] = ["", *(_accepted_form(value, declared) for value in default)]
        undeclared = {name: [value] for name, value in given.items() if name not in accepted}
        answers.append({call["name"]: {**accepted, **undeclared}})
    return answers


def grade_number(text: str, gold_text: str) -> Grade:
    """GSM8K's exact match: the number after the first `####` of `text` against that of `gold_text`.

    `18`, `$18.00`, `18.` and `18 eggs` are equal, as are `1,000` and `1000`. A `####` without a number on its line
    is a wrong answer, whatever follows later.

    Raises:
        DataError: the gold text has no such number.
    """
    gold, given = _answer(gold_text), _answer(text)
    if not isinstance(gold, Decimal):
        raise DataError(f"the gold answer has no number after '####': {gold_text[-80:]!r}")
    if not isinstance(given, Decimal):
        return Grade(False, given)
    return Grade(True) if given == gold else Grade(False, f"{given} instead of {gold}")


def last_number_is(text: str, gold_text: str) -> bool:
    """Whether the last number anywhere in `text` is the one after the gold text's `####`.

    For replies of models that were never told of `####`, which `grade_number` counts as wrong whatever they say. It is
    lenient: a reply that is cut off in mid-calculation may end in the right number by luck.
    """
    numbers = _NUMBER_INSIDE.findall(text)
    return bool(numbers) and Decimal("".join(numbers[-1]).replace(",", "")) == _answer(gold_text)


def _answer(text: str) -> Decimal | str:
    """The number after the first `####`, or why there is none."""
    _, mark, rest = text.partition("####")
    if not mark:
        return "no ####"
    words = re.sub(r"[$,%]", "", rest.partition("\n")[0]).split()
    if words and _NUMBER.fullmatch(words[0]):
        return Decimal(words[0])
    return "no number after ####"


def _schemas(tools: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Parameters by name; of several tools with one name, the first counts."""
    return {tool["name"]: tool["parameters"] for tool in map(normalize_tool, reversed(tools))}


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    return schema.get("properties") or {}


def _kind(schema: Any) -> type:
    """The Python type of a declared one; of several, the first that is not null."""
    declared = schema.get("type") if isinstance(schema, Mapping) else None
    names = declared if isinstance(declared, list) else [declared]
    return next((_KINDS[name] for name in names if name in _KINDS), str)


def _item_kind(schema: Any) -> type | None:
    """The declared type of an array's items; None where it declares none."""
    return _kind(schema["items"]) if _kind(schema) is list and isinstance(schema.get("items"), Mapping) else None


def _accepted_form(value: Any, schema: Any) -> Any:
    """A gold value as it stands in an answer: objects list the accepted values of each key, here one."""
    if _kind(schema) is dict and isinstance(value, dict):
        return {key: [inner] for key, inner in value.items()}
    if _item_kind(schema) is dict and isinstance(value, list):
        return [{key: [inner] for key, inner in v.items()} if isinstance(v, dict) else v for v in value]
    return value


def _call_fault(arguments: Mapping[str, Any], accepted: dict[str, list[Any]], schema: Mapping[str, Any]) -> str | None:
    """Why the arguments do not fit one expected call of the same name; None if they do."""
    properties = _properties(schema)
    for name in schema.get("required", []):
        if name not in arguments:
            return f"required parameter {name!r} is missing"
    for name, value in arguments.items():
        if name not in properties or name not in accepted:
            return f"unexpected parameter {name!r}"
        fault = _value_fault(value, accepted[name], properties[name])
        if fault is not None:
            return f"parameter {name!r}: {fault}"
    for name, values in accepted.items():
        if name not in arguments and "" not in values:
            return f"parameter {name!r} is missing"
    return None


def _value_fault(value: Any, accepted: list[Any], schema: Any) -> str | None:
    kind, items, answer_kind = _kind(schema), _item_kind(schema), _first_kind(accepted)
    given = float if type(value) is int and kind is float else type(value)
    if given not in (kind, answer_kind):
        return f"{value!r:.80} is of type {given.__name__} instead of {kind.__name__}"
    if given is list and items is not None and not _items_typed(value, accepted, items):
        return f"{value!r:.80} holds items of another type than {items.__name__}"
    if answer_kind not in (None, kind):
        fits = value in accepted
    elif kind is dict:
        fits = any(_objects_fit(value, answer) for answer in accepted if isinstance(answer, dict))
    elif kind is list:
        # "", the mark of an optional parameter, has length 0 and so lets an empty list pass
        fits = any(_lists_fit(value, answer, items) for answer in accepted if isinstance(answer, (list, str)))
    else:
        fits = _plain(value) in map(_plain, accepted)
    return None if fits else f"{value!r:.80} is none of {accepted!r:.160}"


def _first_kind(accepted: Sequence[Any]) -> type | None:
    return next((type(answer) for answer in accepted if answer != ""), None)


def _items_typed(value: list[Any], accepted: Sequence[Any], items: type) -> bool:
    """Whether all items have the declared type, or that of some accepted list's first item."""
    return any(
        not isinstance(answer, list) or all(type(item) in (items, _first_kind(answer)) for item in value)
        for answer in accepted
    )


def _lists_fit(value: list[Any], answer: Sequence[Any], items: type | None) -> bool:
    def fit(given: Any, wanted: Any) -> bool:
        if items is dict and isinstance(given, dict) and isinstance(wanted, dict):
            return _objects_fit(given, wanted)
        return bool(_plain(given) == _plain(wanted))

    return len(value) == len(answer) and all(map(fit, value, answer))


def _objects_fit(value: dict[str, Any], answer: dict[str, Any]) -> bool:
    """Key by key; a key's accepted values are a list, and one that is none stands for itself."""
    accepted = {key: values if isinstance(values, list) else [values] for key, values in answer.items()}
    return all(key in accepted and _plain(inner) in map(_plain, accepted[key]) for key, inner in value.items()) and all(
        key in value or "" in values for key, values in accepted.items()
    )


def _plain(value: Any) -> Any:
    """A string as rule 5 compares it; anything else as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
