"""The key/value cache of a routed generation: a block holds keys and values of its open rows only.

It carries the generation's routing, so that the route lives exactly as long as the keys it left out.
"""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from layerroute.model.routing import SkippingRouting

__all__ = ["RoutedCache"]


class RoutedCache(DynamicCache):
    """A `DynamicCache` whose length is counted, not read off a block that may have been skipped.

    Args:
        config: the backbone's text config.
        routing: decides and holds the route of every row.
    """

    def __init__(self, config: PreTrainedConfig, routing: SkippingRouting) -> None:
        super().__init__(config=config)
        self.routing = routing
        self._length = 0

    @property
    def routes(self) -> Tensor:
        """bool `[batch, blocks]`: the route of every row, once the prompt has been read."""
        return self.routing.gates.hard.detach() > 0.5

    def advance(self, tokens: int) -> None:
        """Count `tokens` new positions, after all blocks have had their turn."""
        self._length += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions seen, whether or not block `layer_idx` ran."""
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (length, offset) of the keys that a mask for block `layer_idx` must cover, had it run or not."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, DynamicSlidingWindowLayer):
            return self._length + query_length, 0
        kept = min(self._length, layer.sliding_window - 1)
        return kept + query_length, self._length - kept

    def nbytes(self) -> int:
        """Return the bytes held in keys and values."""
        layers = [layer for layer in self.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
