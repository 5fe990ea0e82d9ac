"""Runs a grid: trains every variant with every seed, evaluates each, and writes the table.

Runs one after the other, and says through `logging` which. What is finished is not done again; what was interrupted
goes on. A run whose training fails costs its figures, not the grid, unless it is the first.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from layerroute.errors import TrainingError, TrainingInterrupted
from layerroute.evaluation.grid import SEED, Grid, cell
from layerroute.evaluation.grid_table import collect, markdown
from layerroute.evaluation.run import EvaluationSettings, evaluate
from layerroute.model.backbone import backbone_config
from layerroute.training.checkpoints import last_checkpoint
from layerroute.training.recipe import Recipe
from layerroute.training.run import train

__all__ = ["ablate"]

_LOG = logging.getLogger(__name__)


def ablate(
    grid: Grid, output: str | Path, *, device: Any = "cpu", progress: bool = False, command: str = ""
) -> dict[str, Any]:
    """Run what is left of a grid, and make the table.

    Args:
        grid: what `plan_grid` planned.
        output: the folder to write.
        device: torch's, for the evaluations; training takes a GPU where there is one.
        progress: draw progress bars on stderr.
        command: to stand in the provenance.

    Returns:
        The content of ablation.json.

    Raises:
        ConfigError: the output holds another grid, or a recipe does not fit the backbone.
        TrainingInterrupted: Ctrl-C came; the same call goes on from there.
        TrainingError: the first training cannot be done.
    """
    blocks = backbone_config(grid.model).get_text_config().num_hidden_layers
    for recipe in grid.variants.values():
        recipe.check_blocks(blocks)
    folder = grid.keep(output)
    runs = list(grid.runs())
    for number, (variant, seed, recipe) in enumerate(runs, start=1):
        what = f"variant {variant}, seed {seed} ({number} of {len(runs)})"
        target = cell(folder, variant, seed)
        try:
            _train(grid, recipe, target / "adapter", what, progress)
            _evaluate(grid, variant, target, what, device=device, progress=progress, command=command)
        except (KeyboardInterrupt, TrainingInterrupted):
            raise TrainingInterrupted(
                f"interrupted in {what}; run the same command again to go on from there"
            ) from None
        except TrainingError as error:
            if number == 1:
                raise
            _LOG.warning("%s: training failed, the table goes without it: %s", what, error)
    table = collect(folder)
    text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "ablation.json").write_text(text, encoding="utf-8")
    (folder / "ablation.md").write_text(markdown(table), encoding="utf-8")
    return table


def _train(grid: Grid, recipe: Recipe, adapter: Path, what: str, progress: bool) -> None:
    """Train one variant, from its last checkpoint if there is one, unless its adapter is there."""
    if (adapter / "router_config.json").is_file():
        return
    checkpoint = last_checkpoint(adapter / "checkpoints")
    _LOG.info("%s: training%s", what, f" goes on from {checkpoint.name}" if checkpoint else "")
    train(grid.model, list(grid.data), recipe, adapter, resume=checkpoint is not None, progress=progress)


def _evaluate(grid: Grid, variant: str, target: Path, what: str, *, device: Any, progress: bool, command: str) -> None:
    """Evaluate one variant, unless that is done; the recipe itself is also compared with baselines."""
    if (target / "evaluation" / "summary.json").is_file():
        return
    _LOG.info("%s: evaluating", what)
    compared = variant == "recipe"
    settings = EvaluationSettings(
        data=tuple(grid.eval_data),
        limit=grid.limit,
        max_length=grid.variants["recipe"].training.max_length,
        seed=SEED,
        baselines=compared,
        calibration=tuple(grid.data) if compared else (),
    )
    where = {"backbone": grid.model, "device": device}
    evaluate(str(target / "adapter"), settings, target / "evaluation", progress=progress, command=command, **where)
