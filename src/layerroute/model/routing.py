"""How the blocks of one pass run: the route is decided when it is first needed, then obeyed.

    MaskedRouting     training: every block is computed, then gated, so that gradients reach the gates
    SkippingRouting   inference: a closed block is not called; in a mixed batch only the open rows enter it
    RouteProbe        decides and calls nothing above the decision

All three decide with the same code on the same tokens. A pass may hold several segments of a turn: each is a run of
tokens under one route, and a later one may only close blocks. One object serves one forward pass, or one generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerroute.errors import BackboneError
from layerroute.model.router import Gates, Memory, Routers

__all__ = ["MaskedRouting", "RouteProbe", "Routing", "SkippingRouting", "stack_segments"]


class Routing:
    """Decides a route, block by block or all at once, and keeps the gates.

    Args:
        routers: the model's routers.
        contexts: bool `[batch, seq]`, one per segment: the tokens that its route may depend on.
        gates: float32 `[batch, segments, blocks]` gates decided elsewhere (a forced route, a window's decision).
        noise: scale of the logit noise, for training.
        threshold: of the gates; None takes the routers' own.
        segment_ids: int64 `[batch, seq]`: the segment of every token; None where there is one segment.
    """

    def __init__(
        self,
        routers: Routers,
        contexts: Sequence[Tensor],
        gates: Gates | None = None,
        *,
        noise: float = 0.0,
        threshold: float | None = None,
        segment_ids: Tensor | None = None,
    ) -> None:
        self.routers = routers
        self.contexts = contexts
        self.noise = noise
        self.threshold = threshold
        self.segment_ids = segment_ids if len(contexts) > 1 else None
        self.asked: set[int] = set()
        self.columns: list[Gates | None] = [None] * routers.blocks
        """Per block: gates float32 `[batch, segments]`, later segments closed where an earlier one is."""
        self.always_open: set[int] = set()
        if gates is not None:
            self._fill(0, gates)
        else:
            ones = torch.ones(contexts[0].shape[0], len(contexts), device=contexts[0].device)
            self.always_open = set(range(routers.blocks)) - set(routers.routable)
            for block in self.always_open:
                self.columns[block] = Gates(ones, ones)

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run block `index` on hidden states `[batch, seq, hidden]` under the route."""
        raise AssertionError("Routing is abstract")

    def check_all_asked(self) -> None:
        """Make sure that the backbone ran every block through this routing.

        Raises:
            BackboneError: some blocks ran on their own, so the route was not obeyed.
        """
        if len(self.asked) < self.routers.blocks:
            missed = sorted(set(range(self.routers.blocks)) - self.asked)
            raise BackboneError(
                f"the backbone's forward did not run blocks {missed} through its list of layers, so they cannot be "
                "routed; its family is not supported"
            )

    @property
    def decided(self) -> bool:
        """Whether the gates of all blocks are known."""
        return all(column is not None for column in self.columns)

    @property
    def gates(self) -> Gates:
        """Gates of all blocks, each float32 `[batch, segments, blocks]`; the route must be decided."""
        columns = [column for column in self.columns if column is not None]
        assert len(columns) == len(self.columns), "the route is not decided yet"
        return Gates(torch.stack([c.hard for c in columns], -1), torch.stack([c.prob for c in columns], -1))

    def _decide(self, index: int, hidden: Tensor) -> None:
        """Make sure that the gate of block `index` is known, from `hidden` as it enters that block."""
        self.asked.add(index)
        if self.columns[index] is None:
            routers = self.routers
            position = routers.routable.index(index)
            # Early: the first routable block decides for all, so no later block comes here undecided.
            last = len(routers.routable) if routers.config.position == "early" else position + 1
            decisions = [
                routers.gates(vector, position, last, self.noise, self.threshold) for vector in self._vectors(hidden)
            ]
            self._fill(index, stack_segments(decisions, self.segment_ids))

    def _vectors(self, hidden: Tensor) -> list[Tensor]:
        """What the routers read for each segment, `[batch, width]`."""
        return [self.routers.read(hidden, context) for context in self.contexts]

    def _fill(self, first: int, gates: Gates) -> None:
        for block, (hard, prob) in enumerate(zip(gates.hard.unbind(-1), gates.prob.unbind(-1), strict=True), first):
            self.columns[block] = Gates(hard, prob)

    def _by_token(self, gate: Tensor) -> Tensor:
        """The gate of every token, `[batch, seq or 1, 1]`, of a block's gates `[batch, segments]`."""
        return (gate if self.segment_ids is None else gate.gather(1, self.segment_ids)).unsqueeze(-1)


def stack_segments(decisions: Sequence[Gates], segment_ids: Tensor | None) -> Gates:
    """Gates `[batch, k]` of successive decisions to `[batch, segments, k]`: what is closed stays closed.

    A segment that a row does not have repeats the row's last one, so that `[:, -1]` is what governs the row's end.
    """
    hard = [decisions[0].hard]
    for segment, gates in enumerate(decisions[1:], start=1):
        assert segment_ids is not None
        present = (segment_ids >= segment).any(1, keepdim=True)
        # the product of hard gates is their conjunction, and its gradient reaches each of them
        hard.append(hard[-1] * torch.where(present, gates.hard, 1.0))
    return Gates(torch.stack(hard, 1), torch.stack([gates.prob for gates in decisions], 1))


class MaskedRouting(Routing):
    """Training: compute every block, then choose by its gate.

    With `gate_gradient` the gradient of what follows reaches the gates, straight through; otherwise it stops at them.
    """

    def __init__(self, *args: Any, gate_gradient: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate_gradient = gate_gradient

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return `gate * block(x) + (1 - gate) * x`, exact at both ends, with its gradient for x, block and gate."""
        self._decide(index, hidden)
        output: Tensor = block(hidden, **kwargs)
        if index in self.always_open:
            return output
        column = self.columns[index]
        assert column is not None
        gate = self._by_token(column.hard)
        chosen = torch.where(gate.detach() > 0.5, output, hidden)
        if not self.gate_gradient:
            return chosen
        # where() selects without rounding; the second term is exactly zero and carries the gate's gradient alone
        return chosen + ((gate - gate.detach()) * (output - hidden).detach()).to(chosen.dtype)


class SkippingRouting(Routing):
    """Inference: call a block only on the rows whose route has it open, and not at all if there are none.

    In a generation the route may be decided again at a boundary (`decide_again`), from a memory of what the routers
    have read; closing a block drops the rows' keys and values from its cache.

    Args:
        remember: keep that memory, for a generation that may decide again.
        memory: of a conversation's earlier tokens; the first decision then reads them too.
    """

    def __init__(self, *args: Any, remember: bool = False, memory: Memory | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remember = remember
        self.memory = memory
        self._due: Tensor | None = None
        self._rows: list[tuple[int, ...] | None] = [None] * self.routers.blocks
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._selected: dict[tuple[tuple[int, ...], int], tuple[Any, Any]] = {}

    @property
    def routes(self) -> Tensor:
        """bool `[batch, blocks]`: the route that holds now; the route must be decided."""
        return self.gates.hard[:, -1].detach() > 0.5

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return the hidden states with the open rows replaced by the block's output."""
        if index == 0:
            self._selected.clear()
        cache = kwargs.get("past_key_values")
        if self.remember and index == self.routers.routable[0]:
            self._note(hidden, cache)
        self._decide(index, hidden)
        if self._due is not None and index == self.routers.routable[0]:
            self._decide_now(cache)
        rows, batch = self.open_rows(index), hidden.shape[0]
        if len(rows) == batch:
            output: Tensor = block(hidden, **kwargs)
            hidden = output if self.segment_ids is None else self._until_closed(index, output, hidden)
        elif rows:
            chosen = self._index(rows, hidden.device)
            output = block(hidden.index_select(0, chosen), **self._select(kwargs, rows, batch))
            output = hidden.index_copy(0, chosen, output)
            hidden = output if self.segment_ids is None else self._until_closed(index, output, hidden)
        if index == len(self.columns) - 1 and cache is not None:
            cache.advance(hidden.shape[1])
        return hidden

    def decide_again(self, rows: Tensor) -> None:
        """Let the next pass decide the route of `rows` (bool `[batch]`) again, with the token that it reads."""
        assert self.remember, "deciding again needs the memory"
        self._due = rows

    def close(self, gates: Gates, rows: Tensor, cache: Any) -> None:
        """Close what new `gates` `[batch, blocks]` close for `rows` (bool `[batch]`), in the route and in the cache."""
        keep = ~rows.unsqueeze(1)
        now = self.gates
        hard = now.hard[:, 0] * torch.where(keep, 1.0, gates.hard)
        prob = torch.where(keep, now.prob[:, 0], gates.prob)
        self._fill(0, Gates(hard.unsqueeze(1), prob.unsqueeze(1)))
        before, self._rows = self._rows, list(_rows_by_block(hard))
        self._selected.clear()
        for index, (old, new) in enumerate(zip(before, self._rows, strict=True)):
            assert old is not None and new is not None
            if old != new:
                cache.keep_rows(index, [old.index(row) for row in new])

    def _vectors(self, hidden: Tensor) -> list[Tensor]:
        return super()._vectors(hidden) if self.memory is None else [self.routers.recall(self.memory)]

    def _note(self, hidden: Tensor, cache: Any) -> None:
        """Add the tokens of this pass, as they enter the first routable block, to the memory."""
        start = cache.get_seq_length()
        if self.memory is None:
            self.memory = Memory(hidden, self.contexts[0], self.routers.config.window, start)
        elif self.memory.length < start + hidden.shape[1]:  # a pass that was stopped and begins anew is noted already
            self.memory.extend(hidden)

    def _decide_now(self, cache: Any) -> None:
        assert self.memory is not None and self._due is not None
        vector = self.routers.recall(self.memory)
        gates = self.routers.gates(vector, 0, len(self.routers.routable), threshold=self.threshold)
        due, self._due = self._due, None
        self.close(self._all_blocks(gates), due, cache)

    def _all_blocks(self, gates: Gates) -> Gates:
        """Gates of the routable blocks among those of all blocks, `[batch, blocks]`."""
        hard = torch.ones(gates.hard.shape[0], len(self.columns), device=gates.hard.device)
        prob = hard.clone()
        hard[:, self.routers.routable], prob[:, self.routers.routable] = gates.hard, gates.prob
        return Gates(hard, prob)

    def open_rows(self, index: int) -> tuple[int, ...]:
        """The rows that block `index` is called on; of later segments none is open where the first is closed."""
        rows = self._rows[index]
        if rows is None:
            if self.decided:
                self._rows = list(_rows_by_block(self.gates.hard[:, 0]))
            elif index in self.always_open:  # below the decision
                return tuple(range(self.contexts[0].shape[0]))
            else:  # routers that sit at each block: the blocks above are not decided yet
                column = self.columns[index]
                assert column is not None
                self._rows[index] = _rows_by_block(column.hard[:, :1])[0]
            rows = self._rows[index]
            assert rows is not None
        return rows

    def _until_closed(self, index: int, output: Tensor, hidden: Tensor) -> Tensor:
        """The block's output on the segments that have it open; a later segment may close what an earlier one runs."""
        column = self.columns[index]
        assert column is not None
        return torch.where(self._by_token(column.hard) > 0.5, output, hidden)

    def _index(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        if rows not in self._indices:
            self._indices[rows] = torch.tensor(rows, device=device)
        return self._indices[rows]

    def _select(self, kwargs: dict[str, Any], rows: tuple[int, ...], batch: int) -> dict[str, Any]:
        """Restrict the per-row arguments of a block (mask, positions, rotary embedding) to `rows`, once per pass."""
        per_row = ("attention_mask", "position_ids", "position_embeddings")
        return {
            name: self._select_part(value, rows, batch) if name in per_row else value for name, value in kwargs.items()
        }

    def _select_part(self, value: Any, rows: tuple[int, ...], batch: int) -> Any:
        if isinstance(value, tuple):
            return tuple(self._select_part(part, rows, batch) for part in value)
        if not isinstance(value, Tensor) or value.shape[0] != batch:
            return value
        key = rows, id(value)
        if key not in self._selected:  # the value is kept beside it, so that its id stays its own
            self._selected[key] = value, value.index_select(0, self._index(rows, value.device))
        return self._selected[key][1]


class RouteProbe(SkippingRouting):
    """Decides as inference does, and leaves out everything that comes after the decision."""

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run the block only if the route is still open to be decided above it."""
        self._decide(index, hidden)
        return hidden if self.decided else super().run(index, block, hidden, kwargs)


def _rows_by_block(hard: Tensor) -> list[tuple[int, ...]]:
    """For gates `[batch, blocks]`: the open rows of each block. The one device-to-host read of a decision."""
    columns = zip(*(hard.detach() > 0.5).tolist(), strict=True)
    return [tuple(row for row, is_open in enumerate(column) if is_open) for column in columns]
