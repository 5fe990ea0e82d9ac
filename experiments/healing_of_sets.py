"""Does what a set of blocks costs at once say what it costs once healed? Every set from the same LoRA and rows.

Start from an adapter that was trained with all budgets at 0. Each set is left out of calls from their boundary on, LoRA
is trained on calls for some updates, and other calls are measured before and after.
"""

from __future__ import annotations

import random

import torch
from trained import arguments, load_trained

from layerroute.training import objective
from layerroute.training.bank import Bank, decision_kinds
from layerroute.training.loss import MODEL_INPUTS
from layerroute.training.removal import losses_without
from layerroute.training.search import _as_served, rows_of_kind

SETS = {
    "seed 42, which ships": [3, 5, 6, 7, 12, 14, 25],
    "seed 43": [3, 4, 5, 6, 7, 12, 13],
    "seed 43, 48 rows, late": [4, 5, 10, 12, 13, 14, 25],
    "seed 44, 48 rows": [3, 7, 12, 13, 14, 17, 25],
    "48 rows, on the trained LoRA": [3, 7, 10, 12, 13, 14, 25],
    "seed 44": [4, 5, 6, 13, 14, 16, 22],
    "the lowest": [2, 3, 4, 5, 6, 7, 8],
}


def main() -> None:
    parser = arguments("Sets of blocks before and after healing.")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=0.001)
    options = parser.parse_args()
    model, parts, collator = load_trained(options, validation_share=0.15, is_trainable=True)
    held = rows_of_kind(parts.validation.samples, "tool_call", 96, 0)
    served = list(_as_served(model, held, collator, "tool_call", ("tool_call",)))
    calls = [s for s in rows_of_kind(parts.train.samples, "tool_call", 600, 7) if len(s.input_ids) <= 256]
    if len(calls) < 6:
        raise SystemExit("--data: fewer than six calls of at most 256 tokens")
    rng, batches = random.Random(0), []
    while len(batches) < options.updates:
        rng.shuffle(calls)
        batches += [calls[start : start + 6] for start in range(0, len(calls) - 5, 6)]
    lora = list(model.lora_parameters())
    at_first = [value.detach().clone() for value in lora]
    for name, blocks in SETS.items():
        with torch.no_grad():
            for value, first in zip(lora, at_first, strict=True):
                value.copy_(first)
        before = losses_without(model.eval(), served, blocks, [None]).item()
        bank = Bank(len(model.structure.blocks), {"tool_call": blocks})
        optimizer = torch.optim.AdamW(lora, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0)
        model.train()
        for update, rows in enumerate(batches[: options.updates]):
            batch = collator(rows)
            kept, targets = objective.loss_tokens(batch["labels"])
            routes = bank.turn_routes(decision_kinds(batch["segment_types"]))
            logits = model(**{key: batch[key] for key in MODEL_INPUTS}, routes=routes, logits_to_keep=kept).logits
            counted = targets != -100
            (objective.cross_entropy_sum(logits[counted], targets[counted]) / counted.sum()).backward()
            torch.nn.utils.clip_grad_norm_(lora, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * min(1, (update + 1) / 5) * (1 - update / options.updates)
            optimizer.step()
            optimizer.zero_grad()
        after = losses_without(model.eval(), served, blocks, [None]).item()
        print(f"{name}, {blocks}: {before:.3f} before, {after:.3f} after", flush=True)


if __name__ == "__main__":
    main()
