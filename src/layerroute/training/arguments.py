"""A recipe in the words of transformers' Trainer."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import TrainingArguments

from layerroute.training.recipe import Recipe

__all__ = ["training_arguments"]

_LOG = logging.getLogger(__name__)


def training_arguments(
    recipe: Recipe, checkpoints: Path, device: torch.device, progress: bool, evaluate: bool
) -> TrainingArguments:
    """A recipe as `TrainingArguments`.

    Args:
        recipe: every setting.
        checkpoints: folder for them.
        device: the model's.
        progress: draw a progress bar.
        evaluate: whether there are rows to evaluate.
    """
    settings = recipe.training
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.updates,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        bf16=settings.precision == "bf16",
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_every or settings.updates,
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to="none",  # trackers come as one callback, `Trackers`
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=recipe.search is not None,  # a block that every row leaves out has no gradient
        disable_tqdm=not progress,
        use_cpu=not torch.cuda.is_available() and device.type == "cpu",  # a GPU, or wherever the model is
    )
    if arguments.n_gpu > 1:
        _LOG.warning("%d GPUs are visible, one is used; start with torchrun to use them all", arguments.n_gpu)
        arguments._n_gpu = 1  # DataParallel would split arguments that are not batched
    return arguments
