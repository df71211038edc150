"""§4.1, Inference: logits and deltas become detections."""

from keras import ops

from retinanet_keras import boxes, nms


def decode(
    logits, deltas, anchors, level_sizes, height, width, *,
    score_threshold=0.05, pre_nms_top_k=1000, nms_iou=0.5, max_detections=100,
):  # fmt: skip
    """The best predictions of every level, decoded, clipped to the image, and thinned by per-class NMS.

    Args:
        logits: [B, A, K], before the sigmoid.
        deltas: [B, A, 4], dx, dy, dw, dh.
        anchors: [A, 4], absolute pixels x1, y1, x2, y2.
        level_sizes: anchors per level, ints (or scalars of the graph) summing to A.
        height, width: of the image before padding in pixels, scalars or [B].
        score_threshold: a score must be above it.
        pre_nms_top_k: (anchor, class) pairs kept per level, the highest exactly.
        nms_iou: boxes of one class that overlap by more are suppressed.
        max_detections: D, kept per image.

    Returns:
        dict of boxes float32 [B, D, 4] in absolute pixels x1, y1, x2, y2, scores float32 [B, D] falling, labels int32
        [B, D], count int32 [B]. Rows past count: box 0, score 0, label -1.
    """
    num_classes = logits.shape[-1]
    picked_logits, picked_anchors, picked_labels = [], [], []
    start = 0
    for size in level_sizes:
        best, anchor, label = _top_pairs(logits[:, start : start + size], pre_nms_top_k)
        picked_logits.append(best)
        picked_anchors.append(anchor + start)
        picked_labels.append(label)
        start = start + size
    # The sigmoid of survivors only: of all A x K logits it would take ten times as long as the selection.
    scores = ops.sigmoid(ops.cast(ops.concatenate(picked_logits, axis=1), "float32"))  # [B, N]
    scores = ops.where(scores > score_threshold, scores, 0.0)
    anchor = ops.concatenate(picked_anchors, axis=1)
    labels = ops.concatenate(picked_labels, axis=1)
    candidates = boxes.decode(
        ops.take(ops.convert_to_tensor(anchors), anchor, axis=0), ops.take_along_axis(deltas, anchor[..., None], axis=1)
    )
    candidates = boxes.clip(candidates, height, width)  # [B, N, 4]
    kept_boxes, kept_scores, kept_labels, count = nms.per_class(
        candidates, scores, labels, num_classes, iou_threshold=nms_iou, max_detections=max_detections
    )
    return {"boxes": kept_boxes, "scores": kept_scores, "labels": kept_labels, "count": count}


def _top_pairs(logits, k):
    """The k highest (anchor, class) pairs of a level, exactly.

    The k highest pairs lie within the k anchors of highest maximum, so only those rows are sorted in full.

    Args:
        logits: [B, A, K].

    Returns:
        logits [B, k'], anchor index int32 [B, k'], class int32 [B, k'], k' = min(k, A x K).
    """
    num_classes = logits.shape[-1]
    rows = _smaller(k, ops.shape(logits)[1])
    _, anchor = ops.top_k(ops.max(logits, axis=-1), rows)  # [B, rows]
    best_rows = ops.take_along_axis(logits, anchor[..., None], axis=1)  # [B, rows, K]
    flat = ops.reshape(best_rows, (ops.shape(logits)[0], -1))
    values, index = ops.top_k(flat, _smaller(k, rows * num_classes))
    index = ops.cast(index, "int32")
    row, label = index // num_classes, index % num_classes
    return values, ops.take_along_axis(ops.cast(anchor, "int32"), row, axis=1), label


def _smaller(a, b):
    """The minimum: of ints an int, as XLA needs it; of scalars of the graph another."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else ops.minimum(a, b)
