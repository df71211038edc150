"""The private parts of Keras that this package uses, each behind one function.

Keras may change them in any release: tests/test_keras_hooks.py fails where it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras


def build_optimizer_only(model: keras.Model, iterator: Any = None, data_batch: Any = None) -> None:
    """Replace `keras.Model._maybe_symbolic_build` for a model whose weights exist already: build only the optimizer.

    Keras's own takes a batch from the data to build the model, and fails where the shapes of replicas differ.
    """
    if model.optimizer is not None and not model.optimizer.built:
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """The metric of a compiled model that Keras logs as `loss`."""
    return model._loss_tracker


def flatten_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """All layers of a model, the layers within layers included."""
    return model._flatten_layers()


def inputs_of(tensor: keras.KerasTensor) -> tuple[Any, list[keras.KerasTensor]]:
    """The operation of a functional model that gives a symbolic tensor, and the tensors that it takes."""
    operation, index, _ = tensor._keras_history
    return operation, operation._inbound_nodes[index].input_tensors


def leave_gradients_unsummed(optimizer: keras.optimizers.Optimizer) -> None:
    """Keep an optimizer from summing gradients over replicas in `apply`, on TensorFlow, for a caller that has done it.

    Args:
        optimizer: a Keras optimizer, or a LossScaleOptimizer around one.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    inner._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables


def variable_index(optimizer: keras.optimizers.Optimizer, variable: Any) -> int:
    """The position of a variable of `update_step` among the optimizer's variables and their moments."""
    return optimizer._get_variable_index(variable)


def variable_path(optimizer: keras.optimizers.Optimizer, variable: Any) -> str:
    """The path of a variable of `update_step`, which on TensorFlow is one without a path."""
    return optimizer._trainable_variables[variable_index(optimizer, variable)].path


def adam_moments(optimizer: keras.optimizers.Adam, variable: Any) -> tuple[keras.Variable, keras.Variable]:
    """Adam's moving averages of a variable's gradient and of its square."""
    index = variable_index(optimizer, variable)
    return optimizer._momentums[index], optimizer._velocities[index]
