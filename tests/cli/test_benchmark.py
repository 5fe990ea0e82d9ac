"""`layerroute benchmark` on a tiny backbone: what it prints, writes and refuses."""

import importlib.util
import json

import pytest

QUICK = ["--prompt-tokens", 8, "--new-tokens", 3, "--repetitions", 2, "--skip", 1, "--threads", 1, "--device", "cpu"]


def test_json(run, backbone):
    outcome = run("benchmark", "--model", backbone, "--batch", 1, "--batch", 2, *QUICK, "--dtype", "bf16", "--json")
    assert outcome.status == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    assert report["model"] == str(backbone)
    assert report["machine"]["dtype"] == "bfloat16" and report["machine"]["threads"] == 1
    assert list(report["arms"]) == list(report["comparisons"]) == ["1", "2"]
    assert report["blocks"] == 5 and report["skipped"] == [3]
    assert report["kv_bytes"]["ratio"] == pytest.approx(0.8)
    assert "repetition 2 of 2" in outcome.stderr


def test_text_of_an_adapter(run, adapter):
    outcome = run("benchmark", "--adapter", adapter, "--batch", 2, *QUICK)
    assert outcome.status == 0, outcome.stderr
    for words in ("batch 2", "mixed", "share_of_ideal", "95% interval", "KV bytes, batch 2", "FLOPs, 8 + 3 tokens"):
        assert words in outcome.stdout
    goals = outcome.stdout.partition("goals (")[2].splitlines()[1:]
    assert len(goals) == 8
    assert all(any(verdict in goal for verdict in ("met", "missed", "within noise")) for goal in goals)


@pytest.mark.parametrize(("name", "start"), [("steps.svg", b"<?xml"), ("steps.PNG", b"\x89PNG")])
def test_figure(name, start, run, backbone, tmp_path):
    outcome = run("benchmark", "--model", backbone, "--batch", 1, *QUICK, "--figure", tmp_path / name, "--json")
    assert outcome.status == 0, outcome.stderr
    assert (tmp_path / name).read_bytes().startswith(start)
    assert json.loads(outcome.stdout)["sweep"]["executed"] == [5, 4, 3]


@pytest.mark.parametrize(("args", "words"), [
    ([], "give either --model NAME or --adapter ADAPTER"),
    (["--model", "a", "--adapter", "b"], "give either --model NAME or --adapter ADAPTER"),
    (["--model", "a", "--backbone", "b"], "--backbone goes with --adapter"),
    (["--model", "a", "--figure", "steps.pdf"], "must end in .png or .svg"),
    (["--model", "a", "--figure", "nowhere/steps.png"], "there is no folder nowhere"),
    (["--model", "a", "--batch", 0], "batch.0=0"),
    (["--model", "a", "--new-tokens", 1], "new_tokens=1"),
    (["--model", "a", "--repetitions", 1], "repetitions=1"),
    (["--model", "a", "--dtype", "int8"], "'int8' is not one of"),
])  # fmt: skip
def test_mistakes_are_one_line(args, words, run):
    outcome = run("benchmark", *args)
    assert outcome.status == 2 and outcome.stdout == ""
    assert words in outcome.stderr and outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(("option", "words"), [(("--skip", 3), "skip=3: only 2"), (("--prompt-tokens", 2046), "2048")])
def test_what_the_backbone_cannot_do_is_one_line(option, words, run, backbone):
    outcome = run("benchmark", "--model", backbone, *QUICK, *option)
    assert outcome.status == 2 and words in outcome.stderr.splitlines()[-1]


def test_a_figure_without_matplotlib_is_refused_before_anything_is_loaded(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "layerroute.runtime.figure.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    outcome = run("benchmark", "--model", "a", "--figure", "steps.png")
    assert outcome.status == 2
    assert "pip install 'layerroute[figures]'" in outcome.stderr
