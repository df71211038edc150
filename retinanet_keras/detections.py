"""§4.1, Inference: logits and deltas become detections."""

from keras import ops

from retinanet_keras import boxes, nms


def decode(
    logits, deltas, anchors, level_sizes, height, width, *,
    score_threshold=0.05, pre_nms_top_k=1000, nms_iou=0.5, max_detections=100, clip="before_nms", p7_threshold=None,
):  # fmt: skip
    """The best predictions of every level, decoded, clipped to the image, and thinned by per-class NMS.

    The last two arguments are for weights trained by other frameworks.

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
        clip: "before_nms"; "after_nms", where boxes left without area are dropped (Detectron2); "inclusive", before it
            to pixels 0 to side - 1, of which a box has one at least (Detectron).
        p7_threshold: in place of `score_threshold` on the last level; None: the same (Detectron: 0).

    Returns:
        dict of boxes float32 [B, D, 4] in absolute pixels x1, y1, x2, y2, scores float32 [B, D] falling, labels int32
        [B, D], count int32 [B]. Rows past count: box 0, score 0, label -1.
    """
    starts = [0]
    for size in level_sizes:
        starts.append(starts[-1] + size)
    bounds = list(zip(starts[:-1], starts[1:], strict=True))
    anchors = ops.convert_to_tensor(anchors)
    return decode_levels(
        [logits[:, start:end] for start, end in bounds], [deltas[:, start:end] for start, end in bounds],
        [anchors[start:end] for start, end in bounds], height, width, score_threshold=score_threshold,
        pre_nms_top_k=pre_nms_top_k, nms_iou=nms_iou, max_detections=max_detections, clip=clip,
        p7_threshold=p7_threshold,
    )  # fmt: skip


def decode_levels(
    logits, deltas, anchors, height, width, *, score_threshold, pre_nms_top_k, nms_iou, max_detections, clip,
    p7_threshold,
):  # fmt: skip
    """`decode` of lists of the levels' logits [B, A_l, K], deltas [B, A_l, 4] and anchors [A_l, 4].

    Joining the levels' logits first would cost as much as all the rest.
    """
    if clip not in ("before_nms", "after_nms", "inclusive"):
        raise ValueError(f'clip: expected "before_nms", "after_nms" or "inclusive", got {clip!r}')
    num_classes = logits[0].shape[-1]
    picked_scores, picked_boxes, picked_labels = [], [], []
    for level, (level_logits, level_deltas, level_anchors) in enumerate(zip(logits, deltas, anchors, strict=True)):
        best, anchor, label = _top_pairs(level_logits, pre_nms_top_k)
        # The sigmoid of survivors only: of all A x K logits it would take ten times as long as the selection.
        best = ops.sigmoid(ops.cast(best, "float32"))
        last = p7_threshold is not None and level == len(logits) - 1
        picked_scores.append(ops.where(best > (p7_threshold if last else score_threshold), best, 0.0))
        picked_boxes.append(boxes.decode(ops.take(level_anchors, anchor, axis=0), _rows(level_deltas, anchor)))
        picked_labels.append(label)
    scores = ops.concatenate(picked_scores, axis=1)  # [B, N]
    candidates = ops.concatenate(picked_boxes, axis=1)  # [B, N, 4]
    labels = ops.concatenate(picked_labels, axis=1)
    if clip != "after_nms":
        candidates = boxes.clip(candidates, height, width, least=1.0 if clip == "inclusive" else 0.0)
    kept = nms.per_class(candidates, scores, labels, num_classes, iou_threshold=nms_iou, max_detections=max_detections)
    if clip == "after_nms":
        kept = _clip_and_drop(*kept[:3], height, width)
    return dict(zip(("boxes", "scores", "labels", "count"), kept, strict=True))


def for_any_batch(detect):
    """Make a detection function take empty batches, too: convolutions of oneDNN and ONNX Runtime fail on them.

    Args:
        detect: a function of arrays [B, ...] to a dict of arrays [B, ...], B at least 1.

    Returns:
        the same function for any B: where it is 0, `detect` is given a row of zeros, and its results are removed.
    """

    def detect_any(*batch):
        count = ops.shape(batch[0])[0]
        if isinstance(count, int) and count > 0:
            return detect(*batch)
        missing = 1 - _smaller(count, 1)
        padded = (ops.pad(array, [[0, missing]] + [[0, 0]] * (len(array.shape) - 1)) for array in batch)
        return {name: value[:count] for name, value in detect(*padded).items()}

    return detect_any


def _clip_and_drop(kept_boxes, scores, labels, height, width):
    """Detections cut to the image; those without area go, and the others move up in order."""
    kept_boxes = boxes.clip(kept_boxes, height, width)
    real = (boxes.area(kept_boxes) > 0) & (labels >= 0)  # [B, D]
    scores, order = ops.top_k(ops.where(real, scores, 0.0), scores.shape[1])  # stable: equal scores keep their order
    real = ops.take_along_axis(real, order, axis=1)
    return (
        ops.where(real[..., None], ops.take_along_axis(kept_boxes, order[..., None], axis=1), 0.0),
        scores,
        ops.where(real, ops.take_along_axis(labels, order, axis=1), -1),
        ops.sum(ops.cast(real, "int32"), axis=1),
    )


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
    anchor = ops.cast(anchor, "int32")
    best_rows = _rows(logits, anchor)  # [B, rows, K]
    flat = ops.reshape(best_rows, (ops.shape(logits)[0], -1))
    values, index = ops.top_k(flat, _smaller(k, rows * num_classes))
    index = ops.cast(index, "int32")
    row, label = index // num_classes, index % num_classes
    return values, ops.take_along_axis(anchor, row, axis=1), label


def _rows(values, index):
    """Rows of [B, A, C] by int32 [B, k] -> [B, k, C]: `take_along_axis` would look up each of the C numbers."""
    batch, count = ops.shape(values)[:2]
    first = ops.arange(batch, dtype="int32")[:, None] * count
    return ops.take(ops.reshape(values, (-1, values.shape[-1])), first + index, axis=0)


def _smaller(a, b):
    """The minimum: of ints an int, as XLA needs it; of scalars of the graph another."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else ops.minimum(a, b)
