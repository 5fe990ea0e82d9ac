"""What routing costs and saves, in plain words: the findings of a verdict that are about money, not about routing.

Pure functions of parts of summary.json. The rules are in docs/report.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from layerroute.report.content import Finding, Status
from layerroute.report.wording import (
    arm_name,
    count,
    interval,
    joined,
    number,
    p_value,
    share,
    signed,
    task_name,
    type_name,
)

__all__ = ["LEVEL", "PERPLEXITY_MARGIN", "beats_static", "judged", "keeps_answers", "keeps_prediction", "saves_compute"]

LEVEL = 0.05
"""Below this a p-value counts."""
PERPLEXITY_MARGIN = 0.02
"""Perplexity counts as kept where the whole interval of its ratio lies below 1 plus this."""
_SAVING = 0.01
"""Fewer FLOPs than this share of the backbone's count as none saved."""
_KEPT_ACCURACY = 0.99
"""Answers count as kept where routed ones are right at least this often as those without routing."""
_ENOUGH = 30
"""On fewer steps than these, answers that are as often right prove nothing kept."""


def keeps_prediction(summary: Mapping[str, Any]) -> Finding:
    """Perplexity and token accuracy under teacher forcing, against the same adapter with routing off."""
    ratios = {kind: ratio for kind, ratio in summary["perplexity_ratio"].items() if ratio.get("mean") is not None}
    status, answer = _kept(ratios)
    losses = joined(
        [
            f"{number(ratio['mean'], 3)} on {type_name(kind)} steps"
            + (f" (95% interval {interval(ratio['ci95'], lambda end: number(end, 3))})" if ratio.get("ci95") else "")
            for kind, ratio in ratios.items()
        ]
    )
    lacking = (
        "; there are too few groups for an interval where none stands"
        if any(not part.get("ci95") for part in ratios.values())
        else ""
    )
    accuracy = summary["token_accuracy"]
    hits = joined(
        [
            f"{share(accuracy['routed'][kind])} against {share(accuracy['lora_only'][kind])} on {type_name(kind)} steps"
            for kind in ratios
        ]
    )
    sentence = (
        f"Perplexity with routing over that without, same adapter: {losses}; 1 is no loss{lacking}. Tokens predicted "
        f"right: {hits}."
        if ratios
        else "No step has a loss that is a number, so perplexity cannot be given."
    )
    return Finding("keeps_prediction", status, "Does it still predict as well?", answer, sentence)


def _kept(ratios: Mapping[str, Mapping[str, Any]]) -> tuple[Status, str]:
    if not ratios:
        return "unclear", "No losses to compare"
    kind, worst = max(ratios.items(), key=lambda item: item[1]["mean"])
    change = f"perplexity {signed(100 * (worst['mean'] - 1))}% on {type_name(kind)} steps"
    ends = [ratio["ci95"] for ratio in ratios.values() if ratio.get("ci95")]
    limit = 1 + PERPLEXITY_MARGIN
    if any(low > limit for low, _ in ends):
        return "no", f"A loss: {change}"
    if len(ends) == len(ratios) and all(high <= limit for _, high in ends):
        return "yes", "Kept: " + (f"at worst {change}" if worst["mean"] > 1 else "perplexity no higher anywhere")
    return "unclear", f"Not settled: {change}"


def keeps_answers(task: str, figures: Mapping[str, Any]) -> Finding:
    """Graded free-running answers of one task, against the same adapter with routing off."""
    arms, test = figures["arms"], figures["tests"].get("routed_vs_lora_only") or {}
    key, question = f"keeps_answers_{task}", f"Are its own answers still right? ({task_name(task)})"
    if "routed" not in arms or "lora_only" not in arms:
        return Finding(key, "unclear", question, "Not compared", "Routed and LoRA-only answers were not both graded.")
    routed, reference, p = arms["routed"]["accuracy"], arms["lora_only"]["accuracy"], test.get("p_value")
    status: Status = "unclear"
    doubt = ""
    if not reference:
        doubt = ": nothing to lose"
    elif p is not None and p < LEVEL and routed < reference:
        status = "no"
    elif test.get("n", 0) < _ENOUGH:
        doubt = ": too few to tell"
    elif p is not None and routed >= _KEPT_ACCURACY * reference:
        status = "yes"
    answer = f"{share(routed)} right, {share(reference)} without routing{doubt}"
    shares = joined([f"{arm_name(arm)} {share(part['accuracy'])}{_wilson(part)}" for arm, part in arms.items() if part])
    tested = f" Routed against LoRA only: {p_value(p)} (McNemar, exact)." if p is not None else ""
    sentence = f"Free running, {count(figures['n'])} {task_name(task)}, share right: {shares}.{tested}"
    return Finding(key, status, question, answer, sentence)


def _wilson(part: Mapping[str, Any]) -> str:
    return f" ({interval(part['ci95'], share)})" if part.get("ci95") else ""


def saves_compute(summary: Mapping[str, Any]) -> Finding:
    """Executed FLOPs against the untouched backbone's."""
    flops, question = summary["flops"], "Does it save compute?"
    everything = flops.get("all") or {}
    if everything.get("total_share") is None:
        return Finding("saves_compute", "unclear", question, "No FLOPs counted", "No executed FLOPs were recorded.")
    saved = {part: _saved(everything.get(f"{part}_share")) for part in ("total", "prefill", "decode")}
    kinds = joined(
        [
            f"{_saved(part['total_share'])} on {type_name(kind)} steps"
            for kind, part in flops.items()
            if kind != "all" and part.get("total_share") is not None
        ]
    )
    if everything["total_share"] <= 1 - _SAVING:
        status: Status = "yes"
        answer = f"{saved['total']} of the FLOPs"
    else:
        status, answer = "no", f"Nothing: {share(everything['total_share'])} of the FLOPs run"
    sentence = (
        f"Of the backbone's FLOPs (output layer, routers and LoRA counted in) {saved['total']} are not executed: "
        f"{saved['prefill']} of prefill (reading the prompt) and {saved['decode']} of decode (writing the answer). By "
        f"type: {kinds}. This is a count over these steps, so it has no interval; layerroute benchmark measures time."
    )
    return Finding("saves_compute", status, question, answer, sentence)


def _saved(executed: float | None) -> str:
    return share(None if executed is None else 1 - executed)


def beats_static(quality: Mapping[str, Any], baselines: Mapping[str, Any]) -> Finding:
    """Graded answers against static pruning at the routed rate, or perplexity where nothing was graded."""
    key, question = "beats_static", "Is it better than removing as many blocks for good?"
    tests = {task: part["tests"]["routed_vs_static"] for task, part in quality.items() if "static" in part["arms"]}
    if tests:
        words = [_against_static(task, quality[task]["arms"], test) for task, test in tests.items()]
        status, answer = judged([_wins(quality[task]["arms"], test) for task, test in tests.items()])
        sentence = (
            "Free-running answers right, routed against static pruning at the rate that routing reached on that step "
            f"type, blocks chosen for that type: {'; '.join(words)}."
        )
        return Finding(key, status, question, answer, sentence)
    statics = {arm: part for arm, part in baselines.items() if arm.startswith("static")}
    figures = {
        arm: part["perplexity"]["all"] for arm, part in {**statics, "routed": baselines.get("routed")}.items() if part
    }
    known = {arm: value for arm, value in figures.items() if value is not None}
    if "routed" not in known or len(known) < 2:
        return Finding(key, "unclear", question, "Not compared", "Static pruning was not measured on these steps.")
    rest = min(value for arm, value in known.items() if arm != "routed")
    listed = joined([f"{arm_name(arm)} {number(value)}" for arm, value in known.items()])
    sentence = (
        f"Perplexity over all steps at the same average rate: {listed}. They have no interval, so there is no verdict; "
        "free running (--generate) or seeds (layerroute ablate) would give one."
    )
    return Finding(key, "unclear", question, f"Perplexity {number(known['routed'])} against {number(rest)}", sentence)


def _against_static(task: str, arms: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    shares = f"{share(arms['routed']['accuracy'])} against {share(arms['static']['accuracy'])}"
    tested = p_value(test["p_value"]) if test.get("p_value") is not None else test.get("reason", "not tested")
    return f"{shares} of {count(test['n'])} {task_name(task)} ({tested})"


def _wins(arms: Mapping[str, Any], test: Mapping[str, Any]) -> bool | None:
    """Whether routed answers are right more often; None where the test does not tell."""
    if test.get("p_value") is None or test["p_value"] >= LEVEL:
        return None
    return bool(arms["routed"]["accuracy"] > arms["static"]["accuracy"])


def judged(wins: Iterable[bool | None]) -> tuple[Status, str]:
    """One judgement of several comparisons with fixed pruning; None is one that was not settled."""
    wins = list(wins)
    if False in wins:
        return "no", "Worse than fixed pruning"
    return ("yes", "Better than fixed pruning") if True in wins else ("unclear", "No difference shown")
