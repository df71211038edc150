"""Losses: float64 references from logit -1000 to 1000, the paper's own numbers, and Appendix B's derivatives."""

import math

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from keras import ops

from retinanet_keras import losses

EXTREME = [-1000.0, -200.0, -104.0, -88.0, -60.0, -30.0, -15.0, -14.0, -13.0]
LOGITS = np.float32(sorted([*EXTREME, *np.negative(EXTREME), *np.linspace(-12, 12, 97)]))
GAMMAS = [0, 0.5, 2, 5]
ALPHAS = [None, 0.25, 0.75]


def value_and_slope(function, logits, y):
    """Values and derivatives by the logits, for one class y everywhere."""
    x = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x, tf.fill(x.shape, float(y)))
    return value.numpy(), tape.gradient(value, x).numpy()


def p_of(x):
    return np.exp(reference.log_sigmoid(x))


def alpha_of(alpha, y):
    return 1.0 if alpha is None else (alpha if y == 1 else 1 - alpha)


def close(ours, theirs):
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs, rtol=5e-5, atol=1e-12)


# Values


@pytest.mark.parametrize("y", [0, 1])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_cross_entropy_equals_numpy(alpha, y):
    ours, _ = value_and_slope(lambda x, t: losses.cross_entropy(x, t, alpha), LOGITS, y)
    x_t = LOGITS if y == 1 else -LOGITS
    close(ours, -alpha_of(alpha, y) * reference.log_sigmoid(x_t))


@pytest.mark.parametrize("y", [0, 1])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_equals_numpy(gamma, alpha, y):
    ours, _ = value_and_slope(lambda x, t: losses.focal(x, t, alpha, gamma), LOGITS, y)
    close(ours, reference.focal(LOGITS, np.full(LOGITS.shape, y), alpha, gamma))


@pytest.mark.parametrize("y", [0, 1])
@pytest.mark.parametrize("gamma, beta", [(1, 0), (2, 1), (4, 0), (0.5, -1)])
def test_focal_star_equals_numpy(gamma, beta, y):
    ours, _ = value_and_slope(lambda x, t: losses.focal_star(x, t, 0.25, gamma, beta), LOGITS, y)
    x_t = np.float64(LOGITS if y == 1 else -LOGITS)
    close(ours, -alpha_of(0.25, y) * reference.log_sigmoid(gamma * x_t + beta) / gamma)


def test_hinge_by_hand():
    values = losses.hinge(np.float32([0, 1000, -1000, math.log(3), 0]), np.float32([1, 1, 1, 0, 0]), threshold=0.75)
    np.testing.assert_allclose(values, [0.25, 0, 0.75, 0.5, 0.25], atol=1e-6)
    weighted = losses.hinge(np.float32([0, 0]), np.float32([1, 0]), alpha=0.25, threshold=0.7)
    np.testing.assert_allclose(weighted, [0.05, 0.15], atol=1e-6)


# What the paper says


def ratio_to_cross_entropy(p_t, gamma=2.0):
    """CE / FL at a probability of the true class."""
    x = np.float32([math.log(p_t / (1 - p_t))])
    ones = np.ones(1, "float32")
    return float(losses.cross_entropy(x, ones)[0] / losses.focal(x, ones, None, gamma)[0])


def test_section_3_2_examples():
    assert ratio_to_cross_entropy(0.9) == pytest.approx(100, rel=1e-4)  # "100x lower loss compared with CE"
    assert ratio_to_cross_entropy(0.968) == pytest.approx(1000, rel=0.03)  # "~0.968 it would have 1000x lower loss"
    assert ratio_to_cross_entropy(0.5) == pytest.approx(4, rel=1e-4)  # "scaled down by at most 4x for p_t <= .5"
    assert max(ratio_to_cross_entropy(p) for p in np.linspace(0.01, 0.5, 20)) <= 4.0001


def test_gamma_0_is_cross_entropy():
    for y in (0.0, 1.0):
        targets = np.full(LOGITS.shape, y, "float32")
        np.testing.assert_allclose(
            losses.focal(LOGITS, targets, 0.25, 0.0), losses.cross_entropy(LOGITS, targets, 0.25)
        )


def test_alpha_weighs_the_classes():
    ours = losses.cross_entropy(np.zeros(2, "float32"), np.float32([1, 0]), alpha=0.25)
    np.testing.assert_allclose(ours, [0.25 * math.log(2), 0.75 * math.log(2)], rtol=1e-6)


# Appendix B


@pytest.mark.parametrize("y", [0, 1])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_slope_of_cross_entropy(alpha, y):
    _, slope = value_and_slope(lambda x, t: losses.cross_entropy(x, t, alpha), LOGITS, y)
    sign = 2 * y - 1
    close(slope, alpha_of(alpha, y) * sign * -p_of(-sign * LOGITS))  # y (p_t - 1), and 1 - p_t = sigmoid(-x_t)


@pytest.mark.parametrize("y", [0, 1])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_slope_of_focal(gamma, alpha, y):
    _, slope = value_and_slope(lambda x, t: losses.focal(x, t, alpha, gamma), LOGITS, y)
    sign = 2 * y - 1
    x_t = np.float64(sign * LOGITS)
    p_t, rest = p_of(x_t), p_of(-x_t)
    close(slope, alpha_of(alpha, y) * sign * rest**gamma * (gamma * p_t * reference.log_sigmoid(x_t) - rest))


@pytest.mark.parametrize("y", [0, 1])
@pytest.mark.parametrize("gamma, beta", [(2, 1), (4, 0)])
def test_slope_of_focal_star(gamma, beta, y):
    _, slope = value_and_slope(lambda x, t: losses.focal_star(x, t, None, gamma, beta), LOGITS, y)
    sign = 2 * y - 1
    close(slope, sign * -p_of(-(gamma * np.float64(sign * LOGITS) + beta)))


def test_slope_of_focal_by_finite_differences():
    x, step = np.linspace(-6, 6, 25), 1e-5
    for y in (0, 1):
        _, slope = value_and_slope(losses.focal, x.astype("float32"), y)
        ys = np.full(x.shape, y)
        np.testing.assert_allclose(
            slope, (reference.focal(x + step, ys) - reference.focal(x - step, ys)) / (2 * step), rtol=1e-4, atol=1e-7
        )


# Types and shapes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_lose_nothing_more(dtype):
    half = ops.cast(np.linspace(-12, 12, 9), dtype)
    ours = losses.focal(half, ops.ones_like(half))
    assert ours.dtype == "float32"
    np.testing.assert_allclose(ours, losses.focal(ops.cast(half, "float32"), np.ones(9, "float32")))


def test_losses_are_elementwise_and_empty_is_allowed():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    targets = (logits > 0.3).astype("float32")
    for function in (losses.cross_entropy, losses.focal, losses.focal_star, losses.hinge):
        whole = ops.convert_to_numpy(function(logits, targets))
        assert whole.shape == logits.shape
        np.testing.assert_allclose(whole[1, 2], function(logits[1, 2], targets[1, 2]), rtol=1e-6)
        assert function(np.zeros((0, 4), "float32"), np.zeros((0, 4), "float32")).shape == (0, 4)


# Smooth L1


def test_smooth_l1_by_hand():
    errors = np.float32([0, 0.1, -0.1, 0.5, -0.5, 2, -1000])
    np.testing.assert_allclose(losses.smooth_l1(errors, 0.5), [0, 0.01, 0.01, 0.25, 0.25, 1.75, 999.75], rtol=1e-6)
    np.testing.assert_allclose(losses.smooth_l1(np.float32([0.5, 3]), 1.0), [0.125, 2.5])
    np.testing.assert_allclose(losses.smooth_l1(np.float32([0.055, 1.055])), [0.01375, 1.0], rtol=1e-6)  # beta 0.11


def test_smooth_l1_is_continuous_and_smooth_where_it_turns():
    for beta in (0.11, 1.0):
        errors = np.float32([beta - 1e-4, beta + 1e-4, -beta - 1e-4, -beta + 1e-4])
        x = tf.constant(errors)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = losses.smooth_l1(x, beta)
        np.testing.assert_allclose(value, beta / 2, atol=2e-4)
        np.testing.assert_allclose(tape.gradient(value, x), [1, 1, -1, -1], atol=2e-3)


def test_smooth_l1_has_no_slope_at_0():
    x = tf.zeros(3)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = losses.smooth_l1(x)
    np.testing.assert_array_equal(tape.gradient(value, x), 0)


# Keras objects


@pytest.mark.parametrize("made", [losses.FocalLoss(0.3, 1.5), losses.FocalLoss(None), losses.SmoothL1Loss(0.4)])
def test_classes_serialise_and_equal_the_functions(made):
    again = keras.losses.deserialize(keras.losses.serialize(made))
    assert type(again) is type(made) and again.get_config() == made.get_config()
    rng = np.random.default_rng(0)
    predictions = rng.normal(size=(2, 5)).astype("float32")
    targets = rng.integers(0, 2, (2, 5)).astype("float32")
    if isinstance(made, losses.FocalLoss):
        expected = losses.focal(predictions, targets, made.alpha, made.gamma)
    else:
        expected = losses.smooth_l1(predictions - targets, made.beta)
    for loss in (made, again):
        np.testing.assert_allclose(loss(targets, predictions), expected, rtol=1e-6)


def test_classes_take_a_reduction():
    x, y = np.float32([1, -2, 3]), np.float32([1, 1, 0])
    loss = losses.FocalLoss(reduction="sum")
    assert float(loss(y, x)) == pytest.approx(reference.focal(x, y).sum(), rel=1e-5)
