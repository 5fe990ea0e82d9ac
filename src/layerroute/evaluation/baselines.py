"""Routes that are chosen otherwise than by the routers, in the same harness and at the rate that the routers reached.

    static_influence   one set of blocks for all steps, by block influence (ShortGPT, arXiv:2403.03853)
    static_greedy      one set for all steps, taken out one by one by the mean loss over step types
    random             for every step another set, drawn at random
    oracle             is told the step type: a set for each, greedily by that type's loss, at that type's rate
    labels             as the oracle, but a probe trained on step types guesses `tool_call` or not
    length             as the oracle, but prompt length alone guesses `tool_call` or not

Nothing is trained further: each runs the adapter's own LoRA, and closes routable blocks only. A turn has one route,
also where the routed model decides again within it; its rate is that of the route which ends the turn. Where the rate
is no whole number of blocks, a step takes the whole number below or above, so that the mean is met. `labels` and
`length` miss the overall rate by as much as their guesses are wrong. Boundary: chooses and measures; writes nothing.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.data.steps import STEP_TYPES
from layerroute.errors import DataError
from layerroute.evaluation.influence import block_influence
from layerroute.evaluation.measure import as_row, batches, bits, finite, score, skip_points
from layerroute.evaluation.predictors import LengthRule, Probe
from layerroute.evaluation.stats import Array
from layerroute.model.deciding import router_vectors
from layerroute.model.routed import RoutedModel
from layerroute.runtime.cost import executed_flops
from layerroute.training.removal import choose_rows, greedy_order, losses_without

__all__ = ["ARMS", "Baselines", "choose", "measure_baselines", "reached_rates"]

ARMS = ("static_influence", "static_greedy", "random", "oracle", "labels", "length")

PURPOSES = {
    "all": STEP_TYPES,
    **{name: (name,) for name in STEP_TYPES},
    "rest": tuple(name for name in STEP_TYPES if name != "tool_call"),
}
"""What a greedy order is chosen for, and the step types that it serves; `rest` is what is not guessed a tool call."""

_LOG = logging.getLogger(__name__)

_INFLUENCE_ROWS = 8
_PROBE_ROWS = 64
"""Rows of each step type, at most."""


def reached_rates(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean skip rate, a share of all blocks, of the rows of samples.jsonl that each of `PURPOSES` serves, if any."""
    sums = {kind: [0.0, 0] for kind in PURPOSES}
    for row in rows:
        for kind, types in PURPOSES.items():
            if row["step_type"] in types:
                sums[kind][0] += row["skip_rate"] / 100
                sums[kind][1] += 1
    return {kind: total / count for kind, (total, count) in sums.items() if count}


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Every arm's choice, ready to give any step its route."""

    blocks: int
    routable: list[int]
    rates: dict[str, float]
    """As `reached_rates` gives them."""
    influence: list[int]
    """Routable blocks, the least influential first."""
    orders: dict[str, list[int]]
    """For each kind in `rates`: blocks in the order in which they go, as many as its rate needs."""
    probe: Probe
    length: LengthRule
    seed: int

    def kind(self, arm: str, sample: Sample, probed: bool) -> str:
        """Which of `PURPOSES` an arm takes a sample for; `probed` is the probe's guess that it is a tool call."""
        guess = {"labels": probed, "length": self.length.predict(sample.prompt_length)}
        if arm in guess:
            return "tool_call" if guess[arm] else "rest"
        return sample.step_type if arm == "oracle" else "all"

    def route(self, arm: str, row_id: str, kind: str = "all") -> Tensor:
        """The route of a step, bool `[blocks]`, on the CPU; a kind that no evaluated step was of counts as `all`.

        Args:
            arm: one of `ARMS`.
            row_id: the step's id, which seeds what is left to chance.
            kind: what the arm takes the step for (see `kind`); those that have one set for all take any step for `all`.
        """
        kind = kind if kind in self.rates else "all"
        rng = random.Random(f"{self.seed}:{row_id}")
        wanted = self.rates[kind] * self.blocks
        count = math.floor(wanted) + (rng.random() < wanted % 1)
        if arm == "random":
            order = rng.sample(self.routable, len(self.routable))
        else:
            order = self.influence if arm == "static_influence" else self.orders[kind]
        route = torch.ones(self.blocks, dtype=torch.bool)
        route[order[:count]] = False
        return route

    def summary(self) -> dict[str, Any]:
        """What was chosen, JSON-able: rates in points of blocks, blocks in the order in which they go."""
        return {
            "skip_rate": {kind: 100 * rate for kind, rate in self.rates.items()},
            "static_influence": self.influence[: self._depth("all")],
            "static_greedy": self.orders["all"],
            "oracle": {kind: order for kind, order in self.orders.items() if kind != "all"},
            "length": vars(self.length),
            "seed": self.seed,
        }

    def _depth(self, kind: str) -> int:
        return _depth(self.rates[kind], self.blocks)


def _depth(rate: float, blocks: int) -> int:
    """Blocks that a rate takes out at most."""
    return math.ceil(rate * blocks - 1e-6)


def choose(
    model: RoutedModel,
    samples: Sequence[Sample],
    collator: StepCollator,
    rates: Mapping[str, float],
    seed: int = 0,
    rows: int = 4,
) -> Baselines:
    """Choose every arm's blocks on calibration samples.

    Args:
        model: in evaluation mode, LoRA not merged.
        samples: of which none is evaluated, as far as possible.
        collator: with labels on the target alone and routes from the prompt alone.
        rates: what `reached_rates` gives of the rows that are evaluated.
        seed: of the choice of samples, and of what the routes leave to chance.
        rows: samples of each step type on which losses are measured.

    Raises:
        DataError: there are no samples.
    """
    if not samples:
        raise DataError("no calibration step fits into the maximum length; baselines need some to be chosen on")
    _LOG.info("choosing baselines: block influence")
    few = choose_rows(samples, rows, seed)
    parts = {name: [_batch(model, collator, [sample]) for sample in of_type] for name, of_type in few.items()}
    influence = block_influence(model, _spread(samples, _INFLUENCE_ROWS, seed), collator)
    return Baselines(
        blocks=model.routers.blocks,
        routable=model.routable,
        rates=dict(rates),
        influence=sorted(model.routable, key=influence.tolist().__getitem__),
        orders=_orders(model, parts, rates),
        probe=_fit_probe(model, _spread(samples, _PROBE_ROWS, seed), collator),
        length=LengthRule.fit([sample.prompt_length for sample in samples], _is_call(samples)),
        seed=seed,
    )


def _batch(model: RoutedModel, collator: StepCollator, samples: Sequence[Sample]) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in collator(samples).items()}


def _spread(samples: Sequence[Sample], rows: int, seed: int) -> list[Sample]:
    """At most so many samples of each step type."""
    return [sample for of_type in choose_rows(samples, rows, seed).values() for sample in of_type]


def _is_call(samples: Sequence[Sample]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.array([sample.step_type == "tool_call" for sample in samples])


def _orders(
    model: RoutedModel, parts: Mapping[str, Sequence[Mapping[str, Tensor]]], rates: Mapping[str, float]
) -> dict[str, list[int]]:
    """A greedy order for each kind; one whose step types have no calibration sample takes what is best for all."""
    depths = {kind: _depth(rate, model.routers.blocks) for kind, rate in rates.items()}
    if not any(depths.values()):
        return {kind: [] for kind in rates}
    _LOG.info("choosing baselines: what each block is worth to each step type")
    alone = {name: losses_without(model, part, (), model.routable) for name, part in parts.items()}
    orders = {}
    for kind, depth in depths.items():
        names = [name for name in PURPOSES[kind] if name in parts] or list(parts)
        _LOG.info("choosing baselines: %d blocks to leave out for %s", depth, kind)
        mean = torch.stack([alone[name] for name in names]).mean(0).tolist()
        ranked = dict(zip(model.routable, mean, strict=True))
        orders[kind] = greedy_order(model, [parts[name] for name in names], ranked, depth)
    return orders


def _fit_probe(model: RoutedModel, samples: Sequence[Sample], collator: StepCollator) -> Probe:
    groups = list(batches(samples))
    vectors = np.concatenate([_vectors(model, _batch(model, collator, group)) for group in groups])
    return Probe.fit(vectors, _is_call([sample for group in groups for sample in group]))


def _vectors(model: RoutedModel, batch: Mapping[str, Tensor]) -> Array:
    """What the routers read to decide the first route of each row, float64 `[B, width]`."""
    read = router_vectors(model, batch["input_ids"], batch["attention_mask"], batch["context_mask"])
    vectors: Array = read[:, 0].double().cpu().numpy()
    return vectors


def measure_baselines(
    model: RoutedModel, samples: Sequence[Sample], collator: StepCollator, baselines: Baselines
) -> list[dict[str, Any]]:
    """Measure one batch of steps under every arm: a row of baselines.jsonl for each.

    Routes that arms share are run once. The routers' own FLOPs, which a static route would save, are counted.

    Args:
        model: in evaluation mode, LoRA not merged.
        samples: few enough for one pass.
        collator: as in `choose`.
        baselines: what `choose` gave.
    """
    batch = _batch(model, collator, samples)
    probed = baselines.probe.predict(_vectors(model, batch))
    routes = [
        {arm: baselines.route(arm, sample.id, baselines.kind(arm, sample, bool(call))) for arm in ARMS}
        for sample, call in zip(samples, probed, strict=True)
    ]
    figures = _scores(model, batch, {(row, bits(route)) for row, arms in enumerate(routes) for route in arms.values()})
    rows = []
    for row, (sample, arms) in enumerate(zip(samples, routes, strict=True)):
        lengths = sample.prompt_length, len(sample.input_ids) - sample.prompt_length
        measured = {}
        for arm, route in arms.items():
            nll, accuracy = figures[row, bits(route)]
            measured[arm] = {
                "route": bits(route),
                "skip_rate": skip_points(route),
                "nll": finite(nll),
                "accuracy": accuracy,
                "flops": as_row(executed_flops(model, [(0, route)], *lengths)),
            }
        rows.append({"id": sample.id, "arms": measured})
    return rows


def _scores(
    model: RoutedModel, batch: Mapping[str, Tensor], wanted: Iterable[tuple[int, str]]
) -> dict[tuple[int, str], tuple[float, float]]:
    """Negative log-likelihood and accuracy of rows of a batch under routes, in passes of at most the batch's size."""
    # like routes together: a block is called for all or none
    pairs = sorted(wanted, key=lambda pair: (pair[1], pair[0]))
    size = len(batch["input_ids"])
    figures: dict[tuple[int, str], tuple[float, float]] = {}
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        rows = torch.tensor([row for row, _ in part], device=model.device)
        routes = torch.tensor([[bit == "1" for bit in route] for _, route in part])
        scores = score(model, {name: tensor[rows] for name, tensor in batch.items()}, routes)
        figures.update(zip(part, zip(scores.nll.tolist(), scores.accuracy.tolist(), strict=True), strict=True))
    return figures
