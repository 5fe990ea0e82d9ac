"""The rules by which calls and numbers are graded, one by one; the whole against the leaderboard is another module."""

import pytest

from layerroute.errors import DataError
from layerroute.evaluation.grading import accepted_from_gold, grade_calls, grade_number, last_number_is

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer", "default": 3},
    "scale": {"type": "number"},
    "exact": {"type": "boolean"},
    "points": {"type": "array", "items": {"type": "number"}},
    "names": {"type": "array", "items": {"type": "string"}},
    "box": {"type": "object"},
    "boxes": {"type": "array", "items": {"type": "object"}},
    "free": {},
    "maybe": {"type": ["null", "integer"]},
}
TOOLS = [
    {"name": "weather.get", "parameters": {"type": "object", "properties": PROPERTIES, "required": ["city"]}},
    {"name": "stop", "parameters": {"type": "object", "properties": {}}},
]


def call(name="weather.get", **arguments):
    return {"name": name, "arguments": arguments}


def grade(calls, *accepted):
    return grade_calls(calls, [{"weather.get": values} for values in accepted], TOOLS)


@pytest.mark.parametrize(
    "parameter, accepted, right, wrong",
    [
        ("city", ["New York, N.Y."], ["new york NY", "NEW-YORK^NY"], ["New York", 1, None, ["New York, N.Y."]]),
        ("city", ["it's"], ['IT"S'], ["its"]),
        ("city", ["a", "b"], ["b"], ["ab", "c"]),
        ("days", [2], [2], [3, 2.0, "2", True, [2]]),
        ("days", ["n_days"], ["n_days"], ["N_days", 2]),
        ("scale", [2.0], [2.0, 2], [2.5, "2.0", True]),
        ("scale", [2], [2.0, 2], [3]),
        ("exact", [True], [True], [False, 1, "true"]),
        ("points", [[1.0, 2.5]], [[1.0, 2.5]], [[2.5, 1.0], [1, 2.5], [1.0], [1.0, 2.5, 3.0], "12", []]),
        ("points", [[1, 2]], [[1, 2], [1.0, 2]], [[1, 3], [True, 2], ["1", 2]]),
        ("names", [["Ann B.", "Cy"], ["D"]], [["ann b", "cy"], ["d"]], [["cy", "ann b"], ["Ann B."], "D"]),
        ("names", [[["A"]]], [[["A"]]], [[["a"]]]),
        ("box", [{"k": ["x y", "z"], "n": [1, ""]}], [{"k": "XY", "n": 1}, {"k": "z"}], [{"n": 1}, {"k": "z", "m": 1}]),
        ("box", [{"k": [{"deep": "X"}]}], [{"k": {"deep": "X"}}], [{"k": {"deep": "x"}}, {"k": {}}]),
        (
            "boxes",
            [[{"k": ["a"]}, {"k": ["b"]}]],
            [[{"k": "A"}, {"k": "B"}]],
            [[{"k": "b"}, {"k": "a"}], [{"k": "a"}], [1]],
        ),
        ("free", ["A b"], ["ab"], [1]),
        ("free", [4], [4], [5, [4]]),
        ("maybe", [None], [None], [0, ""]),
        ("maybe", [4], [4], [None]),
    ],
)
def test_values_are_compared_by_type_and_kind(parameter, accepted, right, wrong):
    given = {} if parameter == "city" else {"city": "x"}
    answer = {"city": ["x"], parameter: accepted}
    for value in right:
        assert grade([call(**given, **{parameter: value})], answer).error is None
    for value in wrong:
        result = grade([call(**given, **{parameter: value})], answer)
        assert not result.correct and parameter in result.error


def test_parameters_are_required_optional_or_unexpected():
    answer = {"city": ["x", ""], "days": [2], "scale": [1.5, ""]}
    assert grade([call(city="x", days=2)], answer).correct
    assert grade([call(city="x", days=2, scale=1.5)], answer).correct
    for arguments, word in (
        ({"days": 2}, "'city' is missing"),  # the schema requires it, whatever the answer says
        ({"city": "x"}, "'days' is missing"),
        ({"city": "x", "days": 2, "exact": True}, "unexpected parameter 'exact'"),  # declared, not in the answer
        ({"city": "x", "days": 2, "other": 1}, "unexpected parameter 'other'"),
        ({"city": "x", "days": 2, "scale": 9.0}, "'scale': 9.0 is none of"),
    ):
        assert word in grade([call(**arguments)], answer).error


def test_calls_are_counted_named_exactly_and_matched_in_any_order():
    first, second = {"city": ["x"]}, {"city": ["y"]}
    x, y, stop = call(city="x"), call(city="y"), call("stop")
    assert grade([x, y], first, second).correct and grade([y, x], first, second).correct
    assert grade([], first).error == "0 calls instead of 1"
    assert grade([x, x], first).error == "2 calls instead of 1"
    assert "'city'" in grade([x, x], first, second).error
    assert grade([call("weather_get", city="x")], first).error == "no call of weather.get (but of weather_get)"
    assert grade_calls([stop, x], [{"weather.get": first}, {"stop": {}}], TOOLS).correct
    assert not grade_calls([call("gone")], [{"gone": {"a": [1]}}], TOOLS).correct


def test_numbers_beyond_a_floats_range_are_graded():
    assert not grade([call(city="x", scale=10**400)], {"city": ["x"], "scale": [1.0]}).correct


def test_tools_in_openais_form_are_the_same_tools():
    wrapped = [{"type": "function", "function": tool} for tool in TOOLS]
    assert grade_calls([call(city="X")], [{"weather.get": {"city": ["x"]}}], wrapped).correct


@pytest.mark.parametrize(
    "gold, right, wrong",
    [
        ({"city": "x"}, [{"city": "X", "days": 3}, {"city": "x", "names": []}], [{"city": "x", "days": 4}, {}]),
        ({"city": "x", "days": 3}, [{"city": "x"}], [{"city": "x", "days": 4}]),
        ({"city": "x", "days": 4}, [], [{"city": "x"}, {"city": "x", "days": 3}]),
        ({"city": "x", "exact": False}, [], [{"city": "x"}, {"city": "x", "exact": True}]),
        (
            {"city": "x", "box": {"k": "A", "l": ["B"]}},
            [{"city": "x", "box": {"l": ["B"], "k": "a"}}],
            [{"city": "x", "box": {}}],
        ),
        ({"city": "x", "boxes": [{"k": "A"}]}, [{"city": "x", "boxes": [{"k": "a"}]}], [{"city": "x", "boxes": []}]),
        (
            {"city": "x", "names": ["A", "B"]},
            [{"city": "x", "names": ["a", "b"]}],
            [{"city": "x", "names": ["b", "a"]}],
        ),
        ({"city": "x", "free": {"k": [1]}}, [], [{"city": "x", "free": {"k": 1}}]),
        ({"city": "x", "maybe": None}, [], [{"city": "x", "maybe": 0}]),
    ],
)
def test_a_gold_call_accepts_itself_and_little_else(gold, right, wrong):
    accepted = accepted_from_gold([call(**gold)], TOOLS)
    assert all(grade_calls([call(**arguments)], accepted, TOOLS).correct for arguments in [gold, *right])
    assert not any(grade_calls([call(**arguments)], accepted, TOOLS).correct for arguments in wrong)


def test_gold_calls_that_contradict_their_tools_are_refused_themselves():
    for gold in (call("gone", a=1), call(city="x", undeclared=1), call(days=3)):
        assert not grade_calls([gold], accepted_from_gold([gold], TOOLS), TOOLS).correct


@pytest.mark.parametrize(
    "text, correct",
    [
        ("2 * 9 = 18\n#### 18", True),
        ("#### 18.0", True),
        ("####18.", True),
        ("#### $18.00 in all", True),
        ("#### $ 18", True),
        ("#### +18%", True),
        ("#### 18\n#### 19", True),
        ("#### 19\n#### 18", False),
        ("#### -18", False),
        ("#### 1,8", True),
        ("#### 18/2", False),
        ("#### eighteen", False),
        ("####\n18", False),
        ("#### 18km", False),
    ],
)
def test_the_number_after_the_first_mark_counts(text, correct):
    assert grade_number(text, "so\n#### 18").correct is correct


def test_numbers_are_compared_as_numbers():
    assert grade_number("#### 1200000", "#### 1,200,000").correct
    assert grade_number("#### 0.50", "#### .5").correct
    assert not grade_number("#### 0.30000000000000001", "#### 0.3").correct


def test_why_a_number_is_wrong():
    assert grade_number("18", "#### 18").error == "no ####"
    assert grade_number("#### Step 1\n#### 18", "#### 18").error == "no number after ####"
    assert grade_number("#### 17", "#### 18").error == "17 instead of 18"
    with pytest.raises(DataError, match="gold answer has no number"):
        grade_number("#### 18", "18")


@pytest.mark.parametrize(
    "text",
    [
        "18", "so the answer is 18.", "He pays $18.00", "= \\boxed{18}", "20 - 2 = 18 dollars", "36-18", "**18**!",
        "x18", "1,2,18", "#### 18", "18 is what\nhe pays.",
    ],
)  # fmt: skip
def test_the_last_number_is_found_wherever_it_stands(text):
    assert last_number_is(text, "#### 18")


def test_the_last_number_has_a_sign_and_thousands():
    assert last_number_is("it is -1,200.5", "#### -1200.5") and last_number_is("a loss of -$18", "#### -18")
    assert last_number_is("1,200,000 in all", "#### 1200000") and last_number_is("only .5", "#### 0.5")
    assert not last_number_is("18 or 17", "#### 18") and not last_number_is("-18", "#### 18")
    assert not last_number_is("eighteen", "#### 18") and not last_number_is("", "#### 18")


def test_a_plain_value_in_an_accepted_object_stands_for_itself():
    accepted = {"city": ["Oslo"], "box": [{"w": 1, "h": [2, 3]}]}
    assert grade([call(city="Oslo", box={"w": 1, "h": 3})], accepted).correct
    assert not grade([call(city="Oslo", box={"w": 2, "h": 3})], accepted).correct
    assert not grade([call(city="Oslo", box={"h": 3})], accepted).correct
