"""`layerroute evaluate`: files that a later stage can rely on, interruptions, and data that is not as it should be."""

from __future__ import annotations

import json

import pytest
import torch

from layerroute import RouterConfig, get_routed_model, load_backbone
from layerroute.data.builtin import builtin_steps
from layerroute.data.steps import write_steps

ARMS = {"base", "lora_only", "routed"}


@pytest.fixture
def evaluate(run, adapter, tmp_path):
    """Evaluate the adapter that closes blocks 2 and 3 for every input."""

    def call(*args, data=("builtin:12",), adapter=adapter):
        options = () if "--max-length" in args else ("--max-length", 2048)
        return run("evaluate", "--adapter", adapter, "--data", *data, "--output", tmp_path / "out", *options, *args)

    return call


@pytest.fixture
def summary(tmp_path):
    return lambda: json.loads((tmp_path / "out" / "summary.json").read_text())


def test_an_evaluation_has_its_keys_and_says_that_all_routes_are_equal(evaluate, summary, tmp_path):
    outcome = evaluate("--json")
    assert outcome.status == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert found == summary()
    assert found["skip_rate"]["planning"]["mean"] == pytest.approx(40)
    assert found["differential"]["pooled"]["mean"] == pytest.approx(0)
    assert set(found["perplexity"]) == ARMS
    assert found["flops"]["tool_call"]["prefill_share"] < 1
    assert found["routes"]["distinct"] == 1 and found["routes"]["entropy"] == 0
    assert found["per_block"]["tool_call"] == [0, 0, 100, 100, 0]
    assert any("route" in warning for warning in found["warnings"])
    provenance = found["provenance"]
    assert provenance["data"]["builtin:12"] and provenance["routers"]["bias_route"] == "11001"
    assert provenance["rows"]["read"] == 12
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == provenance["rows"]["measured"] and {row["route"] for row in rows} == {"11001"}
    assert "layerroute evaluate --adapter" in provenance["command"]
    text = evaluate().stdout  # everything is done already
    assert "skip rate  40.0" in text and "WARNING" in text


def test_an_interrupted_evaluation_goes_on_to_the_same_figures(evaluate, summary, tmp_path):
    evaluate()
    path, whole = tmp_path / "out" / "samples.jsonl", summary()
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40])
    outcome = evaluate()
    assert "5 steps are measured already" in outcome.stderr
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["id"] for row in again) == sorted(json.loads(line)["id"] for line in lines)
    fresh = summary()
    for name in ("skip_rate", "routes", "flops", "dependence", "rows"):
        assert fresh[name] == whole[name]
    assert fresh["perplexity"]["routed"] == pytest.approx(whole["perplexity"]["routed"])


def test_control_c_says_how_to_go_on(evaluate, summary, tmp_path, press_control_c):
    """And calibration data that is also evaluated is counted."""
    steps = builtin_steps(20, seed=1)
    data, calibration = tmp_path / "evaluated.jsonl", tmp_path / "calibration.jsonl"
    write_steps(data, steps[:12])
    write_steps(calibration, steps[6:])
    args = ("--baselines", "--calibration", calibration)
    with press_control_c("layerroute.evaluation.baselines", ""):
        outcome = evaluate(*args, data=(data,))
    assert outcome.status == 130
    assert outcome.stderr.splitlines()[-1] == "error: interrupted; run the same command again to go on from there"
    assert not (tmp_path / "out" / "summary.json").exists()
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    outcome = evaluate(*args, data=(data,))
    assert outcome.status == 0 and f"{len(rows)} steps are measured already" in outcome.stderr
    shared = {row["id"] for row in rows} & {step.id for step in steps[6:]}
    assert summary()["provenance"]["calibration_shared"] == len(shared) > 0


@pytest.mark.parametrize("name", ["samples.jsonl", "provenance.json", "summary.json"])
def test_an_output_that_cannot_be_written_is_one_line(evaluate, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    outcome = evaluate()
    assert outcome.status == 2 and len(outcome.stderr.strip().splitlines()) == 1
    assert outcome.stderr.startswith("error: ") and name in outcome.stderr


def test_weights_that_are_no_numbers_still_give_a_summary(evaluate, summary, backbone, tmp_path):
    model = get_routed_model(load_backbone(str(backbone))[0], RouterConfig(protect_first=1))
    with torch.no_grad():
        for name, parameter in model.peft_model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    outcome = evaluate(adapter=tmp_path / "broken")
    assert outcome.status == 0, outcome.stderr
    found = summary()
    assert found["perplexity"]["routed"]["tool_call"] is None
    assert any("not a number" in warning for warning in found["warnings"])
    assert "perplexity base / LoRA / routed - / - / -" in outcome.stdout


def test_another_evaluation_in_the_folder_is_refused(evaluate):
    evaluate()
    outcome = evaluate("--seed", 3)
    assert outcome.status == 2 and len(outcome.stderr.strip().splitlines()) == 1
    assert "holds another evaluation" in outcome.stderr and "give another --output" in outcome.stderr


def test_duplicate_ids_and_a_missing_step_type_are_said_and_the_rest_is_given(evaluate, summary, tmp_path):
    steps = [step for step in builtin_steps(30, seed=1) if step.step_type == "planning"]
    write_steps(tmp_path / "plans.jsonl", [*steps, steps[0]])
    assert evaluate(data=(tmp_path / "plans.jsonl",)).status == 0
    found = summary()
    text = " ".join(found["warnings"])
    assert "repeat the id" in text and "No tool_call rows" in text
    assert found["provenance"]["rows"]["duplicate_ids"] == 1
    assert found["differential"]["pooled"]["mean"] is None and found["differential"]["pooled"]["reason"]
    assert found["skip_rate"]["planning"]["mean"] == pytest.approx(40)


def test_an_adapter_on_its_own_training_data_is_shouted(evaluate, summary, run, train_args, tmp_path):
    folder = tmp_path / "trained"
    assert run(*train_args[:-1], folder).status == 0
    evaluate("--seed", 42, adapter=folder, data=("builtin:24",))  # the generator's seed is the run's
    assert "TRAINED ON THIS DATA (builtin:24)" in summary()["warnings"][0]
    assert summary()["provenance"]["training"]["overlap"] == ["builtin:24"]


def test_baselines_and_free_running(evaluate, summary, tmp_path):
    args = ("--baselines", "--generate", 1, "--max-new-tokens", 4, "--calibration", "builtin:30")
    assert evaluate("--max-new-tokens", 4).status == 0
    outcome = evaluate(*args)
    assert outcome.status == 0, outcome.stderr
    found = summary()
    arms = {"static_influence", "static_greedy", "random", "oracle", "labels", "length"}
    assert set(found["baselines"]) == ARMS | arms
    for arm in arms:
        assert found["baselines"][arm]["skip_rate"]["all"] == pytest.approx(40)
    assert set(found["quality"]["tool_call"]["arms"]) == ARMS | {"static"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows} == ARMS | {"static"} and {row["new_tokens"] for row in rows} == {4}
    assert {row["skip_rate"] for row in rows if row["arm"] in ("routed", "static")} == {40.0}
    provenance = found["provenance"]
    assert provenance["generations"] == {"chosen": 1, "unfinished_turns": 0, "too_long": 0}
    assert provenance["calibration_shared"] == 0  # `builtin` is drawn by another seed
    first, then = provenance["command"].split(" && ")
    assert "--baselines" not in first and "--baselines --generate 1" in then
    again = evaluate(*args)
    assert "choosing baselines" in outcome.stderr and "choosing baselines" not in again.stderr
    assert summary()["provenance"]["baselines"] == found["provenance"]["baselines"]
    assert len((tmp_path / "out" / "generations.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--baselines",), "give --calibration"),
        (("--generate", 3, "--calibration", "builtin"), "no --baselines"),
        (("--max-length", 8), "raise --max-length"),
        (("--max-length", 4096), "reads at most 2048 tokens"),
        (("--limit", 0), "--limit"),
        (("--calibration", "nonsense", "--baselines"), "unknown data 'nonsense'"),
    ],
)
def test_mistakes_are_one_line(evaluate, args, message):
    outcome = evaluate(*args)
    assert outcome.status == 2 and message in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1
