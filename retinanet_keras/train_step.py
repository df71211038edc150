"""§4.1, Optimization: one step of synchronised SGD on TensorFlow, on one replica or many.

Forward, loss and gradients are one function per replica, compiled by XLA where asked. Everything that crosses replicas
stays outside it: the sums of the losses and the gradients, their division by the global count, clipping, the update.
So the step is that of one device with the same global batch.
"""

import keras
import tensorflow as tf

from retinanet_keras import backbone as backbones
from retinanet_keras import runtime

NOT_FINITE = "the loss or its gradient is not finite"  # the message of the step that `check_finite` stops


def prepare(model):
    """Make a RetinaNet that has just been compiled ready for `update`."""
    # Keras would clip each replica's gradients and then sum them; `update` sums, and leaves the clipping to it.
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # of a LossScaleOptimizer
    inner._all_reduce_sum_gradients = lambda pairs: pairs


def gradient_function(model, jit):
    """A function of (images, boxes, labels, sample_weight=None) of one replica to the sums of its losses and gradients.

    Args:
        model: a compiled RetinaNet.
        jit: compile by XLA; "auto": where there is a GPU.

    Returns:
        a tf.function, or with `run_eagerly` a plain one, giving ((classification, box, divisor, positives, images),
        gradients): float32 scalars as of `objective.loss_terms`, and a gradient of the weighted sum of the losses for
        each trainable variable, divided by the divisor on one replica, by the images of all replicas on several.

    Raises:
        ValueError: where batch normalization would be trained on several replicas, naming a layer and what to use.
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
    if model.own_backbone and not gpu and not jit:
        runtime.tell_if_slow(runtime.work_of(model.backbone.name, model.backbone.get_layer("stem").filters))

    def sums_and_gradients(images, boxes, labels, sample_weight=None):
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
            sums = model.loss_terms(images, {"boxes": boxes, "labels": labels}, outputs, sample_weight)
            loss = model.optimizer.scale_loss(sums[0] + model.box_weight * sums[1])
            # Divided here, it takes no pass over the gradients later, and float16 stays within its range.
            images_in_all = tf.cast(tf.shape(images)[0] * replicas, tf.float32)
            loss = loss / (sums[2] if replicas == 1 else images_in_all)
        return (*sums, tf.cast(tf.shape(images)[0], tf.float32)), tape.gradient(loss, model.trainable_variables)

    if model.run_eagerly:
        return sums_and_gradients
    return tf.function(sums_and_gradients, jit_compile=jit, reduce_retracing=True, autograph=False)


def moving_statistics(model):
    """[(variable, its value now), ...] of all batch normalization that is trained: it moves within the forward pass."""
    variables = [v for layer in _trained_batch_norm(model) for v in (layer.moving_mean, layer.moving_variance)]
    return [(variable, tf.identity(variable.value)) for variable in variables]


def update(model, own, statistics=None):
    """Apply what the replicas' gradient functions gave.

    Args:
        model: a compiled RetinaNet.
        own: (sums, gradients) of this replica.
        statistics: `moving_statistics` from before the gradient function: a step whose loss or gradient is not finite
            is stopped, and leaves all as it was. None: it is not stopped.

    Returns:
        (sums, norm): sums over the global batch, and the norm of its gradient before clipping; equal on all replicas.

    Raises:
        tf.errors.InvalidArgumentError: with the message NOT_FINITE, as `statistics` says.
    """
    several = model.distribute_strategy.num_replicas_in_sync > 1
    if several:  # on one, TensorFlow's all-reduce loses the assignments to moving statistics within `fit`
        own = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, own)
    sums, gradients = own
    classification, box, divisor, _, images = sums
    if several and model.normalizer == "minibatch":
        gradients = [gradient * (images / divisor) for gradient in gradients]
    scale = model.optimizer.scale_loss(1.0)
    norm = tf.linalg.global_norm(gradients) / scale
    ready = list(gradients)
    if statistics is not None:
        # A scaled gradient may overflow: its optimizer leaves the step out and lowers the scale.
        scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        finite = tf.math.is_finite(classification + box) & (scaled | tf.math.is_finite(norm))
        if statistics:  # only one replica has any
            ready.append(tf.cond(finite, lambda: tf.constant(True), lambda: _restore(statistics)))
        with tf.control_dependencies(ready):
            ready.append(tf.debugging.Assert(finite, [NOT_FINITE, classification, box, norm]))
    with tf.control_dependencies(ready):  # a step that fails so far, here or on another worker, does not even count
        gradients = [tf.identity(gradient) for gradient in gradients]
        model.optimizer.apply(gradients, model.trainable_variables)
    return sums, norm


def _restore(statistics):
    for variable, value in statistics:
        variable.assign(value)
    return tf.constant(True)


def _trained_batch_norm(model):
    return [x for x in model._flatten_layers() if isinstance(x, keras.layers.BatchNormalization) and x.trainable]
