"""The runs that a benchmark compares: one way of generating each, timed by one clock.

    plain     transformers' generate on the untouched backbone
    static    the same with some blocks deleted for good: what skipping them can save at most
    open      the routed model, its routers deciding to run every block
    routed    the routed model, its routers deciding to skip those blocks
    mixed     the routed model under a forced route: odd rows skip those blocks, even rows run every block

All are greedy, over the same prompt, for the same number of tokens. Boundary: one generation at a time; order,
repetition and figures are `benchmark.py`'s.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from layerroute.model.routed import RoutedModel
from layerroute.model.structure import find_structure

__all__ = [
    "Arm",
    "Run",
    "decided",
    "endless",
    "evenly_spread",
    "mixed_routes",
    "routed_arm",
    "sharing_copy",
    "static_removal",
]

_CERTAIN = 20.0  # a logit beyond any threshold


@dataclass(frozen=True)
class Run:
    """One generation."""

    prefill: float
    """Milliseconds from the call to the first new token."""
    decode: float
    """Milliseconds per token after the first, the mean of the run."""
    cache: Any
    """The keys and values at its end."""


@dataclass(frozen=True)
class Arm:
    """A way of generating."""

    name: str
    model: Any
    """Something with transformers' `generate`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `generate`."""
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    """A context around the generation, entered before the clock starts."""

    def generate(self, ids: Tensor, new_tokens: int, streamer: BaseStreamer | None = None) -> Any:
        """Generate `new_tokens` (2 at least) from prompts int64 `[batch, seq]` without padding; see `endless`."""
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            streamer=streamer,
            **self.settings,
        )

    def run(self, ids: Tensor, new_tokens: int) -> Run:
        """Generate and time it; arguments as `generate`."""
        clock = _Clock(ids.device)
        with self.within():
            start = clock.now()
            out = self.generate(ids, new_tokens, clock)
        first, last = clock.ticks[1], clock.ticks[-1]
        assert len(clock.ticks) == 1 + new_tokens, "transformers shows the prompt, then every token"
        return Run(1000 * (first - start), 1000 * (last - first) / (new_tokens - 1), out.past_key_values)


class _Clock(BaseStreamer):
    """Notes when the prompt is shown and when each token is there, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ticks: list[float] = []

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def put(self, value: Tensor) -> None:
        self.ticks.append(self.now())

    def end(self) -> None:
        pass


def routed_arm(name: str, model: RoutedModel, closed: Sequence[int], **settings: Any) -> Arm:
    """The routed model with routers that decide to close exactly the blocks `closed`."""
    return Arm(name, model, settings, partial(decided, model, closed))


@contextmanager
def endless(*backbones: Any) -> Iterator[None]:
    """Within this context no token ends a generation, and no arm spends time on looking for one."""
    before = [backbone.generation_config.eos_token_id for backbone in backbones]
    for backbone in backbones:
        backbone.generation_config.eos_token_id = None
    try:
        yield
    finally:
        for backbone, token in zip(backbones, before, strict=True):
            backbone.generation_config.eos_token_id = token


@contextmanager
def decided(model: RoutedModel, closed: Sequence[int]) -> Iterator[None]:
    """Within this context the routers decide to close exactly these routable blocks, whatever they read.

    They still read, multiply and are read from the device: a decision costs what it always costs.
    """
    assert set(closed) <= set(model.routable), "only routable blocks can be closed"
    weight, bias = model.routers.weight, model.routers.bias
    before = weight.detach().clone(), bias.detach().clone()
    logits = [-_CERTAIN if block in set(closed) else _CERTAIN for block in model.routable]
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor(logits))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before[0])
            bias.copy_(before[1])


def mixed_routes(batch: int, blocks: int, closed: Sequence[int]) -> Tensor:
    """bool `[batch, blocks]`, True = executed: rows 1, 3, 5, ... skip `closed`, the others run every block."""
    routes = torch.ones(batch, blocks, dtype=torch.bool)
    routes[1::2, list(closed)] = False
    return routes


def evenly_spread(blocks: Sequence[int], count: int) -> list[int]:
    """`count` of the blocks (as many at most), at even distances, always the same ones."""
    assert 0 <= count <= len(blocks)
    return [blocks[(2 * i + 1) * len(blocks) // (2 * count)] for i in range(count)]


def sharing_copy(backbone: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters are others over the same memory.

    Where weights lie in memory changes a run's time by a tenth, so arms that are compared should read the same ones.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in backbone.parameters()}
    shared |= {id(buffer): buffer for buffer in backbone.buffers()}
    copied: PreTrainedModel = copy.deepcopy(backbone, shared)
    return copied.eval()


def static_removal(backbone: PreTrainedModel, closed: Sequence[int]) -> PreTrainedModel:
    """A copy of a plain backbone that lacks the blocks `closed` and shares every weight with the original."""
    smaller = sharing_copy(backbone)
    decoder: Any = find_structure(smaller).decoder
    kept = [index for index in range(len(decoder.layers)) if index not in set(closed)]
    decoder.layers = nn.ModuleList([decoder.layers[index] for index in kept])
    for position, block in enumerate(decoder.layers):
        block.self_attn.layer_idx = position  # its place in the cache
    config: Any = smaller.config.get_text_config()
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    return smaller
