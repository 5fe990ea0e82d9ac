"""Loss a token of two evaluations on the same steps, with the difference's interval; or against a line at equal FLOPs.

    python compare_losses.py A B --arms routed lora_only
    python compare_losses.py A --line LORA_ALONE ONE_BLOCK_FOR_EVERYTHING

Nats a target token, the mean over steps; 95% bootstrap intervals over conversations, drawn within sources.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

Rows = dict[str, dict[str, Any]]


def read(folder: str) -> Rows:
    with (Path(folder) / "samples.jsonl").open(encoding="utf-8") as file:
        return {row["id"]: row for row in map(json.loads, file)}


def losses(rows: Rows, arm: str, ids: list[str]) -> np.ndarray:
    return np.array([rows[name]["nll"][arm] / rows[name]["target_tokens"] for name in ids])


def executed(rows: Rows, arm: str, ids: list[str], parts: tuple[str, ...]) -> float:
    """FLOPs of `prefill`, `decode` or both, per cent of the backbone's."""
    arm_sum, base_sum = (
        sum(rows[name]["flops"][which][part] for name in ids for part in parts) for which in (arm, "base")
    )
    return 100 * arm_sum / base_sum


def interval(differences: np.ndarray, rows: Rows, ids: list[str]) -> tuple[float, float]:
    conversations: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, name in enumerate(ids):
        conversations[rows[name]["source"]][rows[name]["group"]].append(position)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(2000):
        drawn = [
            position
            for groups in map(list, (found.values() for found in conversations.values()))
            for choice in rng.integers(len(groups), size=len(groups))
            for position in groups[choice]
        ]
        means.append(differences[drawn].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of evaluations on the same steps.")
    parser.add_argument("evaluations", nargs="+", help="one folder with --line, else two")
    parser.add_argument("--arms", nargs=2, default=["routed", "routed"])
    parser.add_argument("--line", nargs=2, help="evaluations whose routed arms are the ends of the line")
    options = parser.parse_args()
    everything = ("prefill", "decode")
    if options.line:
        first, *ends = map(read, [options.evaluations[0], *options.line])
        ids = sorted(set(first).intersection(*ends))
        (loss, flops), (left, more), (right, less) = (
            (losses(rows, "routed", ids).mean(), executed(rows, "routed", ids, everything)) for rows in (first, *ends)
        )
        on_line = np.interp(flops, [less, more], [right, left])
        print(f"{len(ids)} steps: {loss:.4f} at {flops:.1f}% of the FLOPs; the line there: {on_line:.4f}")
        return
    first, second = map(read, options.evaluations)
    for kind in ("all", "tool_call", "planning", "answer"):
        ids = sorted(name for name in first.keys() & second.keys() if kind in ("all", first[name]["step_type"]))
        if not ids:
            continue
        ours, theirs = losses(first, options.arms[0], ids), losses(second, options.arms[1], ids)
        low, high = interval(ours - theirs, first, ids)
        shares = [executed(rows, arm, ids, everything) for rows, arm in zip((first, second), options.arms, strict=True)]
        print(
            f"{kind:10} {len(ids):4} steps: {ours.mean():.4f} and {theirs.mean():.4f}, difference "
            f"{(ours - theirs).mean():+.4f} ({low:+.4f} to {high:+.4f}); FLOPs {shares[0]:.1f} and {shares[1]:.1f}%"
        )


if __name__ == "__main__":
    main()
