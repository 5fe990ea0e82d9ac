"""A bank of routes: for each kind of decision the blocks that it leaves out, in the order in which they go.

Contract: the set of every kind lies within that of the deepest, so that whatever decisions follow one another in a
turn, no block is left out that the deepest kind does not leave out. Boundary: pure bookkeeping over step types and
block numbers; how the order is found is `search.py`'s, who decides at inference is the routers'.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerroute.data.steps import STEP_TYPES
from layerroute.training.settings import Budgets

__all__ = ["DIRECT", "KINDS", "Bank", "decision_kinds", "depths", "prompt_kinds"]

KINDS = (*STEP_TYPES, "direct_call")
"""What is decided: the step types, and the prompt of a call that no thought precedes, up to its boundary."""

DIRECT = KINDS.index("direct_call")


def decision_kinds(segment_types: Tensor) -> Tensor:
    """The kind of every decision, int64 `[B, S]`, an index into `KINDS`; -1 where a row has no such segment.

    Args:
        segment_types: int64 `[B, S]`, an index into `STEP_TYPES` or -1 (see `StepCollator`).
    """
    kinds = segment_types.clone()
    several = (segment_types >= 0).sum(1) > 1
    kinds[several & (segment_types[:, 0] == STEP_TYPES.index("tool_call")), 0] = DIRECT
    return kinds


def prompt_kinds(boundaries: bool) -> list[int]:
    """The kinds, as indices into `KINDS`, that are decided at the end of a prompt: calls have a route of their own from
    a boundary on, if turns have boundaries."""
    call = "direct_call" if boundaries else "tool_call"
    return [index for index, kind in enumerate(KINDS) if kind in (call, "planning", "answer")]


def depths(budgets: Budgets, blocks: int) -> dict[str, int]:
    """How many blocks each kind leaves out: its budget of all `blocks`, to the nearest whole number."""
    shares = budgets.model_dump()
    if shares["direct_call"] is None:
        shares["direct_call"] = shares["tool_call"]
    return {kind: round(shares[kind] * blocks) for kind in KINDS}


class Bank:
    """The blocks that each kind leaves out, the first to go first.

    Args:
        blocks: of the backbone.
        orders: by kind; a kind that is missing leaves out nothing.
    """

    def __init__(self, blocks: int, orders: Mapping[str, list[int]] | None = None) -> None:
        self.blocks = blocks
        self.orders: dict[str, list[int]] = {kind: list((orders or {}).get(kind, ())) for kind in KINDS}

    def routes(self, depth: Mapping[str, int] | None = None) -> Tensor:
        """The route of every kind, bool `[kinds, blocks]`, True = executed.

        Args:
            depth: how many blocks of each order are left out; all of them by default.
        """
        routes = torch.ones(len(KINDS), self.blocks, dtype=torch.bool)
        for index, kind in enumerate(KINDS):
            routes[index, self.orders[kind][: None if depth is None else depth[kind]]] = False
        return routes

    def turn_routes(self, kinds: Tensor, depth: Mapping[str, int] | None = None) -> Tensor:
        """The routes of turns, bool `[B, S, blocks]`: each segment's own, less what an earlier one closed.

        Args:
            kinds: int64 `[B, S]` (see `decision_kinds`).
            depth: as for `routes`.
        """
        table = self.routes(depth).to(kinds.device)
        own = table[kinds.clamp(min=0)] | (kinds < 0).unsqueeze(-1)
        return own.long().cumprod(1).bool()
