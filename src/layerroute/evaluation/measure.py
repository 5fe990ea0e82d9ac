"""Teacher forcing: what each step's target costs under the untouched backbone, under LoRA alone, and routed.

Contract: routes are decided as at inference, from the prompt alone and with no noise, and closed blocks are skipped; a
row's figures do not depend on the rows beside it. LoRA is beside the weights, not merged, and counted in the FLOPs.
Boundary: knows samples and models; what is written where is `run.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.model.routed import RoutedModel
from layerroute.runtime.cost import Flops, backbone_flops, executed_flops, lora_flops
from layerroute.training.loss import MODEL_INPUTS
from layerroute.training.objective import loss_tokens

__all__ = ["Scores", "as_row", "batches", "bits", "finite", "measure", "route_flops", "score", "skip_points"]

BATCH_TOKENS = 2048
"""Padded tokens of a pass at most (one row may be longer): wide enough for a CPU, and logits of it fit anywhere."""


@dataclass(frozen=True)
class Scores:
    """A pass over a batch of B rows."""

    nll: Tensor
    """float64 `[B]`, on the CPU: negative log-likelihood summed over each row's target tokens, nats."""
    accuracy: Tensor
    """float64 `[B]`, on the CPU: share of the target's tokens that are the model's first choice."""
    starts: Tensor
    """bool `[B]`, on the CPU: whether the target's first token is. It decides whether a call is made at all."""
    routes: Tensor
    """bool `[B, segments, blocks]`, on the CPU, True = executed."""
    gate_probs: Tensor
    """float32 `[B, segments, blocks]`, on the CPU: each decision's own, 1 at blocks without a router."""

    def with_rows(self, rows: Tensor, other: Scores) -> Scores:
        """These scores with the rows at indices `rows` taken from `other`, which holds nothing else."""
        nll, accuracy, starts = self.nll.clone(), self.accuracy.clone(), self.starts.clone()
        nll[rows], accuracy[rows], starts[rows] = other.nll, other.accuracy, other.starts
        return Scores(nll, accuracy, starts, self.routes, self.gate_probs)


@torch.no_grad()
def score(model: RoutedModel, batch: Mapping[str, Tensor], routes: Tensor | None = None) -> Scores:
    """Run a batch of `StepCollator` in evaluation mode, under the routers' own routes or forced ones.

    Within `model.disable_routing()` or `model.disable_adapter()` every block runs.

    Args:
        model: in evaluation mode.
        batch: on the model's device.
        routes: bool `[B, blocks]` or `[B, segments, blocks]`; None asks the routers.
    """
    positions, targets = loss_tokens(batch["labels"])
    inputs = {name: batch[name] for name in MODEL_INPUTS}
    forced = {} if routes is None else {"routes": routes.to(model.device)}
    out = model(**inputs, **forced, logits_to_keep=positions, use_cache=False)
    nll, right = [], []
    for logits, wanted in zip(out.logits, targets, strict=True):
        kept = wanted != -100
        row, label = logits[kept].float(), wanted[kept]
        chosen = row.gather(1, label.unsqueeze(1)).squeeze(1)
        nll.append((torch.logsumexp(row, 1) - chosen).double().sum())
        right.append((row.argmax(1) == label).cpu())
    return Scores(
        torch.stack(nll).cpu(),
        torch.stack([hits.double().mean() for hits in right]),
        torch.stack([hits[0] for hits in right]),
        out.routes.cpu(),
        out.gate_probs.float().cpu(),
    )


def batches(samples: Sequence[Sample], tokens: int = BATCH_TOKENS) -> Iterator[list[Sample]]:
    """Group samples of like length, each group at most so many padded tokens (or one sample)."""
    group: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.input_ids)):
        if group and (len(group) + 1) * len(sample.input_ids) > tokens:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def measure(model: RoutedModel, samples: Sequence[Sample], collator: StepCollator) -> list[dict[str, Any]]:
    """Measure one batch of steps: a row of samples.jsonl for each, without its texts and its stability.

    Args:
        model: in evaluation mode, LoRA not merged.
        samples: few enough for one pass (see `batches`).
        collator: with labels on the target alone and routes from the prompt alone.
    """
    batch = {name: tensor.to(model.device) for name, tensor in collator(samples).items()}
    routed = score(model, batch)
    with model.disable_adapter():
        base = score(model, batch)
    lora = routed
    skipping = (~routed.routes).flatten(1).any(1).nonzero().squeeze(1)
    if len(skipping):  # with every gate open the routed pass is the LoRA-only pass, bit for bit
        chosen = {name: tensor[skipping.to(tensor.device)] for name, tensor in batch.items()}
        with model.disable_routing():
            lora = routed.with_rows(skipping, score(model, chosen))
    arms = {"base": base, "lora_only": lora, "routed": routed}
    return [_record(model, sample, row, arms) for row, sample in enumerate(samples)]


def _record(model: RoutedModel, sample: Sample, row: int, arms: Mapping[str, Scores]) -> dict[str, Any]:
    routed = arms["routed"]
    starts = [0, *sample.segment_starts]
    routes = routed.routes[row, : len(starts)]
    prompt, new = sample.prompt_length, len(sample.input_ids) - sample.prompt_length
    flops = {
        "base": backbone_flops(model, prompt, new),
        "lora_only": lora_flops(model, prompt, new),
        "routed": route_flops(model, sample, routes),
    }
    return {
        "id": sample.id,
        "group": sample.group,
        "source": sample.source,
        "step_type": sample.step_type,
        "prompt_tokens": prompt,
        "target_tokens": new,
        "cut": sample.cut,
        "route": bits(routes[-1]),
        "skip_rate": skip_points(routes[-1]),
        "gate_probs": [finite(round(value, 6)) for value in routed.gate_probs[row, len(starts) - 1].tolist()],
        "segments": [{"start": at, "route": bits(route)} for at, route in zip(starts, routes, strict=True)],
        "nll": {name: finite(float(scores.nll[row])) for name, scores in arms.items()},
        "accuracy": {name: float(scores.accuracy[row]) for name, scores in arms.items()},
        "starts": {name: bool(scores.starts[row]) for name, scores in arms.items()},
        "flops": {name: as_row(cost) for name, cost in flops.items()},
    }


def route_flops(model: RoutedModel, sample: Sample, routes: Tensor) -> Flops:
    """FLOPs of generating the sample's target from its prompt under the routes of its turn, bool `[segments, blocks]`.

    A segment that starts within the prompt (in the turn's own thought) is taken to have read all of the prompt.
    """
    prompt, new = sample.prompt_length, len(sample.input_ids) - sample.prompt_length
    segments = [(0, routes[0])]
    for position, route in zip(sample.segment_starts, routes[1:], strict=True):
        # the pass that reads the boundary's last token gives the first token under the new route
        start = position + 1 - prompt
        segments = [*segments, (start, route)] if start > 0 else [(0, route)]
    return executed_flops(model, segments, prompt, new)


def as_row(cost: Flops) -> dict[str, int]:
    """FLOPs, JSON-able."""
    return {"prefill": cost.prefill, "decode": cost.decode}


def bits(route: Tensor) -> str:
    """A route, bool `[blocks]`, as text: 1 for an executed block, 0 for a skipped one, first block first."""
    return "".join("1" if is_open else "0" for is_open in route.tolist())


def skip_points(route: Tensor) -> float:
    """Skip rate of a route, bool `[blocks]`, in points of all blocks."""
    return 100 * float((~route).double().mean())


def finite(number: float) -> float | None:
    """The number, or None for NaN and infinity, which JSON does not know."""
    return number if abs(number) < float("inf") else None
