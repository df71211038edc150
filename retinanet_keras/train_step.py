"""§4.1, Optimization: one step of synchronised SGD on TensorFlow, on one replica or many.

Forward, loss and gradients are one function per replica, compiled by XLA where asked. Everything that crosses replicas
stays outside it: the sums of the losses and the gradients, their division by the global count, clipping, the update.
So the step is that of one device with the same global batch.
"""

import keras
import tensorflow as tf

from retinanet_keras import backbone as backbones

NOT_FINITE = "the loss or its gradient is not finite"  # the message of the step that `check_finite` stops


def prepare(model):
    """Make a RetinaNet that has just been compiled ready for `update`.

    Raises:
        ValueError: where batch normalisation would be trained on several replicas, naming a layer and what to use.
    """
    replicas = model.distribute_strategy.num_replicas_in_sync
    trained = [
        layer.name
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if replicas > 1 and trained:
        raise ValueError(
            f"norm: batch normalisation is trained in {len(trained)} layers ({trained[0]}, ...), and on {replicas} "
            'replicas each would have statistics of its own. Use norm="group" for training from random weights, or '
            '"frozen" with pre-trained ones'
        )
    # Keras would clip each replica's gradients and then sum them; `update` sums, and leaves the clipping to it.
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # of a LossScaleOptimizer
    inner._all_reduce_sum_gradients = lambda pairs: pairs


def gradient_function(model, jit):
    """A function of (images, boxes, labels) of one replica to the sums of its losses and their gradients.

    Args:
        model: a compiled RetinaNet.
        jit: compile by XLA; "auto": where there is a GPU.

    Returns:
        a tf.function giving ((classification, box, divisor, positives, images), gradients): float32 scalars as of
        `objective.loss_terms`, and a gradient of the weighted sum of the losses for each trainable variable, divided
        by the divisor where this replica is the only one.
    """
    gpu = bool(tf.config.list_physical_devices("GPU"))
    jit = gpu if jit == "auto" else jit
    if jit and not gpu:
        backbones.split_groups(model.backbone)

    alone = model.distribute_strategy.num_replicas_in_sync == 1

    def sums_and_gradients(images, boxes, labels):
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
            sums = model.loss_terms(images, {"boxes": boxes, "labels": labels}, outputs)
            loss = model.optimizer.scale_loss(sums[0] + model.box_weight * sums[1])
            if alone:  # no pass over all gradients for it afterwards
                loss = loss / sums[2]
        return (*sums, tf.cast(tf.shape(images)[0], tf.float32)), tape.gradient(loss, model.trainable_variables)

    return tf.function(sums_and_gradients, jit_compile=jit, reduce_retracing=True)


def update(model, own, check_finite=False):
    """Apply what the replicas' gradient functions gave.

    Args:
        model: a compiled RetinaNet.
        own: (sums, gradients) of this replica.
        check_finite: stop, before anything has changed, where the loss or its gradient is not finite.

    Returns:
        (sums, norm): sums over the global batch, and the norm of its gradient before clipping; equal on all replicas.

    Raises:
        tf.errors.InvalidArgumentError: with the message NOT_FINITE, as `check_finite` says.
    """
    sums, gradients = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, own)
    classification, box, divisor = sums[:3]
    if model.distribute_strategy.num_replicas_in_sync > 1:
        gradients = [gradient / divisor for gradient in gradients]
    scale = model.optimizer.scale_loss(1.0)
    norm = tf.linalg.global_norm(gradients) / scale
    ready = list(gradients)
    if check_finite:
        # A scaled gradient may overflow: its optimizer leaves the step out and lowers the scale.
        scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        finite = tf.math.is_finite(classification + box) & (scaled | tf.math.is_finite(norm))
        ready.append(tf.debugging.Assert(finite, [NOT_FINITE, classification, box, norm]))
    with tf.control_dependencies(ready):  # a step that fails so far, here or on another worker, does not even count
        gradients = [tf.identity(gradient) for gradient in gradients]
        model.optimizer.apply(gradients, model.trainable_variables)
    return sums, norm
