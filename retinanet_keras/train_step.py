"""§4.1, Optimization: one step of synchronized SGD on TensorFlow, on one replica or many.

Forward, loss and gradients are one function per replica, compiled by XLA if requested. Everything that crosses replicas
stays outside it: the sums of the losses and the gradients, their division by the global count, clipping, the update.
So the step is that of one device with the same global batch.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from retinanet_keras import backbone as backbones
from retinanet_keras import keras_hooks, runtime
from retinanet_keras.objective import LossTerms

NOT_FINITE = "the loss or its gradient is not finite"  # the message of the step that `check_finite` stops


def prepare(model: keras.Model) -> None:
    """Make a RetinaNet that has just been compiled ready for `update`."""
    # Keras would clip each replica's gradients and then sum them; `update` sums, and leaves the clipping to it.
    keras_hooks.leave_gradients_unsummed(model.optimizer)


def gradient_function(model: keras.Model, jit: bool | str) -> Callable[..., tuple[LossTerms, list[tf.Tensor]]]:
    """A function that computes the loss terms and gradients of one replica's batch.

    Args:
        model: keras.Model, compiled.
        jit: bool or "auto". Compile by XLA; "auto": where there is a GPU.

    Returns:
        A function of (images, boxes, labels, sample_weight=None), a tf.function or with `run_eagerly` a plain one. It
        returns (terms, gradients): LossTerms, and for each trainable variable the gradient of the weighted sum of the
        losses, divided by the divisor on one replica, by the images of all replicas on several.

    Raises:
        ValueError: If batch normalization would be trained on several replicas.
    """
    replicas = model.distribute_strategy.num_replicas_in_sync
    trained = _trained_batch_norm(model)
    if replicas > 1 and trained:
        raise ValueError(
            f"norm: batch normalization is trained in {len(trained)} layers ({trained[0].name}, ...), and on "
            f'{replicas} replicas each would have statistics of its own. Use norm="group" for training from random '
            'weights, or "frozen" with pre-trained ones'
        )
    gpu = bool(tf.config.list_physical_devices("GPU"))
    jit = gpu if jit == "auto" else jit
    if jit and not gpu:
        backbones.split_groups(model.backbone)
    if model.builtin_backbone and not gpu and not jit:
        runtime.tell_if_slow(runtime.work_of(model.backbone.name, model.backbone.get_layer("stem").filters))

    def terms_and_gradients(images, boxes, labels, sample_weight=None):
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
            terms = model.loss_terms(images, {"boxes": boxes, "labels": labels}, outputs, sample_weight)
            loss = model.optimizer.scale_loss(terms.weighted_sum(model.box_weight))
            # Divided here, it takes no pass over the gradients later, and float16 stays within its range.
            loss = loss / (terms.divisor if replicas == 1 else terms.images * replicas)
        return terms, tape.gradient(loss, model.trainable_variables)

    if model.run_eagerly:
        return terms_and_gradients
    return tf.function(terms_and_gradients, jit_compile=jit, reduce_retracing=True, autograph=False)


def moving_statistics(model: keras.Model) -> list[tuple[keras.Variable, tf.Tensor]]:
    """[(variable, its value now), ...] of all batch normalization that is trained: it moves within the forward pass."""
    variables = [v for layer in _trained_batch_norm(model) for v in (layer.moving_mean, layer.moving_variance)]
    return [(variable, tf.identity(variable.value)) for variable in variables]


def update(
    model: keras.Model,
    terms: LossTerms,
    gradients: list[tf.Tensor],
    statistics: list[tuple[keras.Variable, tf.Tensor]] | None = None,
) -> tuple[LossTerms, tf.Tensor]:
    """Sum loss terms and gradients over the replicas, and apply the gradients.

    Args:
        model: keras.Model, compiled.
        terms: LossTerms of this replica.
        gradients: list of tensors. Gradients of this replica, from `gradient_function`.
        statistics: `moving_statistics` from before the gradient function. A step whose loss or gradient is not finite
            is then stopped, and leaves everything as it was. None: it is not stopped.

    Returns:
        (terms, norm): LossTerms of the global batch, and the norm of its gradient before clipping; equal on all
        replicas.

    Raises:
        tf.errors.InvalidArgumentError: With the message NOT_FINITE, if `statistics` is given and the loss or its
            gradient is not finite.
    """
    several = model.distribute_strategy.num_replicas_in_sync > 1
    if several:  # on one, TensorFlow's all-reduce loses the assignments to moving statistics within `fit`
        terms, gradients = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM, (terms, gradients)
        )
    if several and model.normalizer == "minibatch":
        gradients = [gradient * (terms.images / terms.divisor) for gradient in gradients]
    scale = model.optimizer.scale_loss(1.0)
    norm = tf.linalg.global_norm(gradients) / scale
    ready = list(gradients)
    if statistics is not None:
        # A scaled gradient may overflow: its optimizer skips the step and lowers the scale.
        scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        finite = tf.math.is_finite(terms.classification + terms.box) & (scaled | tf.math.is_finite(norm))
        if statistics:  # only one replica has any
            ready.append(tf.cond(finite, lambda: tf.constant(True), lambda: _restore(statistics)))
        with tf.control_dependencies(ready):
            ready.append(tf.debugging.Assert(finite, [NOT_FINITE, terms.classification, terms.box, norm]))
    with tf.control_dependencies(ready):  # a step that fails so far, here or on another worker, does not even count
        gradients = [tf.identity(gradient) for gradient in gradients]
        model.optimizer.apply(gradients, model.trainable_variables)
    return terms, norm


def _restore(statistics: list[tuple[keras.Variable, tf.Tensor]]) -> tf.Tensor:
    for variable, value in statistics:
        variable.assign(value)
    return tf.constant(True)


def _trained_batch_norm(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    layers = keras_hooks.flatten_layers(model)
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
