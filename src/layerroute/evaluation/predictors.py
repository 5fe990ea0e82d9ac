"""Two ways to guess that a step is a tool call before it is written: a probe trained on labels, and prompt length.

They are what routers are compared with: the first reads what routers read but was told the step types, the second sees
one number. Boundary: arrays and routers' vectors in, yes or no out; what a guess is used for is `baselines.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from layerroute.evaluation.stats import Array

__all__ = ["LengthRule", "Probe"]


@dataclass(frozen=True)
class Probe:
    """A router's shape, `Linear(width, 1)`, that says whether a step is a tool call: where its logit is above 0."""

    weight: Array
    """float64 `[width]`."""
    bias: float

    @classmethod
    def fit(cls, vectors: Array, is_call: Array) -> Probe:
        """Fit by binary cross-entropy, both kinds of equal weight, on vectors `[n, width]` and labels bool `[n]`.

        Ridge of `1 / n` on the weight of standardised features, for there may be fewer rows than features. With one
        kind alone, that kind is the answer to every vector.
        """
        if is_call.all() or not is_call.any():
            return cls(np.zeros(vectors.shape[1]), 1.0 if is_call.all() else -1.0)
        mean, scale = vectors.mean(0), vectors.std(0)
        scale = np.where(scale > 0, scale, 1)
        features = (vectors - mean) / scale
        shares = np.where(is_call, 0.5 / is_call.sum(), 0.5 / (~is_call).sum())
        ridge = 1 / len(vectors)

        def loss(parameters: Array) -> tuple[float, Array]:
            weight, bias = parameters[:-1], parameters[-1]
            logits = features @ weight + bias
            error = shares * (special.expit(logits) - is_call)
            value = shares @ (np.logaddexp(0, logits) - is_call * logits) + ridge / 2 * weight @ weight
            return float(value), np.append(features.T @ error + ridge * weight, error.sum())

        found = optimize.minimize(loss, np.zeros(vectors.shape[1] + 1), jac=True, method="L-BFGS-B").x
        weight = found[:-1] / scale
        return cls(weight, float(found[-1] - weight @ mean))

    def predict(self, vectors: Array) -> Array:
        """bool `[n]`: whether each vector `[n, width]` is a tool call's."""
        predicted: Array = vectors @ self.weight + self.bias > 0
        return predicted


@dataclass(frozen=True)
class LengthRule:
    """Says that a step is a tool call by the length of its prompt alone."""

    threshold: float
    """Tokens."""
    shorter: bool
    """Whether the shorter prompts are the tool calls, or those that reach the threshold."""

    @classmethod
    def fit(cls, lengths: Sequence[int], is_call: Array) -> LengthRule:
        """The threshold (half-way between two lengths) and the direction of the best balanced accuracy.

        Balanced accuracy is the mean of the shares of tool calls and of other steps that are told right; the lowest
        threshold wins a tie, and then `shorter`. With one kind alone, that kind is the answer to every length.
        """
        tokens = np.asarray(lengths, dtype=float)
        if is_call.all() or not is_call.any():
            return cls(0.0, shorter=not is_call.all())
        levels = np.unique(tokens)
        thresholds = np.concatenate([[levels[0]], (levels[1:] + levels[:-1]) / 2])
        below = tokens < thresholds[:, None]
        right = (below[:, is_call].mean(1) + 1 - below[:, ~is_call].mean(1)) / 2
        balanced = np.stack([right, 1 - right], 1)
        best = int(balanced.argmax())
        return cls(float(thresholds[best // 2]), shorter=best % 2 == 0)

    def predict(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens is a tool call's."""
        return (tokens < self.threshold) == self.shorter
