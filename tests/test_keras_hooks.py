"""The private parts of Keras behind `keras_hooks`: present, and doing what the package relies on."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from retinanet_keras import keras_hooks

pytestmark = pytest.mark.check


def changed(what):
    return f"Keras {keras.__version__} has changed {what}: adapt retinanet_keras/keras_hooks.py to it"


def two_layers():
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="inside")])
    images = keras.Input((2,), name="images")
    return keras.Model(images, keras.layers.Dense(1, name="last")(inner(images)))


@pytest.fixture(params=[keras.optimizers.SGD, keras.optimizers.AdamW])
def built(request):
    """(optimizer, its variables)."""
    variables = [keras.Variable(np.ones(2), name="kernel"), keras.Variable(np.ones(3), name="bias")]
    optimizer = request.param(0.1)
    optimizer.build(variables)
    return optimizer, variables


def test_fit_builds_by_the_hook(monkeypatch):
    """`fit` and `train_on_batch` call it by its name, and do nothing else to build."""
    calls = []

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)
            self.dense.build((None, 2))
            self.built = True

        def call(self, x):
            return self.dense(x)

        def _maybe_symbolic_build(self, iterator=None, data_batch=None):
            calls.append(1)
            keras_hooks.build_optimizer_only(self, iterator, data_batch)

    model = Model()
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    assert calls, changed("what builds a model in `fit` (`_maybe_symbolic_build`)")
    model.train_on_batch(np.ones((2, 2)), np.ones((2, 1)))
    assert len(calls) > 1 and model.optimizer.built, changed("what builds a model in `train_on_batch`")


def test_the_loss_tracker_is_what_keras_logs_as_loss():
    model = two_layers()
    model.compile("sgd", "mse", run_eagerly=True)
    loss = model.train_on_batch(np.ones((2, 2)), np.zeros((2, 1)), return_dict=True)["loss"]
    tracker = getattr(model, "_loss_tracker", None)
    assert isinstance(tracker, keras.metrics.Mean), changed("`_loss_tracker` of a compiled model")
    assert float(keras_hooks.loss_tracker(model).result()) == float(loss), changed("what `_loss_tracker` holds")


def test_layers_within_layers_are_listed():
    assert hasattr(keras.Model, "_flatten_layers"), changed("`_flatten_layers` of a model")
    assert {"inside", "last"} <= {layer.name for layer in keras_hooks.flatten_layers(two_layers())}, changed(
        "what `_flatten_layers` lists"
    )


def test_a_symbolic_tensor_tells_where_it_comes_from():
    model = two_layers()
    assert hasattr(model.output, "_keras_history"), changed("`_keras_history` of a symbolic tensor")
    operation, (tensor,) = keras_hooks.inputs_of(model.output)
    assert operation.name == "last" and tensor.shape == (None, 3), changed("`_keras_history` or `_inbound_nodes`")


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_summed_by_the_method_that_is_replaced(scaled):
    """`apply` calls it on the optimizer itself, within a LossScaleOptimizer too, and no more once it is replaced."""
    strategy = tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(len(tf.config.list_logical_devices("CPU")))])
    calls = []
    with strategy.scope():
        inner = keras.optimizers.SGD(0.1)
        optimizer = keras.optimizers.LossScaleOptimizer(inner) if scaled else inner
        variable = keras.Variable(np.ones(2))
        optimizer.build([variable])
    original = getattr(inner, "_all_reduce_sum_gradients", None)
    assert original is not None, changed("`_all_reduce_sum_gradients` of optimizers on TensorFlow")
    inner._all_reduce_sum_gradients = lambda pairs: calls.append(1) or original(pairs)
    strategy.run(lambda: optimizer.apply([tf.ones(2)], [variable]))
    assert calls, changed("where `apply` of an optimizer sums gradients over replicas")
    calls.clear()
    keras_hooks.leave_gradients_unsummed(optimizer)
    strategy.run(lambda: optimizer.apply([tf.ones(2)], [variable]))
    assert not calls


def test_variables_are_found_with_their_paths(built):
    optimizer, variables = built
    for name in ("_get_variable_index", "_trainable_variables"):
        assert hasattr(optimizer, name), changed(f"`{name}` of an optimizer")
    assert [keras_hooks.variable_index(optimizer, v) for v in variables] == [0, 1], changed("`_get_variable_index`")
    paths = [keras_hooks.variable_path(optimizer, v) for v in variables]
    assert paths == [v.path for v in variables], changed("`_trainable_variables`")
    tensors = [keras_hooks.variable_path(optimizer, v.value) for v in variables]  # what `update_step` is given
    assert tensors == paths, changed("what `_get_variable_index` takes")


def test_adam_has_two_moments_of_each_variable():
    variable = keras.Variable(np.ones(2))
    optimizer = keras.optimizers.AdamW(0.1)
    optimizer.build([variable])
    for name in ("_momentums", "_velocities"):
        assert hasattr(optimizer, name), changed(f"`{name}` of Adam")
    optimizer.apply([tf.constant([2.0, 4.0])], [variable])
    mean, square = keras_hooks.adam_moments(optimizer, variable)
    np.testing.assert_allclose(mean, [0.2, 0.4], rtol=1e-5, err_msg=changed("`_momentums`"))
    np.testing.assert_allclose(square, [0.004, 0.016], rtol=1e-5, err_msg=changed("`_velocities`"))
