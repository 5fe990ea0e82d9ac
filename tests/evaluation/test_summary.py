"""Summaries of synthetic evaluations: right about an effect, none, and length alone; and what is missing is said."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from layerroute.errors import DataError
from layerroute.evaluation.summary import summarize

TYPES = ("tool_call", "planning", "answer")


def only(rows, *types):
    return [row for row in rows if row["step_type"] in types]


def skip(row):
    return 100 * row["route"].count("0") / len(row["route"])


def excludes_zero(section):
    low, high = section["ci95"]
    return low > 0 or high < 0


def differentials(summary):
    return {name: part for name, part in summary["differential"].items() if name != "by_source"}


def test_a_planted_effect_is_found_in_every_way(make_samples, provenance):
    summary = summarize(make_samples(15.0, "planted"), provenance)
    expected = 15 * 17 / 20  # of all blocks, where it was planted in the routable ones
    for section in differentials(summary).values():
        assert excludes_zero(section) and section["p_value"] < 0.01
        assert section["ci95"][0] < expected < section["ci95"][1] and section["mean"] == pytest.approx(
            expected, abs=2.5
        )
    found = summary["dependence"]
    assert found["auc"]["ci95"][0] > 0.6 and found["partial_correlation"]["ci95"][0] > 0.2
    assert found["partial_correlation"]["p_value"] < 1e-4
    information = found["mutual_information"]["step_type"]
    assert 0.01 < information["corrected_bits"] < information["bits"] and information["p_value"] < 0.01
    assert summary["warnings"] == []


def test_no_effect_is_not_found(make_samples, provenance):
    """Over several seeds, in about as many as the level says."""
    found = {}
    for seed in range(12):
        summary = summarize(make_samples(15.0, "none", seed, groups=24), provenance, seed=seed)
        for name, section in differentials(summary).items():
            found.setdefault(name, []).append((section["p_value"] < 0.05) + excludes_zero(section))
    assert found.keys() == {"paired", "paired_length_matched", "pooled", "length_matched"}
    for name, each in found.items():
        assert sum(count > 0 for count in each) <= 3, name


def test_what_is_only_length_is_matched_away(make_samples, provenance):
    """Pooled and paired differentials are large; prompts of the same length give none."""
    missed = 0
    for seed in range(5):
        summary = summarize(make_samples(15.0, "length", seed), provenance, seed=seed)
        pooled, matched = summary["differential"]["pooled"], summary["differential"]["length_matched"]
        assert pooled["mean"] > 6 and excludes_zero(pooled) and pooled["p_value"] < 0.01
        assert abs(matched["mean"]) < 4
        missed += excludes_zero(matched) + (matched["p_value"] < 0.05)
        assert abs(summary["dependence"]["partial_correlation"]["r"]) < 0.15
    assert missed <= 2


def test_figures_are_those_of_the_rows(make_samples, provenance):
    rows = make_samples()
    summary = summarize(rows, provenance)
    for kind in TYPES:
        chosen = only(rows, kind)
        rates = [skip(row) for row in chosen]
        found = summary["skip_rate"][kind]
        assert found["mean"] == pytest.approx(np.mean(rates)) and found["std"] == pytest.approx(np.std(rates, ddof=1))
        assert found["n"] == len(chosen) == summary["rows"][kind]
        assert found["groups"] == len({row["group"] for row in chosen})
        assert found["ci95"][0] < found["mean"] < found["ci95"][1]
        tokens = sum(row["target_tokens"] for row in chosen)
        for arm in ("base", "lora_only", "routed"):
            loss = sum(row["nll"][arm] for row in chosen) / tokens
            assert summary["perplexity"][arm][kind] == pytest.approx(math.exp(loss))
            right = sum(row["accuracy"][arm] * row["target_tokens"] for row in chosen)
            assert summary["token_accuracy"][arm][kind] == pytest.approx(right / tokens)
            begun = np.mean([row["starts"][arm] for row in chosen])
            assert summary["start_accuracy"][arm][kind] == pytest.approx(begun)
        ratio = summary["perplexity"]["routed"][kind] / summary["perplexity"]["lora_only"][kind]
        assert summary["perplexity_ratio"][kind]["mean"] == pytest.approx(ratio)
        low, high = summary["perplexity_ratio"][kind]["ci95"]
        assert low < ratio < high
        bits = np.array([[bit == "0" for bit in row["route"]] for row in chosen])
        assert summary["per_block"][kind] == pytest.approx((100 * bits.mean(0)).tolist())
        counts = np.bincount(bits.sum(1), minlength=21).tolist()
        assert summary["dependence"]["distribution"][kind] == counts
    base, routed = (sum(row["flops"][arm]["prefill"] for row in rows) for arm in ("base", "routed"))
    assert summary["flops"]["all"]["prefill_share"] == pytest.approx(routed / base)
    whole = [sum(sum(row["flops"][arm].values()) for row in only(rows, "planning")) for arm in ("base", "routed")]
    assert summary["flops"]["planning"]["total_share"] == pytest.approx(whole[1] / whole[0])
    assert summary["routes"]["distinct"] == len({row["route"] for row in rows})
    assert summary["groups"] == 120 and summary["min_groups"] == 10 and summary["format_version"] == 1
    assert summary["provenance"] == provenance


def test_sources_are_told_apart(make_samples, provenance):
    rows = make_samples()
    each = []
    for group in sorted({row["group"] for row in rows if row["source"] == "talk"}):
        own = [row for row in rows if row["group"] == group]
        calls, plans = ([skip(row) for row in only(own, kind)] for kind in ("tool_call", "planning"))
        each.append(np.mean(calls) - np.mean(plans))  # two of each: of equal weight
    summary = summarize(rows, provenance)["differential"]
    assert summary["paired"]["mean"] == pytest.approx(np.mean(each))
    assert summary["paired"]["sources"] == ["talk"] and summary["pooled"]["sources"] == ["calls", "plans", "talk"]
    assert list(summary["by_source"]) == ["talk", "calls", "plans"]
    assert summary["by_source"]["talk"] == {
        **{k: v for k, v in summary["paired"].items() if k != "sources"},
        "paired": True,
    }
    calls = summary["by_source"]["calls"]
    assert calls["mean"] is calls["ci95"] is None and calls["reason"] == "no planning rows" and not calls["paired"]
    assert calls["n_tool_call"] == 60 and calls["groups"] == 30


def test_length_matching_names_its_strata(make_samples, provenance):
    rows = only(make_samples(), "tool_call", "planning")
    bins = {}
    for row in rows:
        number = math.floor(math.log(row["prompt_tokens"]) / math.log(1.1))
        bins.setdefault(number, {"tool_call": [], "planning": []})[row["step_type"]].append(skip(row))
    both = [part for part in bins.values() if all(part.values())]
    weights = [min(map(len, part.values())) for part in both]
    each = [np.mean(part["tool_call"]) - np.mean(part["planning"]) for part in both]
    found = summarize(rows, provenance)["differential"]["length_matched"]
    assert found["mean"] == pytest.approx(np.average(each, weights=weights))
    assert found["strata"] == len(both) and found["matched"] == sum(weights)
    assert found["n_tool_call"] == sum(len(part["tool_call"]) for part in both)


def test_dependence_on_bias_and_initial_gates(make_samples, provenance):
    rows = make_samples()
    routable = provenance["routers"]["routable"]
    provenance["routers"]["bias_route"] = "11" + "0" * 17 + "1"
    found = summarize(rows, provenance)["dependence"]
    opened = [np.mean([row["route"][i] == "1" for i in routable]) for row in rows]
    assert found["flip_rate"]["all"] == pytest.approx(100 * np.mean(opened))
    moved = abs(np.array([row["gate_probs"] for row in rows]) - provenance["routers"]["initial_probs"]).mean(0)
    assert found["gate_movement"]["per_block"] == pytest.approx(moved.tolist(), abs=1e-6)
    assert found["gate_movement"]["mean"] == pytest.approx(moved[routable].mean(), abs=1e-6)
    assert found["stability"] == {"same_route": pytest.approx(50, abs=1), "flips": 10.0, "n": len(rows)}


def test_stability_that_was_not_measured(make_samples, provenance):
    rows = [{**row, "stability": None} for row in make_samples(groups=10)]
    assert summarize(rows, provenance)["dependence"]["stability"] is None
    rows[3]["stability"] = {"flips": 20.0, "same_route": True}
    assert summarize(rows, provenance)["dependence"]["stability"] == {"same_route": 100.0, "flips": 20.0, "n": 1}


def test_routes_of_a_thousand_steps_need_as_many_rows(make_samples, provenance):
    few, many = (summarize(make_samples(groups=groups), provenance)["routes"] for groups in (20, 300))
    assert few["per_1000"] is None and 0 < many["per_1000"] < many["distinct"]


@pytest.mark.parametrize("absent", TYPES)
def test_an_absent_step_type_is_said(absent, make_samples, provenance):
    rows = only(make_samples(groups=20), *(set(TYPES) - {absent}))
    summary = summarize(rows, provenance)
    json.dumps(summary, allow_nan=False)
    assert summary["warnings"] == [f"No {absent} rows: what needs them cannot be given."]
    assert (
        summary["skip_rate"][absent]["mean"] is None and summary["skip_rate"][absent]["reason"] == f"no {absent} rows"
    )
    assert summary["perplexity"]["base"][absent] is summary["per_block"][absent] is None
    assert summary["flops"][absent]["total_share"] is summary["perplexity_ratio"][absent]["mean"] is None
    pooled, auc = summary["differential"]["pooled"], summary["dependence"]["auc"]
    if absent == "answer":
        assert pooled["mean"] is not None
    else:
        assert pooled["mean"] is pooled["p_value"] is auc["value"] is None
        assert pooled["reason"] == auc["reason"] == f"no {absent} rows"
        assert summary["differential"]["paired"]["mean"] is None


def test_few_groups_give_figures_without_intervals(make_samples, provenance):
    rows = [row for row in make_samples(groups=60) if row["source"] == "talk"]
    for count, said in ((1, "All rows are of one group"), (4, "Only 4 groups")):
        kept = {row["group"] for row in rows[: 5 * count]}
        summary = summarize([row for row in rows if row["group"] in kept], provenance)
        pooled, found = summary["differential"]["pooled"], summary["dependence"]
        assert pooled["mean"] is not None and pooled["ci95"] is pooled["p_value"] is None
        assert f"tool_call rows of {count} group" in pooled["reason"] and pooled["groups"] == count
        assert summary["skip_rate"]["tool_call"]["ci95"] is found["auc"]["ci95"] is None
        assert found["mutual_information"]["step_type"]["p_value"] is found["partial_correlation"]["ci95"] is None
        assert len(summary["warnings"]) == 1 and said in summary["warnings"][0]
        json.dumps(summary, allow_nan=False)


def test_types_that_never_share_a_source_have_no_p_value(make_samples, provenance):
    rows = [row for row in make_samples() if row["source"] != "talk"]
    summary = summarize(rows, provenance)["differential"]
    assert summary["pooled"]["ci95"] is not None and summary["pooled"]["p_value"] is None
    assert "no source holds both step types" in summary["pooled"]["reason"]
    assert summary["paired"]["mean"] is None and summary["paired"]["groups"] == 0
    assert summary["paired"]["reason"].startswith("no group holds both")


def test_equal_routes_are_said(make_samples, provenance):
    route = "1" * 15 + "0" * 5
    rows = [{**row, "route": route} for row in make_samples(groups=20)]
    summary = summarize(rows, provenance)
    assert summary["warnings"] == ["All rows take the same route: routing does not depend on the input."]
    assert summary["routes"] == {"distinct": 1, "entropy": 0.0, "per_1000": None}
    pooled, found = summary["differential"]["pooled"], summary["dependence"]
    assert (pooled["mean"], pooled["ci95"], pooled["p_value"]) == (0, [0, 0], 1)
    assert found["auc"]["value"] == 0.5 and found["auc"]["ci95"] == [0.5, 0.5]
    assert found["partial_correlation"]["r"] is None and "does not vary" in found["partial_correlation"]["reason"]
    assert found["mutual_information"]["step_type"]["bits"] == found["mutual_information"]["source"]["bits"] == 0
    json.dumps(summary, allow_nan=False)


def test_routes_that_never_repeat_tell_nothing_of_labels(make_samples, provenance):
    rows = [{**row, "route": f"{i:020b}"} for i, row in enumerate(make_samples(groups=20))]
    found = summarize(rows, provenance)["dependence"]["mutual_information"]["step_type"]
    assert found["corrected_bits"] is found["p_value"] is None and found["reason"] == "every row has a route of its own"


def test_losses_that_are_no_numbers_are_left_out(make_samples, provenance):
    rows = make_samples(groups=20)
    expected = summarize(rows, provenance)["perplexity"]
    spoilt = [{**row, "id": row["id"] + "!", "nll": {**row["nll"], "routed": None}} for row in rows[:3]]
    summary = summarize([*rows, *spoilt], provenance)
    assert summary["perplexity"] == {arm: pytest.approx(parts) for arm, parts in expected.items()}
    assert summary["warnings"] == [
        f"3 of {len(rows) + 3} rows have a loss that is not a number; perplexity leaves them out."
    ]
    none = summarize([{**row, "nll": dict.fromkeys(row["nll"])} for row in rows], provenance)
    assert set(none["perplexity"]["base"].values()) == {None}
    assert none["perplexity_ratio"]["planning"]["reason"] == "no planning rows with a loss"


def test_duplicates_and_training_data_are_said(make_samples, provenance):
    provenance["rows"]["duplicate_ids"] = 2
    provenance["training"] |= {"overlap": ["fireact.train", "glaive"], "data": {"fireact.train": "ab", "glaive": "cd"}}
    provenance["data"] = {"fireact.train": "ab", "glaive": "ef"}
    first, second, third = summarize(make_samples(groups=20), provenance)["warnings"]
    assert first.startswith("THE ADAPTER WAS TRAINED ON THIS DATA (fireact.train)")
    assert second.startswith("THE ADAPTER WAS TRAINED ON DATA OF THIS NAME (glaive)")
    assert third == "2 rows repeat the id of another row and are left out."


def test_rows_that_cannot_be_read(make_samples, provenance):
    with pytest.raises(DataError, match=r"samples\.jsonl holds no rows"):
        summarize([], provenance)
    rows = make_samples(groups=2)
    rows[1]["route"] = "101"
    with pytest.raises(DataError, match=rf"sample '{rows[1]['id']}': 'route' and 'gate_probs' of 3 blocks"):
        summarize(rows, provenance)


def test_the_seed_fixes_the_summary(make_samples, provenance):
    rows = make_samples(groups=12)
    first, again, other = (json.dumps(summarize(rows, provenance, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_torch_is_not_needed():
    modules = ["summary", "dependence", "quality", "baseline_table", "stats", "counts", "seeds"]
    imports = "; ".join(f"import layerroute.evaluation.{name}" for name in modules)
    code = f"import sys; {imports}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def planted(rows, rates):
    """The rows with routes that skip `rates(row)` of 20 blocks."""
    return [{**row, "route": "0" * rates(row) + "1" * (20 - rates(row))} for row in rows]


def test_unlike_mixes_of_two_sources_are_no_effect(make_samples, provenance):
    """In both sources tool calls skip less; one has many of them and skips much, the other few and little."""
    rows = []
    for row in make_samples(groups=80):
        number = int(row["group"].split("-")[1])
        if row["source"] == "talk" and row["step_type"] != "answer":
            much = number % 2 == 0
            kept = row["step_type"] == ("tool_call" if much else "planning") or row["id"].endswith(("0", "1", "2", "3"))
            rows += [{**row, "source": f"talk-{much}"}] * kept
    rows = planted(
        rows, lambda row: (12 if row["source"] == "talk-True" else 4) - 2 * (row["step_type"] == "tool_call")
    )
    found = summarize(rows, provenance)["differential"]
    assert found["pooled"]["mean"] > 0 and found["pooled"]["p_value"] == 1
    assert found["paired"]["mean"] == pytest.approx(-10) and found["paired"]["ci95"][1] < 0
    assert found["paired_length_matched"]["mean"] == pytest.approx(-10)


def test_one_mixed_conversation_does_not_pair_a_source(make_samples, provenance):
    rows = [row for row in make_samples(groups=60) if row["source"] != "talk"]
    pair = [row for row in make_samples() if row["group"] == "talk-0" and row["step_type"] != "answer"]
    rows = [{**row, "source": "one"} for row in (*rows, *pair)]
    rows = planted(rows, lambda row: 4 if row["group"] == "talk-0" else 4 + 6 * (row["step_type"] == "tool_call"))
    found = summarize(rows, provenance)["differential"]
    assert found["paired"]["mean"] == 0 and found["paired"]["groups"] == 1 and found["paired"]["ci95"] is None
    assert found["pooled"]["mean"] > 20 and found["by_source"]["one"]["paired"]


def test_sources_of_one_conversation_have_wide_intervals(make_samples, provenance):
    rows = [{**row, "source": row["group"]} for row in make_samples(groups=12) if row["group"].startswith("talk")]
    low, high = summarize(rows, provenance)["differential"]["paired"]["ci95"]
    assert high - low > 3
