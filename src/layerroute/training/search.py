"""The search of a bank of routes: which blocks each kind of decision leaves out, measured as they will be served.

A call after a thought, and any call after its boundary, does without blocks on its own tokens alone; every other kind
does without them from its first token on. Contract: extends a bank, trains nothing. Boundary: when to search, and how
deep, is the loss's matter.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.model.routed import RoutedModel
from layerroute.training.bank import KINDS, Bank
from layerroute.training.removal import greedy_order, losses_without

__all__ = ["extend_bank", "kinds_of", "rows_of_kind"]

_LOG = logging.getLogger(__name__)

_BATCH = 8


def extend_bank(
    model: RoutedModel,
    bank: Bank,
    depth: Mapping[str, int],
    samples: Sequence[Sample],
    collator: StepCollator,
    *,
    rows: int,
    seed: int,
) -> None:
    """Search further blocks for every kind whose order in the bank is shorter than its depth.

    Kinds of one depth share one order, searched on the mean of their losses: with equal budgets for all there is one
    route for all. The deepest are served first, from all routable blocks; the others choose among their blocks, so that
    what the decisions of a turn add up to lies within the deepest. A kind without rows leaves out nothing.

    Args:
        model: LoRA as trained so far; its mode is kept.
        bank: extended in place.
        depth: by kind.
        samples: of training.
        collator: makes batches of them.
        rows: of each kind, at most.
        seed: of their choice.
    """
    training = model.training
    model.eval()
    allowed, nested = list(model.routable), False
    for kinds in _alike(bank, depth):
        order, goal = bank.orders[kinds[0]], depth[kinds[0]]
        chosen = {kind: rows_of_kind(samples, kind, rows, seed) for kind in kinds} if len(order) < goal else {}
        for kind in [kind for kind, found in chosen.items() if not found]:
            _LOG.warning("the data holds no %s: no block is left out for it", kind)
            del chosen[kind]
        if chosen:
            parts = [list(_as_served(model, chosen[kind], collator, kind, kinds)) for kind in chosen]
            order = _search(model, parts, order, goal, allowed)
            bank.orders.update({kind: list(order) for kind in chosen})
            _LOG.info("%s: %d blocks can be left out best: %s", " and ".join(chosen), len(order), order)
        if order and not nested:
            allowed, nested = order, True
    model.train(training)


def _alike(bank: Bank, depth: Mapping[str, int]) -> list[list[str]]:
    """Kinds of one depth and one order so far, those first that leave out most."""
    groups: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    for kind in KINDS:
        order = bank.orders[kind]
        groups.setdefault((-max(depth[kind], len(order)), -len(order), tuple(order)), []).append(kind)
    return [groups[key] for key in sorted(groups)]


def _search(
    model: RoutedModel,
    parts: Sequence[Sequence[Mapping[str, Any]]],
    order: Sequence[int],
    goal: int,
    allowed: Sequence[int],
) -> list[int]:
    """The order, longer: up to `goal` blocks, of those allowed."""
    candidates = [block for block in allowed if block not in order]
    alone = torch.stack([losses_without(model, part, order, candidates) for part in parts]).mean(0).tolist()
    missing = min(goal - len(order), len(candidates))
    return [*order, *greedy_order(model, parts, dict(zip(candidates, alone, strict=True)), missing, order)]


def rows_of_kind(samples: Sequence[Sample], kind: str, rows: int, seed: int) -> list[Sample]:
    """At most so many samples that hold a decision of a kind, chosen at random, the sources in turn."""
    by_source: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if kind in kinds_of(sample):
            by_source[sample.source].append(sample)
    rng = random.Random(seed)
    ranked = []
    for source in sorted(by_source):
        of_source = by_source[source]
        rng.shuffle(of_source)
        ranked += [(turn, rng.random(), sample) for turn, sample in enumerate(of_source[:rows])]
    return [sample for _, _, sample in sorted(ranked, key=lambda item: item[:2])[:rows]]


def kinds_of(sample: Sample) -> tuple[str, ...]:
    """The kinds of decision that a sample's own target holds: a direct call counts as a call, too."""
    direct = sample.step_type == "tool_call" and sample.segment_starts and not sample.thought_length
    return (sample.step_type, "direct_call") if direct else (sample.step_type,)


@torch.no_grad()
def _as_served(
    model: RoutedModel, samples: Sequence[Sample], collator: StepCollator, kind: str, alike: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Batches for `losses_without`: a call after its boundary as its own tokens behind those that were read before.

    Where the kinds that are `alike` to it leave the same blocks out of what comes before, a call is one whole row.
    """
    parted = kind == "tool_call" and "planning" not in alike
    behind = [sample for sample in samples if parted and sample.segment_starts]
    for group in _groups(behind):
        yield _behind_boundary(model, group, collator)
    for group in _groups([sample for sample in samples if not (parted and sample.segment_starts)]):
        yield {name: value.to(model.device) for name, value in collator(group).items()}


def _groups(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples of like length together."""
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    for start in range(0, len(ordered), _BATCH):
        yield ordered[start : start + _BATCH]


def _behind_boundary(model: RoutedModel, samples: Sequence[Sample], collator: StepCollator) -> dict[str, Any]:
    """The tokens from each turn's first boundary on, with the keys and values of those before it.

    What comes before is padded on the left and the rest on the right, so that the boundaries meet.
    """
    starts = [sample.segment_starts[0] for sample in samples]
    before = replace(collator, padding_side="left")([_cut(s, 0, at) for s, at in zip(samples, starts, strict=True)])
    own = collator([_cut(s, at, len(s.input_ids)) for s, at in zip(samples, starts, strict=True)])
    before, own = ({name: value.to(model.device) for name, value in part.items()} for part in (before, own))
    mask = before["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    read = model.structure.decoder(
        input_ids=before["input_ids"], attention_mask=mask, position_ids=positions, use_cache=True
    )
    lengths = torch.tensor(starts, device=model.device).unsqueeze(1)
    return {
        "input_ids": own["input_ids"],
        "labels": own["labels"],
        "attention_mask": torch.cat([mask, own["attention_mask"]], dim=1),
        "position_ids": lengths + torch.arange(own["input_ids"].shape[1], device=model.device),
        "past_key_values": read.past_key_values,
    }


def _cut(sample: Sample, start: int, end: int) -> Sample:
    """The tokens `start` to `end` of a sample, all of them learned that its target holds."""
    prompt = min(max(sample.prompt_length - start, 0), end - start)
    return replace(
        sample, input_ids=sample.input_ids[start:end], prompt_length=prompt, thought_length=0, segment_starts=()
    )
