"""Weighted means that are read out now and then, over all processes.

Sums stay on the device until they are read, so that counting does not wait for the accelerator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Means"]


class Means:
    """Named means; every process must add the same names between two reads."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, weight: Tensor) -> None:
        """Add a sum and its weight, both scalars; a weight of 0 adds nothing but the name."""
        pair = torch.stack([total.detach().float(), weight.detach().float()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means of the names that got any weight, and forget everything.

        Args:
            reduce: adds a tensor up over all processes.
        """
        if not self._sums:
            return {}
        sums = reduce(torch.stack(list(self._sums.values()))).tolist()
        means = {name: total / weight for name, (total, weight) in zip(self._sums, sums, strict=True) if weight}
        self._sums = {}
        return means
