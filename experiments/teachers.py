"""Whom routed calls should learn from: nobody, the same weights at full depth, LoRA before healing, or the backbone.

Start from an adapter that was trained with all budgets at 0. The seven blocks of the shipped adapter are left out of
calls from their boundary on, and LoRA is trained on calls for some updates, each time from the same weights and on the
same rows; other calls are measured, routed and at full depth. Nats a token, mean over calls, with 95% bootstrap
intervals of the difference to training without a teacher.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from healing import batches_of_calls, difference, heal, healing_arguments, measured, set_lora
from healing_of_sets import SETS
from torch import Tensor
from trained import load_trained

from layerroute import RoutedModel
from layerroute.training.bank import Bank
from layerroute.training.search import rows_of_kind


def same_weights(model: RoutedModel, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
    with model.disable_routing():
        return model(**inputs, logits_to_keep=kept, use_cache=False).logits


def lora_at_first(model: RoutedModel, at_first: list[Tensor], inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
    now = set_lora(model, at_first)
    logits = same_weights(model, inputs, kept)
    set_lora(model, now)
    return logits


def backbone(model: RoutedModel, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
    with model.disable_adapter():
        return same_weights(model, inputs, kept)


def main() -> None:
    parser = healing_arguments("Healing with and without a teacher.", updates=30, rows=96)
    options = parser.parse_args()
    model, parts, collator = load_trained(options, validation_share=0.15, is_trainable=True)
    held = rows_of_kind(parts.validation.samples, "tool_call", options.rows, 0)
    batches = batches_of_calls(parts.train.samples, options.updates)
    at_first = [value.detach().clone() for value in model.lora_parameters()]
    blocks = len(model.structure.blocks)
    routed, whole = Bank(blocks, {"tool_call": SETS["seed 42, which ships"]}), Bank(blocks)
    teachers = {
        "nobody": None,
        "the same weights at full depth": partial(same_weights, model),
        "LoRA before healing, at full depth": partial(lora_at_first, model, at_first),
        "the backbone, LoRA off": partial(backbone, model),
    }
    print(
        f"{len(held)} calls before healing: routed {measured(model, held, collator, routed)[:, 0].mean():.3f}, "
        f"full depth {measured(model, held, collator, whole)[:, 0].mean():.3f}",
        flush=True,
    )
    alone: dict[str, np.ndarray] = {}
    for name, teacher in teachers.items():
        set_lora(model, at_first)
        heal(model, batches, collator, routed, options.learning_rate, teacher)
        after = {
            "routed": measured(model, held, collator, routed)[:, 0],
            "full depth": measured(model, held, collator, whole)[:, 0],
        }
        alone = alone or after
        print(
            f"{name}: " + ", ".join(f"{k} {v.mean():.3f} {difference(v, alone[k])}" for k, v in after.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
