"""A toy task for a tiny model: the last prompt tokens tell the step type, and the type tells the target."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from layerroute import RoutedModel, get_routed_model
from layerroute.data.collate import StepDataset
from layerroute.data.render import Sample
from layerroute.data.steps import STEP_TYPES
from layerroute.training.bank import KINDS
from layerroute.training.recipe import Recipe, load_recipe
from layerroute.training.run import lora_config
from layerroute.training.trainer import RoutedTrainer

FAST = {
    "steps": "6",
    "max_length": "64",
    "window": "4",
    "protect_first": "1",
    "protect_last": "1",
    "boundaries": "[]",
    "save_every": "2",
    "log_every": "1",
    "validation_rows": "null",
    "lora_lr": "0.01",
}
GATES = {
    # far from the initial gates, so that a few updates change routes
    "router_lr": "0.05",
    "budgets.tool_call": "0.5",
}


def toy_sample(index: int, rng: random.Random) -> Sample:
    kind = STEP_TYPES[index % 3]
    marker = 5 + index % 3
    prompt = [rng.randrange(20, 97) for _ in range(rng.randrange(4, 12))] + [marker] * 3
    target = [10 + marker] * (2 + index % 4) + [2]
    return Sample(array("i", prompt + target), len(prompt), kind, "toy", str(index // 3), str(index), False)


@pytest.fixture
def toy_data() -> Callable[..., StepDataset]:
    def make(rows: int = 60, seed: int = 0) -> StepDataset:
        rng = random.Random(seed)
        return StepDataset([toy_sample(i, rng) for i in range(rows)])

    return make


@pytest.fixture
def fast_recipe() -> Callable[..., Recipe]:
    def make(name: str = "end_to_end", **overrides: object) -> Recipe:
        base = FAST | {"end_to_end": GATES, "paper": {"router_lr": "0.05"}, "default": {"fit_length": "64"}}[name]
        named = {f"budgets.{key}" if key in KINDS else key: str(value) for key, value in overrides.items()}
        return load_recipe(name, base | named)

    return make


@pytest.fixture
def make_trainer(make_backbone, toy_data, tmp_path: Path) -> Callable[..., RoutedTrainer]:
    """A trainer of a fresh tiny model on `rows` (by default the toy task); the same seed gives the same model."""

    def make(
        recipe: Recipe,
        folder: str = "checkpoints",
        evaluate: bool = False,
        rows: Callable[..., StepDataset] = toy_data,
        **kwargs: object,
    ) -> RoutedTrainer:
        model: RoutedModel = get_routed_model(make_backbone(blocks=4), recipe.router, lora_config(recipe))
        held_out = rows(15, seed=1) if evaluate else None
        return RoutedTrainer(
            model,
            recipe,
            rows(),
            held_out,
            pad_token_id=0,
            checkpoints=tmp_path / folder,
            data={"toy": "0"},
            **kwargs,
        )

    return make
