"""The memory-bandwidth limit of decoding: what a step has to read, over how fast the device reads.

At small batches a step reads every executed weight once and does little with it, so no implementation that reads the
same bytes can be faster than this.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerroute.model.routed import RoutedModel

__all__ = ["bandwidth_limits", "read_bandwidth", "step_bytes"]

_READ = 2**28  # bytes, beyond any cache
_TRIES = 7


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which the device reads memory: the best of several sums over 256 MiB."""
    data = torch.ones(_READ // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(_TRIES):
        start = time.perf_counter()
        data.sum().item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return _READ / best


def step_bytes(model: RoutedModel, route: Tensor, positions: int, rows: int) -> int:
    """Bytes that one decoding step reads: the open blocks' weights and cache, the final norm and the head.

    Args:
        model: with LoRA merged.
        route: bool `[blocks]`, True = executed.
        positions: keys per row.
        rows: of the batch.
    """
    backbone: Any = model.backbone
    blocks = [block for block, is_open in zip(model.structure.blocks, route.tolist(), strict=True) if is_open]
    modules = [*blocks, model.structure.decoder.norm, backbone.get_output_embeddings()]
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    attention: Any = model.structure.blocks[0].self_attn
    config: Any = model.config.get_text_config()
    per_position = 2 * config.num_key_value_heads * attention.head_dim * backbone.dtype.itemsize
    return weights + len(blocks) * per_position * positions * rows


def bandwidth_limits(model: RoutedModel, routes: Mapping[str, Tensor], positions: int, rows: int) -> dict[str, Any]:
    """JSON-able: the measured bandwidth, and for each named route the bytes of a step and its least milliseconds."""
    bandwidth = read_bandwidth(model.device)
    limits: dict[str, Any] = {"batch": rows, "bytes_per_second": bandwidth}
    for name, route in routes.items():
        read = step_bytes(model, route, positions, rows)
        limits[name] = {"step_bytes": read, "limit_ms": 1000 * read / bandwidth}
    return limits
