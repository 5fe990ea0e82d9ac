"""Which rows make which micro-batch: a plan of the whole run, fixed by its seed.

The sampler lasts for all updates rather than for one pass over the data, so that a resumed run finds its place by
counting micro-batches. Knows nothing of tokens or tensors beyond each row's kind, source and length.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

__all__ = ["StepSampler"]


class StepSampler(Sampler[int]):
    """Yields `batches * batch_size` row numbers, to be cut into micro-batches in this order.

    Args:
        kinds: each row's kind, such as its step type.
        sources: where each row is from.
        lengths: each row's number of tokens.
        batch_size: rows per micro-batch.
        batches: micro-batches of the whole run, over all processes.
        seed: of the shuffling.
        balance: take the kinds in turn, and within a kind its sources; otherwise all rows are one pool.
        length_window: within so many micro-batches, rows of like length meet; 1 sorts nothing.
        mixed: within that window, rows of a type are dealt out by length: the shortest of each type meet in one
            micro-batch, the longest in another. Types stay mixed in every micro-batch, because length tells the type
            and a gate would otherwise see one type at a time. If not mixed, length alone counts, which pads least.

    Every row of a pool (of a source in it) is used once before one is used again.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        sources: Sequence[str],
        lengths: Sequence[int],
        *,
        batch_size: int,
        batches: int,
        seed: int,
        balance: bool,
        length_window: int,
        mixed: bool,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.length_window = length_window
        self.mixed = mixed
        self.pools: dict[str, dict[str, list[int]]] = {}
        """Row numbers by kind and source."""
        for row, (kind, source) in enumerate(zip(kinds, sources, strict=True)):
            of_kind, of_source = (kind, source) if balance else ("", "")
            self.pools.setdefault(of_kind, {}).setdefault(of_source, []).append(row)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(self.seed)
        streams = [_in_turn([pool[source] for source in sorted(pool)], rng) for _, pool in sorted(self.pools.items())]
        slot = 0
        for start in range(0, self.batches, self.length_window):
            window = min(self.length_window, self.batches - start)
            turns = [i % len(streams) for i in range(slot, slot + window * self.batch_size)]
            slot += len(turns)
            drawn = [[next(stream) for _ in range(turns.count(i))] for i, stream in enumerate(streams)]
            if self.length_window > 1:
                drawn = [sorted(rows, key=lambda row: self.lengths[row]) for rows in drawn]
            queues = [iter(rows) for rows in drawn]
            dealt = [next(queues[turn]) for turn in turns]
            if not self.mixed and self.length_window > 1:
                dealt.sort(key=lambda row: self.lengths[row])
            plan = [dealt[i : i + self.batch_size] for i in range(0, len(dealt), self.batch_size)]
            rng.shuffle(plan)
            for batch in plan:
                yield from batch


def _in_turn(pools: list[list[int]], rng: random.Random) -> Iterator[int]:
    streams = [_shuffled_for_ever(pool, rng) for pool in pools]
    while True:
        for stream in streams:
            yield next(stream)


def _shuffled_for_ever(pool: list[int], rng: random.Random) -> Iterator[int]:
    while True:
        order = list(pool)
        rng.shuffle(order)
        yield from order
