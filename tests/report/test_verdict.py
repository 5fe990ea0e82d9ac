"""The verdict is right about an effect, none, and length alone, over several seeds; and hedges elsewhere."""

from __future__ import annotations

import copy

import pytest

from layerroute.report.over_seeds import findings_over_seeds
from layerroute.report.verdict import findings, warnings

SEEDS = range(8)


def routing(summary):
    found = findings(summary)[0]
    assert found.key == "routes_by_step_type"
    return found


def by_key(found):
    return {finding.key: finding for finding in found}


@pytest.mark.parametrize("paired", [True, False])
def test_a_planted_effect_is_a_yes(make_summary, paired):
    for seed in SEEDS:
        summary = make_summary("planted", seed, paired=paired)
        found = routing(summary)
        assert found.status == "yes", seed
        part = summary["differential"]["paired" if paired else "length_matched"]
        low, high = part["ci95"]
        assert f"{part['mean']:.1f} points more" in found.answer
        assert f"95% interval {low:.1f} to {high:.1f}, p " in found.sentence
        assert ("Within the same conversations" in found.sentence) == paired


@pytest.mark.parametrize("paired", [True, False])
def test_without_an_effect_there_is_no_yes(make_summary, paired):
    statuses = [routing(make_summary("none", seed, paired=paired)).status for seed in SEEDS]
    assert statuses.count("no") >= len(SEEDS) - 1  # one in twenty is chance


def test_what_is_only_length_is_said_to_be_length(make_summary):
    """Without pairs; chance may put one length-matched interval beside zero."""
    found = [routing(make_summary("length", seed, paired=False)) for seed in SEEDS]
    assert {finding.status for finding in found} == {"no"}
    assert sum("prompt length" in finding.answer for finding in found) >= len(SEEDS) - 1


def test_types_from_unlike_sources_are_no_proof(make_summary):
    """All calls from one source, all plans from another, at equal lengths: the publication's own data."""
    summary = make_summary("planted", paired=False)
    summary["differential"]["length_matched"] |= {"p_value": None, "reason": "no source holds both step types"}
    found = routing(summary)
    assert found.status == "unclear" and "difference between sources" in found.sentence


def test_pairs_that_differ_in_length_are_no_proof(make_summary):
    """In the same conversations, but tool calls come where prompts are shorter."""
    found = [routing(make_summary("length", seed)) for seed in SEEDS]
    assert "yes" not in {finding.status for finding in found}
    assert sum(finding.status == "no" for finding in found) >= len(SEEDS) - 1
    assert all("length" in finding.answer and "like length" in finding.sentence for finding in found)


@pytest.mark.parametrize("paired", [True, False])
def test_more_on_planning_is_a_no_that_says_so(make_summary, paired):
    for seed in SEEDS[:3]:
        found = routing(make_summary("reversed", seed, paired=paired))
        assert (
            found.status == "no" and "MORE on planning" in found.answer and "points of blocks fewer" in found.sentence
        )


def test_one_route_is_static_pruning(make_summary):
    found = routing(make_summary("static"))
    assert found.status == "no" and "static pruning" in found.sentence and "20.0%" in found.sentence


def test_too_few_groups_are_unclear(make_summary):
    for paired in (True, False):
        found = routing(make_summary("planted", groups=8, paired=paired))
        assert found.status == "unclear" and "need 10" in found.sentence


@pytest.mark.parametrize("kind, words", [("planning", "no planning steps"), ("tool_call", "no tool call steps")])
def test_an_absent_step_type_is_unclear(make_summary, kind, words):
    summary = make_summary()
    summary["rows"][kind] = 0
    found = routing(summary)
    assert found.status == "unclear" and words in found.sentence


def paired_effect(low, high, p, mean=None):
    middle = (low + high) / 2 if mean is None else mean
    return {"mean": middle, "ci95": [low, high], "p_value": p, "groups": 40, "sources": ["fireact"]}


@pytest.mark.parametrize(
    "low, high, p, status",
    [(1.0, 5.0, 0.049, "yes"), (1.0, 5.0, 0.05, "unclear"), (0.0, 5.0, 0.01, "no"), (-5.0, -0.1, 0.01, "no")],
)
def test_interval_and_test_must_agree(make_summary, low, high, p, status):
    summary = make_summary()
    summary["differential"]["paired"] = paired_effect(low, high, p)
    assert routing(summary).status == status


def test_imprecise_length_matching_does_not_overturn_pairs(make_summary):
    summary = make_summary()
    summary["differential"]["paired"] = paired_effect(15.0, 25.0, 0.001)
    for matched, status in [
        ((-4.0, 30.0, 0.2), "yes"),
        ((-4.0, 15.0, 0.2), "no"),
        ((2.0, 9.0, 0.01), "unclear"),
        ((2.0, 15.0, 0.01), "yes"),
    ]:
        summary["differential"]["paired_length_matched"] = paired_effect(*matched)
        assert routing(summary).status == status


def test_a_difference_between_sources_is_named_as_one(make_summary):
    summary = make_summary("none", 1)
    summary["differential"]["pooled"] = paired_effect(10.0, 14.0, 0.001)
    found = routing(summary)
    assert found.status == "no" and "between sources" in found.sentence


@pytest.mark.parametrize(
    "ends, status",
    [([0.99, 1.019], "yes"), ([0.99, 1.03], "unclear"), ([1.021, 1.1], "no"), (None, "unclear")],
)
def test_prediction_is_kept_within_two_per_cent(make_summary, ends, status):
    summary = make_summary()
    summary["perplexity_ratio"]["planning"] = {"mean": 1.01 if ends is None else sum(ends) / 2, "ci95": ends}
    assert by_key(findings(summary))["keeps_prediction"].status == status


def test_no_losses_are_unclear(make_summary):
    summary = make_summary()
    summary["perplexity_ratio"] = {kind: {"mean": None, "ci95": None} for kind in summary["perplexity_ratio"]}
    assert by_key(findings(summary))["keeps_prediction"].status == "unclear"


def graded(routed, lora_only, p, static=0.5, p_static=0.001, n=100):
    arms = {"lora_only": lora_only, "routed": routed, "static": static}
    tests = {"routed_vs_lora_only": p, "routed_vs_static": p_static}
    return {
        "n": n,
        "arms": {arm: {"accuracy": share, "ci95": [0.1, 0.9], "n": n} for arm, share in arms.items()},
        "tests": {name: {"p_value": value, "only_first": 1, "only_second": 2, "n": n} for name, value in tests.items()},
    }


@pytest.mark.parametrize(
    "routed, lora_only, p, status",
    [(0.8, 0.8, 1.0, "yes"), (0.7, 0.8, 0.01, "no"), (0.9, 0.8, 0.01, "yes"), (0.77, 0.8, 0.4, "unclear"),
     (0.8, 0.8, None, "unclear")],
)  # fmt: skip
def test_answers_are_judged_by_their_paired_test(make_summary, routed, lora_only, p, status):
    """No significant loss is not yet no loss."""
    found = by_key(findings(make_summary() | {"quality": {"gsm8k": graded(routed, lora_only, p)}}))[
        "keeps_answers_gsm8k"
    ]
    assert found.status == status and "GSM8K" in found.question and f"{100 * routed:.1f}%" in found.answer


@pytest.mark.parametrize(
    "routed, lora_only, p, n, status, doubt",
    [(0.0, 0.0, 1.0, 100, "unclear", "nothing to lose"), (0.2, 0.0, 0.01, 100, "unclear", "nothing to lose"),
     (0.8, 0.8, 1.0, 29, "unclear", "too few to tell"), (0.9, 0.5, 0.01, 29, "unclear", "too few to tell"),
     (0.8, 0.8, 1.0, 30, "yes", ""), (0.2, 0.9, 0.01, 29, "no", "")],
)  # fmt: skip
def test_nothing_right_or_few_steps_prove_nothing_kept(make_summary, routed, lora_only, p, n, status, doubt):
    summary = make_summary() | {"quality": {"tool_call": graded(routed, lora_only, p, n=n)}}
    found = by_key(findings(summary))["keeps_answers_tool_call"]
    assert found.status == status and found.answer.endswith(doubt or "without routing")


@pytest.mark.parametrize("static, p, status", [(0.5, 0.001, "yes"), (0.9, 0.001, "no"), (0.79, 0.6, "unclear")])
def test_fixed_pruning_is_beaten_by_a_test_alone(make_summary, static, p, status):
    quality = {"tool_call": graded(0.8, 0.8, 1.0, static, p)}
    assert by_key(findings(make_summary() | {"quality": quality}))["beats_static"].status == status


def test_perplexity_without_an_interval_beats_nothing(make_summary):
    arm = {"perplexity": {"all": 4.0}}
    summary = make_summary() | {"baselines": {"static_greedy": arm, "routed": {"perplexity": {"all": 3.0}}}}
    found = by_key(findings(summary))["beats_static"]
    assert found.status == "unclear" and "3.00 against 4.00" in found.answer


@pytest.mark.parametrize("share, status", [(0.7, "yes"), (0.99, "yes"), (0.995, "no"), (1.01, "no"), (None, "unclear")])
def test_savings_are_of_executed_flops(make_summary, share, status):
    summary = make_summary()
    summary["flops"]["all"]["total_share"] = share
    assert by_key(findings(summary))["saves_compute"].status == status


def test_every_finding_has_its_sentence(make_summary):
    for kind in ("planted", "none", "length", "static"):
        for finding in findings(make_summary(kind)):
            assert finding.status in ("yes", "no", "unclear") and finding.sentence.endswith(".") and finding.answer
            assert "None" not in finding.sentence and "nan" not in finding.sentence and "  " not in finding.sentence


def test_training_data_is_shouted(make_summary):
    summary = make_summary()
    assert warnings(summary) == []
    seen = copy.deepcopy(summary)
    seen["provenance"]["training"]["overlap"] = ["fireact.jsonl.gz"]
    assert "TRAINED ON THIS DATA (fireact.jsonl.gz)" in warnings(seen)[0]
    seen["warnings"] = ["The adapter was trained on this data."]
    assert warnings(seen) == seen["warnings"]


@pytest.mark.parametrize(
    "effect, seeds, status", [(20.0, 5, "yes"), (0.5, 5, "no"), (-20.0, 5, "no"), (20.0, 1, "unclear")]
)
def test_seeds_decide_whether_it_holds(ablation_content, effect, seeds, status):
    found = by_key(findings_over_seeds(ablation_content(seeds, effect)))
    assert found["holds_over_seeds"].status == status
    if seeds == 1:
        assert found["beats_static_over_seeds"].status == "unclear"


def test_a_lost_seed_leaves_the_question_open(ablation_content):
    ablation = ablation_content()
    for metric in ablation["arms"]["routed"]:
        ablation["arms"]["routed"][metric] = {"mean": None, "ci95": None, "values": [1.0, None]}
    assert by_key(findings_over_seeds(ablation))["holds_over_seeds"].status == "unclear"


def test_fixed_pruning_over_seeds(ablation_content):
    ablation = ablation_content()
    tests = ablation["tests"]["static_greedy"]["perplexity_all"]
    assert by_key(findings_over_seeds(ablation))["beats_static_over_seeds"].status == "yes"
    tests["mean_difference"] = 0.3
    assert by_key(findings_over_seeds(ablation))["beats_static_over_seeds"].status == "no"
    tests["t_p_value"] = 0.4
    assert by_key(findings_over_seeds(ablation))["beats_static_over_seeds"].status == "unclear"
