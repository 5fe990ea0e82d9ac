"""`layerroute benchmark-training` on a tiny backbone: what it prints, and what it refuses."""

import json

import pytest

from layerroute.cli.benchmark_training import report_lines

SETTINGS = ("batch_size=2", "gradient_accumulation=1", "max_length=2048", "protect_first=1", "search.rows=1")
QUICK = [part for setting in (*SETTINGS, "fit_rows=3", "window=8") for part in ("--set", setting)]


def test_json_and_text(run, backbone):
    args = ["--model", backbone, "--data", "builtin:12", "builtin:24", *QUICK, "--updates", 2, "--threads", 1, "--json"]
    outcome = run("benchmark-training", *args)
    assert outcome.status == 0, outcome.stderr
    assert "update 2 of 2 done" in outcome.stderr
    report = json.loads(outcome.stdout)
    assert report["updates"] == 2 and report["run_updates"] == 200
    assert report["machine"]["threads"] == 1 and report["changes"]["search.rows"] == "1"
    lora, routed = report["arms"]["lora"], report["arms"]["routed"]
    assert lora["once_s"] == 0 < routed["once_s"]
    for arm in (lora, routed):
        assert 0 < arm["seconds"]["min"] <= arm["seconds"]["max"]
        assert report["tokens"] / arm["seconds"]["max"] <= 2 * arm["tokens_per_second"]
        assert len(arm["losses"]) == 2 and arm["peak_bytes"] > 2**20
    low, high = report["ratio"]["interval"]
    assert low <= high and report["run_ratio"] > 0 and 0 <= report["padding"] < 1

    text = "\n".join(report_lines(report))
    for words in ("recipe default, batch_size=2", "tokens/s", "MiB", "95% interval", "of 200 updates", "% padding"):
        assert words in text
    assert len(text.partition("goals (")[2].splitlines()) == 3


GIVEN = ["--model", "a", "--data", "builtin"]


@pytest.mark.parametrize(("args", "words"), [
    (["--data", "builtin"], "Missing option '--model'"),
    (["--model", "a"], "Missing option '--data'"),
    ([*GIVEN, "--recipe", "papre"], "did you mean 'paper'?"),
    ([*GIVEN, "--set", "routr_lr=1"], "(did you mean 'router_lr'?)"),
    ([*GIVEN, "--set", "router_lr"], "expected KEY=VALUE"),
    ([*GIVEN, "--updates", 1], "'--updates'"),
    ([*GIVEN, "--updates", 400], "updates=400: of this recipe's 200 updates, from 2 to 199"),
    ([*GIVEN, "--threads", 0], "'--threads'"),
])  # fmt: skip
def test_mistakes_are_one_line(args, words, run):
    outcome = run("benchmark-training", *args)
    assert outcome.status == 2 and outcome.stdout == ""
    assert words in outcome.stderr and outcome.stderr.count("\n") == 1


def test_what_training_refuses_is_one_line_from_the_other_process(run, tmp_path):
    outcome = run("benchmark-training", "--model", tmp_path, "--data", "builtin:12")
    assert outcome.status == 2 and "no config.json" in outcome.stderr and outcome.stderr.count("\n") == 1
