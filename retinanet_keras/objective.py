"""§4.1, Training: the loss of a batch, from the network's outputs and the ground truth."""

import dataclasses

import keras
from keras import ops

from retinanet_keras import losses, mining, targets


def loss_terms(
    outputs, gt_boxes, gt_labels, anchors, *, target_config, classification_loss, box_loss, normalizer="image",
    mining_config=None, image_weights=None,
):  # fmt: skip
    """The unnormalized losses of a batch, and what to divide them by.

    Args:
        outputs: dict of logits [B, A, K] and deltas [B, A, 4].
        gt_boxes: [B, N, 4], absolute pixels x1, y1, x2, y2.
        gt_labels: [B, N], -1 in padding.
        anchors: [A, 4], in the same pixels.
        target_config: a TargetConfig.
        classification_loss: Keras loss or function, called (0/1 targets, logits), element-wise.
        box_loss: called (target deltas, deltas), element-wise.
        normalizer: "image", each image's losses are divided by its own number of positive anchors (§4.1); "minibatch",
            the divisor is the sum over the images of Detectron's number of assigned anchors + 1.
        mining_config: a MiningConfig, or None: the classification loss is of each image's hardest anchors only (§5.1).
        image_weights: factors of each image's losses, a dict of labels [B], for classification, and boxes [B]; or None.

    Returns:
        (classification, box, divisor, positives): float32 scalars. The losses are sums over the batch; sums and
        divisors of several batches may be added up before dividing. positives: the number of positive anchors.
    """
    class_targets, box_targets, assigned = targets.assign_and_count(
        anchors, gt_boxes, gt_labels, **dataclasses.asdict(target_config)
    )  # [B, A], [B, A, 4], [B]
    class_targets, box_targets = ops.stop_gradient(class_targets), ops.stop_gradient(box_targets)
    positive = class_targets >= 0
    count = ops.sum(ops.cast(positive, "float32"), axis=1)  # [B]

    classification = _anchor_losses(classification_loss, class_targets, outputs["logits"])  # [B, A]
    counted = class_targets != targets.IGNORE
    if mining_config:
        hardness = ops.stop_gradient(classification)
        counted = mining.select(hardness, anchors, positive, counted, **dataclasses.asdict(mining_config))
    classification = ops.sum(ops.where(counted, classification, 0.0), axis=1)  # [B]

    box = ops.sum(_elementwise(box_loss, box_targets, outputs["deltas"]), axis=-1)  # [B, A]
    box = ops.sum(ops.where(positive, box, 0.0), axis=1)  # [B]

    if image_weights is not None:
        classification, box = classification * image_weights["labels"], box * image_weights["boxes"]
    if normalizer == "image":
        # An image without positives still teaches the background: its loss is divided by 1.
        classification, box = (ops.sum(loss / ops.maximum(count, 1.0)) for loss in (classification, box))
        divisor = ops.cast(ops.shape(count)[0], "float32")
    else:
        classification, box = ops.sum(classification), ops.sum(box)
        divisor = ops.sum(ops.cast(assigned, "float32") + 1.0)
    return classification, box, divisor, ops.sum(count)


def _anchor_losses(loss, class_targets, logits):
    """The classification loss of each anchor, summed over classes.

    Every logit counts as a negative, then the one logit of each positive anchor is corrected: no [B, A, K] targets.

    Args:
        loss: element-wise, called (0/1 targets, logits).
        class_targets: int32 [B, A].
        logits: [B, A, K].

    Returns:
        float32 [B, A].
    """
    if isinstance(loss, losses.ElementLoss):  # these broadcast their targets
        zero, one = ops.zeros((1, 1, 1)), ops.ones((1, 1, 1))
    else:
        zero = one = None

    def as_negatives(logits):
        return _elementwise(loss, ops.zeros_like(logits), logits) if zero is None else loss.call(zero, logits)

    def change_of(own):
        if one is None:
            return _elementwise(loss, ops.ones_like(own), own) - _elementwise(loss, ops.zeros_like(own), own)
        return loss.call(one, own) - loss.call(zero, own)

    positive, label = class_targets >= 0, ops.maximum(class_targets, 0)  # [B, A]

    def total(logits):
        own = ops.take_along_axis(logits, label[..., None], axis=-1)  # [B, A, 1]
        return ops.sum(as_negatives(logits), axis=-1) + ops.where(positive, change_of(own)[..., 0], 0.0)

    if keras.backend.backend() == "tensorflow":
        return _with_sparse_gradient(total, as_negatives, change_of, positive, label)(logits)
    return total(logits)


def _with_sparse_gradient(total, as_negatives, change_of, positive, label):
    """`total` with its gradient for TensorFlow, which would spread that of the picked logits over all of them.

    Here it is added where they are; the derivatives are those of the parts, from the logits alone.
    """
    import tensorflow as tf

    def slope(function, x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return tape.gradient(value, x, upstream)

    @tf.custom_gradient
    def loss(logits):
        def gradient(upstream):  # [B, A]
            dense = slope(as_negatives, logits, tf.broadcast_to(upstream[..., None], tf.shape(logits)))
            own = tf.gather(logits, label, batch_dims=2)[..., None]  # [B, A, 1]
            change = slope(change_of, own, tf.where(positive, upstream, 0.0)[..., None])[..., 0]
            batch, anchors = tf.unstack(tf.shape(label))
            rows = tf.broadcast_to(tf.range(batch)[:, None], (batch, anchors))
            columns = tf.broadcast_to(tf.range(anchors), (batch, anchors))
            places = tf.stack([rows, columns, tf.cast(label, tf.int32)], axis=-1)  # [B, A, 3]
            return tf.tensor_scatter_nd_add(dense, places, tf.cast(change, dense.dtype))

        return total(logits), gradient

    return loss


def _elementwise(loss, targets, predictions):
    """Unreduced float32 values of any Keras loss or function, of the predictions' shape.

    Keras's own losses average over the last axis, here one of length 1; `call` comes before any other reduction.
    """
    values = getattr(loss, "call", loss)(targets[..., None], predictions[..., None])
    return ops.cast(ops.reshape(values, ops.shape(predictions)), "float32")
