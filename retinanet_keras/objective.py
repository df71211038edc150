"""§4.1, Training: the loss of a batch, from the network's outputs and the ground truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import keras
from keras import ops

from retinanet_keras import losses, mining, targets
from retinanet_keras.config import MiningConfig, TargetConfig
from retinanet_keras.tensors import Tensor

ElementwiseLoss: TypeAlias = Any  # called (targets, predictions): a Keras loss, or a function


class LossTerms(NamedTuple):
    """The unnormalized losses of a batch and its counts, float32 scalars.

    All are sums over the images, so those of several batches may be added up before dividing.

    Attributes:
        classification: The classification loss.
        box: The box regression loss.
        divisor: What to divide both losses by.
        positives: The number of positive anchors.
        images: The number of images.
    """

    classification: Tensor
    box: Tensor
    divisor: Tensor
    positives: Tensor
    images: Tensor

    def weighted_sum(self, box_weight: float) -> Tensor:
        """The two losses added, still to be divided."""
        return self.classification + box_weight * self.box


def loss_terms(
    outputs: dict[str, Tensor],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    anchors: Tensor,
    *,
    target_config: TargetConfig,
    classification_loss: ElementwiseLoss,
    box_loss: ElementwiseLoss,
    normalizer: str = "image",
    mining_config: MiningConfig | None = None,
    image_weights: dict[str, Tensor] | None = None,
) -> LossTerms:
    """The unnormalized losses of a batch, and what to divide them by.

    Args:
        outputs: dict of logits [B, A, K] and deltas [B, A, 4].
        gt_boxes: float tensor [B, N, 4]. Absolute pixels x1, y1, x2, y2.
        gt_labels: int tensor [B, N]. 0..K-1, -1 in padding.
        anchors: float tensor [A, 4], in the same pixels.
        target_config: TargetConfig. How anchors are matched to ground truth.
        classification_loss: Keras loss or function, called (0/1 targets, logits), element-wise.
        box_loss: Keras loss or function, called (target deltas, deltas), element-wise.
        normalizer: "image", each image's losses are divided by its own number of positive anchors (§4.1), and the
            divisor is the number of images; "minibatch", the divisor is the sum over the images of Detectron's number
            of assigned anchors + 1.
        mining_config: MiningConfig, or None. Only the hardest anchors of each image contribute to its classification
            loss (§5.1); None: all that are not ignored.
        image_weights: dict of float tensors labels [B] and boxes [B], or None. Factors of the classification loss and
            of the box loss of each image.

    Returns:
        LossTerms of the batch.
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
    images = ops.cast(ops.shape(count)[0], "float32")
    if normalizer == "image":
        # An image without positives still teaches the background: its loss is divided by 1.
        classification, box = (ops.sum(loss / ops.maximum(count, 1.0)) for loss in (classification, box))
        divisor = images
    else:
        classification, box = ops.sum(classification), ops.sum(box)
        divisor = ops.sum(ops.cast(assigned, "float32") + 1.0)
    return LossTerms(classification, box, divisor, ops.sum(count), images)


def _anchor_losses(loss: ElementwiseLoss, class_targets: Tensor, logits: Tensor) -> Tensor:
    """The classification loss of each anchor, summed over classes.

    Every logit counts as a negative, then the one logit of each positive anchor is corrected: no [B, A, K] targets.

    Args:
        loss: Keras loss or function, called (0/1 targets, logits), element-wise.
        class_targets: int32 tensor [B, A].
        logits: float tensor [B, A, K].

    Returns:
        float32 tensor [B, A].
    """
    if isinstance(loss, losses.ElementLoss):  # these broadcast their targets
        zero, one = ops.zeros((1, 1, 1)), ops.ones((1, 1, 1))
    else:
        zero = one = None

    def as_negatives(logits: Tensor) -> Tensor:
        return _elementwise(loss, ops.zeros_like(logits), logits) if zero is None else loss.call(zero, logits)

    def correction(picked: Tensor) -> Tensor:
        if one is None:
            return _elementwise(loss, ops.ones_like(picked), picked) - _elementwise(
                loss, ops.zeros_like(picked), picked
            )
        return loss.call(one, picked) - loss.call(zero, picked)

    positive, label = class_targets >= 0, ops.maximum(class_targets, 0)  # [B, A]

    def total(logits: Tensor) -> Tensor:
        picked = ops.take_along_axis(logits, label[..., None], axis=-1)  # [B, A, 1]
        return ops.sum(as_negatives(logits), axis=-1) + ops.where(positive, correction(picked)[..., 0], 0.0)

    if keras.backend.backend() == "tensorflow":
        return _with_sparse_gradient(total, as_negatives, correction, positive, label)(logits)
    return total(logits)


def _with_sparse_gradient(
    total: Callable[[Tensor], Tensor],
    as_negatives: Callable[[Tensor], Tensor],
    correction: Callable[[Tensor], Tensor],
    positive: Tensor,
    label: Tensor,
) -> Callable[[Tensor], Tensor]:
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
            picked = tf.gather(logits, label, batch_dims=2)[..., None]  # [B, A, 1]
            change = slope(correction, picked, tf.where(positive, upstream, 0.0)[..., None])[..., 0]
            batch, anchors = tf.unstack(tf.shape(label))
            rows = tf.broadcast_to(tf.range(batch)[:, None], (batch, anchors))
            columns = tf.broadcast_to(tf.range(anchors), (batch, anchors))
            positions = tf.stack([rows, columns, tf.cast(label, tf.int32)], axis=-1)  # [B, A, 3]
            return tf.tensor_scatter_nd_add(dense, positions, tf.cast(change, dense.dtype))

        return total(logits), gradient

    return loss


def _elementwise(loss: ElementwiseLoss, targets: Tensor, predictions: Tensor) -> Tensor:
    """Unreduced float32 values of any Keras loss or function, of the predictions' shape.

    Keras's own losses average over the last axis, here one of length 1; `call` comes before any other reduction.
    """
    elements: ElementwiseLoss = getattr(loss, "call", loss)
    values = elements(targets[..., None], predictions[..., None])
    return ops.cast(ops.reshape(values, ops.shape(predictions)), "float32")
