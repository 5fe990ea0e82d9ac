"""Does what a set of blocks costs at once say what it costs once healed? Every set from the same LoRA and rows.

Start from an adapter that was trained with all budgets at 0. Each set is left out of calls from their boundary on, LoRA
is trained on calls for some updates, and other calls are measured before and after.
"""

from __future__ import annotations

from healing import batches_of_calls, heal, set_lora
from trained import arguments, load_trained

from layerroute.training.bank import Bank
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
    batches = batches_of_calls(parts.train.samples, options.updates)
    at_first = [value.detach().clone() for value in model.lora_parameters()]
    for name, blocks in SETS.items():
        set_lora(model, at_first)
        before = losses_without(model, served, blocks, [None]).item()
        heal(model, batches, collator, Bank(len(model.structure.blocks), {"tool_call": blocks}), options.learning_rate)
        after = losses_without(model, served, blocks, [None]).item()
        print(f"{name}, {blocks}: {before:.3f} before, {after:.3f} after", flush=True)


if __name__ == "__main__":
    main()
