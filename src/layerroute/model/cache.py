"""The key/value cache of a routed generation: a block holds keys and values of its open rows only.

It carries the generation's routing, so that the route lives exactly as long as the keys it left out. Blocks with full
attention append in place to buffers that have room; transformers' own dynamic layers copy all keys for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from layerroute.model.routing import SkippingRouting

__all__ = ["RoomyLayer", "RoutedCache"]

_ROOM = 64  # positions: a block's buffers are copied once in so many decoded tokens, and hold at most as many in vain


class RoomyLayer(DynamicLayer):
    """Keys and values `[rows, heads, length, dim]` of one block, at the front of buffers with room for more."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append `[rows, heads, new, dim]` and return all keys and values, views of the buffers."""
        length = 0 if self.keys is None else self.keys.shape[-2]
        end = length + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._buffers = self._roomier(key_states, end), self._roomier(value_states, end)
            if self.keys is not None and self.values is not None:
                self._buffers[0][..., :length, :], self._buffers[1][..., :length, :] = self.keys, self.values
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        keys, values = self._buffers
        keys[..., length:end, :], values[..., length:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    @staticmethod
    def _roomier(states: Tensor, length: int) -> Tensor:
        return states.new_empty(*states.shape[:-2], length + _ROOM, states.shape[-1])

    def keep(self, length: int, rows: Tensor | None = None) -> None:
        """Forget positions from `length` on, and all rows but `rows` (int64 `[k]`)."""
        if self.keys is None or self.values is None:
            return
        if rows is not None and not len(rows):
            self.reset()
            return
        self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]
        if rows is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        elif self._buffers is not None and self._buffers[0].shape[-2] > 2 * length + _ROOM:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        else:
            return
        self._buffers = None  # what was dropped is freed; the next token makes room again

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._buffers = None

    @property
    def nbytes(self) -> int:
        """Bytes held, room included."""
        return _bytes(self._buffers or (self.keys, self.values))


class RoutedCache(DynamicCache):
    """A `DynamicCache` whose length is counted, not read off a block that may have been skipped.

    Args:
        config: the backbone's text config.
        routing: decides and holds the route of every row.
    """

    def __init__(self, config: PreTrainedConfig, routing: SkippingRouting) -> None:
        super().__init__(config=config)
        self.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.routing = routing
        self.segments: list[tuple[int, Tensor]] = []
        """Where each segment of the generated sequences starts, and bool `[batch, blocks]` the routes from there on."""
        self._length = 0

    @property
    def routes(self) -> Tensor:
        """bool `[batch, blocks]`: the route of every row as it is now, once the prompt has been read."""
        return self.routing.routes

    @property
    def slides(self) -> bool:
        """Whether some block keeps a sliding window only; what it has dropped cannot be had back."""
        return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in self.layers)

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

    def keep_rows(self, index: int, rows: Sequence[int]) -> None:
        """Forget, in block `index`, all but these of the rows that it holds."""
        layer = self.layers[index]
        assert isinstance(layer, DynamicLayer)
        if layer.keys is None:
            return
        chosen = torch.tensor(rows, dtype=torch.long, device=layer.keys.device)
        if isinstance(layer, RoomyLayer):
            layer.keep(self._length, chosen)
        else:
            layer.batch_select_indices(chosen)

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on, half-read ones too; a sliding window can only forget everything."""
        assert length == 0 or not self.slides, "a sliding window cannot be truncated"
        for layer in self.layers:
            if length and isinstance(layer, RoomyLayer):
                layer.keep(length)
            else:
                layer.reset()
        self._length = min(self._length, length)

    def nbytes(self) -> int:
        """Return the bytes held in keys and values."""
        layers = [layer for layer in self.layers if isinstance(layer, DynamicLayer)]
        return sum(
            layer.nbytes if isinstance(layer, RoomyLayer) else _bytes((layer.keys, layer.values)) for layer in layers
        )


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(int(tensor.numel()) * tensor.element_size() for tensor in tensors if tensor is not None)
