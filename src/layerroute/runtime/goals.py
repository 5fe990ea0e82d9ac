"""What a benchmark compares with what, and which bounds the figures should keep. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from layerroute.runtime.timing import Goal, Ratio, Spread

__all__ = ["Times", "goals_of", "kv_goal", "ratios_of"]

_COMPARISONS = {
    "open/plain": ("open", "plain"),
    "static/plain": ("static", "plain"),
    "routed/plain": ("routed", "plain"),
    "routed/static": ("routed", "static"),
    "share_of_ideal": ("static", "routed"),
    "mixed/open": ("mixed", "open"),
    "compiled-open/open": ("compiled-open", "open"),
    "compiled-routed/routed": ("compiled-routed", "routed"),
}
"""Per name: whose time is divided by whose."""
_GOALS = (
    ("open/plain", "prefill", Goal("prefill, open/plain", "<=", 1.02)),
    ("open/plain", "decode", Goal("decode, open/plain", "<=", 1.02)),
    ("share_of_ideal", "decode", Goal("decode, share of the speed of static removal", ">=", 0.98)),
    ("routed/static", "prefill", Goal("prefill, routed/static", "<=", 1.03)),
    ("mixed/open", "prefill", Goal("prefill, mixed/open", "<", 1.0)),
    ("mixed/open", "decode", Goal("decode, mixed/open", "<", 1.0)),
    ("mixed/open", "total", Goal("whole generation, mixed/open", "<", 1.0)),
    ("compiled-open/open", "decode", Goal("decode, compiled-open/open", "<=", 1.0)),
    ("compiled-routed/routed", "decode", Goal("decode, compiled-routed/routed", "<=", 1.0)),
)


@dataclass
class Times:
    """What was measured of one arm: milliseconds, one figure per repetition."""

    warmup_s: float
    kv_bytes: int | None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "prefill_ms": asdict(Spread.of(self.prefill)),
            "decode_ms": asdict(Spread.of(self.decode)),
            "total_ms": asdict(Spread.of(self.total)),
            "warmup_s": self.warmup_s,
        }


def ratios_of(times: Mapping[str, Times], seed: int) -> dict[str, dict[str, Ratio]]:
    """Every comparison whose two arms were measured: prefill, decode and total apart."""
    return {
        name: {
            part: Ratio.of(getattr(times[arm], part), getattr(times[reference], part), seed)
            for part in ("prefill", "decode", "total")
        }
        for name, (arm, reference) in _COMPARISONS.items()
        if arm in times and reference in times
    }


def goals_of(ratios: Mapping[str, Mapping[str, Ratio]], batch: int) -> list[dict[str, Any]]:
    """JSON-able: each goal that a comparison speaks of, its figure, and whether it is met."""
    rows = []
    for comparison, part, goal in _GOALS:
        if comparison in ratios:
            ratio = ratios[comparison][part]
            value, interval = ratio.as_dict()["ratio"], ratio.interval
            rows.append(
                {"goal": f"batch {batch}: {goal}", "value": value, "interval": interval, "met": goal.met(interval)}
            )
    return rows


def kv_goal(ratio: float, share: float) -> dict[str, Any]:
    """JSON-able: whether the cache holds no more than the share of the blocks that run."""
    goal = Goal("KV bytes, routed/open", "<=", share + 1e-6)  # the share itself, up to rounding
    return {"goal": str(goal), "value": ratio, "interval": (ratio, ratio), "met": goal.met((ratio, ratio))}
