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
from typing import Any

import torch

from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.model.routed import RoutedModel
from layerroute.training.bank import KINDS, Bank
from layerroute.training.removal import greedy_order, losses_without

__all__ = ["extend_bank", "kinds_of", "rows_of_kind"]

_LOG = logging.getLogger(__name__)

_BATCH = 4


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

    The deepest kind is served first, from all routable blocks; the others choose among its blocks, so that no two sets
    add up to a third. A kind without rows leaves out nothing.

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
    allowed = list(model.routable)
    for kind in sorted(KINDS, key=lambda kind: -depth[kind]):
        order, missing = bank.orders[kind], depth[kind] - len(bank.orders[kind])
        chosen = rows_of_kind(samples, kind, rows, seed) if missing > 0 else []
        if missing > 0 and not chosen:
            _LOG.warning("the data holds no %s: it is trained without that budget, and leaves out nothing", kind)
        if chosen:
            part = list(_as_served(model, chosen, collator, kind))
            candidates = [block for block in allowed if block not in order]
            alone = dict(zip(candidates, losses_without(model, part, order, candidates).tolist(), strict=True))
            order += greedy_order(model, [part], alone, min(missing, len(candidates)), order)
            loss = losses_without(model, part, order, [None])
            full = losses_without(model, part, [], [None])
            _LOG.info(
                "%s leaves out %s: %.3f nats, %.3f with every block (%d rows)", kind, order, loss, full, len(chosen)
            )
        if order and allowed == model.routable:
            allowed = order
    model.train(training)


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
    model: RoutedModel, samples: Sequence[Sample], collator: StepCollator, kind: str
) -> Iterator[dict[str, Any]]:
    """Batches for `losses_without`: a call after its boundary as its own tokens behind those that were read before."""
    whole = []
    for sample in samples:
        if kind == "tool_call" and sample.segment_starts:
            yield _from_boundary(model, sample, collator)
        else:
            whole.append(sample)
    whole.sort(key=lambda sample: len(sample.input_ids))
    for start in range(0, len(whole), _BATCH):
        yield {name: value.to(model.device) for name, value in collator(whole[start : start + _BATCH]).items()}


def _from_boundary(model: RoutedModel, sample: Sample, collator: StepCollator) -> dict[str, Any]:
    batch = {name: value.to(model.device) for name, value in collator([sample]).items()}
    start = sample.segment_starts[0]
    before = batch["input_ids"][:, :start]
    past = model.structure.decoder(input_ids=before, use_cache=True).past_key_values
    own = {name: batch[name][:, start:] for name in ("input_ids", "labels")}
    return {**own, "attention_mask": batch["attention_mask"], "past_key_values": past}
