"""Guessing tool calls: a probe that is a logistic regression, and the best of all length thresholds."""

import itertools

import numpy as np
import pytest

from layerroute.evaluation.predictors import LengthRule, Probe


def test_the_probe_is_a_logistic_regression():
    """Its gradient is zero, and where it can tell the kinds apart, it does; scale and offset do not matter."""
    rng = np.random.default_rng(0)
    is_call = np.arange(90) % 3 == 0
    vectors = rng.normal(size=(90, 5)) * [1, 10, 0.1, 1, 1] + [0, 50, 0, 0, 0]
    vectors[:, 1] += 6 * is_call
    probe = Probe.fit(vectors, is_call)
    scale = vectors.std(0)
    features = (vectors - vectors.mean(0)) / scale
    error = 1 / (1 + np.exp(-(vectors @ probe.weight + probe.bias))) - is_call
    shares = np.where(is_call, 1 / 60, 1 / 120)
    np.testing.assert_allclose(features.T @ (shares * error) + probe.weight * scale / 90, 0, atol=1e-4)
    assert (shares * error).sum() == pytest.approx(0, abs=1e-4)
    np.testing.assert_array_equal(Probe.fit(vectors * 7 + 2, is_call).predict(vectors * 7 + 2), probe.predict(vectors))
    apart = np.where(is_call, 1.0, -1.0)[:, None]
    assert (Probe.fit(apart, is_call).predict(apart) == is_call).all()


@pytest.mark.parametrize("only", [True, False])
def test_one_kind_alone_is_the_answer(only):
    is_call = np.full(4, only)
    assert (Probe.fit(np.eye(4), is_call).predict(np.eye(4)) == only).all()
    assert LengthRule.fit([5, 6, 7, 8], is_call).predict(3) is only
    assert LengthRule.fit([5, 6, 7, 8], is_call).predict(9) is only


@pytest.mark.parametrize("seed", range(6))
def test_the_length_threshold_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    is_call = rng.random(25) < 0.4
    lengths = rng.integers(10, 40, size=25) + (8 if seed % 2 else -8) * is_call

    def balanced(predict):
        said = np.array([predict(tokens) for tokens in lengths.tolist()])
        return (said[is_call].mean() + (~said[~is_call]).mean()) / 2

    best = max(
        balanced(lambda tokens: (tokens < threshold) == shorter)  # noqa: B023
        for threshold, shorter in itertools.product(range(60), (True, False))
    )
    rule = LengthRule.fit(lengths.tolist(), is_call)
    assert balanced(rule.predict) == pytest.approx(best) and rule.shorter == (seed % 2 == 0)
