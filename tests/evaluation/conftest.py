"""Synthetic rows of an evaluation, with an effect of the step type, with none, and with one of length alone."""

import numpy as np
import pytest

BLOCKS = 20
ROUTABLE = list(range(2, 19))
KINDS = {"talk": ["tool_call", "planning", "tool_call", "planning", "answer"], "calls": ["tool_call"] * 2}
KINDS["plans"] = ["planning"] * 2


def synthetic_samples(effect: float = 15.0, kind: str = "planted", seed: int = 0, groups: int = 60) -> list[dict]:
    """Rows of samples.jsonl: `groups` conversations that hold every step type, and as many that hold one.

    `effect` is in points of routable blocks: of a tool call over planning (`planted`), or of a prompt half as long
    (`length`, where tool calls have shorter prompts). Conversations differ among themselves in every kind.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(2 * groups):
        source = "talk" if number < groups else ("calls", "plans")[number % 2]
        level = rng.normal(40, 8)
        for step_type in KINDS[source]:
            is_call = step_type == "tool_call"
            tokens = int(np.exp(rng.normal(np.log(300), 0.5)) * (0.6 if kind == "length" and is_call else 1)) + 20
            points = level + {"planted": effect * is_call, "none": 0, "length": effect * np.log2(300 / tokens)}[kind]
            rows.append(make_row(f"{source}-{number}", source, step_type, tokens, points / 100, rng, len(rows)))
    return rows


def make_row(group, source, step_type, tokens, closing, rng, number) -> dict:
    closed = np.zeros(BLOCKS, dtype=bool)
    closed[ROUTABLE[: rng.binomial(len(ROUTABLE), np.clip(closing, 0, 1))]] = True  # always in the same order
    route = "".join("0" if shut else "1" for shut in closed)
    probs = np.where(closed, rng.uniform(0, 0.5, BLOCKS), rng.uniform(0.5, 1, BLOCKS))
    probs[[i for i in range(BLOCKS) if i not in ROUTABLE]] = 1
    new = int(rng.integers(5, 60))
    loss = new * rng.uniform(1.0, 2.0)
    flops = {"prefill": 1000 * tokens, "decode": 1000 * new}
    return {
        "id": f"{group}#{number}", "group": group, "source": source, "step_type": step_type,
        "prompt_tokens": tokens, "target_tokens": new, "cut": False,
        "route": route, "skip_rate": 100 * closed.mean(), "gate_probs": probs.tolist(),
        "segments": [{"start": 0, "route": route}],
        "nll": {"base": 1.5 * loss, "lora_only": loss, "routed": 1.1 * loss},
        "accuracy": {"base": 0.5, "lora_only": 0.75, "routed": 0.7},
        "starts": {"base": False, "lora_only": True, "routed": bool(number % 2)},
        "flops": {
            "base": flops, "lora_only": {part: 1.01 * cost for part, cost in flops.items()},
            "routed": {part: (1 - closed.mean()) * cost for part, cost in flops.items()},
        },
        "stability": {"flips": 10.0, "same_route": bool(number % 2)},
        "text": {"prompt_end": "...", "target": "..."},
    }  # fmt: skip


@pytest.fixture
def make_samples():
    return synthetic_samples


@pytest.fixture
def provenance() -> dict:
    """What the statistics read of provenance.json."""
    return {
        "routers": {
            "routable": ROUTABLE,
            "threshold": 0.5,
            "bias_route": "1" * BLOCKS,
            "initial_probs": [0.9 if i in ROUTABLE else 1.0 for i in range(BLOCKS)],
        },
        "data": {},
        "training": {"data": {}, "overlap": [], "recipe": {}},
        "rows": {"read": 0, "measured": 0, "dropped": 0, "duplicate_ids": 0},
        "seed": 0,
    }


def draw_clustered(seed, groups=30, size=6, effect=0.0, strata=1):
    """`(values, first, group, stratum)`: half of each group is `first`; groups differ as much as rows do."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), size)
    first = np.tile(np.arange(size) % 2 == 0, groups)
    values = rng.normal(size=groups)[group] + rng.normal(size=groups * size) + effect * first
    return values, first, group, group % strata


def match_by_hand(values, first, bins):
    weighted, weights = 0.0, 0
    for b in set(bins.tolist()):
        ones, others = values[(bins == b) & first], values[(bins == b) & ~first]
        if weight := min(len(ones), len(others)):
            weighted, weights = weighted + weight * (ones.mean() - others.mean()), weights + weight
    return weighted / weights


@pytest.fixture(name="clustered")
def clustered_fixture():
    return draw_clustered


@pytest.fixture(name="matched_by_hand")
def matched_by_hand_fixture():
    return match_by_hand
