"""Calls graded in free running, a line for each evaluation and one for all: `python graded.py EVALUATION ...`"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

from scipy.stats import binomtest

Verdicts = list[tuple[bool, bool]]
"""Per step: right with LoRA alone, right routed."""


def read(folder: str) -> Verdicts:
    by_step: dict[str, dict[str, bool]] = defaultdict(dict)
    with (Path(folder) / "generations.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            by_step[row["id"]][row["arm"]] = bool(row["correct"])
    return [(arms["lora_only"], arms["routed"]) for arms in by_step.values()]


def line(name: str, verdicts: Verdicts) -> str:
    counts = Counter(verdicts)
    full, routed = counts[True, False], counts[False, True]
    both = counts[True, True]
    p = binomtest(full, full + routed).pvalue if full + routed else 1.0
    return (
        f"{name}: {len(verdicts)} steps, right with LoRA alone {both + full}, routed {both + routed}; "
        f"only at full depth {full}, only routed {routed}; McNemar, exact: p {p:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA alone against routed, graded.")
    parser.add_argument("evaluations", nargs="+")
    folders = parser.parse_args().evaluations
    verdicts = {folder: read(folder) for folder in folders}
    for folder, found in verdicts.items():
        print(line(folder, found))
    print(line("together", [verdict for found in verdicts.values() for verdict in found]))


if __name__ == "__main__":
    main()
