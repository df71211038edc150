"""What tests need of the backend they run on, which KERAS_BACKEND names: to compile and to differentiate."""

import keras
import numpy as np
import pytest
from keras import ops

NAME = keras.backend.backend()
tensorflow_only = pytest.mark.skipif(NAME != "tensorflow", reason="about TensorFlow's graphs")


def compiled(function, xla=False):
    """A function of arrays as the backend compiles it; on PyTorch as it is."""
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=xla, reduce_retracing=True, autograph=False)
    if NAME == "jax":
        import jax

        return jax.jit(function)
    return function


def numpy_of(tree):
    return keras.tree.map_structure(ops.convert_to_numpy, tree)


def value_and_slope(function, x):
    """function(x), and the derivative of its sum by x, as NumPy."""
    if NAME == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value.numpy(), tape.gradient(value, x).numpy()
    if NAME == "jax":
        import jax

        value, pull = jax.vjp(function, jax.numpy.asarray(x))
        return np.asarray(value), np.asarray(pull(jax.numpy.ones_like(value))[0])
    import torch

    x = torch.tensor(x, requires_grad=True)
    value = function(x)
    value.sum().backward()
    return value.detach().numpy(), x.grad.numpy()
