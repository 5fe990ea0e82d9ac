"""`layerroute data`: logs to a file of steps, and what those steps are like."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from layerroute.data.builtin import builtin_steps
from layerroute.data.load import load_steps
from layerroute.data.steps import digest, read_steps, write_steps

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
LOG = {
    "messages": [
        {"role": "user", "content": "Weather in Lima?"},
        {"role": "assistant", "content": "I should look it up.", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ],
    "tools": [TOOL],
}


@pytest.fixture
def logs(tmp_path):
    path = tmp_path / "logs.jsonl"
    path.write_text(json.dumps(LOG) + "\n")
    return path


@pytest.mark.parametrize("name", ["steps.jsonl", "steps.jsonl.gz"])
def test_convert_writes_the_steps_of_a_log(run, logs, tmp_path, name):
    output = tmp_path / name
    outcome = run("data", "convert", f"openai:{logs}", "--output", output)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.splitlines() == [
        "3 steps in 1 conversations: 1 tool_call, 1 planning, 1 answer",
        f"steps: {output}",
    ]
    assert list(read_steps(output)) == load_steps([f"openai:{logs}"]).steps
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["logs.jsonl", name])


def test_convert_counts_what_it_leaves_out(run, logs, tmp_path):
    good = {"system": "", "chat": "USER: Hi\n\n\nASSISTANT: Hello. <|endoftext|>"}
    glaive = tmp_path / "glaive.jsonl"
    glaive.write_text(json.dumps(good) + "\n" + json.dumps({"system": "", "chat": "?"}))
    specs = (f"openai:{logs}", f"glaive:{glaive}")
    outcome = run("data", "convert", *specs, "--output", tmp_path / "a.jsonl", "--json")
    result = json.loads(outcome.stdout)
    assert result["types"] == {"tool_call": 1, "planning": 1, "answer": 2}
    assert (result["rows"], result["conversations"]) == (4, 2)
    assert result["left_out"] == {f"glaive:{glaive}": 1} and list(result["data"]) == list(specs)
    text = run("data", "convert", *specs, "--output", tmp_path / "b.jsonl").stdout
    assert f"left out: 1 rows of glaive:{glaive}, which cannot be converted" in text


def test_the_same_log_gives_the_same_bytes_whatever_the_name(run, logs, tmp_path):
    outputs = [tmp_path / "one.jsonl.gz", tmp_path / "two.jsonl.gz"]
    for output in outputs:
        run("data", "convert", f"openai:{logs}", "--output", output)
    assert digest(outputs[0]) == digest(outputs[1])
    assert gzip.decompress(outputs[0].read_bytes()).count(b"\n") == 3


def test_inspect_prints_tables_and_warnings(run, tmp_path):
    steps = builtin_steps(120, seed=1)
    write_steps(tmp_path / "steps.jsonl", [*steps, steps[0]])
    outcome = run("data", "inspect", tmp_path / "steps.jsonl")
    assert outcome.status == 0, outcome.stderr
    assert "WARNING: 1 rows repeat the id of another row" in outcome.stdout
    assert "121 steps in " in outcome.stdout and "prompt length is in characters" in outcome.stdout
    assert "go on from a thought" in outcome.stdout and "within conversations" in outcome.stdout
    assert all(len(line) <= 120 for line in outcome.stdout.splitlines() if not line.startswith("WARNING"))


def test_inspect_counts_tokens_with_the_models_tokenizer(run, backbone):
    args = ("data", "inspect", "builtin:60", "--model", backbone, "--max-length", 1200)
    result = json.loads(run(*args, "--json").stdout)
    assert result["rows"] == 60 and list(result["data"]) == ["builtin:60"] and result["left_out"] == {}
    lengths = result["lengths"]["answer"]
    assert lengths["prompt_tokens"]["max"] > lengths["prompt_characters"]["max"]  # a byte each, and the template's
    text = run(*args).stdout
    assert "prompt length is in tokens" in text and f"cut to fit {lengths['cut']}, dropped {lengths['dropped']}" in text


def test_inspect_without_one_of_the_two_types(run, tmp_path):
    write_steps(tmp_path / "plans.jsonl", [s for s in builtin_steps(60, seed=1) if s.step_type == "planning"])
    text = run("data", "inspect", tmp_path / "plans.jsonl").stdout
    assert "WARNING: no tool_call rows" in text and "not given, for one of the two is absent" in text


def test_inspect_with_a_limit_takes_whole_conversations(run):
    result = json.loads(run("data", "inspect", "builtin:60", "--limit", 20, "--json").stdout)
    assert result["rows"] == 20


INSPECT = ("data", "inspect")
CONVERT = ("data", "convert", "--output", "{tmp}/out.jsonl")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("data", "inspct"), "No such command 'inspct'"),
        (INSPECT, "Missing argument 'SPEC...'"),
        ((*INSPECT, "nonsense"), "unknown data 'nonsense'; use a .jsonl"),
        ((*INSPECT, "openia:{tmp}/logs.jsonl"), "openai|sharegpt|glaive|qa:FILE"),
        ((*INSPECT, "{tmp}/none.jsonl"), "none.jsonl: no such file"),
        ((*INSPECT, "{tmp}/empty.jsonl"), "empty.jsonl: the file is empty"),
        ((*INSPECT, "{tmp}/logs.jsonl"), "logs.jsonl:1: field 'id' is missing"),
        ((*INSPECT, "builtin:9", "builtin:9"), "'builtin:9' is given twice"),
        ((*INSPECT, "builtin:9", "--max-length", "512"), "--max-length 512 counts tokens; give --model"),
        ((*INSPECT, "builtin:9", "--model", "{tmp}"), "no config.json"),
        ((*INSPECT, "builtin:9", "--limit", "0"), "'--limit'"),
        (CONVERT, "Missing argument 'SPEC...'"),
        (("data", "convert", "builtin:9"), "Missing option '--output'"),
        ((*CONVERT, "nonsense"), "unknown data 'nonsense'; use a .jsonl"),
        ((*CONVERT, "openai:{tmp}/none.jsonl"), "none.jsonl: no such file"),
        ((*CONVERT, "openai:{tmp}/empty.jsonl"), "empty.jsonl: the file is empty"),
        ((*CONVERT, "openai:{tmp}/bad.jsonl"), "bad.jsonl:1: row 1: 'messages'"),
        (("data", "convert", "builtin:9", "--output", "{tmp}/logs.jsonl"), "logs.jsonl: exists already"),
        (("data", "convert", "builtin:9", "--output", "{tmp}/steps.json"), "steps are .jsonl or .jsonl.gz files"),
        (("data", "convert", "builtin:9", "--output", "{tmp}/none/a.jsonl"), "there is no folder"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(args, message, run, logs, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    before = sorted(os.listdir(tmp_path))
    outcome = run(*[arg.replace("{tmp}", str(tmp_path)) for arg in args])
    assert outcome.status == 2 and outcome.stdout == ""
    last = outcome.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in outcome.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / ".new.out.jsonl").mkdir()  # stands where the file is made
    outcome = run("data", "convert", "builtin:9", "--output", tmp_path / "out.jsonl")
    assert outcome.status == 2 and outcome.stderr.count("\n") == 1
    assert "out.jsonl: cannot be written" in outcome.stderr


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_help_shows_examples(command, run):
    outcome = run("data", command, "--help")
    assert outcome.status == 0 and f"layerroute data {command} " in outcome.stdout.split("Examples:")[1]
