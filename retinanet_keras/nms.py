"""§4.1, Inference: greedy non-maximum suppression, class by class.

`per_class` is written in keras.ops and runs on every backend; TensorFlow's own kernel gives the same result faster.
"""

import keras
from keras import ops

from retinanet_keras import boxes as box_ops
from retinanet_keras.tensors import Tensor


def per_class(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Suppress boxes that overlap a box of higher score of the same class by more than the threshold.

    Args:
        boxes: tensor [B, N, 4]. Absolute pixels x1, y1, x2, y2.
        scores: tensor [B, N]. Candidates of score 0 or less are not considered.
        labels: int32 tensor [B, N]. 0..K-1.
        num_classes: int. Number of object classes, K.
        iou_threshold: float. IoU above which a box is suppressed.
        max_detections: int. Largest number of boxes of an image, D.

    Returns:
        (boxes [B, D, 4], scores [B, D], labels int32 [B, D], count int32 [B]), in descending order of score. Rows past
        count: box 0, score 0, label -1.
    """
    if keras.backend.backend() == "tensorflow":
        detections = _tensorflow_kernel(boxes, scores, labels, num_classes, iou_threshold, max_detections)
    else:
        detections = greedy(boxes, scores, labels, iou_threshold, max_detections)
    boxes, scores, labels, count = detections
    real = ops.arange(max_detections)[None] < count[:, None]  # [B, D]
    return (
        ops.where(real[..., None], boxes, 0.0),
        ops.where(real, scores, 0.0),
        ops.cast(ops.where(real, labels, -1), "int32"),
        ops.cast(count, "int32"),
    )


def greedy(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pick the best remaining candidate, suppress what overlaps it in its class, repeat; all images at once.

    Arguments and results are those of `per_class`, but rows past count hold any values.
    """
    boxes = ops.cast(boxes, "float32")
    rows = ops.arange(max_detections)

    def body(step, alive, picks, count):
        best = ops.argmax(alive, axis=1)  # [B]
        score = ops.max(alive, axis=1)
        picked = ops.take_along_axis(boxes, best[:, None, None], axis=1)  # [B, 1, 4]
        same = labels == ops.take_along_axis(labels, best[:, None], axis=1)
        overlaps = box_ops.iou(picked, boxes)[:, 0] > iou_threshold  # [B, N]
        chosen = ops.arange(ops.shape(boxes)[1])[None] == best[:, None]
        alive = ops.where((same & overlaps) | chosen, 0.0, alive)
        picks = ops.where((rows == step)[None], best[:, None], picks)
        return step + 1, alive, picks, count + ops.cast(score > 0, "int32")

    batch = ops.shape(scores)[0]
    start = (
        ops.zeros((), "int32"),
        ops.cast(scores, "float32"),
        ops.zeros((batch, max_detections), "int32"),
        ops.zeros((batch,), "int32"),
    )
    _, _, picks, count = ops.while_loop(lambda step, *_: step < max_detections, body, start)
    return (
        ops.take_along_axis(boxes, picks[..., None], axis=1),
        ops.take_along_axis(scores, picks, axis=1),
        ops.take_along_axis(labels, picks, axis=1),
        count,
    )


def _tensorflow_kernel(
    boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, iou_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TensorFlow's combined kernel, on ranks in place of scores, as it gives equal scores no order.

    `clip_boxes=False`: the default clips pixels to [0, 1].
    """
    import tensorflow as tf

    count = tf.shape(scores)[1]
    scores, order = tf.math.top_k(scores, count)  # stable, the first among equals
    rank = tf.where(scores > 0, tf.cast(count - tf.range(count), tf.float32), 0.0)  # [B, N], whole numbers
    boxes, labels = (tf.gather(values, order, batch_dims=1) for values in (boxes, labels))
    by_class = tf.one_hot(labels, num_classes) * rank[..., None]  # [B, N, K]
    suppressed = tf.image.combined_non_max_suppression(
        boxes[:, :, None, :],
        by_class,
        max_detections,
        max_detections,
        iou_threshold=iou_threshold,
        score_threshold=0.0,
        clip_boxes=False,
    )
    picks = tf.minimum(
        count - tf.cast(suppressed.nmsed_scores, tf.int32), count - 1
    )  # [B, D]; beyond the valid ones, any
    boxes, scores, labels = (tf.gather(values, picks, batch_dims=1) for values in (boxes, scores, labels))
    return boxes, scores, labels, suppressed.valid_detections
