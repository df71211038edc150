"""The step on TensorFlow: what it logs, refuses and leaves out, Keras's ways to run it, and mixed precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from retinanet_keras import losses, optimizers
from retinanet_keras.config import MiningConfig, TrainConfig


def batch():
    """Two noisy images, one without boxes."""
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), "uint8")
    boxes = np.array([[[8, 8, 50, 44], [40, 10, 90, 60]], [[0, 0, 0, 0]] * 2], "float32")
    return images, {"boxes": boxes, "labels": np.array([[0, 2], [-1, -1]])}


def compiled(small_model, optimizer=None, **settings):
    names = ("normalizer", "check_finite", "run_eagerly", "steps_per_execution", "auto_scale_loss", "mining")
    of_compile = {name: settings.pop(name) for name in names if name in settings}
    model = small_model(**settings)
    model.compile(optimizer or optimizers.CoupledSGD(0.01, l2=0.0, bias_rate=1.0), jit_compile=False, **of_compile)
    return model


@pytest.mark.eager
@pytest.mark.parametrize("normalizer", ["image", pytest.param("minibatch", marks=pytest.mark.slow)])
def test_the_logged_norm_is_that_of_the_gradient_of_the_logged_loss(small_model, normalizer):
    model = compiled(small_model, normalizer=normalizer)
    images, truth = batch()
    with tf.GradientTape() as tape:
        terms = model.loss_terms(images, truth, model(images, training=True))
        loss = (terms.classification + terms.box) / terms.divisor
    gradients = tape.gradient(loss, model.trainable_variables)
    logs = model.train_on_batch(images, truth, return_dict=True)
    assert logs["loss"] == pytest.approx(float(loss), rel=1e-5)
    norm = np.sqrt(sum((g.numpy().astype("float64") ** 2).sum() for g in gradients))
    assert float(logs["gradient_norm"]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fit_moves_the_statistics_of_batch_normalization(small_model, jit_compile):
    """Three steps at rate 0: a statistic that one forward pass moves by d from 0 is at (1 - momentum^3) d' then."""
    model = small_model(norm="batch", freeze_at=0)
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    model.compile(keras.optimizers.SGD(0.0), jit_compile=jit_compile)
    images, truth = batch()
    start = [layer.moving_variance.numpy() for layer in layers]
    model(images, training=True)
    means = [layer.moving_mean.numpy() / (1 - layer.momentum) for layer in layers]  # of the batch
    moved = [layer.moving_variance.numpy() - before for layer, before in zip(layers, start, strict=True)]
    for layer, before in zip(layers, start, strict=True):
        layer.moving_mean.assign(np.zeros_like(before))
        layer.moving_variance.assign(before)
    model.fit(tf.data.Dataset.from_tensors((images, truth)).repeat(3), verbose=0)
    for layer, mean, before, by in zip(layers, means, start, moved, strict=True):
        share = 1 - layer.momentum**3
        assert np.abs(mean).max() > 1e-3
        np.testing.assert_allclose(layer.moving_mean, share * mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(layer.moving_variance, before + by * share / (1 - layer.momentum), rtol=1e-3)


@pytest.mark.parametrize("check_finite", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite(small_model, check_finite):
    model = compiled(small_model, keras.optimizers.AdamW(0.01), check_finite=check_finite)
    images, truth = batch()
    images = images.astype("float32")
    images[0, 3, 3, 0] = np.nan
    before = [v.numpy() for v in model.trainable_variables]
    if check_finite:
        with pytest.raises(tf.errors.InvalidArgumentError, match="not finite"):
            model.train_on_batch(images, truth)
        for variable, value in zip(model.trainable_variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)
        assert model.optimizer.iterations == 0
        model.train_on_batch(*batch())  # and training continues
        assert model.optimizer.iterations == 1
    else:
        model.train_on_batch(images, truth)
        assert not all(np.isfinite(v.numpy()).all() for v in model.trainable_variables)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [None, "group", "batch", "frozen"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains_float32_weights_on_float32_losses(small_model, policy, norm, tmp_path):
    images, truth = batch()
    of_resnet = {"norm": norm} if norm else {}
    expected = compiled(small_model, **of_resnet).train_on_batch(images, truth, return_dict=True)
    model = compiled(small_model, dtype=policy, check_finite=True, **of_resnet)
    assert {v.dtype for v in model.weights} == {"float32"}
    first = next(layer for layer in model.backbone.layers if isinstance(layer, keras.layers.Conv2D))
    assert model.class_subnet.tower[0].compute_dtype == first.compute_dtype == policy[6:]
    outputs = model(images)
    assert outputs["logits"].dtype == outputs["deltas"].dtype == tf.float32
    assert model.loss_terms(images, truth, outputs).classification.dtype == tf.float32
    logs = model.train_on_batch(images, truth, return_dict=True)
    for name in ("loss", "positives"):
        assert logs[name] == pytest.approx(expected[name], rel=0.02), name
    assert keras.config.dtype_policy().name == "float32"  # that of others is left alone
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.optimizer) is type(model.optimizer) and again.check_finite
    np.testing.assert_array_equal(again(images)["logits"], model(images)["logits"])


def test_a_float16_step_that_overflows_is_skipped_and_the_scale_halved(small_model):
    model = compiled(small_model, dtype="mixed_float16", check_finite=True)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.dynamic_scale.assign(2.0**100)
    before = [v.numpy() for v in model.trainable_variables]
    model.train_on_batch(*batch())
    for variable, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert float(model.optimizer.dynamic_scale) == 2.0**99 and model.optimizer.iterations == 0


@pytest.mark.eager
def test_the_optimizer_of_a_configuration_takes_the_step(small_model):
    """One step of §4.1 after warm-up: rate x (gradient + 1e-4 x kernel), twice the gradient of biases."""
    settings = TrainConfig(learning_rate=0.02, batch_size=8, warmup=0)
    images, truth = batch()
    model = compiled(small_model, optimizers.build(settings))
    with tf.GradientTape() as tape:
        terms = model.loss_terms(images, truth, model(images, training=True))
        loss = (terms.classification + terms.box) / terms.divisor
    gradients = tape.gradient(loss, model.trainable_variables)
    before = [v.numpy() for v in model.trainable_variables]
    model.train_on_batch(images, truth)
    for variable, old, gradient in zip(model.trainable_variables, before, gradients, strict=True):
        kind = variable.path.rsplit("/", 1)[-1]
        gradient = gradient.numpy() + (1e-4 * old if kind == "kernel" else gradient.numpy() if kind == "bias" else 0)
        np.testing.assert_allclose(variable.numpy(), old - 0.01 * gradient, atol=2e-7, err_msg=variable.path)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"norm": "batch"}])
def test_several_steps_per_execution_are_the_same_steps(small_model, settings):
    """Seven, by three."""
    data = tf.data.Dataset.from_tensors(batch()).repeat(7)
    ends = []
    for steps in (1, 3):
        model = compiled(small_model, steps_per_execution=steps, check_finite=True, **settings)
        calls = []
        count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs, calls=calls: calls.append(batch))
        logged = model.fit(data, callbacks=[count], verbose=0).history
        assert len(calls) == -(-7 // steps) and model.optimizer.iterations == 7
        ends.append([*logged.values(), model.evaluate(data, verbose=0), *(v.numpy() for v in model.weights)])
    for by_one, by_three in zip(*ends, strict=True):
        np.testing.assert_allclose(by_one, by_three, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_run_eagerly_runs_the_loss_as_python_at_every_step(small_model):
    images, truth = batch()
    expected = compiled(small_model).train_on_batch(images, truth, return_dict=True)
    seen = []

    def focal(targets, logits):
        seen.append(tf.executing_eagerly())
        return losses.FocalLoss().call(targets, logits)

    model = small_model()
    model.compile(optimizers.CoupledSGD(0.01, l2=0.0, bias_rate=1.0), focal, run_eagerly=True)
    assert model.train_on_batch(images, truth, return_dict=True) == pytest.approx(expected, rel=1e-4)
    calls = len(seen)
    model.train_on_batch(images, truth)
    assert calls and len(seen) == 2 * calls and all(seen)
    with pytest.raises(ValueError, match='jit_compile: expected False or "auto" with run_eagerly=True, got True'):
        model.compile("sgd", run_eagerly=True, jit_compile=True)


def test_how_keras_runs_a_model_is_saved_with_it(small_model, tmp_path):
    mining = MiningConfig(batch_size=50, ratio=3)
    model = compiled(small_model, run_eagerly=True, steps_per_execution=3, mining=mining)
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.run_eagerly and again.steps_per_execution == 3 and again.mining == mining


@pytest.mark.eager
@pytest.mark.parametrize("scaled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_auto_scale_loss(small_model, tmp_path, scaled):
    model = compiled(small_model, dtype="mixed_float16", auto_scale_loss=scaled)
    model.train_on_batch(*batch())
    model.save(tmp_path / "model.keras")
    for one in (model, keras.models.load_model(tmp_path / "model.keras")):
        assert isinstance(one.optimizer, keras.optimizers.LossScaleOptimizer) == scaled
        assert one.optimizer.iterations == 1
