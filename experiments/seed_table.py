"""Figures of seeds side by side, with mean and Student's 95% half width: `python seed_table.py EVALUATION ...`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

KINDS = ("tool_call", "planning", "answer")
FIGURES = {
    **{f"skipped, {kind}": ("skip_rate", kind, "mean") for kind in KINDS},
    **{f"differential, {way}": ("differential", way, "mean") for way in ("paired", "length_matched", "pooled")},
    **{f"perplexity routed, {kind}": ("perplexity", "routed", kind) for kind in KINDS},
    **{f"routed over LoRA alone, {kind}": ("perplexity_ratio", kind, "mean") for kind in KINDS},
    "token accuracy routed, tool_call": ("token_accuracy", "routed", "tool_call"),
    "first token right routed, tool_call": ("start_accuracy", "routed", "tool_call"),
    "FLOPs, tool_call": ("flops", "tool_call", "total_share"),
    "FLOPs, all": ("flops", "all", "total_share"),
    "distinct routes": ("routes", "distinct"),
}


def figure(summary: dict[str, Any], path: tuple[str, ...]) -> float:
    value: Any = summary
    for key in path:
        value = value[key]
    return float(value)


def loss(folder: Path) -> float:
    """Nats a token of the routed arm, the mean over steps."""
    with (folder / "samples.jsonl").open(encoding="utf-8") as file:
        return float(np.mean([row["nll"]["routed"] / row["target_tokens"] for row in map(json.loads, file)]))


def row(label: str, values: list[float]) -> str:
    spread = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    cells = " ".join(f"{value:8.3f}" for value in values)
    return f"{label:36} {cells}   {np.mean(values):.3f} ± {spread:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Seeds side by side.")
    parser.add_argument("evaluations", nargs="+", type=Path)
    folders = parser.parse_args().evaluations
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    for label, path in FIGURES.items():
        print(row(label, [figure(summary, path) for summary in summaries]))
    print(row("loss a token routed, mean over steps", [loss(folder) for folder in folders]))


if __name__ == "__main__":
    main()
