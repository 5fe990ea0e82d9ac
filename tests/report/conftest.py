"""Synthetic evaluations and ablations on disk: with an effect of the step type, with none, and with length alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerroute.evaluation.seeds import over_seeds, paired_tests
from layerroute.evaluation.summary import summarize

BLOCKS = 30
ROUTABLE = list(range(2, 29))
ORDER = [9, 12, 7, 14, 21, 16, 5, 23, 11, 18, 25, 20, 3, 27, 8, 13, 22, 10, 17, 6, 24, 15, 26, 4, 19, 28, 2]
MIXED = ["tool_call", "planning", "tool_call", "planning", "answer"]
STATICS = ("static_influence", "static_greedy", "random", "oracle", "labels", "length")


def bits(closed: int) -> str:
    shut = set(ORDER[:closed])
    return "".join("0" if block in shut else "1" for block in range(BLOCKS))


def draw_rows(kind: str = "planted", seed: int = 0, groups: int = 40, paired: bool = True) -> list[dict[str, Any]]:
    """Rows of samples.jsonl.

    `planted`: tool calls skip 20 points of blocks more. `none`: no difference. `length`: shorter prompts skip more,
    and tool calls have shorter ones. `reversed`: planning skips more. `static`: one route. Without `paired` no group
    holds two step types, though a source does.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(groups):
        level = rng.normal(6, 1)
        if paired:
            source, types = ("fireact", "toolbench-conversations")[number % 2], MIXED
        else:
            source, types = ("hermes", "glaive")[number // 2 % 2], (["tool_call"] * 3, ["planning"] * 3)[number % 2]
        for step_type in types:
            is_call = step_type == "tool_call"
            tokens = int(np.exp(rng.normal(5.7, 0.4)) * (0.55 if kind == "length" and is_call else 1)) + 20
            closed = level + rng.normal(0, 1.2)
            closed += {"planted": 6 * is_call, "reversed": -4 * is_call, "length": 5 * np.log2(300 / tokens)}.get(
                kind, 0
            )
            count = 6 if kind == "static" else int(np.clip(round(closed), 0, 20))
            rows.append(make_row(f"{source}-{number}", source, step_type, tokens, count, rng, len(rows)))
    return rows


def make_row(
    group: str, source: str, step_type: str, tokens: int, closed: int, rng: np.random.Generator, number: int
) -> dict[str, Any]:
    route = bits(closed)
    new = int(rng.integers(8, 70))
    base = {"prefill": 270_000_000 * tokens, "decode": 270_000_000 * new}
    loss = new * rng.uniform(0.9, 1.6)
    written = {
        "tool_call": '<tool_call>\n{"name": "search", "arguments": {"q": "tallest <b>bridge</b>"}}\n</tool_call>'
    }
    return {
        "id": f"{group}#{number}", "group": group, "source": source, "step_type": step_type,
        "prompt_tokens": tokens, "target_tokens": new, "cut": False,
        "route": route, "skip_rate": 100 * route.count("0") / BLOCKS,
        "gate_probs": [0.2 if bit == "0" else 0.8 if i in ROUTABLE else 1.0 for i, bit in enumerate(route)],
        "segments": [{"start": 0, "route": route}],
        "nll": {"base": 1.5 * loss, "lora_only": loss, "routed": (1.002 + 0.0005 * closed) * loss},
        "accuracy": {"base": 0.61, "lora_only": 0.78, "routed": 0.775},
        "starts": {"base": number % 3 == 0, "lora_only": number % 4 > 0, "routed": number % 4 > 0},
        "flops": {
            "base": base,
            "lora_only": {part: int(1.01 * cost) for part, cost in base.items()},
            "routed": {part: int((1.01 - 0.9 * closed / BLOCKS) * cost) for part, cost in base.items()},
        },
        "stability": {"flips": 2.5, "same_route": bool(number % 3)},
        "text": {
            "prompt_end": "Tools: search, lookup.\n<|im_start|>user\nWhich bridge is the tallest?<|im_end|>",
            "target": written.get(step_type, "First I look for a list of bridges, then I compare their heights: " * 4),
        },
    }  # fmt: skip


def draw_baselines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    harm = dict(zip(STATICS, (1.12, 1.06, 2.4, 1.001, 1.01, 1.03), strict=True))
    closed = dict(zip(STATICS, (9, 9, 9, 9, 8, 10), strict=True))
    drawn = []
    for row in rows:
        arms = {}
        for arm in STATICS:
            flops = {part: int((1.01 - 0.9 * closed[arm] / BLOCKS) * n) for part, n in row["flops"]["base"].items()}
            nll = harm[arm] * row["nll"]["lora_only"]
            arms[arm] = {
                "route": bits(closed[arm]),
                "skip_rate": 0.0,
                "nll": nll,
                "accuracy": 0.8 / harm[arm],
                "flops": flops,
            }
        drawn.append({"id": row["id"], "arms": arms})
    return drawn


def draw_generations(rows: list[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    right = {"base": 0.5, "lora_only": 0.85, "routed": 0.84, "static": 0.55}
    tasks = {"tool_call": "tool_call", "planning": "gsm8k"}
    drawn = []
    for row in rows:
        task, luck = tasks.get(row["step_type"]), rng.uniform()
        for arm, share in right.items() if task else ():
            called = bool(luck < share + 0.1) if task == "tool_call" else None
            drawn.append({
                "id": row["id"], "group": row["group"], "source": row["source"], "task": task, "arm": arm, "text": "",
                "new_tokens": 20, "finished": bool(rng.uniform() < 0.97), "correct": bool(luck < share),
                "valid_json": called, "schema_valid": called, "error": None,
                "last_number": None if task == "tool_call" else bool(luck < share + 0.1),
                "skip_rate": row["skip_rate"] if arm in ("routed", "static") else 0.0,
                "flops": {"prefill": 1, "decode": 1},
            })  # fmt: skip
    return drawn


PROVENANCE: dict[str, Any] = {
    "adapter": {"name": "smollm2-135m", "files": {"router_model.safetensors": "5e" * 32}},
    "backbone": {
        "name": "smollm2-135m", "fingerprint": "9f" * 32, "model_type": "llama", "blocks": BLOCKS,
        "parameters": 134_515_008,
    },
    "data": {"fireact.jsonl.gz": "ab" * 32, "toolbench-conversations.jsonl.gz": "cd" * 32},
    "calibration_data": None,
    "versions": {"layerroute": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
    "machine": {"cpu": "Some processor at 2.4 GHz", "threads": 2, "device": "cpu", "dtype": "float32"},
    "seed": 0,
    "settings": {"limit": 200, "max_length": 1024, "max_new_tokens": 256, "batch_size": 8},
    "command": "layerroute evaluate --adapter smollm2-135m --data fireact.jsonl.gz --output evaluation",
    "routers": {
        "routable": ROUTABLE, "threshold": 0.5, "bias_route": "1" * BLOCKS,
        "initial_probs": [0.88 if i in ROUTABLE else 1.0 for i in range(BLOCKS)],
    },
    "training": {"data": {"train.jsonl.gz": "ef" * 32}, "overlap": [], "recipe": {"router": {"window": 32}}},
    "rows": {"read": 200, "measured": 200, "dropped": 0, "duplicate_ids": 0},
}  # fmt: skip


def make_provenance(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(PROVENANCE)), **changes}


def summary_of(kind: str = "planted", seed: int = 0, **options: Any) -> dict[str, Any]:
    return summarize(draw_rows(kind, seed, **options), make_provenance(), seed=seed)


def write_evaluation(
    folder: Path, kind: str = "planted", seed: int = 0, full: bool = True, provenance: Any = None, **options: Any
) -> Path:
    """A folder as `layerroute evaluate` leaves it; `full` with baselines and generations."""
    rows = draw_rows(kind, seed, **options)
    extra = {"baselines": draw_baselines(rows), "generations": draw_generations(rows, seed)} if full else {}
    summary = summarize(rows, provenance or make_provenance(), seed=seed, **extra)
    folder.mkdir(parents=True)
    for name, part in {"samples": rows, **extra}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


METRICS = {"differential": 19.0, "paired_differential": 20.0, "perplexity_all": 3.5, "flops_share": 0.72}
METRICS |= {"skip_tool_call": 38.0, "skip_planning": 19.0, "token_accuracy_all": 0.78}


def draw_ablation(seeds: int = 5, effect: float = 20.0, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    effects = {"base": 0.0, "lora_only": 0.0, "routed": effect, "static_greedy": 0.0, "oracle": 25.0, "labels": 22.0}
    harm = {"base": 1.4, "lora_only": 0.99, "routed": 1.0, "static_greedy": 1.2, "oracle": 0.98, "labels": 1.01}
    values = {
        arm: {
            metric: (
                rng.normal(effects[arm], 3, seeds) if "differential" in metric and effects[arm]
                else np.full(seeds, 0.0) if "differential" in metric
                else middle * harm[arm] * rng.normal(1, 0.01, seeds)
            ).tolist()
            for metric, middle in METRICS.items()
        }
        for arm in effects
    }  # fmt: skip
    tests = {
        arm: {metric: paired_tests(values["routed"][metric], values[arm][metric]) for metric in METRICS}
        for arm in values
        if arm != "routed"
    }
    curve = [
        {
            "value": weight,
            **{m: over_seeds((v * (1 + 0.1 * i) * rng.normal(1, 0.02, 3)).tolist()) for m, v in METRICS.items()},
        }
        for i, weight in enumerate((0.1, 0.3, 1.0, 3.0))
    ]
    return {
        "format_version": 1,
        "seeds": list(range(seeds)),
        "recipe": "default",
        "metrics": list(METRICS),
        "arms": {arm: {metric: over_seeds(v) for metric, v in parts.items()} for arm, parts in values.items()},
        "tests": tests,
        "sensitivity": {"router_loss_weight": curve},
        "provenance": make_provenance(),
        "warnings": [],
    }


def write_ablation(folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "ablation.json").write_text(json.dumps(draw_ablation(**options)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    return draw_rows


@pytest.fixture(scope="session")
def provenance() -> Callable[..., dict[str, Any]]:
    return make_provenance


@pytest.fixture(scope="session")
def make_summary() -> Callable[..., dict[str, Any]]:
    return summary_of


@pytest.fixture(scope="session")
def make_evaluation() -> Callable[..., Path]:
    return write_evaluation


@pytest.fixture(scope="session")
def make_ablation() -> Callable[..., Path]:
    return write_ablation


@pytest.fixture(scope="session")
def ablation_content() -> Callable[..., dict[str, Any]]:
    return draw_ablation
