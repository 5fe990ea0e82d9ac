"""What an ablation runs: variants of a recipe, each with every seed, and the file that says so.

    DIR/grid.json                       the grid; a command that plans another one is refused in this folder
    DIR/VARIANT/seed-N/adapter/         a training run
    DIR/VARIANT/seed-N/evaluation/      its evaluation

Contract: every recipe was checked when a `Grid` exists. Boundary: plans and records; trains nothing, imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layerroute.data.load import open_steps
from layerroute.errors import ConfigError
from layerroute.training.recipe import Recipe, load_recipe, recipe_keys

__all__ = ["GRID_FILE", "SEED", "Grid", "cell", "plan_grid"]

GRID_FILE = "grid.json"
FORMAT_VERSION = 1

SEED = 0
"""Of every evaluation, so that all measure the same rows."""

_OPEN = {
    # gates start open and have neither a gradient that matters nor noise nor a penalty: nothing ever closes one
    "gates": {
        "router.closed_blocks": "[]",
        "router.threshold": "0.5",
        "gates.gate_signal": "straight_through",
        "gates.cost_rows": "null",
        "gates.router_loss_weight": "0",
        "gates.logit_noise": "0",
        "optimizer.router_lr": "0",
    },
    "search": {"objective.accepted": "null"}
    | {f"objective.budgets.{kind}": "0" for kind in ("direct_call", "tool_call", "planning", "answer")},
}
"""Changes that leave LoRA alone at work, by how routes are learned."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every variant with every seed, on the same data."""

    model: str
    recipe: str
    """As the user named it."""
    data: dict[str, str]
    """What is trained on: spec to SHA-256."""
    eval_data: dict[str, str]
    """What is measured: spec to SHA-256."""
    limit: int | None
    """Steps per source at most, in an evaluation."""
    seeds: list[int]
    variants: dict[str, Recipe]
    """By the name of their folder, with the first seed."""
    sensitivity: dict[str, list[dict[str, Any]]]
    """Per recipe key, by its path: `{"value", "variant"}`, the recipe's own value among them."""

    def runs(self) -> Iterator[tuple[str, int, Recipe]]:
        """Variant, seed and recipe of every run: all variants of a seed before the next seed."""
        for seed in self.seeds:
            for name, recipe in self.variants.items():
                training = recipe.training.model_copy(update={"seed": seed})
                yield name, seed, recipe.model_copy(update={"training": training})

    def as_row(self) -> dict[str, Any]:
        """JSON-able."""
        variants = {name: recipe.model_dump(mode="json") for name, recipe in self.variants.items()}
        return {"format_version": FORMAT_VERSION, **vars(self), "variants": variants}

    def keep(self, output: str | Path) -> Path:
        """Make the folder and write grid.json, or make sure that the one that is there says the same.

        Raises:
            ConfigError: the folder holds another grid (the first difference is named), or cannot be written.
        """
        path, now = Path(output) / GRID_FILE, json.loads(json.dumps(self.as_row()))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(json.dumps(now, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--output {output}: cannot be used: {error}") from None
        for name, old, new in _differences(before, now, ""):
            raise ConfigError(
                f"--output {output} holds another grid: {name} is {old!r} there, not {new!r}; give the command that it "
                "was started with, or another --output"
            )
        return path.parent


def cell(folder: Path, variant: str, seed: int) -> Path:
    """The folder of one run."""
    return folder / variant / f"seed-{seed}"


def plan_grid(
    model: str,
    recipe: str,
    data: Sequence[str],
    eval_data: Sequence[str],
    *,
    seeds: int,
    limit: int | None = None,
    changes: Mapping[str, str] | None = None,
    sensitivity: Mapping[str, str] | None = None,
) -> Grid:
    """Plan the variants of a recipe, and look the data over.

    Args:
        model: the backbone, anything `load_backbone` takes.
        recipe: a packaged name or a file.
        data: what is trained on, anything `open_steps` takes.
        eval_data: what is measured.
        seeds: how many, counted up from the recipe's.
        limit: steps per source at most, in an evaluation.
        changes: of the recipe, for every variant; as `load_recipe` takes them.
        sensitivity: values by recipe key, as YAML text with commas between them; each is a variant of its own.

    Raises:
        ConfigError: an unknown recipe key, a value that its field does not allow, no seed.
        DataError: data that cannot be used.
    """
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}: at least one is needed; intervals need 2, tests 3")
    changes = dict(changes or {})
    own = load_recipe(recipe, changes)
    variants = {"recipe": own}
    variants["lora_only"] = load_recipe(recipe, changes | _OPEN["gates" if own.gates else "search"])
    variants["routers_only"] = load_recipe(recipe, changes | {"optimizer.lora_lr": "0"})
    points = {}
    for key, texts in (sensitivity or {}).items():
        path, values = _leaf(key), _values(key, texts)
        tried = {_name(path, value): load_recipe(recipe, changes | {path: json.dumps(value)}) for value in values}
        if len(tried) < len(values):
            raise ConfigError(f"--sensitivity {key}={texts}: a value is given twice")
        named = {name: made for name, made in tried.items() if made != own}
        variants |= named
        points[path] = _points(path, {"recipe": own, **named})
    return Grid(
        model=model,
        recipe=recipe,
        data=open_steps(data, own.training.seed, own.training.rows_per_source).digests,
        eval_data=open_steps(eval_data, SEED, limit).digests,
        limit=limit,
        seeds=list(range(own.training.seed, own.training.seed + seeds)),
        variants=variants,
        sensitivity=points,
    )


def _leaf(key: str) -> str:
    """The path of a recipe key that stands for one value.

    Raises:
        ConfigError: there is no such key, it is ambiguous, it is a section, or it is the seed.
    """
    paths = list(recipe_keys())
    if any(f".{key}." in f".{path}" for path in paths):
        raise ConfigError(f"--sensitivity {key}: that is a section; give one of its keys")
    found = [path for path in paths if path == key or path.endswith(f".{key}")]
    if len(found) != 1:
        load_recipe("default", {key: "null"})  # unknown or ambiguous: says so
    if found[0] == "training.seed":
        raise ConfigError(f"--sensitivity {key}: every variant runs with every seed; give --seeds")
    return found[0]


def _values(key: str, texts: str) -> list[Any]:
    try:
        values = yaml.safe_load(f"[{texts}]")
    except yaml.YAMLError:
        values = None
    if not values:
        raise ConfigError(f"--sensitivity {key}={texts}: expected values with commas between them, such as 100,300")
    assert isinstance(values, list)
    return values


def _name(path: str, value: Any) -> str:
    """A folder's name for a variant."""
    return re.sub(r"[^\w.=+-]+", "_", f"{path}={value if isinstance(value, str) else json.dumps(value)}")


def _points(path: str, variants: Mapping[str, Recipe]) -> list[dict[str, Any]]:
    """What each variant has at `path`, in order where all are numbers."""
    points = [{"value": _value(recipe, path), "variant": name} for name, recipe in variants.items()]
    numbers = all(isinstance(point["value"], (int, float)) for point in points)
    return sorted(points, key=lambda point: point["value"]) if numbers else points


def _value(recipe: Recipe, path: str) -> Any:
    node: Any = recipe.model_dump(mode="json")
    for part in path.split("."):
        node = node[part] if node is not None else None  # budgets: null
    return node


def _differences(before: Any, now: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of what differs, at the depth at which it does."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
    elif before != now:
        yield prefix, before, now
