"""What to leave out: blocks, attention alone, MLPs alone, or halves freely; from a call's boundary on, unhealed.

Each unit's cost alone is measured on a few calls, and the cheapest by loss per FLOP are taken up to so many blocks'
worth; the loss is then that of other calls.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from trained import arguments, load_trained

from layerroute import RoutedModel
from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.training import objective
from layerroute.training.loss import MODEL_INPUTS
from layerroute.training.search import rows_of_kind

Half = tuple[int, str]
"""A block's number, and `attention` or `mlp`."""
HALVES = ("attention", "mlp")


class Halves:
    """A model of which halves of blocks add nothing, from each row's boundary on."""

    def __init__(self, model: RoutedModel) -> None:
        self.model = model
        self.out: Collection[Half] = ()
        self.before: Tensor | None = None
        for number, block in enumerate(model.structure.blocks):
            for name, module in zip(HALVES, (block.self_attn, block.mlp), strict=True):
                module.register_forward_hook(lambda _, args, result, half=(number, name): self._mask(half, result))

    def _mask(self, half: Half, result: Any) -> Any:
        if half not in self.out:
            return result
        return (result[0] * self.before, *result[1:]) if isinstance(result, tuple) else result * self.before

    @torch.no_grad()
    def loss(self, out: Collection[Half], batches: Sequence[dict[str, Tensor]]) -> float:
        """Nats a target token."""
        self.out = out
        total, tokens = 0.0, 0
        everything = torch.ones(len(self.model.structure.blocks), dtype=torch.bool)
        for batch in batches:
            self.before = (batch["segment_ids"] == 0).unsqueeze(-1).to(self.model.backbone.dtype)
            kept, targets = objective.loss_tokens(batch["labels"])
            inputs = {name: batch[name] for name in MODEL_INPUTS}
            logits = self.model(**inputs, routes=everything, logits_to_keep=kept).logits
            counted = targets != -100
            total += objective.cross_entropy_sum(logits[counted], targets[counted]).item()
            tokens += int(counted.sum())
        return total / tokens


def batches_of(samples: Sequence[Sample], collator: StepCollator) -> list[dict[str, Tensor]]:
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    return [collator(ordered[start : start + 6]) for start in range(0, len(ordered), 6)]


def share_of_attention(model: RoutedModel) -> float:
    """Attention's share of a block's weights, and so of its FLOPs but for the attention products."""
    block = model.structure.blocks[2]
    sizes = [
        sum(value.numel() for name, value in part.named_parameters() if "lora_" not in name)
        for part in (block.self_attn, block.mlp)
    ]
    return sizes[0] / sum(sizes)


def main() -> None:
    parser = arguments("Blocks, attention or MLP as the unit of skipping.")
    parser.add_argument("--rows", type=int, default=12, help="calls on which each unit is tried")
    options = parser.parse_args()
    model, parts, collator = load_trained(options, validation_share=0.15)
    calls = rows_of_kind(parts.validation.samples, "tool_call", 400, 0)
    tried = batches_of(calls[: options.rows], collator)
    judged = batches_of(calls[options.rows : options.rows + 48], collator)
    halves, attention = Halves(model), share_of_attention(model)
    full = halves.loss((), tried)
    print(f"nothing left out: {full:.3f}, on the other calls {halves.loss((), judged):.3f}", flush=True)
    units: dict[str, list[tuple[Half, ...]]] = {
        "blocks": [tuple((block, name) for name in HALVES) for block in model.routable],
        "MLPs alone": [((block, "mlp"),) for block in model.routable],
        "attention alone": [((block, "attention"),) for block in model.routable],
    }
    units["attention and MLP, freely"] = units["MLPs alone"] + units["attention alone"]
    worth = {"attention": attention, "mlp": 1 - attention}
    alone = {unit: halves.loss(unit, tried) - full for unit in {unit for group in units.values() for unit in group}}
    for name, group in units.items():
        sizes = {unit: sum(worth[half] for _, half in unit) for unit in group}
        ranked = sorted(group, key=lambda unit: alone[unit] / sizes[unit])
        for budget in (4, 7):
            chosen: list[Half] = []
            spent = 0.0
            for unit in ranked:
                if spent + sizes[unit] <= budget + 1e-9:
                    chosen += unit
                    spent += sizes[unit]
            print(f"{name}, worth {spent:.2f} blocks: {halves.loss(chosen, judged):.3f}", flush=True)


if __name__ == "__main__":
    main()
