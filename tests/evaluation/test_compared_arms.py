"""The summary's tables of arms: baselines on the same steps, and the quality of free-running generations."""

import math

import numpy as np
import pytest

from layerroute.errors import DataError
from layerroute.evaluation.summary import summarize


def skip(row):
    return 100 * row["route"].count("0") / len(row["route"])


def baseline(row, route, factor):
    flops = {part: cost * route.count("1") / len(route) for part, cost in row["flops"]["base"].items()}
    loss = None if factor is None else factor * row["nll"]["base"]
    return {"route": route, "skip_rate": skip({"route": route}), "nll": loss, "accuracy": 0.5, "flops": flops}


def test_baselines_stand_beside_the_arms_of_the_same_steps(make_samples, provenance):
    rows = make_samples()
    covered = rows[::3]
    told = {"tool_call": "1" * 10 + "0" * 10, "planning": "1" * 18 + "00", "answer": "1" * 20}
    lines = [
        {"id": row["id"], "arms": {"oracle": baseline(row, told[row["step_type"]], 2.0),
                                   "random": baseline(row, "0" * 5 + "1" * 15, None if i == 0 else 3.0)}}
        for i, row in enumerate(covered)
    ]  # fmt: skip
    summary = summarize(rows, provenance, baselines=iter(lines))
    table = summary["baselines"]
    assert list(table) == ["base", "lora_only", "routed", "oracle", "random"]
    assert (
        table["oracle"]["differential"] == 40 and table["random"]["differential"] == table["base"]["differential"] == 0
    )
    assert table["oracle"]["skip_rate"]["planning"] == 10 and table["random"]["skip_rate"]["all"] == 25
    assert table["random"]["flops"]["all"] == pytest.approx(0.75) and table["base"]["flops"]["planning"] == 1
    assert table["oracle"]["token_accuracy"]["all"] == pytest.approx(0.5)
    loss, tokens = sum(row["nll"]["base"] for row in covered), sum(row["target_tokens"] for row in covered)
    assert table["base"]["perplexity"]["all"] == pytest.approx(math.exp(loss / tokens))
    assert table["oracle"]["perplexity"]["all"] == pytest.approx(math.exp(2 * loss / tokens))
    loss, tokens = loss - covered[0]["nll"]["base"], tokens - covered[0]["target_tokens"]
    assert table["random"]["perplexity"]["all"] == pytest.approx(math.exp(3 * loss / tokens))
    assert table["routed"]["skip_rate"]["all"] == pytest.approx(np.mean([skip(row) for row in covered]))
    assert summary["warnings"] == [
        f"Baseline random: 1 of {len(covered)} losses are not numbers; its perplexity leaves them out."
    ]


def test_baselines_of_other_steps_are_refused(make_samples, provenance):
    rows = make_samples(groups=5)
    line = {"id": "elsewhere", "arms": {"random": baseline(rows[0], "1" * 20, 1.0)}}
    with pytest.raises(DataError, match="no sample has the id 'elsewhere'"):
        summarize(rows, provenance, baselines=[line])
    assert summarize(rows, provenance)["baselines"] is None


def generation(number, arm, correct, task="tool_call"):
    calls = task == "tool_call"
    return {
        "id": f"{task}-{number}", "group": f"{number}", "source": "s", "task": task, "arm": arm, "text": "...",
        "new_tokens": 9, "finished": number % 4 != 0, "correct": correct, "valid_json": True if calls else None,
        "schema_valid": number % 2 == 0 if calls else None, "last_number": None if calls else correct, "error": None,
        "skip_rate": 20.0 if arm == "routed" else 0.0, "flops": {"prefill": 1, "decode": 1},
    }  # fmt: skip


def test_quality_is_counted_and_compared(make_samples, provenance):
    """Of 40 steps base has 30 right and the routed arm 24 of them; static holds the first 12 steps only."""
    lines = [generation(i, "base", i < 30) for i in range(40)] + [generation(i, "routed", i < 24) for i in range(40)]
    lines += [generation(i, "static", i >= 6) for i in range(12)]
    lines += [generation(i, "routed", True, "gsm8k") for i in range(5)]
    quality = summarize(make_samples(groups=5), provenance, generations=iter(lines))["quality"]
    calls = quality["tool_call"]
    assert calls["n"] == 40 and list(calls["arms"]) == ["base", "routed", "static"]
    routed = calls["arms"]["routed"]
    assert routed["accuracy"] == 0.6 and routed["n"] == 40 and routed["skip_rate"] == 20
    assert routed["ci95"] == pytest.approx([0.4460, 0.7365], abs=1e-4)  # Wilson, by hand
    assert (routed["valid_json"], routed["schema_valid"], routed["unfinished"]) == (1, 0.5, 0.25)
    assert calls["tests"]["routed_vs_base"] == {
        "p_value": pytest.approx(2 * 0.5**6),
        "only_first": 0,
        "only_second": 6,
        "n": 40,
    }
    assert calls["tests"]["routed_vs_static"] == {
        "p_value": pytest.approx(2 * 0.5**6),
        "only_first": 6,
        "only_second": 0,
        "n": 12,
    }
    assert "routed_vs_lora_only" not in calls["tests"]
    math_ = quality["gsm8k"]
    assert math_["arms"]["routed"]["ci95"] is math_["arms"]["routed"]["valid_json"] is None and math_["tests"] == {}
    assert math_["arms"]["routed"]["last_number"] == 1 and routed["last_number"] is None


def test_generations_of_before_there_was_a_last_number_are_counted(make_samples, provenance):
    line = {name: value for name, value in generation(0, "routed", True, "gsm8k").items() if name != "last_number"}
    routed = summarize(make_samples(groups=5), provenance, generations=[line])["quality"]["gsm8k"]["arms"]["routed"]
    assert routed["accuracy"] == 1 and routed["last_number"] is None


def test_generations_of_few_groups_are_not_tested(make_samples, provenance):
    lines = [
        {**generation(i, arm, arm == "base"), "group": str(i % 4)} for i in range(40) for arm in ("base", "routed")
    ]
    quality = summarize(make_samples(groups=5), provenance, generations=lines)["quality"]["tool_call"]
    test = quality["tests"]["routed_vs_base"]
    assert test["p_value"] is quality["arms"]["base"]["ci95"] is None and test["only_second"] == 40
    assert test["reason"] == "4 groups; p-values need 10"
    assert summarize(make_samples(groups=5), provenance)["quality"] is None
