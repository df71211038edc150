"""SGD against NumPy over several steps, schedules at their turning points, and both optimizers after a reload."""

import keras
import numpy as np
import pytest
from keras import ops

from retinanet_keras import optimizers
from retinanet_keras.config import TrainConfig


def a_model():
    """A kernel, biases, and the scale and shift of a normalization."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    )
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    return model


def names(model):
    return [variable.path.rsplit("/", 1)[-1] for variable in model.trainable_variables]


def values(model):
    return [ops.convert_to_numpy(variable).astype("float64") for variable in model.trainable_variables]


def gradients(model, steps):
    rng = np.random.default_rng(2)
    return [[rng.normal(size=v.shape).astype("float32") for v in model.trainable_variables] for _ in range(steps)]


def apply(optimizer, model, steps):
    for step in steps:
        optimizer.apply([ops.convert_to_tensor(g) for g in step], model.trainable_variables)


# SGD


def test_sgd_equals_numpy():
    """L2 is in the gradient, of kernels only; gradients of biases are doubled; then momentum."""
    model = a_model()
    assert set(names(model)) == {"kernel", "bias", "gamma", "beta"}
    weights, momenta = values(model), [0.0] * 6
    steps = gradients(model, 5)
    for step in steps:
        for i, (name, gradient) in enumerate(zip(names(model), step, strict=True)):
            gradient = gradient + 0.05 * weights[i] if name == "kernel" else gradient * (2 if name == "bias" else 1)
            momenta[i] = 0.9 * momenta[i] + gradient
            weights[i] = weights[i] - 0.1 * momenta[i]
    apply(optimizers.CoupledSGD(0.1, momentum=0.9, l2=0.05, bias_rate=2.0), model, steps)
    for ours, expected in zip(values(model), weights, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_sgd_without_penalty_is_keras_sgd():
    ours, theirs = a_model(), a_model()
    steps = gradients(ours, 4)
    apply(optimizers.CoupledSGD(0.1, momentum=0.9, l2=0.0, bias_rate=1.0), ours, steps)
    apply(keras.optimizers.SGD(0.1, momentum=0.9), theirs, steps)
    for a, b in zip(values(ours), values(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sgd_penalty_goes_through_the_momentum():
    """A gradient of zero twice: the coupled penalty of the first step returns in the second."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[1.0]])
    optimizer = optimizers.CoupledSGD(0.1, momentum=0.5, l2=1.0)
    expected = [1 - 0.1, 0.9 - 0.1 * (0.5 * 1.0 + 0.9)]
    for value in expected:
        apply(optimizer, model, [[np.zeros((1, 1), "float32")]])
        assert float(model.layers[0].kernel[0, 0]) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("jump", "corrected"), [(0.1, True), (1.2, True), (1.09, False), (0.95, False)])
def test_the_momentum_follows_a_jump_of_the_rate(jump, corrected):
    """Steps of v = m * v * (new rate / old) + rate * gradient, where the rate jumps by more than 1.1 either way."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[0.0]])
    optimizer = optimizers.CoupledSGD(0.5, momentum=0.9, l2=0.0)
    weight = velocity = 0.0
    for rate, factor in ((0.5, 1.0), (0.5 * jump, jump if corrected else 1.0), (0.5 * jump, 1.0)):
        optimizer.learning_rate = rate
        apply(optimizer, model, [[np.ones((1, 1), "float32")]])
        velocity = 0.9 * velocity * factor + rate
        weight -= velocity
        assert float(model.layers[0].kernel[0, 0]) == pytest.approx(weight, rel=1e-5)


def test_with_the_correction_steps_shrink_with_the_rate_at_once():
    """Under a constant gradient steps tend to rate / (1 - momentum) * gradient; after a drop they do so at once."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[0.0]])
    optimizer = optimizers.CoupledSGD(optimizers.Schedule(1.0, 400, warmup=0, drops=(300,)), momentum=0.9, l2=0.0)
    places = []
    for _ in range(303):
        places.append(float(model.layers[0].kernel[0, 0]))
        apply(optimizer, model, [[np.ones((1, 1), "float32")]])
    np.testing.assert_allclose(np.diff(places)[-3:], [-10, -1, -1], rtol=1e-3)


# Schedules


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 0.01),
        ({"batch_size": 4}, 0.0025),
        ({"batch_size": 64, "learning_rate": 0.02, "reference_batch": 32}, 0.04),
        ({"batch_size": 4, "reference_batch": None}, 0.01),
        ({"batch_size": 4, "optimizer": "adamw"}, 0.01),
    ],
)
def test_the_rate_scales_linearly_with_the_batch(settings, rate):
    schedule = optimizers.build(TrainConfig(**settings))._learning_rate
    assert rates(schedule, 500) == pytest.approx([rate])


def rates(schedule, *steps):
    return [float(schedule(step)) for step in steps]


def test_step_schedule_of_the_paper():
    schedule = optimizers.build(TrainConfig())._learning_rate
    assert rates(schedule, 0) == pytest.approx([0.01 / 3])
    assert rates(schedule, 250) == pytest.approx([0.01 * 2 / 3])
    assert rates(schedule, 500, 501, 59_999) == pytest.approx([0.01] * 3)
    assert rates(schedule, 60_000, 79_999) == pytest.approx([0.001] * 2)
    assert rates(schedule, 80_000, 89_999, 200_000) == pytest.approx([0.0001] * 3)


def test_warm_up_is_linear():
    schedule = optimizers.Schedule(0.3, 1000, warmup=10, drops=(100,))
    np.testing.assert_allclose(np.diff(rates(schedule, *range(11))), 0.02, rtol=1e-4)
    assert rates(optimizers.Schedule(0.3, 1000, warmup=0, drops=(100,)), 0, 1, 2) == pytest.approx([0.3] * 3)


def test_drops_during_the_warm_up_count():
    assert rates(optimizers.Schedule(0.3, 1000, warmup=100, drops=(50,)), 50) == pytest.approx([0.3 * 2 / 3 * 0.1])


def test_cosine_schedule():
    schedule = optimizers.Schedule(0.2, 1100, warmup=100, drops=None)
    assert rates(schedule, 0, 100, 600) == pytest.approx([0.2 / 3, 0.2, 0.1])
    assert rates(schedule, 350) == pytest.approx([0.1 * (1 + np.cos(np.pi / 4))], rel=1e-5)
    assert 0 < rates(schedule, 1099)[0] < 1e-6
    assert rates(schedule, 1100, 2000) == pytest.approx([0, 0], abs=1e-9)


def test_the_optimizer_follows_its_schedule():
    model = a_model()
    optimizer = optimizers.build(TrainConfig(iterations=10, learning_rate=1.0, warmup=2, drops=(4, 6)))
    seen = []
    for step in gradients(model, 8):
        seen.append(float(optimizer.learning_rate))
        apply(optimizer, model, [step])
    assert seen == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01, 0.01])


# Both kinds


SGD_RUN = TrainConfig(
    iterations=20, warmup=3, drops=(8, 12), momentum=0.8, weight_decay=0.02, bias_rate=3.0, clip_norm=5.0
)
ADAMW_RUN = TrainConfig(
    iterations=20, warmup=3, optimizer="adamw", schedule="cosine", weight_decay=0.5, learning_rate=0.1
)


def test_build_passes_the_settings():
    sgd = optimizers.build(SGD_RUN)
    assert isinstance(sgd, optimizers.CoupledSGD)
    assert (sgd.momentum, sgd.l2, sgd.bias_rate, sgd.global_clipnorm, sgd.weight_decay) == (0.8, 0.02, 3.0, 5.0, None)
    assert optimizers.build(TrainConfig()).global_clipnorm is None
    adamw = optimizers.build(ADAMW_RUN)
    assert isinstance(adamw, keras.optimizers.AdamW)
    assert adamw.weight_decay == 0.5 and float(adamw.learning_rate) == pytest.approx(0.1 / 3)


def test_adamw_decays_kernels_only():
    model = a_model()
    before = values(model)
    zeros = [np.zeros(v.shape, "float32") for v in model.trainable_variables]
    apply(optimizers.build(ADAMW_RUN), model, [zeros])
    for name, old, new in zip(names(model), before, values(model), strict=True):
        np.testing.assert_allclose(new, old * (1 - 0.5 * 0.1 / 3) if name == "kernel" else old, rtol=1e-5)


def test_adamw_equals_numpy():
    """Five steps, against float64, with a penalty on kernels only."""
    model = a_model()
    expected, steps = values(model), gradients(model, 5)
    decayed = [name == "kernel" for name in names(model)]
    optimizer = optimizers.KernelAdamW(0.1, weight_decay=0.5)
    apply(optimizer, model, steps)
    first, second = ([np.zeros(v.shape) for v in expected] for _ in range(2))
    for t, step in enumerate(steps, start=1):
        for i, gradient in enumerate(step):
            gradient = gradient.astype("float64")
            expected[i] = expected[i] * (1 - 0.1 * 0.5 * decayed[i])
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            mean, square = first[i] / (1 - 0.9**t), second[i] / (1 - 0.999**t)
            # Keras adds its epsilon before the correction of the second moment.
            expected[i] -= 0.1 * mean / (np.sqrt(square) + 1e-7 / np.sqrt(1 - 0.999**t))
    for found, value in zip(values(model), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


def test_the_norm_of_the_whole_gradient_is_clipped():
    model = a_model()
    before = values(model)
    ones = [np.full(v.shape, 10.0, "float32") for v in model.trainable_variables]
    settings = TrainConfig(learning_rate=1.0, warmup=0, weight_decay=0.0, bias_rate=1.0, clip_norm=0.5, momentum=0.0)
    optimizer = optimizers.build(settings)
    apply(optimizer, model, [ones])
    moved = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(before, values(model), strict=True)))
    assert moved == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("run", [SGD_RUN, ADAMW_RUN], ids=["sgd", "adamw"])
def test_a_deserialized_optimizer_takes_the_same_steps(run):
    optimizer = optimizers.build(run)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is type(optimizer) and again.get_config() == optimizer.get_config()
    ours, theirs = a_model(), a_model()
    steps = gradients(ours, 10)
    apply(optimizer, ours, steps)
    apply(again, theirs, steps)
    for a, b in zip(values(ours), values(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name, kind, settings",
    [
        ("SGD", optimizers.CoupledSGD, {"momentum": 0.8, "nesterov": False, "l2": 0.1, "bias_rate": 3.0}),
        ("AdamW", optimizers.KernelAdamW, {"weight_decay": 0.1, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}),
    ],
)
def test_optimizers_in_files_with_their_former_names_are_read(name, kind, settings):
    """The classes were called as Keras's own are; a file names them by module, class and registered name."""
    saved = {
        "module": "retinanet_keras.optimizers",
        "class_name": name,
        "config": {"name": name, "learning_rate": 0.5, **settings},
        "registered_name": f"retinanet_keras>{name}",
    }
    optimizer = keras.saving.deserialize_keras_object(saved)
    assert type(optimizer) is kind
    assert optimizer.get_config().items() >= saved["config"].items()
    assert keras.saving.serialize_keras_object(optimizer)["registered_name"] == saved["registered_name"]
