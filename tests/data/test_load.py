"""Specs to steps."""

from __future__ import annotations

import json

import pytest

from layerroute.data.builtin import builtin_steps
from layerroute.data.load import load_steps, open_steps
from layerroute.data.steps import digest, write_steps
from layerroute.errors import DataError

LOG = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def test_files_and_builtin_in_order_with_digests(tmp_path):
    path = str(tmp_path / "mine.jsonl.gz")
    written = builtin_steps(30, seed=9)
    write_steps(path, written)
    loaded = load_steps([path, "builtin:50"], seed=2)
    assert loaded.steps == written + builtin_steps(50, seed=2)
    assert loaded.digests[path] == digest(path)
    assert loaded.digests["builtin:50"] != load_steps(["builtin:50"], seed=3).digests["builtin:50"]
    assert loaded.skipped == {}
    assert len(load_steps(["builtin"]).steps) == 600


def test_raw_logs_by_format(tmp_path):
    path = tmp_path / "logs.jsonl"
    path.write_text(json.dumps(LOG))
    (step,) = load_steps([f"openai:{path}"]).steps
    assert step.source == "openai" and step.target["content"] == "Hello."
    path.write_text(json.dumps(LOG) + "\n" + json.dumps({"messages": 3}))
    with pytest.raises(DataError, match=r"logs\.jsonl:2: row 2: 'messages'"):
        load_steps([f"openai:{path}"])


def test_a_log_that_is_one_json_array(tmp_path):
    path = tmp_path / "logs.json"
    path.write_text(json.dumps([LOG], indent=2))
    assert len(load_steps([f"openai:{path}"]).steps) == 1
    path.write_text(json.dumps(LOG))
    with pytest.raises(DataError, match="a list of rows, not an object"):
        load_steps([f"openai:{path}"])
    path.write_text('[\n{"messages": ]')
    with pytest.raises(DataError, match=r"logs\.json:2: not JSON"):
        load_steps([f"openai:{path}"])


def test_dirty_formats_are_counted(tmp_path):
    good = {"system": "", "chat": "USER: Hi\n\n\nASSISTANT: Hello. <|endoftext|>"}
    path = tmp_path / "glaive.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({"system": "", "chat": "?"}))
    loaded = load_steps([f"glaive:{path}"])
    assert len(loaded.steps) == 1 and loaded.skipped == {f"glaive:{path}": 1}
    path.write_text(json.dumps({"system": "", "chat": "?"}))
    with pytest.raises(DataError, match="gives no step"):
        load_steps([f"glaive:{path}"])


def test_a_limit_takes_whole_groups_in_order_and_is_seeded():
    steps = load_steps(["builtin:200"]).steps
    limited = load_steps(["builtin:200"], limit_per_source=40).steps
    assert len(limited) == 40
    assert limited == [step for step in steps if step in limited]
    sizes = {g: sum(s.group == g for s in steps) for g in {s.group for s in limited}}
    parted = [g for g, size in sizes.items() if sum(s.group == g for s in limited) < size]
    assert len(parted) <= 1
    assert load_steps(["builtin:200"], limit_per_source=40).steps == limited
    assert len(load_steps(["builtin:20"], limit_per_source=40).steps) == 20


def test_a_file_is_read_row_by_row_and_again(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_steps(path, builtin_steps(200, seed=1))
    stream = open_steps([str(path), "builtin:30"], limit_per_source=20)
    assert stream.count == 40
    assert list(stream) == list(stream) == load_steps([str(path), "builtin:30"], limit_per_source=20).steps
    first = iter(stream)
    next(first)
    with path.open("a") as file:
        file.write("{")
    with pytest.raises(DataError, match=r"mine\.jsonl:201: not JSON"):  # had all been held, nobody would have noticed
        list(stream)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no data given; use"),
        (["nonsense"], "unknown data 'nonsense'; use a .jsonl or .*builtin:COUNT, hermes, glaive, gsm8k, turing"),
        (["builtin:none"], "the count is a whole number"),
        (["builtin:0"], "the count is a whole number"),
        (["builtin:5", "builtin:5"], "given twice"),
        (["gone.jsonl"], "no such file"),
        (["openai:gone.jsonl"], "no such file"),
        (["openia:gone.jsonl"], "unknown data 'openia:gone.jsonl'; use a .jsonl"),
    ],
)
def test_what_cannot_be_loaded(specs, message):
    with pytest.raises(DataError, match=message):
        load_steps(specs)
