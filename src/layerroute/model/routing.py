"""How the blocks of one pass run: the route is decided when it is first needed, then obeyed.

    MaskedRouting     training: every block is computed, then gated, so that gradients reach the gates
    SkippingRouting   inference: a closed block is not called; in a mixed batch only the open rows enter it
    RouteProbe        decides and calls nothing above the decision

All three decide with the same code on the same tokens. One object serves one forward pass, or one generation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerroute.errors import BackboneError
from layerroute.model.router import Gates, Routers

__all__ = ["MaskedRouting", "RouteProbe", "Routing", "SkippingRouting"]


class Routing:
    """Decides a route, block by block or all at once, and keeps the gates.

    Args:
        routers: the model's routers.
        context_mask: bool `[batch, seq]`, the tokens the route may depend on.
        gates: float32 `[batch, blocks]` gates decided elsewhere (a forced route, a window's decision).
        noise: scale of the logit noise, for training.
    """

    def __init__(self, routers: Routers, context_mask: Tensor, gates: Gates | None = None, noise: float = 0.0) -> None:
        self.routers = routers
        self.context_mask = context_mask
        self.noise = noise
        self.asked: set[int] = set()
        self.columns: list[Gates | None] = [None] * routers.blocks
        self.always_open: set[int] = set()
        if gates is not None:
            self._fill(0, gates)
        else:
            ones = torch.ones(context_mask.shape[0], 1, device=context_mask.device)
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
        """Gates of all blocks, each float32 `[batch, blocks]`; the route must be decided."""
        columns = [column for column in self.columns if column is not None]
        assert len(columns) == len(self.columns), "the route is not decided yet"
        return Gates(torch.cat([c.hard for c in columns], 1), torch.cat([c.prob for c in columns], 1))

    def _decide(self, index: int, hidden: Tensor) -> None:
        """Make sure that the gate of block `index` is known, from `hidden` as it enters that block."""
        self.asked.add(index)
        if self.columns[index] is not None:
            return
        routers = self.routers
        position = routers.routable.index(index)
        # Early: the first routable block decides for all, so no later block comes here undecided.
        last = len(routers.routable) if routers.config.position == "early" else position + 1
        vector = routers.read(hidden, self.context_mask)
        self._fill(index, routers.gates(vector, position, last, self.noise))

    def _fill(self, first: int, gates: Gates) -> None:
        columns = zip(gates.hard.split(1, dim=1), gates.prob.split(1, dim=1), strict=True)
        for block, column in enumerate(columns, start=first):
            self.columns[block] = Gates(*column)


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
        gate = column.hard.unsqueeze(-1)
        chosen = torch.where(gate.detach() > 0.5, output, hidden)
        if not self.gate_gradient:
            return chosen
        # where() selects without rounding; the second term is exactly zero and carries the gate's gradient alone
        return chosen + ((gate - gate.detach()) * (output - hidden).detach()).to(chosen.dtype)


class SkippingRouting(Routing):
    """Inference: call a block only on the rows whose route has it open, and not at all if there are none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows: list[Tensor | bool] | None = None

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return the hidden states with the open rows replaced by the block's output."""
        self._decide(index, hidden)
        rows = self._open_rows(index)
        cache = kwargs.get("past_key_values")
        if rows is True:
            hidden = block(hidden, **kwargs)
        elif rows is not False:
            selected = block(hidden.index_select(0, rows), **_select_rows(kwargs, rows, hidden.shape[0]))
            hidden = hidden.index_copy(0, rows, selected)
        if index == len(self.columns) - 1 and cache is not None:
            cache.advance(hidden.shape[1])
        return hidden

    def _open_rows(self, index: int) -> Tensor | bool:
        """True: all rows are open; False: none is; otherwise int64 indices of the open rows."""
        if index in self.always_open:
            return True
        if self._rows is None and self.decided:
            self._rows = _rows_by_block(self.gates.hard)
        if self._rows is not None:
            return self._rows[index]
        column = self.columns[index]  # routers that sit at each block: the blocks above are not decided yet
        assert column is not None
        return _rows_by_block(column.hard)[0]


class RouteProbe(SkippingRouting):
    """Decides as inference does, and leaves out everything that comes after the decision."""

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run the block only if the route is still open to be decided above it."""
        self._decide(index, hidden)
        return hidden if self.decided else super().run(index, block, hidden, kwargs)


def _rows_by_block(hard: Tensor) -> list[Tensor | bool]:
    """For gates `[batch, blocks]`: the open rows of each block. The one device-to-host read of a decision."""
    result: list[Tensor | bool] = []
    shared: dict[tuple[int, ...], Tensor] = {}
    for column in zip(*(hard.detach() > 0.5).tolist(), strict=True):
        if all(column) or not any(column):
            result.append(bool(column[0]))
            continue
        rows = tuple(row for row, is_open in enumerate(column) if is_open)
        if rows not in shared:
            shared[rows] = torch.tensor(rows, device=hard.device)
        result.append(shared[rows])
    return result


def _select_rows(kwargs: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """Restrict the per-row arguments of a block (mask, positions, rotary embedding) to `rows`."""

    def select(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(select(part) for part in value)
        if isinstance(value, Tensor) and value.shape[0] == batch:
            return value.index_select(0, rows)
        return value

    per_row = ("attention_mask", "position_ids", "position_embeddings")
    return {name: select(value) if name in per_row else value for name, value in kwargs.items()}
