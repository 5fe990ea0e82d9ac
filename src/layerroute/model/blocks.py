"""The seam between a backbone and routing: its list of blocks, each of which asks the pass's routing how to run.

A decoder's forward iterates over its `layers`, or over a slice of them. `RoutedBlocks` holds the same blocks under
the same names, so checkpoints, hooks and LoRA see no difference, but iterating over it yields callables. The routing
travels with the call, as the keyword `routing` or on a `RoutedCache`; nothing is stored on a layer. Without routing a
block runs as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["RoutedBlock", "RoutedBlocks"]


class RoutedBlock:
    """One block as the decoder's loop sees it."""

    def __init__(self, index: int, block: nn.Module) -> None:
        self.index = index
        self.block = block

    def __call__(self, hidden_states: Tensor, *, routing: Any = None, **kwargs: Any) -> Tensor:
        if routing is None:
            routing = getattr(kwargs.get("past_key_values"), "routing", None)
        if routing is None:
            output: Tensor = self.block(hidden_states, **kwargs)
            return output
        routed: Tensor = routing.run(self.index, self.block, hidden_states, kwargs)
        return routed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class RoutedBlocks(nn.ModuleList):
    """The decoder's blocks; iterating gives `RoutedBlock`s, everything else behaves as an `nn.ModuleList`."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [RoutedBlock(i, block) for i, block in list(enumerate(self._modules.values()))[index]]
        return super().__getitem__(index)
