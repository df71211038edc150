"""§4, Anchors: match anchors to ground truth.

One pass over the ground-truth boxes, with a state of one IoU, one index and one flag per anchor: the [B, N, A] matrix
of all IoUs is never made.
"""

import numpy as np
from keras import ops

from retinanet_keras import boxes
from retinanet_keras.tensors import Tensor

BACKGROUND = -1
IGNORE = -2
BOXES_PER_PASS = 4  # in one pass of the state through memory: under XLA a quarter faster than 1
SMALLEST_UNION = float(np.finfo("float32").tiny)  # 0 / 0 would be NaN


def assign(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    low_quality: str = "detectron",
) -> tuple[Tensor, Tensor]:
    """Match every anchor to a ground-truth box, to the background, or to neither.

    An anchor is matched to the box of its highest IoU (the first among equals): positive from `positive_iou`,
    background below `negative_iou`, ignored in between.

    Args:
        anchors: tensor [A, 4]. Absolute pixels x1, y1, x2, y2.
        gt_boxes: tensor [B, N, 4]. Boxes in the same pixels; N may be 0.
        gt_labels: int tensor [B, N]. 0..K-1, or -1 in rows that are padding.
        positive_iou: float. IoU from which an anchor is positive.
        negative_iou: float. IoU below which an anchor is background.
        low_quality: str. What happens to each box's best anchors, ties included: "none", nothing; "detectron", they
            become positive, and those below `negative_iou` return to background; "all", they become positive whatever
            their IoU above 0. Such an anchor has the class and the box of its own highest IoU, as in Detectron.

    Returns:
        (class_targets, box_targets): int32 tensor [B, A], 0..K-1, BACKGROUND or IGNORE; float32 tensor [B, A, 4],
        deltas dx, dy, dw, dh to the box, 0 where the anchor is not positive.
    """
    return assign_and_count(
        anchors, gt_boxes, gt_labels, positive_iou=positive_iou, negative_iou=negative_iou, low_quality=low_quality
    )[:2]


def assign_and_count(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    low_quality: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`assign`, with Detectron's count of assigned anchors as third result, int32 [B].

    It counts a box's best anchors before those under `negative_iou` return to background.
    """
    if low_quality not in ("none", "detectron", "all"):
        raise ValueError(f'low_quality: expected "none", "detectron" or "all", got {low_quality!r}')
    anchors = ops.cast(ops.convert_to_tensor(anchors), "float32")
    gt_boxes = ops.cast(ops.convert_to_tensor(gt_boxes), "float32")
    gt_labels = ops.cast(ops.convert_to_tensor(gt_labels), "int32")
    # A padding row at the end: images without boxes are no special case, and index N means "no box".
    gt_boxes = ops.pad(gt_boxes, [[0, 0], [0, 1], [0, 0]])  # [B, N + 1, 4]
    gt_labels = ops.pad(gt_labels, [[0, 0], [0, 1]], constant_values=-1)  # [B, N + 1]

    best_iou, best_box, forced = _match(anchors, gt_boxes, gt_labels, low_quality != "none")
    positive = best_iou >= positive_iou
    if low_quality == "detectron":
        positive = positive | (forced & (best_iou >= negative_iou))
    elif low_quality == "all":
        positive = positive | forced
    count = ops.sum(ops.cast(positive | forced, "int32"), axis=1)  # [B]; nothing is forced under "none"
    label = ops.take_along_axis(gt_labels, best_box, axis=1)  # [B, A]
    unmatched = ops.where(best_iou < negative_iou, BACKGROUND, IGNORE)
    class_targets = ops.cast(ops.where(positive, label, unmatched), "int32")

    matched_boxes = ops.take_along_axis(gt_boxes, best_box[..., None], axis=1)  # [B, A, 4]
    matched_boxes = ops.where(positive[..., None], matched_boxes, anchors)  # the anchor itself has zero deltas
    return class_targets, boxes.encode(anchors, matched_boxes), count


def _match(anchors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, want_forced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Each anchor's highest IoU [B, A], the box that has it [B, A], and whether it is some box's best [B, A]."""
    batch, count = ops.shape(gt_labels)[0], ops.shape(gt_labels)[1]
    valid = (gt_labels >= 0) & (boxes.area(gt_boxes) > 0)  # [B, N]
    # Boxes are padded at the end, so the loop stops at the batch's last one.
    last = ops.max(ops.where(ops.any(valid, axis=0), ops.arange(1, count + 1, dtype="int32"), 0))
    shape = (batch, ops.shape(anchors)[0])

    # What the loop reads is laid out before it: columns of the anchors, and rows x1, y1, x2, y2, area of the boxes. A
    # box that is not valid becomes 0, 0, 0, 0, which overlaps nothing, and such boxes fill the last pass.
    anchor_columns = (*(anchors[:, side] for side in range(4)), boxes.area(anchors))  # 5 x [A]
    gt_boxes = ops.where(valid[..., None], gt_boxes, 0.0)
    rows = ops.concatenate([gt_boxes, boxes.area(gt_boxes)[..., None]], axis=-1)  # [B, N, 5]
    rows = ops.pad(ops.transpose(rows, (1, 2, 0)), [[0, BOXES_PER_PASS - 1], [0, 0], [0, 0]])[..., None]  # [., 5, B, 1]

    def body(start, best_iou, best_box, forced):
        for j in range(BOXES_PER_PASS):
            overlap = _iou(rows[start + j], anchor_columns)  # [B, A]
            if want_forced:
                highest = ops.max(overlap, axis=1, keepdims=True)  # [B, 1]
                forced = forced | (overlap == ops.where(highest > 0, highest, 2.0))  # no IoU is 2
            best_box = ops.where(overlap > best_iou, start + j, best_box)
            best_iou = ops.maximum(overlap, best_iou)
        return start + BOXES_PER_PASS, best_iou, best_box, forced

    state = (
        ops.zeros((), "int32"),
        ops.zeros(shape, "float32"),
        ops.full(shape, count - 1, "int32"),  # the padding row
        ops.zeros(shape, "bool"),
    )
    _, best_iou, best_box, forced = ops.while_loop(lambda start, *_: start < last, body, state)
    return best_iou, best_box, forced


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """`boxes.iou` of boxes given as columns x1, y1, x2, y2, area that broadcast: the same numbers in fewer steps."""
    width = ops.relu(ops.minimum(a[2], b[2]) - ops.maximum(a[0], b[0]))
    height = ops.relu(ops.minimum(a[3], b[3]) - ops.maximum(a[1], b[1]))
    shared = width * height
    return shared / ops.maximum(a[4] + b[4] - shared, SMALLEST_UNION)
