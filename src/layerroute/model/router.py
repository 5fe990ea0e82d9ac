"""The routers: what they read, and the gates they give.

One `Linear(width, 1)` per routable block, kept as the rows of one matrix so that reading one vector costs one matmul.
Knows nothing of blocks, caches or backbones; `routing.py` decides when to ask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerroute.config import RouterConfig

__all__ = ["Gates", "Memory", "Routers", "tail_mask"]


class Gates(NamedTuple):
    """Gates of some blocks for a batch; a gate of 1 executes the block."""

    hard: Tensor
    """float32 `[batch, k]`: exactly 0 or 1, with the gradient of `prob` (straight-through)."""
    prob: Tensor
    """float32 `[batch, k]`: sigmoid of the logit, without exploration noise."""


def tail_mask(context_mask: Tensor, window: int) -> Tensor:
    """Return bool `[batch, seq]`: the last `window` True positions of each row of `context_mask`."""
    from_the_right = context_mask.long().flip(1).cumsum(1).flip(1)
    return context_mask.bool() & (from_the_right <= window)


class Memory:
    """What the routers need of the tokens read so far, to decide again at a boundary: nothing is run twice for it.

    Args:
        hidden: `[batch, seq, hidden]` as it enters the first routable block, for the prompt.
        context_mask: bool `[batch, seq]`: the prompt's tokens, padding left out.
        window: tokens of the tail.
        start: tokens before these that are not read; only a tail can do without them.
    """

    def __init__(self, hidden: Tensor, context_mask: Tensor, window: int, start: int = 0) -> None:
        self.count = context_mask.sum(1)
        """int64 `[batch]`: tokens read."""
        self.total = (hidden.float() * context_mask.unsqueeze(-1)).sum(1)
        """float32 `[batch, hidden]`: their sum."""
        order = torch.argsort(tail_mask(context_mask, window).long(), dim=1, stable=True)[:, -window:]
        tail = hidden.gather(1, order.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        self.tail = functional.pad(tail, (0, 0, window - tail.shape[1], 0))
        """`[batch, window, hidden]`: the last of them, right-aligned; rows that hold fewer start with anything."""

        self.length = start + hidden.shape[1]
        """Where the tokens read end in the sequence, padding counted."""

    def extend(self, hidden: Tensor) -> None:
        """Add more tokens of every row, `[batch, seq, hidden]`."""
        self.count = self.count + hidden.shape[1]
        self.total = self.total + hidden.float().sum(1)
        self.tail = torch.cat([self.tail, hidden], dim=1)[:, -self.tail.shape[1] :]
        self.length += hidden.shape[1]


def _masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


class Routers(nn.Module):
    """All routers of a model: `weight` float32 `[routable, width]` and `bias` float32 `[routable]`.

    Args:
        config: what is read, and how.
        hidden_size: the backbone's; `width` is twice that for `joint` pooling.
        blocks: how many blocks the backbone has.

    Raises:
        ConfigError: when the settings leave no block to route.
    """

    def __init__(self, config: RouterConfig, hidden_size: int, blocks: int) -> None:
        super().__init__()
        self.config = config
        self.blocks = blocks
        self.routable = config.routable(blocks)
        width = 2 * hidden_size if config.pooling == "joint" else hidden_size
        self.weight = nn.Parameter(torch.zeros(len(self.routable), width, dtype=torch.float32))
        self.bias = nn.Parameter(self.initial_logit.clone())

    @property
    def initial_logit(self) -> Tensor:
        """float32 `[routable]`: every router's logit before training, on any input."""
        closed = set(self.config.closed_blocks)
        signs = [-1.0 if block in closed else 1.0 for block in self.routable]
        return torch.tensor(signs, dtype=torch.float32) * self.config.init_bias

    def read(self, hidden: Tensor, context_mask: Tensor) -> Tensor:
        """Pool hidden states `[batch, seq, hidden]` over the context into the routers' vector `[batch, width]`.

        `context_mask` is bool `[batch, seq]`: the tokens that the route may depend on. With `normalize` the vector is
        float32 of unit root mean square (each half of it for `joint`); otherwise it keeps the hidden states' dtype.
        """
        if self.config.normalize:
            hidden = hidden.float()
        mean, tail = context_mask, tail_mask(context_mask, self.config.window)
        masks = {"mean": [mean], "tail": [tail], "joint": [tail, mean], "last": [tail_mask(context_mask, 1)]}
        return self._vector([_masked_mean(hidden, mask) for mask in masks[self.config.pooling]])

    def recall(self, memory: Memory) -> Tensor:
        """The vector `[batch, width]` that `read` gives over all tokens that `memory` has seen, up to rounding."""
        if self.config.pooling == "last":
            return self._vector([memory.tail[:, -1].float()])
        window = memory.tail.shape[1]
        valid = torch.arange(window, device=memory.tail.device) >= window - memory.count.unsqueeze(1)
        tail = _masked_mean(torch.where(valid.unsqueeze(-1), memory.tail, 0).float(), valid)
        mean = memory.total / memory.count.clamp(min=1).unsqueeze(1)
        return self._vector({"mean": [mean], "tail": [tail], "joint": [tail, mean]}[self.config.pooling])

    def _vector(self, parts: list[Tensor]) -> Tensor:
        if self.config.normalize:
            parts = [functional.rms_norm(part, part.shape[-1:], eps=1e-6) for part in parts]
        return torch.cat(parts, dim=-1)

    def gates(self, vector: Tensor, first: int, last: int, noise: float = 0.0, threshold: float | None = None) -> Gates:
        """Return the gates of routers `first` to `last - 1` (positions in `routable`) for a vector `[batch, width]`.

        A gate is open where its probability exceeds `threshold` (the config's by default). `noise` scales logistic
        noise added to the logit before that: exploration, for training only. The
        straight-through estimator (Bengio et al. 2013, arXiv:1308.3432) passes d(gate)/d(logit) = sigmoid'(logit).
        """
        weight, bias = self.weight[first:last], self.bias[first:last]
        if self.config.normalize:
            with torch.autocast(vector.device.type, enabled=False):
                logits = functional.linear(vector.float(), weight.float(), bias.float())
        else:
            logits = functional.linear(vector, weight.to(vector.dtype), bias.to(vector.dtype)).float()
        prob = torch.sigmoid(logits)
        noisy = torch.sigmoid(logits + noise * _logistic_like(logits)) if noise else prob
        hard = (noisy > (self.config.threshold if threshold is None else threshold)).float() + (noisy - noisy.detach())
        return Gates(hard=hard, prob=prob)


def _logistic_like(logits: Tensor) -> Tensor:
    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    return torch.logit(uniform)
