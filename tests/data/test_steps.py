"""Reading, checking, writing and splitting rows."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import random
import subprocess
import sys

import pytest

from layerroute.data.steps import (
    Step,
    check_tools,
    digest,
    mark_open_turn,
    open_turns,
    read_steps,
    split_by_group,
    write_steps,
)
from layerroute.errors import ConfigError, DataError

ROW = {
    "id": "x#0",
    "source": "s",
    "group": "x",
    "step_type": "tool_call",
    "messages": [{"role": "user", "content": "Weather in Lima?"}],
    "tools": [{"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}],
    "target": {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "weather", "arguments": {"city": "Lima"}}],
    },
    "meta": {"k": 1},
}


def changed(**fields):
    return {**copy.deepcopy(ROW), **fields}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_written_steps_are_read_back_equal(tmp_path, name):
    steps = [Step.from_row(ROW), Step.from_row(changed(id="ü#1", tools=None, meta={}))]
    assert write_steps(tmp_path / name, steps) == 2
    assert list(read_steps(tmp_path / name)) == steps


def test_arguments_given_as_json_text_become_objects():
    calls = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}]
    row = changed(target={"role": "assistant", "content": "", "tool_calls": calls})
    assert Step.from_row(row).target == ROW["target"]


BROKEN = {
    "not JSON": "{",
    "a row is a JSON object": [1],
    "'target' is missing": {k: v for k, v in ROW.items() if k != "target"},
    "'id' is a string": changed(id=3),
    "'step_type' is 'thinking'": changed(step_type="thinking"),
    "at least one message": changed(messages=[]),
    "messages[0]: 'role' is 'robot'": changed(messages=[{"role": "robot", "content": "x"}]),
    "messages[0]: 'content' is text": changed(messages=[{"role": "user", "content": 5}]),
    "only the last message can be partial": changed(
        messages=[{"role": "assistant", "content": "x", "partial": True}, {"role": "user", "content": "x"}]
    ),
    "needs 'tool_calls'": changed(target={"role": "assistant", "content": "hello"}),
    "two rows": changed(target={**ROW["target"], "content": "I call it."}),
    "holds no 'tool_calls'": changed(step_type="planning"),
    "needs text": changed(step_type="answer", target={"role": "assistant", "content": ""}),
    "a step is the assistant's": changed(step_type="answer", target={"role": "user", "content": "x"}),
    "neither an object nor a JSON string": changed(
        target={"role": "assistant", "tool_calls": [{"name": "weather", "arguments": "[1]"}]}
    ),
    "'name' and 'arguments'": changed(target={"role": "assistant", "tool_calls": [{"arguments": {}}]}),
    "tool 'f': 'parameters' is no valid JSON Schema": changed(tools=[{"name": "f", "parameters": {"type": "dict"}}]),
    "an object is needed, not null": changed(tools=[{"name": "f"}]),
    "'tools' is a list": changed(tools={"name": "f"}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_malformed_row_is_an_error_with_file_and_line(tmp_path, message):
    path = tmp_path / "rows.jsonl"
    broken = BROKEN[message]
    text = broken if isinstance(broken, str) else json.dumps(broken)
    path.write_text(f"{json.dumps(ROW)}\n\n{text}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_steps(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)


def test_a_schema_fault_names_its_place():
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": "low"}}}
    with pytest.raises(DataError, match="properties/n/minimum"):
        check_tools([{"type": "function", "function": {"name": "f", "parameters": schema}}])


def test_missing_empty_truncated_and_binary_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_steps(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        list(read_steps(tmp_path / "empty.jsonl"))
    noise = "".join(random.Random(0).choices("abcdefgh", k=20000))
    whole = gzip.compress("\n".join([json.dumps(changed(meta={"noise": noise}))] * 3).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d+: the gzip file is truncated"):
        list(read_steps(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(ROW))
    with pytest.raises(DataError, match="truncated or damaged"):
        list(read_steps(tmp_path / "plain.jsonl.gz"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_steps(tmp_path / "bytes.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_steps(tmp_path))


def test_digest_is_the_files_sha256(tmp_path):
    content = bytes(range(256)) * 9000
    (tmp_path / "f").write_bytes(content)
    assert digest(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def grouped(counts):
    return [
        Step.from_row(changed(id=f"{s}{g}#{i}", source=s, group=f"{s}{g}"))
        for s, n in counts.items()
        for g in range(n)
        for i in range(3)
    ]


def test_a_split_keeps_groups_whole_and_every_source_in_both_parts():
    steps = grouped({"big": 100, "small": 10})
    train, held = split_by_group(steps, 0.2, seed=1)
    assert not {s.group for s in train} & {s.group for s in held}
    assert sorted(s.id for s in train + held) == sorted(s.id for s in steps)
    assert len({s.group for s in held if s.source == "big"}) == 20
    assert len({s.group for s in held if s.source == "small"}) == 2


def test_a_split_depends_on_the_seed_and_not_on_the_order():
    steps = grouped({"a": 30})
    shuffled = random.Random(0).sample(steps, len(steps))
    held = {s.id for s in split_by_group(steps, 0.3, seed=5)[1]}
    assert {s.id for s in split_by_group(shuffled, 0.3, seed=5)[1]} == held
    assert {s.id for s in split_by_group(steps, 0.3, seed=6)[1]} != held


def test_no_part_of_a_split_is_empty_where_two_groups_are_there():
    for share in (0.01, 0.99):
        train, held = split_by_group(grouped({"a": 2}), share, seed=0)
        assert train and held
    train, held = split_by_group(grouped({"a": 3}), 0, seed=0)
    assert len(train) == 9 and not held
    with pytest.raises(ConfigError, match=r"1\.5"):
        split_by_group(grouped({"a": 2}), 1.5, seed=0)


def test_thoughts_that_a_row_takes_up_are_marked_open():
    def thought(i, text):
        target = {"role": "assistant", "content": text}
        return Step.from_row(changed(id=f"x#{i}", step_type="planning", target=target))

    partial = {"role": "assistant", "content": "look it up", "partial": True}
    call = Step.from_row(changed(messages=[*ROW["messages"], partial]))
    steps = [thought(1, "look it up"), call, thought(2, "nothing to do")]
    marked = [mark_open_turn(step, open_turns(steps)) for step in steps]
    assert [bool(s.target.get("partial")) for s in marked] == [True, False, False]


def test_reading_needs_neither_torch_nor_transformers():
    code = (
        "import sys; import layerroute.data.load; "
        "bad = {'torch', 'transformers', 'datasets', 'jsonschema'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
