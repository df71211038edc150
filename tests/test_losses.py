"""Losses: 60 digits from logit -1000 to 1000, the paper's own numbers, and Appendix B's derivatives."""

import math

import backends
import keras
import mpmath
import numpy as np
import pytest
import reference
from keras import ops

from retinanet_keras import losses

pytestmark = pytest.mark.check

LOGITS = np.float64(sorted([*np.linspace(-1000, 1000, 41), *np.linspace(-100, 100, 101), *np.linspace(-0.02, 0.02, 9)]))
GAMMAS = [0, 0.5, 2, 5]
ALPHAS = [None, 0.25, 0.75]
CLASSES = [0, 1]


def value_and_slope(function, logits, y):
    """Values and derivatives by the logits, for one class y everywhere."""
    targets = np.full(logits.shape, y, logits.dtype)
    return backends.value_and_slope(lambda x: function(x, targets), logits)


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def minus_log_p(x):
    """-log(sigmoid(x)), 60 digits."""
    return mpmath.log1p(mpmath.exp(-x))


def holds(ours, theirs, dtype):
    """Relative to the true value where that is above 1e-30, else absolute."""
    theirs = np.array([float(value) for value in theirs])
    assert np.isfinite(ours).all()
    large = np.abs(theirs) > 1e-30
    assert large.any()
    relative = 1e-5 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(ours[large], theirs[large], rtol=relative)
    np.testing.assert_allclose(ours[~large], theirs[~large], atol=1e-30, rtol=0)


def check(function, value_of, slope_of, alpha, y, dtype, logits=LOGITS):
    """A loss against its value and derivative by x_t in 60 digits, for logits of -1000 to 1000."""
    if dtype == "float64" and backends.NAME == "jax":
        pytest.skip("JAX computes in float32 unless told otherwise")
    logits = logits.astype(dtype)
    value, slope = value_and_slope(function, logits, y)
    assert value.dtype == slope.dtype == dtype
    sign = 2 * y - 1
    weight = 1 if alpha is None else mpmath.mpf(alpha if y == 1 else 1 - alpha)
    with mpmath.workdps(60):
        true_logits = [sign * mpmath.mpf(float(x)) for x in logits]
        holds(value, [weight * value_of(x) for x in true_logits], dtype)
        holds(slope, [weight * sign * slope_of(x) for x in true_logits], dtype)


# Values, and Appendix B's derivatives: 1 - p_t is written sigmoid(-x_t)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("y", CLASSES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_cross_entropy(alpha, y, dtype):
    check(
        lambda x, t: losses.cross_entropy(x, t, alpha),
        minus_log_p, lambda x: -sigmoid(-x), alpha, y, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("y", CLASSES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal(gamma, alpha, y, dtype):
    check(
        lambda x, t: losses.focal(x, t, alpha, gamma),
        lambda x: sigmoid(-x) ** gamma * minus_log_p(x),
        lambda x: sigmoid(-x) ** gamma * (-gamma * sigmoid(x) * minus_log_p(x) - sigmoid(-x)),
        alpha, y, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("y", CLASSES)
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma, beta", [(1, 0), (2, 1), (4, 0), (0.5, -1)])
def test_focal_star(gamma, beta, alpha, y, dtype):
    check(
        lambda x, t: losses.focal_star(x, t, alpha, gamma, beta),
        lambda x: minus_log_p(gamma * x + beta) / gamma, lambda x: -sigmoid(-(gamma * x + beta)), alpha, y, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("y", CLASSES)
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_hinge(alpha, y, dtype):
    check(
        lambda x, t: losses.hinge(x, t, alpha),
        lambda x: max(0, mpmath.mpf(0.5) - sigmoid(x)), lambda x: -sigmoid(x) * sigmoid(-x) if x < 0 else 0,
        alpha, y, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("y", CLASSES)
@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
def test_hinge_of_other_thresholds(threshold, y, dtype):
    """Beside where it ends, too, which is at the logit of the threshold."""
    end = 0.0 if threshold == 1 else math.log(threshold / (1 - threshold))
    near = [sign * (end + step) for sign in (1, -1) for step in (-1e-3, -1e-5, 1e-5, 1e-3)]
    logits = np.array([*LOGITS, *near])
    check(
        lambda x, t: losses.hinge(x, t, threshold=threshold),
        lambda x: max(0, mpmath.mpf(threshold) - sigmoid(x)),
        lambda x: -sigmoid(x) * sigmoid(-x) if sigmoid(x) < threshold else 0,
        None, y, dtype, logits,
    )  # fmt: skip


def test_hinge_by_hand():
    values = losses.hinge(np.float32([0, 1000, -1000, math.log(3), 0]), np.float32([1, 1, 1, 0, 0]), threshold=0.75)
    np.testing.assert_allclose(ops.convert_to_numpy(values), [0.25, 0, 0.75, 0.5, 0.25], atol=1e-6)
    weighted = losses.hinge(np.float32([0, 0]), np.float32([1, 0]), alpha=0.25, threshold=0.7)
    np.testing.assert_allclose(ops.convert_to_numpy(weighted), [0.05, 0.15], atol=1e-6)


@pytest.mark.parametrize("y", CLASSES)
def test_focal_by_finite_differences(y):
    x, step = np.linspace(-6, 6, 25), 1e-5
    _, slope = value_and_slope(losses.focal, x.astype("float32"), y)
    ys = np.full(x.shape, y)
    differences = (reference.focal(x + step, ys) - reference.focal(x - step, ys)) / (2 * step)
    np.testing.assert_allclose(slope, differences, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("function", [losses.cross_entropy, losses.focal, losses.focal_star, losses.hinge])
def test_a_weighted_sum_has_the_weighted_slope(function):
    """What comes from above in the chain rule arrives."""
    x = np.linspace(-4, 4, 9).astype("float32")
    _, slope = value_and_slope(function, x, 0)
    _, weighted = value_and_slope(lambda x, t: function(x, t) * ops.arange(9, dtype="float32"), x, 0)
    np.testing.assert_allclose(weighted, slope * range(9), rtol=1e-6)


def test_targets_broadcast():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    one = np.ones((1, 1, 1), "float32")
    value, slope = value_and_slope(lambda x, _: losses.focal(x, one), x, 1)
    expected = value_and_slope(losses.focal, x, 1)
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(slope, expected[1])


@backends.tensorflow_only
def test_the_backward_pass_keeps_logits_and_targets_alone():
    """Nothing of the logits' size is made in the forward pass for the backward one but they themselves."""
    import tensorflow as tf

    @tf.function
    def both(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = losses.focal(x, tf.ones((1, 1)))
        return value, tape.gradient(value, x, output_gradients=upstream)

    def needed(output):
        """What an output is computed from, and is as large as the logits."""
        seen, open_ = {}, [output.op]
        while open_:
            op = open_.pop()
            if op.name not in seen:
                seen[op.name] = op
                open_ += [tensor.op for tensor in op.inputs]
        return {name for name, op in seen.items() if op.outputs[0].shape == (500, 700)}, seen

    graph = both.get_concrete_function(*[tf.TensorSpec([500, 700])] * 2).graph
    (of_value, operations), (of_slope, _) = map(needed, graph.outputs)
    assert len(of_value) > 4 and len(of_slope) > 4
    assert {operations[name].type for name in of_value & of_slope} <= {"Placeholder", "Identity", "IdentityN"}


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
        ours, theirs = losses.focal(LOGITS, targets, 0.25, 0.0), losses.cross_entropy(LOGITS, targets, 0.25)
        np.testing.assert_allclose(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))


def test_alpha_weighs_the_classes():
    ours = losses.cross_entropy(np.zeros(2, "float32"), np.float32([1, 0]), alpha=0.25)
    np.testing.assert_allclose(ops.convert_to_numpy(ours), [0.25 * math.log(2), 0.75 * math.log(2)], rtol=1e-6)


# Types and shapes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_lose_nothing_more(dtype):
    half = ops.cast(np.linspace(-12, 12, 9), dtype)
    ours = losses.focal(half, ops.ones_like(half))
    assert keras.backend.standardize_dtype(ours.dtype) == "float32"
    whole = losses.focal(ops.cast(half, "float32"), np.ones(9, "float32"))
    np.testing.assert_allclose(ops.convert_to_numpy(ours), ops.convert_to_numpy(whole))


def test_losses_are_elementwise_and_empty_is_allowed():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    targets = (logits > 0.3).astype("float32")
    for function in (losses.cross_entropy, losses.focal, losses.focal_star, losses.hinge):
        whole = ops.convert_to_numpy(function(logits, targets))
        assert whole.shape == logits.shape
        one = ops.convert_to_numpy(function(logits[1, 2], targets[1, 2]))
        np.testing.assert_allclose(whole[1, 2], one, rtol=1e-6)
        assert function(np.zeros((0, 4), "float32"), np.zeros((0, 4), "float32")).shape == (0, 4)


# Smooth L1


def test_smooth_l1_by_hand():
    errors = np.float32([0, 0.1, -0.1, 0.5, -0.5, 2, -1000])
    expected = [0, 0.01, 0.01, 0.25, 0.25, 1.75, 999.75]
    np.testing.assert_allclose(ops.convert_to_numpy(losses.smooth_l1(errors, 0.5)), expected, rtol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(losses.smooth_l1(np.float32([0.5, 3]), 1.0)), [0.125, 2.5])
    default = losses.smooth_l1(np.float32([0.055, 1.055]))  # beta 0.11
    np.testing.assert_allclose(ops.convert_to_numpy(default), [0.01375, 1.0], rtol=1e-6)


@pytest.mark.parametrize("dtype, relative", [("float32", 1e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("beta", [0.11, 1.0])
def test_smooth_l1_equals_numpy(beta, dtype, relative):
    if dtype == "float64" and backends.NAME == "jax":
        pytest.skip("JAX computes in float32 unless told otherwise")
    errors = np.concatenate([np.linspace(-2, 2, 101), [-1000, 1000, 1e-9]]).astype(dtype)
    value, slope = value_and_slope(lambda x, _: losses.smooth_l1(x, beta), errors, 0)
    np.testing.assert_allclose(value, reference.smooth_l1(errors, beta), rtol=relative)
    np.testing.assert_allclose(slope, np.clip(np.float64(errors) / beta, -1, 1), rtol=relative, atol=1e-30)


# Keras objects

MADE = [
    (losses.CrossEntropyLoss(0.3), lambda x, t: losses.cross_entropy(x, t, 0.3)),
    (losses.CrossEntropyLoss(), lambda x, t: losses.cross_entropy(x, t)),
    (losses.FocalLoss(0.3, 1.5), lambda x, t: losses.focal(x, t, 0.3, 1.5)),
    (losses.FocalLoss(None), lambda x, t: losses.focal(x, t, None)),
    (losses.FocalStarLoss(None, 4.0, 0.5), lambda x, t: losses.focal_star(x, t, None, 4.0, 0.5)),
    (losses.HingeLoss(0.3, 0.7), lambda x, t: losses.hinge(x, t, 0.3, 0.7)),
    (losses.SmoothL1Loss(0.4), lambda x, t: losses.smooth_l1(x - t, 0.4)),
]


@pytest.mark.parametrize("made, function", MADE)
def test_classes_serialize_and_equal_the_functions(made, function):
    again = keras.losses.deserialize(keras.losses.serialize(made))
    assert type(again) is type(made) and again.get_config() == made.get_config()
    rng = np.random.default_rng(0)
    predictions = rng.normal(size=(2, 5)).astype("float32")
    targets = rng.integers(0, 2, (2, 5)).astype("float32")
    expected = ops.convert_to_numpy(function(predictions, targets))
    for loss in (made, again):
        np.testing.assert_allclose(ops.convert_to_numpy(loss.call(targets, predictions)), expected, rtol=1e-6)
        assert float(loss(targets, predictions)) == pytest.approx(expected.mean(), rel=1e-5)  # Keras's reduction


def test_sample_weights_count_samples_or_elements():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 3)).astype("float32"), np.eye(3, dtype="float32")
    weight = np.float32([1, 0, 2])
    elements = reference.focal(x, y)
    loss = losses.FocalLoss()
    assert float(loss(y, x, sample_weight=weight)) == pytest.approx((elements * weight[:, None]).mean(), rel=1e-5)
    each = rng.random((3, 3)).astype("float32")
    assert float(loss(y, x, sample_weight=each)) == pytest.approx((elements * each).mean(), rel=1e-5)


def test_classes_take_a_reduction():
    x, y = np.float32([1, -2, 3]), np.float32([1, 1, 0])
    expected = reference.focal(x, y).sum()
    assert float(losses.FocalLoss(reduction="sum")(y, x)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.FocalLoss(reduction="sum_over_batch_size")(y, x)) == pytest.approx(expected / 3, rel=1e-5)


@pytest.mark.parametrize("loss", [made for made, _ in MADE])
def test_half_precision_is_reduced_in_float32(loss):
    """In float16 a sum of 100,000 losses would be infinite or stuck."""
    half = ops.cast(np.full(100_000, -3.0), "float16")
    whole = type(loss).from_config({**loss.get_config(), "reduction": "sum"})
    total = whole(ops.ones_like(half), half)
    assert keras.backend.standardize_dtype(total.dtype) == "float32"
    one = float(whole(np.ones(1), np.float32([-3.0])))
    assert float(total) == pytest.approx(100_000 * one, rel=1e-3)
    under = type(loss)(reduction="sum", dtype="mixed_float16")
    assert np.isfinite(float(under(ops.ones_like(half), half)))


@pytest.mark.parametrize("loss", [losses.FocalLoss(), losses.HingeLoss(reduction="sum")])
def test_they_train_any_keras_model(loss):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(1, kernel_initializer=keras.initializers.Constant(-1.0))])
    model.compile(keras.optimizers.SGD(0.01), loss)
    x = np.linspace(-1, 1, 32).astype("float32")[:, None]
    history = model.fit(x, (x > 0).astype("float32"), epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
