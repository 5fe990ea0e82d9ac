"""A trained adapter with its data, as the training of `docs/results.md` read it."""

from __future__ import annotations

import argparse

import torch

from layerroute import RoutedModel
from layerroute.data.collate import StepCollator, padding_id
from layerroute.training.recipe import load_recipe
from layerroute.training.run import RunParts, load_parts


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    return parser


def load_trained(
    options: argparse.Namespace, *, validation_share: float, is_trainable: bool = False
) -> tuple[RoutedModel, RunParts, StepCollator]:
    """The adapter on its backbone with its data, rows of 320 tokens."""
    parts, collator = load_data(options, validation_share=validation_share, max_length=320)
    model = RoutedModel.from_pretrained(options.adapter, parts.backbone, is_trainable=is_trainable)
    return model.eval(), parts, collator


def load_data(
    options: argparse.Namespace, *, validation_share: float, max_length: int
) -> tuple[RunParts, StepCollator]:
    """The data at so many tokens a row (1,024 to fit routers), a share of the groups apart; and the bare backbone."""
    torch.manual_seed(0)
    settings = {
        "training.max_length": str(max_length),
        "training.rows_per_source": "1500",
        "training.validation_rows": "2000",
        "training.validation_share": str(validation_share),
        "training.precision": "bf16",
    }
    parts = load_parts(options.model, options.data, load_recipe("default", settings))
    return parts, StepCollator(padding_id(parts.tokenizer), loss_on="target", pool_over="prompt")
