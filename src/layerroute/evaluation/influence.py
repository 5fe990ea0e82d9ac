"""Block influence: how much each block changes its input, ShortGPT's measure of what can be left out.

Contract: LoRA is on, nothing is trained. Boundary: knows batches and models, not rates or rows; `baselines.py` decides
how many blocks go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.evaluation.measure import batches
from layerroute.model.routed import RoutedModel

__all__ = ["block_influence"]


@torch.no_grad()
def block_influence(model: RoutedModel, samples: Sequence[Sample], collator: StepCollator) -> Tensor:
    """Measure what each block does to its input at full depth: ShortGPT's block influence (arXiv:2403.03853).

    `1 - mean over tokens of cos(x, y)`, x entering the block and y leaving it; every token of prompt and target counts.

    Args:
        model: in evaluation mode, LoRA on.
        samples: any number.
        collator: makes batches of them.

    Returns:
        float64 `[blocks]`, on the CPU.
    """
    cosines = _Cosines(model.routers.blocks)
    for group in batches(samples):
        batch = {name: tensor.to(model.device) for name, tensor in collator(group).items()}
        cosines.mask = batch["attention_mask"].bool()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        model.structure.decoder(**inputs, use_cache=False, routing=cosines)
    return 1 - cosines.total / cosines.tokens


class _Cosines:
    """A pass at full depth that adds up the cosine of what enters and what leaves each block, over attended tokens."""

    def __init__(self, blocks: int) -> None:
        self.total = torch.zeros(blocks, dtype=torch.float64)
        self.tokens = torch.zeros(blocks, dtype=torch.float64)
        self.mask = torch.empty(0)

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        output: Tensor = block(hidden, **kwargs)
        cosine = functional.cosine_similarity(hidden.float(), output.float(), dim=-1)[self.mask]
        self.total[index] += cosine.double().sum().cpu()
        self.tokens[index] += len(cosine)
        return output
