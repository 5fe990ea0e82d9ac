"""Which rows make which micro-batch: a plan of the whole run, fixed by its seed.

The sampler lasts for all updates rather than for one pass over the data, so that a resumed run finds its place by
counting micro-batches. Knows nothing of tokens or tensors beyond each row's type and length.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

__all__ = ["StepSampler"]


class StepSampler(Sampler[int]):
    """Yields `batches * batch_size` row numbers, to be cut into micro-batches in this order.

    Args:
        types: each row's step type.
        lengths: each row's number of tokens.
        batch_size: rows per micro-batch.
        batches: micro-batches of the whole run, over all processes.
        seed: of the shuffling.
        balance: take the step types in turn; otherwise all rows are one pool.
        length_window: within so many micro-batches, rows of a type are dealt out by length: the shortest of each type
            meet in one micro-batch, the longest in another. Types stay mixed in every micro-batch, because length
            tells the type and a router would otherwise see one type at a time.

    Every row of a pool is used once before one is used again.
    """

    def __init__(
        self,
        types: Sequence[str],
        lengths: Sequence[int],
        *,
        batch_size: int,
        batches: int,
        seed: int,
        balance: bool,
        length_window: int,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.length_window = length_window
        keys = sorted(set(types)) if balance else [None]
        self.pools = [[i for i, kind in enumerate(types) if key in (None, kind)] for key in keys]

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(self.seed)
        streams = [_shuffled_for_ever(pool, rng) for pool in self.pools]
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
            plan = [dealt[i : i + self.batch_size] for i in range(0, len(dealt), self.batch_size)]
            rng.shuffle(plan)
            for batch in plan:
                yield from batch


def _shuffled_for_ever(pool: list[int], rng: random.Random) -> Iterator[int]:
    while True:
        order = list(pool)
        rng.shuffle(order)
        yield from order
