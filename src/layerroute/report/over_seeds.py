"""What an ablation says in plain words: does it hold when it is trained again, and does it beat fixed pruning?

Pure functions of the content of ablation.json. The rules are in docs/report.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerroute.report.content import Finding
from layerroute.report.price import LEVEL, judged
from layerroute.report.wording import arm_name, interval, joined, p_value, signed

__all__ = ["findings_over_seeds"]


def findings_over_seeds(ablation: Mapping[str, Any]) -> list[Finding]:
    """What an ablation.json says about training again with other seeds."""
    routed = ablation["arms"].get("routed") or {}
    found = [_holds(routed)]
    if statics := [arm for arm in ablation["arms"] if arm.startswith("static")]:
        found.append(_beats_static_over_seeds(statics, ablation.get("tests") or {}))
    return found


def _holds(routed: Mapping[str, Any]) -> Finding:
    key, question = "holds_over_seeds", "Does it hold over training seeds?"
    metric = next((name for name in ("paired_differential", "differential") if _given(routed, name)), None)
    if metric is None:
        return Finding(key, "unclear", question, "No figures", "A differential is missing, of some seed or of all.")
    figure = routed[metric]
    positive = sum(value > 0 for value in figure["values"] if value is not None)
    kind = "within the same conversations" if metric == "paired_differential" else "over all data"
    ends = figure.get("ci95")
    ci = f" (95% interval over seeds {interval(ends)})" if ends else ""
    sentence = (
        f"Trained anew with each seed, the differential {kind} is {signed(figure['mean'])} points on average{ci}, "
        f"above zero for {positive} of {len(figure['values'])}."
    )
    if ends is None:
        return Finding(key, "unclear", question, "One seed tells nothing of others", sentence)
    if ends[0] > 0:
        return Finding(key, "yes", question, f"Yes: above zero for {positive} of {len(figure['values'])}", sentence)
    answer = "It skips MORE on planning" if ends[1] < 0 else "No: the interval over seeds includes zero"
    return Finding(key, "no", question, answer, sentence)


def _given(figures: Mapping[str, Any], metric: str) -> bool:
    return (figures.get(metric) or {}).get("mean") is not None


def _beats_static_over_seeds(statics: Sequence[str], tests: Mapping[str, Any]) -> Finding:
    key, question = "beats_static_over_seeds", "Better than removing as many blocks for good, seed by seed?"
    compared = {arm: (tests.get(arm) or {}).get("perplexity_all") or {} for arm in statics}
    known = {arm: test for arm, test in compared.items() if test.get("mean_difference") is not None}
    if not known:
        return Finding(key, "unclear", question, "Not compared", "Perplexity was not compared with static pruning.")
    words = [
        f"{signed(test['mean_difference'], 2)} against {arm_name(arm)} (paired t: {p_value(test.get('t_p_value'))}, "
        f"Wilcoxon: {p_value(test.get('wilcoxon_p_value'))})"
        for arm, test in known.items()
    ]
    if all(test.get("t_p_value") is None for test in known.values()):
        words.append("too few seeds, or seeds too alike, to test it")
        return Finding(key, "unclear", question, "Not tested", f"Difference in perplexity: {joined(words)}.")
    clear = [test["mean_difference"] < 0 if _counts(test) else None for test in known.values()]
    status, answer = judged(clear)
    if None in clear and status == "yes":
        status, answer = "unclear", "Better than some fixed pruning only"
    return Finding(key, status, question, answer, f"Difference in perplexity, below zero is better: {joined(words)}.")


def _counts(test: Mapping[str, Any]) -> bool:
    return test.get("t_p_value") is not None and test["t_p_value"] < LEVEL
