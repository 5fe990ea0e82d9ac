"""The verdict in plain words: does it route by step type, what does that cost, what does it save?

Pure functions from the content of summary.json or ablation.json to findings. The rules are in docs/report.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from layerroute.report.content import Finding, Status
from layerroute.report.price import LEVEL, beats_static, keeps_answers, keeps_prediction, saves_compute
from layerroute.report.wording import count, interval, joined, p_value, points, signed, type_name

__all__ = ["findings", "warnings"]

_COMPARED = ("tool_call", "planning")

Side = Literal["above", "below", "around", "disputed", "untested"]


def findings(summary: Mapping[str, Any]) -> list[Finding]:
    """What one evaluation's summary.json says, most important first."""
    quality = summary.get("quality") or {}
    found = [_routes_by_step_type(summary), keeps_prediction(summary)]
    found += [keeps_answers(task, figures) for task, figures in quality.items()]
    found.append(saves_compute(summary))
    if quality or summary.get("baselines"):
        found.append(beats_static(quality, summary.get("baselines") or {}))
    return found


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """The summary's own, and that the data was trained on where none of them says so."""
    given = list(summary.get("warnings") or [])
    overlap = (summary["provenance"].get("training") or {}).get("overlap") or []
    if overlap and not any("trained on" in text.lower() for text in given):
        given.insert(0, f"THE ADAPTER WAS TRAINED ON THIS DATA ({', '.join(overlap)}): these figures flatter it.")
    return given


def _side(effect: Mapping[str, Any]) -> Side | None:
    """Where an effect's interval lies, None without one.

    Above 0 it is `disputed` if the test does not agree, and `untested` if there could be none.
    """
    if effect.get("ci95") is None:
        return None
    low, high = effect["ci95"]
    if high < 0:
        return "below"
    if low <= 0:
        return "around"
    p = effect.get("p_value")
    if p is None:
        return "untested"
    return "above" if p < LEVEL else "disputed"


def _measured(effect: Mapping[str, Any]) -> str:
    """`+21.3 points (95% interval 18.2 to 24.0, p < 0.001)`."""
    return f"{signed(effect['mean'])} points {_tested(effect)}"


def _compared(effect: Mapping[str, Any]) -> str:
    """The same as a sentence's end, after `tool calls skip`."""
    way = "more" if effect["mean"] >= 0 else "fewer"
    return f"{points(abs(effect['mean']))} points of blocks {way} than planning steps {_tested(effect)}"


def _tested(effect: Mapping[str, Any]) -> str:
    test = "" if effect.get("p_value") is None else f", {p_value(effect['p_value'])}"
    return f"(95% interval {interval(effect['ci95'])}{test})"


def _routes_by_step_type(summary: Mapping[str, Any]) -> Finding:
    status, answer, sentence = _routing(summary)
    return Finding("routes_by_step_type", status, "Does it route by step type?", answer, sentence)


def _routing(summary: Mapping[str, Any]) -> tuple[Status, str, str]:
    if absent := [type_name(kind) for kind in _COMPARED if not summary["rows"].get(kind)]:
        words = f"The data holds no {joined(absent)} steps, so there is nothing to compare. Give data with both."
        return "unclear", f"No {joined(absent)} steps to compare", words
    if summary["routes"]["distinct"] == 1:
        return "no", "One route for every input", _static_words(summary)
    effects = summary["differential"]
    if _side(effects["paired"]) is not None:
        return _by_pairs(effects, _rates(summary))
    return _by_length(effects, _rates(summary))


def _static_words(summary: Mapping[str, Any]) -> str:
    rate = summary["skip_rate"]["tool_call"]["mean"]
    if not rate:
        return "Every block runs on every step: the routers close nothing, so there is no routing to speak of."
    return (
        f"Every input takes the same route, with {points(rate)}% of the blocks skipped. This is static pruning: the "
        "blocks could be removed for good, and the routers with them."
    )


def _rates(summary: Mapping[str, Any]) -> str:
    tool, plan = (
        f"{points(summary['skip_rate'][kind]['mean'])}% of the blocks ({interval(summary['skip_rate'][kind]['ci95'])})"
        if summary["skip_rate"][kind].get("ci95")
        else f"{points(summary['skip_rate'][kind]['mean'])}% of the blocks"
        for kind in _COMPARED
    )
    return f"Over all data, tool calls skip {tool} and planning steps {plan}."


def _by_pairs(effects: Mapping[str, Any], rates: str) -> tuple[Status, str, str]:
    """With both step types in one conversation: tools and history are the same, so they give nothing away."""
    paired, matched = effects["paired"], effects["paired_length_matched"]
    side, where = _side(paired), joined(paired.get("sources") or ["the paired sources"])
    words = (
        f"Within the same conversations ({where}; {count(paired['groups'])} groups) tool calls skip "
        f"{_compared(paired)}."
    )
    if side == "below":
        return "no", "It skips MORE on planning", f"{words} That is the wrong way round. {rates}"
    if side == "around":
        pooled = effects["pooled"]
        apart = (
            f" The difference over all data, {_measured(pooled)}, is one between sources, not between step types."
            if _side(pooled) in ("above", "disputed", "untested")
            else ""
        )
        return "no", "No difference between step types", f"{words} The interval includes zero.{apart} {rates}"
    if side == "disputed":
        return "unclear", "Interval and test disagree", f"{words} More data would settle it. {rates}"
    at_length = f"Among their prompts of like length it is {_measured(matched)}." if _side(matched) else ""
    if _length_explains(matched, paired):
        if _side(matched) in ("around", "below"):
            return "no", "Explained by prompt length", f"{words} But that is a matter of length. {at_length} {rates}"
        return "unclear", "Step type or prompt length", f"{words} But length may explain it. {at_length} {rates}"
    return (
        "yes",
        f"Yes: {points(paired['mean'])} points more on tool calls",
        " ".join(filter(None, (words, at_length, rates))),
    )


def _length_explains(matched: Mapping[str, Any], effect: Mapping[str, Any]) -> bool:
    """Whether prompts of like length differ clearly less: by less than half, or by nothing and less than the effect."""
    side = _side(matched)
    if side is None:
        return False
    upper = matched["ci95"][1]
    return bool(upper < effect["mean"] / 2 or (side in ("around", "below") and upper < effect["mean"]))


def _by_length(effects: Mapping[str, Any], rates: str) -> tuple[Status, str, str]:
    """Without such conversations: among prompts of like length."""
    pooled, matched = effects["pooled"], effects["length_matched"]
    side = _side(matched)
    if side is None:
        reason = (matched.get("reason") or pooled.get("reason") or "no figures").replace("_", " ")
        words = (
            f"Neither within conversations nor at like prompt length are there enough steps of both types: {reason}."
        )
        return "unclear", "Too little data to say", f"{words} {rates}"
    words = (
        f"No source holds both step types in enough conversations, so prompts of like length are compared: there tool "
        f"calls skip {_compared(matched)}."
    )
    if side == "above":
        if _side(pooled) in ("above", "untested") and _length_explains(matched, pooled):
            most = f"That is less than half of the difference over all data, {_measured(pooled)}."
            return "unclear", "Mostly prompt length", f"{words} {most} {rates}"
        warning = "Sources may still differ in more than length; paired data would settle it."
        return "yes", f"Yes: {points(matched['mean'])} points more on tool calls", f"{words} {warning} {rates}"
    if side == "disputed":
        return "unclear", "Interval and test disagree", f"{words} More data would settle it. {rates}"
    if side == "untested":
        reason = "But no source holds both step types, so that this may be a difference between sources."
        return "unclear", "Step types or sources", f"{words} {reason} {rates}"
    if side == "below":
        pooled_words = f" Over all data the difference is {_measured(pooled)}." if _side(pooled) else ""
        return "no", "It skips MORE on planning", f"{words} That is the wrong way round.{pooled_words} {rates}"
    if _side(pooled) in ("above", "disputed", "untested", "below"):
        explained = f"The difference over all data, {_measured(pooled)}, is explained by prompt length."
        return "no", "Explained by prompt length", f"{words} The interval includes zero. {explained}"
    return "no", "No difference between step types", f"{words} The interval includes zero. {rates}"
