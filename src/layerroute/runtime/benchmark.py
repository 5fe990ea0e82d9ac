"""Speed, memory and FLOPs of a routed model beside plain transformers, in one process.

Within a repetition every arm runs once, one after the other, and the order rotates from one repetition to the next, so
that a machine that slows down slows all of them; ratios are then taken within repetitions. Boundary: what runs is
`arms.py`, what is made of the times is `timing.py`; loads and prints nothing.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from layerroute.config import Settings
from layerroute.errors import ConfigError
from layerroute.model.cache import RoutedCache
from layerroute.model.routed import RoutedModel
from layerroute.runtime.arms import Arm, endless, evenly_spread, mixed_routes, routed_arm, static_removal
from layerroute.runtime.bandwidth import bandwidth_limits
from layerroute.runtime.counting import count_flops
from layerroute.runtime.goals import Times, goals_of, kv_goal, ratios_of
from layerroute.runtime.machine import machine_facts
from layerroute.runtime.timing import Line, Spread

__all__ = ["BenchmarkSettings", "run"]

_DEFAULT_SHARE = 0.27  # of the blocks: 8 of 30
_COUNTED = (64, 4)  # tokens of the prompt and new ones, at most: a short run shows what is executed

_LOG = logging.getLogger(__name__)


class BenchmarkSettings(Settings):
    """What is measured, and how often."""

    batch: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 4, 8), min_length=1)
    """Rows of a generation; everything is measured for each size."""
    prompt_tokens: int = Field(256, ge=1)
    new_tokens: int = Field(32, ge=2)
    skip: int | None = Field(None, ge=1)
    """Blocks left out, evenly spread over the routable ones; None takes 27% of all blocks."""
    repetitions: int = Field(9, ge=2)
    compiled: bool = False
    """Whether the compiled runtime is measured too."""
    sweep: bool = False
    """Whether decode time is also measured against the number of executed blocks, at the first batch size."""
    seed: int = Field(0, ge=0)
    """Of the prompts and of the resampling."""


def run(plain: PreTrainedModel, model: RoutedModel, settings: BenchmarkSettings) -> dict[str, Any]:
    """Measure, and return the JSON-able report that docs/benchmark.md describes.

    Args:
        plain: the untouched backbone.
        model: the same backbone in another object, routed, in evaluation mode, LoRA merged.
        settings: what is measured.

    Raises:
        ConfigError: more blocks are to be left out than carry a router, the tokens do not fit the context, or compiled
            decoding is asked for where it runs eagerly.
    """
    closed = _closed_blocks(model, settings)
    _check_length(model, settings)
    with endless(plain, model.backbone):
        return _measure(plain, model, closed, settings)


def _measure(
    plain: PreTrainedModel, model: RoutedModel, closed: list[int], settings: BenchmarkSettings
) -> dict[str, Any]:
    static = static_removal(plain, closed)
    report: dict[str, Any] = {
        "machine": machine_facts(model.device, model.backbone.dtype),
        "settings": {**settings.model_dump(mode="json"), "skip": len(closed)},
        "blocks": model.routers.blocks,
        "skipped": closed,
        "arms": {},
        "comparisons": {},
        "goals": [],
    }
    for batch in dict.fromkeys(settings.batch):
        model.graphs.clear()  # their number is bounded, and those of another batch size are of no use
        arms = _arms(plain, static, model, closed, batch, settings.compiled)
        ids = _prompt(model, batch, settings.prompt_tokens, settings.seed)
        times = _warm_up(arms, ids, settings)
        if settings.compiled and len(model.graphs) == 0:
            if not report["arms"]:
                raise ConfigError("compiled=True: this backbone decodes eagerly, for the reason logged; leave it out")
            arms = [arm for arm in arms if "compiled" not in arm.name]  # this batch size does, as logged
            times = {arm.name: times[arm.name] for arm in arms}
        _repeat(arms, ids, settings, times)
        ratios = ratios_of(times, settings.seed)
        report["arms"][str(batch)] = {name: measured.as_dict() for name, measured in times.items()}
        report["comparisons"][str(batch)] = {
            name: {part: ratio.as_dict() for part, ratio in parts.items()} for name, parts in ratios.items()
        }
        report["goals"] += goals_of(ratios, batch)
        if "kv_bytes" not in report:
            report["kv_bytes"] = _kv_bytes(times, batch)
            report["goals"].append(kv_goal(report["kv_bytes"]["ratio"], 1 - len(closed) / model.routers.blocks))
    report["bandwidth"] = _bandwidth(model, closed, settings, report["arms"])
    if settings.sweep:
        report["sweep"] = _sweep(plain, model, len(closed), settings)
    prompt, new = min(settings.prompt_tokens, _COUNTED[0]), min(settings.new_tokens, _COUNTED[1])
    report["flops"] = count_flops(model, closed, _prompt(model, 1, prompt, settings.seed), new)
    return report


def _closed_blocks(model: RoutedModel, settings: BenchmarkSettings) -> list[int]:
    routable, blocks = model.routable, model.routers.blocks
    if settings.skip is None:
        return evenly_spread(routable, max(1, min(round(_DEFAULT_SHARE * blocks), len(routable))))
    if settings.skip > len(routable):
        raise ConfigError(f"skip={settings.skip}: only {len(routable)} of this model's {blocks} blocks carry a router")
    return evenly_spread(routable, settings.skip)


def _check_length(model: RoutedModel, settings: BenchmarkSettings) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = settings.prompt_tokens + settings.new_tokens
    if limit is not None and needed > limit:
        raise ConfigError(
            f"prompt_tokens={settings.prompt_tokens} and new_tokens={settings.new_tokens} need {needed} positions, but "
            f"the backbone's context holds {limit}"
        )


def _prompt(model: RoutedModel, batch: int, length: int, seed: int) -> Tensor:
    """Random tokens, int64 `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    words = model.config.get_text_config().vocab_size
    return torch.randint(words, (batch, length), generator=generator).to(model.device)


def _arms(
    plain: PreTrainedModel,
    static: PreTrainedModel,
    model: RoutedModel,
    closed: Sequence[int],
    batch: int,
    compiled: bool,
) -> list[Arm]:
    arms = [
        Arm("plain", plain),
        Arm("static", static),
        routed_arm("open", model, ()),
        routed_arm("routed", model, closed),
    ]
    if batch > 1:
        routes = mixed_routes(batch, model.routers.blocks, closed).to(model.device)
        arms.append(Arm("mixed", model, {"routes": routes}))
    if compiled:
        arms.append(routed_arm("compiled-open", model, (), compiled=True))
        arms.append(routed_arm("compiled-routed", model, closed, compiled=True))
    return arms


def _warm_up(arms: Sequence[Arm], ids: Tensor, settings: BenchmarkSettings) -> dict[str, Times]:
    """Run every arm once; whatever is made on the first call (compiled graphs) is made here."""
    times: dict[str, Times] = {}
    for arm in arms:
        start = time.perf_counter()
        cache = arm.run(ids, settings.new_tokens).cache
        held = cache.nbytes() if isinstance(cache, RoutedCache) else None
        times[arm.name] = Times(warmup_s=time.perf_counter() - start, kv_bytes=held)
        _LOG.info("batch %d: warmed up %s in %.1f s", len(ids), arm.name, times[arm.name].warmup_s)
    return times


def _repeat(arms: Sequence[Arm], ids: Tensor, settings: BenchmarkSettings, times: Mapping[str, Times]) -> None:
    """Run the arms in turn, and add to `times`."""
    for repetition in range(settings.repetitions):
        first = repetition % len(arms)
        with _no_collection():
            for arm in [*arms[first:], *arms[:first]]:
                timed = arm.run(ids, settings.new_tokens)
                times[arm.name].prefill.append(timed.prefill)
                times[arm.name].decode.append(timed.decode)
                times[arm.name].total.append(timed.prefill + (settings.new_tokens - 1) * timed.decode)
        _LOG.info("batch %d: repetition %d of %d done", len(ids), repetition + 1, settings.repetitions)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within this context garbage is not collected; it is on entering, so that no timing pays for an earlier one."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _bandwidth(
    model: RoutedModel, closed: Sequence[int], settings: BenchmarkSettings, arms: Mapping[str, Any]
) -> dict[str, Any]:
    """The memory-bandwidth limit of a decoding step at the first batch size, and the share that each arm reaches."""
    batch = settings.batch[0]
    every = torch.ones(model.routers.blocks, dtype=torch.bool)
    fewer = every.clone()
    fewer[list(closed)] = False
    positions = settings.prompt_tokens + settings.new_tokens // 2
    limits = bandwidth_limits(model, {"open": every, "routed": fewer}, positions, batch)
    pace = {"plain": "open", "static": "routed", "compiled-open": "open", "compiled-routed": "routed"}
    limits["share_of_limit"] = {
        name: limits[pace.get(name, name)]["limit_ms"] / arm["decode_ms"]["median"]
        for name, arm in arms[str(batch)].items()
        if name != "mixed"
    }
    return limits


def _kv_bytes(times: Mapping[str, Times], batch: int) -> dict[str, Any]:
    whole, routed = times["open"].kv_bytes, times["routed"].kv_bytes
    assert whole is not None and routed is not None, "a routed generation has a routed cache"
    return {"batch": batch, "open": whole, "routed": routed, "ratio": routed / whole}


def _sweep(plain: PreTrainedModel, model: RoutedModel, skip: int, settings: BenchmarkSettings) -> dict[str, Any]:
    """Decode time, routed and with the blocks deleted, at several counts of executed blocks, all in turn."""
    blocks = model.routers.blocks
    skips = sorted({0, skip // 2, skip, min(2 * skip, len(model.routable))})
    arms = []
    for count in skips:
        closed = evenly_spread(model.routable, count)
        static = static_removal(plain, closed) if closed else plain
        arms += [Arm(f"static-{count}", static), routed_arm(f"routed-{count}", model, closed)]
    ids = _prompt(model, settings.batch[0], settings.prompt_tokens, settings.seed)
    times = _warm_up(arms, ids, settings)
    _repeat(arms, ids, settings, times)
    executed = [blocks - count for count in skips]
    sweep: dict[str, Any] = {"batch": settings.batch[0], "executed": executed}
    for kind in ("routed", "static"):
        spreads = [Spread.of(times[f"{kind}-{count}"].decode) for count in skips]
        line = Line.through(executed, [spread.median for spread in spreads])
        sweep[kind] = {"decode_ms": [asdict(spread) for spread in spreads], "line": asdict(line)}
    return sweep
