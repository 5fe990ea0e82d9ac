"""Do calls heal better when the tokens that the routed model is unsure of weigh more in the loss?

Start from an adapter that was trained with all budgets at 0. The seven blocks of the shipped adapter are left out of
calls from their boundary on, and LoRA is trained on calls for some updates, each time from the same weights and on the
same rows, with every token alike and with weights. Other calls, up to 768 tokens long, are measured as in
`lora_on_mlp.py`.
"""

from __future__ import annotations

import numpy as np
from healing import batches_of_calls, heal, healing_arguments, measured, said, set_lora
from healing_of_sets import SETS
from torch import Tensor
from trained import load_data

from layerroute import RoutedModel
from layerroute.training.bank import Bank
from layerroute.training.search import rows_of_kind


def unsure(nats: Tensor) -> Tensor:
    """`0.2 + 1 - p` of a token to which the routed model gives `p`, scaled to a mean of 1."""
    weights = 1.2 - (-nats).exp()
    return weights / weights.mean()


def main() -> None:
    parser = healing_arguments("Healing with the same and with other weights of the tokens.", updates=40, rows=150)
    options = parser.parse_args()
    parts, collator = load_data(options, validation_share=0.15, max_length=768)
    model = RoutedModel.from_pretrained(options.adapter, parts.backbone, is_trainable=True).eval()
    held = rows_of_kind(parts.validation.samples, "tool_call", options.rows, 0)
    batches = batches_of_calls(parts.train.samples, options.updates, rows=1200)
    at_first = [value.detach().clone() for value in model.lora_parameters()]
    blocks = len(model.structure.blocks)
    banks = {"routed": Bank(blocks, {"tool_call": SETS["seed 42, which ships"]}), "full depth": Bank(blocks)}
    weighings = {"all alike": None, "those unsure": unsure}
    alike: dict[str, np.ndarray] = {}
    for name, weigh in weighings.items():
        set_lora(model, at_first)
        heal(model, batches, collator, banks["routed"], options.learning_rate, weigh=weigh)
        after = {depth: measured(model, held, collator, bank) for depth, bank in banks.items()}
        alike = alike or after
        for depth in banks:
            print(f"{name}, {depth}: {said(after[depth], alike[depth])}", flush=True)


if __name__ == "__main__":
    main()
