"""How many blocks each kind of decision leaves out during a run: along a ramp, or as far as losses are accepted.

Both have one surface: `at(step)` gives the depths of an update, `note` is told what skipping cost, `state` goes into a
checkpoint. Boundary: numbers alone; which blocks go is the bank's matter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

from layerroute.model.routed import RoutedModel
from layerroute.training import objective
from layerroute.training.bank import KINDS, depths
from layerroute.training.recipe import Recipe

__all__ = ["AcceptedDepth", "Depth", "RampedDepth", "make_depth"]

_LOG = logging.getLogger(__name__)


class Depth(Protocol):
    """Blocks that each kind leaves out; steps are optimiser updates, from 0."""

    most: dict[str, int]
    """Beyond which a kind never goes."""

    def at(self, step: int) -> dict[str, int]:
        """By kind, at update `step`; updates are asked for in their order, each as often as is wanted."""

    def limit(self, found: Mapping[str, int]) -> None:
        """Go no deeper than blocks were found, by kind."""

    def note(self, divergence: Mapping[str, tuple[float, float]]) -> None:
        """Be told what skipping cost in a micro-batch: summed divergence and loss tokens, by kind."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, JSON-able and exact."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""


def make_depth(recipe: Recipe, model: RoutedModel) -> Depth:
    """The recipe's: by `objective.budgets` of all the model's blocks, or by `objective.accepted` loss."""
    depth: Depth
    if recipe.objective.accepted is None:
        depth = RampedDepth(recipe, model.routers.blocks)
    else:
        depth = AcceptedDepth(recipe, len(model.routable))
    if not model.router_config.boundaries:  # a turn has one route: a call's own
        depth.most["direct_call"] = 0
    return depth


class RampedDepth:
    """None in the warm-up, then rising linearly to the budgets."""

    def __init__(self, recipe: Recipe, blocks: int) -> None:
        assert recipe.search is not None and recipe.objective.budgets is not None
        updates = recipe.training.updates
        self.warmup = round(recipe.search.full_depth_share * updates)
        self.ramp = recipe.objective.ramp_share * updates
        self.most = depths(recipe.objective.budgets, blocks)
        if self.at(updates - 1) != self.most:
            _LOG.warning("training.steps: %d updates are too few for the ramp; the budgets are not reached", updates)
        for kind, share in recipe.objective.budgets.model_dump().items():
            if share and not self.most[kind]:
                _LOG.warning("objective.budgets.%s=%s is less than half of one of %d blocks: none", kind, share, blocks)

    def at(self, step: int) -> dict[str, int]:
        """`ceil(most * min(1, done / ramp))`, where `done` counts the updates since the warm-up."""
        done = step - self.warmup
        if done < 0:
            return dict.fromkeys(KINDS, 0)
        return {kind: math.ceil(objective.budget_at(done, goal, self.ramp)) for kind, goal in self.most.items()}

    def limit(self, found: Mapping[str, int]) -> None:
        """Lower what the ramp ends with."""
        self.most = {kind: min(most, found[kind]) for kind, most in self.most.items()}

    def note(self, divergence: Mapping[str, tuple[float, float]]) -> None:
        """A ramp goes its way whatever it costs."""

    def state(self) -> dict[str, Any]:
        """Where the ramp ends."""
        return {"most": self.most}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        self.most = dict(state["most"])


class AcceptedDepth:
    """One block deeper whenever skipping has cost less than is accepted, one less deep whenever it has cost more.

    A multiplier's ascent in whole blocks: every `interval` updates, each kind compares the divergence per loss token
    since the last change with what is accepted of it. In the last part of the run a kind only gives blocks back.
    """

    def __init__(self, recipe: Recipe, routable: int) -> None:
        assert recipe.search is not None and recipe.objective.accepted is not None
        updates = recipe.training.updates
        self.accepted: dict[str, float] = recipe.objective.accepted.model_dump()
        self.interval = max(1, round(_INTERVAL_SHARE * updates))
        self.next_change = round(recipe.search.full_depth_share * updates)
        self.settling = round((1 - _SETTLE_SHARE) * updates)
        self.most = dict.fromkeys(KINDS, routable)
        self.depth = dict.fromkeys(KINDS, 0)
        self.cost = {kind: [0.0, 0.0] for kind in KINDS}
        """Summed divergence and loss tokens since the last change."""

    def at(self, step: int) -> dict[str, int]:
        """The depths, changed where it is time."""
        if step >= self.next_change:
            self.next_change += self.interval
            self._change(deeper=step < self.settling)
        return dict(self.depth)

    def _change(self, deeper: bool) -> None:
        for kind in KINDS:
            total, tokens = self.cost[kind]
            accepted = self.accepted[kind]
            if self.depth[kind] and tokens and total / tokens > accepted:
                self.depth[kind] -= 1
            elif deeper and tokens and accepted > 0 and self.depth[kind] < self.most[kind]:
                self.depth[kind] += 1
        # what a boundary closes, its prompt may close at most
        self.depth["direct_call"] = min(self.depth["direct_call"], self.depth["tool_call"])
        self.cost = {kind: [0.0, 0.0] for kind in KINDS}

    def limit(self, found: Mapping[str, int]) -> None:
        """Never ask for more again."""
        self.most = {kind: min(most, found[kind]) for kind, most in self.most.items()}
        self.depth = {kind: min(depth, found[kind]) for kind, depth in self.depth.items()}

    def note(self, divergence: Mapping[str, tuple[float, float]]) -> None:
        """Add a micro-batch, of all processes."""
        for kind, (total, tokens) in divergence.items():
            self.cost[kind][0] += total
            self.cost[kind][1] += tokens

    def state(self) -> dict[str, Any]:
        """All that changes."""
        return {name: getattr(self, name) for name in ("depth", "most", "cost", "next_change")}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        self.depth, self.most, self.next_change = dict(state["depth"]), dict(state["most"]), state["next_change"]
        self.cost = {kind: list(pair) for kind, pair in state["cost"].items()}


_INTERVAL_SHARE = 0.04
"""Of the run between two changes: about 20 of them before it settles, each judged on several updates."""

_SETTLE_SHARE = 0.25
"""Of the run, its last part, in which no kind goes deeper."""
