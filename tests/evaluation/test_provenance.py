"""What an evaluation says of itself: data that the adapter was trained on, and what must agree to go on."""

from __future__ import annotations

import json

import pytest

from layerroute.errors import DataError
from layerroute.evaluation.provenance import resumed, trained_on

TRAINED = {"data/plans.train.jsonl.gz": "d1", "builtin:600": "d2", "hermes": "d3", "sharegpt:raw/talk.json": "d4"}


@pytest.mark.parametrize(
    ("spec", "digest", "seed", "found"),
    [
        ("other.jsonl", "d1", 0, True),  # renamed
        ("other.jsonl", "x", 0, False),
        ("plans.train.jsonl.gz", "x", 0, True),
        ("elsewhere/plans.train.jsonl", "x", 0, True),
        ("plans.test.jsonl", "x", 0, False),
        ("builtin", "x", 42, True),
        ("builtin:20", "x", 42, True),
        ("builtin", "x", 43, False),
        ("hermes", "x", 0, True),
        ("glaive", "x", 0, False),
        ("sharegpt:talk.json", "x", 0, True),
        ("talk.json", "x", 0, True),
    ],
)
def test_data_that_was_trained_on_is_known_by_digest_or_name(spec, digest, seed, found):
    assert trained_on({spec: digest, "new.jsonl": "y"}, seed, TRAINED, 42) == ([spec] if found else [])


def test_an_adapter_that_says_no_seed_is_known_by_the_rest():
    assert trained_on({"builtin": "x", "hermes": "y"}, 0, TRAINED, None) == ["hermes"]
    assert trained_on({"builtin": "x"}, 0, {}, None) == []


def provenance(**changes):
    made = {name: {"of": name} for name in ("adapter", "backbone", "data", "settings")}
    made |= {"calibration_data": None, "seed": 0, "versions": {"torch": "2.9", "peft": "0.18"}, "command": "evaluate"}
    return made | changes


def test_other_versions_do_not_go_on_and_are_named(tmp_path):
    path = tmp_path / "provenance.json"
    assert resumed(path, provenance()) == json.loads(path.read_text()) == resumed(path, provenance())
    with pytest.raises(DataError, match=r"its versions are torch 2\.9, not torch 3\.0; give another --output"):
        resumed(path, provenance(versions={"torch": "3.0", "peft": "0.18"}))
    with pytest.raises(DataError, match="its seed is 0, not 1; give another"):
        resumed(path, provenance(seed=1))


def test_each_command_that_added_something_is_kept_once(tmp_path):
    path = tmp_path / "provenance.json"
    resumed(path, provenance())
    for _ in range(2):
        found = resumed(path, provenance(calibration_data={"x": "d"}, command="evaluate --baselines"))
        path.write_text(json.dumps(found))
    assert found["command"] == "evaluate && evaluate --baselines" and found["calibration_data"] == {"x": "d"}
    found = resumed(path, provenance(calibration_data={"x": "d"}, command="evaluate --generate 5"))
    assert found["command"].endswith("&& evaluate --generate 5")
    assert "of" in resumed(path, provenance(command="other"))["data"]
