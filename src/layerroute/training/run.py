"""One training run from names to an adapter folder: backbone, data, split, training, saving, resuming.

Everything that can be refused is refused before the backbone is loaded. Says what it does through `logging`.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from layerroute.config import RouterConfig
from layerroute.data.boundaries import boundary_tokens
from layerroute.data.collate import StepDataset, padding_id
from layerroute.data.load import Loaded, load_steps
from layerroute.data.render import Sample
from layerroute.data.steps import STEP_TYPES, split_by_group
from layerroute.errors import ConfigError, TrainingError, TrainingInterrupted
from layerroute.model.attach import get_routed_model
from layerroute.model.backbone import load_backbone
from layerroute.training.callbacks import LogFile, StopOnSignal
from layerroute.training.checkpoints import RunFolder, last_checkpoint
from layerroute.training.processes import check_launch, is_first_process, part_at_exit, process_count, process_lost
from layerroute.training.recipe import Recipe
from layerroute.training.trackers import Trackers
from layerroute.training.trainer import RoutedTrainer

__all__ = ["RunParts", "TrainResult", "load_parts", "lora_config", "train"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did."""

    output: Path
    updates: int
    rows: dict[str, dict[str, int]]
    """`train` and `validation`: rows by step type."""
    cut: int
    """Rows whose messages were cut from the left to fit."""
    dropped: int
    """Rows left out because target and tools alone do not fit."""
    final: dict[str, float]
    """The last line of the training log, and the last evaluation (`eval_...`)."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "output": str(self.output)}

    def summary(self) -> str:
        """A few lines to print."""
        lines = [f"{name} rows: {_counts(rows)}" for name, rows in self.rows.items()]
        lines[0] += f"; {self.cut} cut to fit, {self.dropped} dropped"
        shown = ("cross_entropy", "penalty", "eval_loss", "eval_full_loss")
        kinds = ("", "eval_", "eval_first_segment_")
        skips = [f"{kind}skip_rate_{name}" for kind in kinds for name in STEP_TYPES]
        lines += [f"{name}: {self.final[name]:.4f}" for name in (*shown, *skips) if name in self.final]
        return "\n".join([*lines, f"adapter: {self.output} ({self.updates} updates, {self.seconds:.0f} s)"])


@dataclass(frozen=True)
class RunParts:
    """What a run starts from."""

    backbone: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    router: RouterConfig
    """The recipe's, its boundaries as token ids."""
    train: StepDataset
    validation: StepDataset | None
    fit: StepDataset
    """The steps of `train` at the length that routers are fitted to."""
    loaded: Loaded

    @property
    def rows(self) -> dict[str, dict[str, int]]:
        """`train` and `validation`: rows by step type."""
        parts = {"train": self.train.samples, "validation": self.validation.samples if self.validation else []}
        return {name: dict(Counter(sample.step_type for sample in samples)) for name, samples in parts.items()}

    def record(self) -> dict[str, Any]:
        """What an adapter says of its data and of the processes that read it, JSON-able."""
        return {
            "processes": process_count(),
            "sources": self.loaded.digests,
            "rows": self.rows,
            "cut": self.train.cut,
            "dropped": self.train.dropped,
            "skipped": self.loaded.skipped,
        }


def load_parts(model_name: str, data_specs: Sequence[str], recipe: Recipe) -> RunParts:
    """Load data and backbone, tokenise, and split; arguments and errors are those of `train`."""
    settings = recipe.training
    loaded = load_steps(data_specs, seed=settings.seed, limit_per_source=settings.rows_per_source)
    backbone, tokenizer = load_backbone(model_name, dtype=_DTYPES[settings.precision])
    _check_backbone(recipe, backbone)
    boundaries = _boundaries(tokenizer, recipe)
    train_set, validation_set, fit_set = _datasets(tokenizer, loaded, recipe, boundaries)
    router = recipe.router.model_copy(update={"boundaries": boundaries})
    return RunParts(backbone, tokenizer, router, train_set, validation_set, fit_set, loaded)


def train(
    model_name: str,
    data_specs: Sequence[str],
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = False,
) -> TrainResult:
    """Train an adapter.

    Args:
        model_name: anything `load_backbone` takes.
        data_specs: anything `load_steps` takes.
        recipe: every setting.
        output: the adapter folder to be; checkpoints and log lie in it too (see `checkpoints.py`).
        resume: continue an interrupted run from its last checkpoint, to the weights it would have reached.
        progress: draw a progress bar on stderr; otherwise log a line from time to time.

    Raises:
        TrainingError: the output folder is taken, there is nothing to resume or to train on, the resumed run is
            another one, the loss is not finite, or another process of the run has ended.
        TrainingInterrupted: Ctrl-C or SIGTERM came; a checkpoint was written.
        ConfigError: a setting that this backbone cannot serve.
        DataError, BackboneError: data or backbone cannot be loaded.
    """
    started = time.monotonic()
    folder = RunFolder(output)
    checkpoint = folder.check(resume)
    settings = recipe.training
    check_launch()
    part_at_exit()
    trackers = Trackers(settings.report_to)
    parts = load_parts(model_name, data_specs, recipe)
    if is_first_process():  # it alone keeps the folder
        description = {
            "recipe": recipe.model_dump(mode="json"),
            "data": parts.loaded.digests,
            "model": str(model_name),
            "processes": process_count(),  # an update is of as many micro-batches
        }
        folder.open(description, checkpoint)
    _tell(parts)

    set_seed(settings.seed)
    model = get_routed_model(parts.backbone, parts.router, lora_config(recipe))
    stopper = StopOnSignal()
    trainer = RoutedTrainer(
        model,
        recipe,
        parts.train,
        parts.validation,
        pad_token_id=padding_id(parts.tokenizer),
        checkpoints=folder.checkpoints,
        data=parts.record(),
        fit_dataset=parts.fit,
        progress=progress,
        callbacks=[stopper, LogFile(folder.log), trackers],
    )
    _train(trainer, stopper, checkpoint)
    if trainer.is_world_process_zero():
        left_out = {"left_out": trainer.left_out} if trainer.left_out is not None else {}
        model.eval().save_pretrained(folder.path, recipe=recipe.model_dump(mode="json"), data=parts.record() | left_out)
    return TrainResult(
        output=folder.path,
        updates=settings.updates,
        rows=parts.rows,
        cut=parts.train.cut,
        dropped=parts.train.dropped,
        final=_final(trainer.state.log_history),
        seconds=time.monotonic() - started,
    )


def _tell(parts: RunParts) -> None:
    """Say what there is to train on, and what of it is missing."""
    for spec, count in parts.loaded.skipped.items():
        _LOG.warning("data %s: %d rows could not be converted and are left out", spec, count)
    for name in [name for name in STEP_TYPES if name not in parts.rows["train"]]:
        _LOG.warning("the data holds no %s to train on: the run goes without its budget", name)
    for part, counts in parts.rows.items():
        _LOG.info("%s rows: %s", part, _counts(counts))


def _train(trainer: RoutedTrainer, stopper: StopOnSignal, checkpoint: Path | None) -> None:
    """Run the loop; a signal, a lost process or a failed write ends it with what there is to go on from."""
    updates = trainer.recipe.training.updates
    with stopper:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (OSError, RuntimeError) as error:
            good = last_checkpoint(trainer.checkpoints) or "none yet"
            if process_lost(error):
                raise TrainingError(
                    f"training stopped after update {trainer.state.global_step} of {updates}, because another process "
                    f"of this run has ended; last good checkpoint: {good}; run the same command with --resume to "
                    "continue"
                ) from error
            # torch reports a failed write as a RuntimeError of this name
            if not isinstance(error, OSError) and "PytorchStreamWriter" not in str(error):
                raise
            raise TrainingError(
                f"training stopped, a file could not be written: {error}; last good checkpoint: {good}; make room and "
                "run the same command with --resume"
            ) from error
    if stopper.requested and trainer.state.global_step < updates:
        raise TrainingInterrupted(
            f"interrupted after update {trainer.state.global_step} of {updates}; checkpoint: "
            f"{last_checkpoint(trainer.checkpoints)}; run the same command with --resume to continue"
        )


def _check_backbone(recipe: Recipe, backbone: PreTrainedModel) -> None:
    config = backbone.config.get_text_config()
    recipe.check_blocks(config.num_hidden_layers)
    lengths = {"training.max_length": recipe.training.max_length}
    if recipe.search and recipe.search.fit_length:
        lengths["search.fit_length"] = recipe.search.fit_length
    for name, length in lengths.items():
        if length > config.max_position_embeddings:
            raise ConfigError(f"{name}={length}: this backbone reads at most {config.max_position_embeddings} tokens")


def lora_config(recipe: Recipe) -> LoraConfig:
    """The recipe's LoRA; which projections it sits on is the backbone's matter (`get_routed_model`)."""
    return LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, lora_dropout=recipe.lora.dropout)


def _boundaries(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[tuple[int, ...], ...]:
    """The recipe's boundaries as token ids."""
    markers = recipe.router.boundaries
    boundaries = boundary_tokens(tokenizer, markers)
    if markers and not boundaries:
        _LOG.warning(
            "router.boundaries=%s: the chat template writes none of the known markers, so a turn has one route; give "
            "the text that opens its calls",
            list(markers),
        )
    return boundaries


def _datasets(
    tokenizer: PreTrainedTokenizerBase, loaded: Loaded, recipe: Recipe, boundaries: Sequence[Sequence[int]]
) -> tuple[StepDataset, StepDataset | None, StepDataset]:
    """Tokenise, and split by group: training, validation, and what routers are fitted to (see `RunParts`).

    The training part carries the counts of cut and dropped rows of training and validation.
    """
    settings = recipe.training
    everything = StepDataset.from_steps(tokenizer, loaded.steps, settings.max_length, boundaries)
    kept_in, held = split_by_group(loaded.steps, settings.validation_share, settings.seed)
    groups = {step.group for step in held}
    train_set = StepDataset([s for s in everything.samples if s.group not in groups], everything.dropped)
    train_set.cut = everything.cut
    if not len(train_set):
        raise TrainingError(
            f"no row is left to train on: of {len(loaded.steps)} rows, {everything.dropped} do not fit into "
            f"training.max_length={settings.max_length} and {len(everything)} are validation "
            f"(training.validation_share={settings.validation_share})"
        )
    kept = _spread([s for s in everything.samples if s.group in groups], settings.validation_rows, settings.seed)
    length = recipe.search and recipe.search.fit_length
    fit_set = StepDataset.from_steps(tokenizer, kept_in, length, boundaries) if length else train_set
    return train_set, StepDataset(kept) if kept else None, fit_set


def _spread(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """At most `limit` samples, step types in equal parts as far as they go, sorted by length to pad less."""
    if limit is not None:
        random.Random(seed).shuffle(samples)
        turn: Counter[str] = Counter()
        ranked = []
        for sample in samples:
            ranked.append((turn[sample.step_type], sample))
            turn[sample.step_type] += 1
        samples = [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])[:limit]]
    return sorted(samples, key=lambda sample: len(sample.input_ids))


def _counts(rows: dict[str, int]) -> str:
    return ", ".join(f"{rows[name]} {name}" for name in STEP_TYPES if name in rows) or "none"


def _final(history: list[dict[str, float]]) -> dict[str, float]:
    """The last training line and the last evaluation of a log, in one mapping."""
    final: dict[str, float] = {}
    for event in history:
        if "loss" in event or "eval_loss" in event:
            final.update(event)
    final.pop("epoch", None)
    return final
