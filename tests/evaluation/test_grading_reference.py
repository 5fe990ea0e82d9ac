"""Our grades of calls against the leaderboard's own checker, on its own data and on seeded faults put into it.

The checker and its data are read out of the published archive, which is fetched into pytest's cache and never
installed: it pins old versions of much that its checker does not need.
"""

import copy
import hashlib
import importlib
import json
import random
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from types import ModuleType, SimpleNamespace

import pytest

from layerroute.evaluation.grading import accepted_from_gold, grade_calls

PACKAGE, SHA256 = "bfcl-eval==2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
CATEGORIES = [
    f"{live}{kind}"
    for live in ("", "live_")
    for kind in ("simple" if live else "simple_python", "multiple", "parallel", "parallel_multiple")
]


@pytest.fixture(scope="module")
def archive(request):
    folder = request.config.cache.mkdir("bfcl-eval")
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries=1", f"--dest={folder}", PACKAGE]
    if not fetched(folder):
        done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
        if not fetched(folder):
            pytest.fail(
                f"needs the archive of {PACKAGE} from the package index, once (or its file in {folder}): {done.stderr}"
            )
    return fetched(folder)[0]


def fetched(folder):
    return [path for path in folder.glob("*.whl") if hashlib.sha256(path.read_bytes()).hexdigest() == SHA256]


@pytest.fixture(scope="module")
def checker(archive):
    """`checker(calls, expected, tools, category)`: the leaderboard's verdict."""
    # its list of models imports every client there is; of it the checker wants to know whether dots became underscores
    models = ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = defaultdict(lambda: SimpleNamespace(underscore_to_dot=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(archive))
        patch.setitem(sys.modules, models.__name__, models)
        module = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def check(calls, expected, tools, category):
        named = [{call["name"]: call["arguments"]} for call in calls]
        return module.ast_checker(tools, named, expected, python, category, "any model")["valid"]

    return check


def read_rows(archive, category):
    """The tools and the expected calls of every row of a category."""
    with zipfile.ZipFile(archive) as file:
        questions, answers = (
            [json.loads(line) for line in file.read(f"bfcl_eval/data/{part}BFCL_v4_{category}.json").splitlines()]
            for part in ("", "possible_answer/")
        )
    expected = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [(row["function"], expected[row["id"]]) for row in questions]


def accepted_calls(expected, choose):
    """Calls made of accepted values, of which `choose` takes one; parameters that may only be left out are."""

    def chosen(accepted):
        given = {key: [value for value in values if value != ""] for key, values in accepted.items()}
        return {key: choose(values) for key, values in given.items() if values}

    def plain(value):  # an object lists the accepted values of its keys; objects within it do not
        if isinstance(value, list):
            return [plain(item) for item in value]
        return chosen(value) if isinstance(value, dict) else value

    return [
        {"name": name, "arguments": {key: plain(value) for key, value in chosen(accepted).items()}}
        for answer in expected
        for name, accepted in answer.items()
    ]


def places(value):
    """Every container and key of a JSON value, at any depth."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def with_fault(value, kind, rng):
    """A value with a fault of one kind, or as it was where the kind does not apply to it."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "wrong type":
        return rng.choice([None, True, 1, 1.5, "1", [], {}, [value], {"a": value}, str(value), [str(value)]])
    if kind == "changed value":
        others = {str: f"{value}x", bool: not value, type(None): 0}
        return value + rng.choice([1, 0.5]) if is_number else others.get(type(value), value)
    if kind == "emptied":
        return type(value)() if isinstance(value, (list, dict)) else ""
    if kind == "number type" and is_number:
        return int(value) if isinstance(value, float) else rng.choice([float(value), bool(value)])
    if kind == "spelling" and isinstance(value, str):
        position = rng.randint(0, len(value))
        marked = value[:position] + rng.choice(" ,./-_*^'\"!") + value[position:]
        bare = "".join(letter for letter in value if letter not in " ,./-_*^")
        return rng.choice([value.upper(), value.lower(), value.title(), value.replace("'", '"'), marked, bare])
    if kind == "items" and isinstance(value, list) and value:
        return rng.choice([value[::-1], value[1:], value[:-1], value + value[:1], [*value, None]])
    if kind == "keys" and isinstance(value, dict) and value:
        return rng.choice([{**value, "x": 1}, {key.upper(): inner for key, inner in value.items()}])
    return value


INSIDE = ("wrong type", "changed value", "emptied", "number type", "spelling", "items", "keys", "dropped")
OUTSIDE = ("order", "missing call", "extra call", "name", "dots", "other tool", "extra parameter")


def change_outside(calls, kind, tools, rng):
    """Change the list of calls, or the outside of one."""
    call = rng.choice(calls)
    if kind == "order":
        rng.shuffle(calls)
    elif kind == "missing call":
        calls.remove(call)
    elif kind == "extra call":
        calls.append(copy.deepcopy(call))
    elif kind == "name":
        call["name"] = rng.choice([call["name"] + "s", call["name"].swapcase(), ""])
    elif kind == "dots":
        call["name"] = call["name"].replace(".", "_")
    elif kind == "other tool":
        call["name"] = rng.choice(tools)["name"]
    else:
        known = [key for tool in tools for key in tool["parameters"]["properties"]]
        call["arguments"].setdefault(rng.choice([*known, "extra"]), rng.choice(["", "x", 1, None, []]))


def change_inside(calls, kind, rng):
    """Put a fault into one argument, at any depth, where that is possible."""
    found = [place for call in calls for place in places(call["arguments"])]
    for container, key in rng.sample(found, len(found)):
        before = container[key]
        if kind == "dropped":
            del container[key]
            return
        container[key] = with_fault(before, kind, rng)
        if repr(container[key]) != repr(before):
            return


def variants(expected, tools, rng):
    """`(kind, calls)`: the answer by its first accepted values, and that answer changed in every way that applies."""
    gold = accepted_calls(expected, lambda values: values[0])
    yield "gold", gold
    yield "other accepted", accepted_calls(expected, rng.choice)
    for kind in (*OUTSIDE, *INSIDE, *INSIDE):
        calls = copy.deepcopy(gold)
        if kind in INSIDE:
            change_inside(calls, kind, rng)
        else:
            change_outside(calls, kind, tools, rng)
        if repr(calls) != repr(gold):
            yield kind, calls


def as_json_schema(schema):
    """The leaderboard's parameters with JSON Schema's own types."""
    names = {"dict": "object", "float": "number", "tuple": "array"}
    given = {key: value for key, value in schema.items() if (key, value) != ("type", "any")}
    if "type" in given:
        given["type"] = names.get(given["type"], given["type"])
    if "items" in given:
        given["items"] = as_json_schema(given["items"])
    if "properties" in given:
        given["properties"] = {key: as_json_schema(value) for key, value in given["properties"].items()}
    return given


def compare(rows, category, checker, seed=0):
    """Counts of `(kind, the checker's verdict, ours)`; ours by tools of both forms."""
    rng, counts = random.Random(f"{category} {seed}"), Counter()
    for tools, expected in rows:
        ours = [{**tool, "parameters": as_json_schema(tool["parameters"])} for tool in tools]
        for kind, calls in variants(expected, tools, rng):
            grades = {grade_calls(calls, expected, form).correct for form in (tools, ours)}
            assert len(grades) == 1
            counts[kind, checker(calls, expected, tools, category), grades.pop()] += 1
    return counts


def deviations(counts):
    return {key: count for key, count in counts.items() if key[1] is not key[2]}


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_verdicts_are_the_leaderboards(category, archive, checker):
    """On every row: without faults, and with one fault of every kind that applies."""
    counts = compare(read_rows(archive, category), category, checker)
    assert deviations(counts) == {}
    # the comparison says something only if the leaderboard lets some answers pass and others not
    passed = Counter(kind for kind, verdict, _ in counts.elements() if verdict)
    refused = Counter(kind for kind, verdict, _ in counts.elements() if not verdict)
    assert passed["gold"] > 50 * refused["gold"] and passed["spelling"] > refused["spelling"]
    assert all(refused[kind] > 10 * passed[kind] for kind in ("extra call", "name", "changed value", "wrong type"))


@pytest.mark.parametrize("category", CATEGORIES)
def test_answers_made_of_gold_calls_are_graded_alike(category, archive, checker):
    """The form that plain gold calls are brought into means to the leaderboard what it means here."""
    rows = read_rows(archive, category)
    gold = [(tools, accepted_calls(expected, lambda values: values[0])) for tools, expected in rows]
    counts = compare([(tools, accepted_from_gold(calls, tools)) for tools, calls in gold], category, checker)
    assert deviations(counts) == {} and counts["gold", True, True] > 0.9 * len(rows)
