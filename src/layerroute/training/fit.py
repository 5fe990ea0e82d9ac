"""Routers fitted to a bank of routes: each block's gate learns which kinds of decision leave the block out.

What the routers read is fixed once LoRA is trained, so that this is a convex fit on stored vectors, over far more
decisions than the updates have seen. Blocks that the same kinds leave out get the same router, and so a bank of few
routes stays one. Contract: sets the routers' weights; LoRA is as at inference. Boundary: kinds are labels here only,
nothing asks for them at inference.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.model.deciding import router_vectors
from layerroute.model.routed import RoutedModel
from layerroute.training.bank import KINDS, Bank, decision_kinds
from layerroute.training.search import rows_of_kind

__all__ = ["Decisions", "fit_routers", "read_decisions"]

_LOG = logging.getLogger(__name__)

_BATCH = 8


@dataclass(frozen=True)
class Decisions:
    """What the routers read at n decisions, and what kind each is of."""

    vectors: Tensor
    """float32 `[n, width]`."""
    kinds: Tensor
    """int64 `[n]`, an index into `KINDS`."""
    weights: Tensor
    """float32 `[n]`: every kind counts alike, and so does every source within it; they add up to 1."""


@torch.no_grad()
def read_decisions(
    model: RoutedModel, samples: Sequence[Sample], collator: StepCollator, *, rows: int, seed: int
) -> Decisions:
    """Read all decisions of at most so many rows of each kind, the sources in turn.

    A seldom source is read whole where a random choice would hold a few rows of it: what tells the kinds apart differs
    by source, and each counts alike.
    """
    found = {id(sample): sample for kind in KINDS for sample in rows_of_kind(samples, kind, rows, seed)}
    chosen = sorted(found.values(), key=lambda sample: len(sample.input_ids))
    training = model.training
    model.eval()
    vectors, kinds, sources = [], [], []
    for start in range(0, len(chosen), _BATCH):
        part = chosen[start : start + _BATCH]
        batch = {name: value.to(model.device) for name, value in collator(part).items()}
        read = router_vectors(
            model, batch["input_ids"], batch["attention_mask"], batch["context_mask"], batch["segment_ids"]
        )
        of_batch = decision_kinds(batch["segment_types"])
        present = of_batch >= 0
        vectors.append(read[present])
        kinds.append(of_batch[present])
        sources += [part[row].source for row in present.nonzero()[:, 0].tolist()]
    model.train(training)
    every_kind = torch.cat(kinds)
    return Decisions(torch.cat(vectors).float(), every_kind, _weights(every_kind, sources))


def _weights(kinds: Tensor, sources: Sequence[str]) -> Tensor:
    labels = list(zip(kinds.tolist(), sources, strict=True))
    cells = Counter(labels)
    cells_of_kind = Counter(kind for kind, _ in cells)
    weights = [1 / (len(cells_of_kind) * cells_of_kind[kind] * cells[kind, source]) for kind, source in labels]
    return torch.tensor(weights, device=kinds.device)


def fit_routers(model: RoutedModel, decisions: Decisions, bank: Bank, *, decay: float, open_weight: float) -> None:
    """Set every router to the logistic regression of 'this kind runs the block' on what the routers read.

    Minimises `sum of weight * cross_entropy(gate, route) + decay * |w|^2 / 2` per block, the bias free, by L-BFGS.
    A block that every kind runs is left wide open, one that none runs is closed as firmly.

    Args:
        model: whose routers are set.
        decisions: at least one.
        bank: whose routes are the targets.
        decay: larger is smoother.
        open_weight: how much more it counts to close a block that the decision's kind runs than to run one that it
            leaves out.
    """
    table = bank.routes().to(decisions.kinds.device)
    routers = model.routers
    threshold = routers.config.threshold
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for position, block in enumerate(routers.routable):
        patterns.setdefault(tuple(table[:, block].tolist()), []).append(position)
    with torch.no_grad():
        routers.weight.zero_()
    for pattern, positions in patterns.items():
        target = torch.tensor(pattern, device=decisions.kinds.device)[decisions.kinds].float()
        if bool((target == target[0]).all()):  # nothing to tell apart
            with torch.no_grad():
                routers.bias[positions] = _WIDE_OPEN if bool(target[0]) else -_WIDE_OPEN
            continue
        weights = decisions.weights * torch.where(target > 0.5, open_weight, 1.0)
        weight, bias = _regress(decisions.vectors, weights / weights.sum(), target, decay)
        with torch.no_grad():
            routers.weight[positions] = weight
            routers.bias[positions] = bias + math.log(threshold / (1 - threshold))
    _tell(model, decisions, table)


def _tell(model: RoutedModel, decisions: Decisions, table: Tensor) -> None:
    """Say how much of what each kind was told its routers skip, and warn where that is less than half."""
    gates = model.routers.gates(decisions.vectors, 0, len(model.routable)).hard.detach()
    closed = (1 - gates).sum(1) / table.shape[1]
    for index, kind in enumerate(KINDS):
        of_kind = decisions.kinds == index
        if not bool(of_kind.any()):
            continue
        goal, found = 1 - float(table[index].float().mean()), float(closed[of_kind].mean())
        _LOG.info("%s: the routers skip %.1f%% of the blocks, told were %.1f%%", kind, 100 * found, 100 * goal)
        if found > goal + _TOLERANCE:
            _LOG.warning(
                "%s: the routers skip %.1f%% of the blocks where the budget is %.1f%%; a higher search.open_weight "
                "may help",
                kind,
                100 * found,
                100 * goal,
            )
        if found < goal / 2:
            _LOG.warning(
                "%s: the routers skip %.1f%% of the blocks where the budget is %.1f%%; what they read hardly tells "
                "this kind from the others: try another router.pooling or window, or a lower search.open_weight",
                kind,
                100 * found,
                100 * goal,
            )


_WIDE_OPEN = 20.0
"""The logit of a block that no kind leaves out, and minus that of one that every kind does. A float32 sigmoid is 1
there, so that no threshold, and no calibrated budget, closes a block that training never left out."""


def _regress(vectors: Tensor, weights: Tensor, target: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Weight `[width]` and bias of one router; `decay` acts on the weight of standardised features."""
    vectors, weights, target = vectors.double(), weights.double(), target.double()
    mean, scale = vectors.mean(0), vectors.std(0, correction=0).clamp(min=1e-6)
    features = (vectors - mean) / scale
    weight = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = functional.binary_cross_entropy_with_logits(features @ weight + bias, target, reduction="none")
        loss = (weights * losses).sum() + decay * weight.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    plain = weight.detach() / scale
    return plain.float(), (bias.detach() - plain @ mean).float()


_TOLERANCE = 0.03
"""Share of all blocks by which a kind may miss its budget upwards before it is said."""
