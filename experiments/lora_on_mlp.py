"""Does LoRA on the MLPs too heal calls of missing blocks better than LoRA on the attention alone?

Start from an adapter that was trained with all budgets at 0. The seven blocks of the shipped adapter are left out of
calls from their boundary on, and LoRA is trained on calls for some updates, each time from the same weights and on the
same rows. Other calls, up to 768 tokens long, are measured: nats a token, the share of tokens that the model puts
first, and calls of which it puts every token first, which are those that it would write as the data has them.
"""

from __future__ import annotations

import numpy as np
import torch
from healing import batches_of_calls, heal, healing_arguments, measured, said, set_lora
from healing_of_sets import SETS
from peft import LoraConfig
from safetensors.torch import load_file
from trained import load_data

from layerroute import RoutedModel, get_routed_model
from layerroute.training.bank import Bank
from layerroute.training.run import RunParts
from layerroute.training.search import rows_of_kind

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def with_room_for_mlp(parts: RunParts, adapter: str) -> RoutedModel:
    """The adapter's LoRA, and fresh pairs on the MLPs, which change nothing until they are trained."""
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=ATTENTION + MLP)
    model = get_routed_model(parts.backbone, parts.router, config)
    trained = {
        name.replace(".weight", ".default.weight"): value
        for name, value in load_file(f"{adapter}/adapter_model.safetensors").items()
    }
    here = dict(model.peft_model.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            here[name].copy_(value)
    return model


def main() -> None:
    parser = healing_arguments("Healing by LoRA on the attention, and on the MLPs too.", updates=40, rows=150)
    options = parser.parse_args()
    parts, collator = load_data(options, validation_share=0.15, max_length=768)
    model = with_room_for_mlp(parts, options.adapter).eval()
    held = rows_of_kind(parts.validation.samples, "tool_call", options.rows, 0)
    at_first = [value.detach().clone() for value in model.lora_parameters()]
    blocks = len(model.structure.blocks)
    banks = {"routed": Bank(blocks, {"tool_call": SETS["seed 42, which ships"]}), "full depth": Bank(blocks)}
    base: dict[str, np.ndarray] = {}
    batches = batches_of_calls(parts.train.samples, options.updates, rows=1200)
    for arm in ("attention", "attention and MLPs"):
        set_lora(model, at_first)
        for name, parameter in model.peft_model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_("MLP" in arm or not any(module in name for module in MLP))
        heal(model, batches, collator, banks["routed"], options.learning_rate)
        after = {depth: measured(model, held, collator, bank) for depth, bank in banks.items()}
        base = base or after
        print(f"{arm}: " + "; ".join(f"{depth} {said(after[depth], base[depth])}" for depth in banks), flush=True)


if __name__ == "__main__":
    main()
