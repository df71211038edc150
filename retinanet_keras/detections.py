"""§4.1, Inference: logits and deltas become detections."""

from collections.abc import Callable, Sequence

from keras import ops

from retinanet_keras import boxes, nms
from retinanet_keras.tensors import Size, Tensor, smaller


def decode(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    level_sizes: Sequence[Size],
    height: Size | Tensor,
    width: Size | Tensor,
    *,
    score_threshold: float = 0.05,
    pre_nms_top_k: int = 1000,
    nms_iou: float = 0.5,
    max_detections: int = 100,
    clip: str = "before_nms",
    p7_threshold: float | None = None,
) -> dict[str, Tensor]:
    """Decode the best predictions of every level, clip them to the image, and apply NMS to each class.

    `clip` and `p7_threshold` are for weights trained by other frameworks.

    Args:
        logits: float tensor [B, A, K], before the sigmoid.
        deltas: float tensor [B, A, 4]. dx, dy, dw, dh.
        anchors: float tensor [A, 4]. Absolute pixels x1, y1, x2, y2.
        level_sizes: sequence of ints, or scalars of the graph. Number of anchors on each level, together A.
        height: scalar, or tensor [B]. Height of the image before padding in pixels.
        width: scalar, or tensor [B]. Width of the image before padding in pixels.
        score_threshold: float. Predictions with a score that is not above it are filtered.
        pre_nms_top_k: int. (anchor, class) pairs of highest score that go into NMS, for each level; exact.
        nms_iou: float. Boxes of one class that overlap by more are suppressed.
        max_detections: int. Largest number of detections in an image, D.
        clip: str. "before_nms"; "after_nms", where boxes left without area are filtered (Detectron2); "inclusive",
            before NMS to pixels 0 to side - 1, of which a box has at least one (Detectron).
        p7_threshold: float or None. Replaces `score_threshold` on the last level (Detectron: 0); None: the same.

    Returns:
        dict of boxes float32 [B, D, 4] in absolute pixels x1, y1, x2, y2, scores float32 [B, D] in descending order,
        labels int32 [B, D], count int32 [B]. Rows past count: box 0, score 0, label -1.
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
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    height: Size | Tensor,
    width: Size | Tensor,
    *,
    score_threshold: float,
    pre_nms_top_k: int,
    nms_iou: float,
    max_detections: int,
    clip: str,
    p7_threshold: float | None,
) -> dict[str, Tensor]:
    """`decode` of lists of the levels' logits [B, A_l, K], deltas [B, A_l, 4] and anchors [A_l, 4].

    Concatenating the levels' logits first would cost as much as all the rest.
    """
    if clip not in ("before_nms", "after_nms", "inclusive"):
        raise ValueError(f'clip: expected "before_nms", "after_nms" or "inclusive", got {clip!r}')
    num_classes = logits[0].shape[-1]
    picked_scores, picked_boxes, picked_labels = [], [], []
    for level, (level_logits, level_deltas, level_anchors) in enumerate(zip(logits, deltas, anchors, strict=True)):
        best, anchor, label = _top_pairs(level_logits, pre_nms_top_k)
        # The sigmoid of the best only: of all A x K logits it would take ten times as long as the selection.
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
    detections = nms.per_class(
        candidates, scores, labels, num_classes, iou_threshold=nms_iou, max_detections=max_detections
    )
    if clip == "after_nms":
        detections = _clip_and_filter(*detections[:3], height, width)
    return dict(zip(("boxes", "scores", "labels", "count"), detections, strict=True))


def for_any_batch(detect: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Make a detection function accept empty batches, too: convolutions of oneDNN and ONNX Runtime fail on them.

    Args:
        detect: function of tensors [B, ...] to a dict of tensors [B, ...], B at least 1.

    Returns:
        The same function for any B: if it is 0, `detect` is given a row of zeros, and its results are removed.
    """

    def detect_any(*batch: Tensor) -> dict[str, Tensor]:
        count = ops.shape(batch[0])[0]
        if isinstance(count, int) and count > 0:
            return detect(*batch)
        missing = 1 - smaller(count, 1)
        padded = (ops.pad(array, [[0, missing]] + [[0, 0]] * (len(array.shape) - 1)) for array in batch)
        return {name: value[:count] for name, value in detect(*padded).items()}

    return detect_any


def _clip_and_filter(
    detected: Tensor, scores: Tensor, labels: Tensor, height: Size | Tensor, width: Size | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clip detections to the image; those left without area are filtered, and the others move up in order."""
    detected = boxes.clip(detected, height, width)
    real = (boxes.area(detected) > 0) & (labels >= 0)  # [B, D]
    scores, order = ops.top_k(ops.where(real, scores, 0.0), scores.shape[1])  # stable: equal scores keep their order
    real = ops.take_along_axis(real, order, axis=1)
    return (
        ops.where(real[..., None], ops.take_along_axis(detected, order[..., None], axis=1), 0.0),
        scores,
        ops.where(real, ops.take_along_axis(labels, order, axis=1), -1),
        ops.sum(ops.cast(real, "int32"), axis=1),
    )


def _top_pairs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k highest (anchor, class) pairs of a level, exactly.

    The k highest pairs lie within the k anchors of highest maximum, so only those rows are sorted in full.

    Args:
        logits: float tensor [B, A, K].
        k: int.

    Returns:
        logits [B, k'], anchor index int32 [B, k'], class int32 [B, k'], k' = min(k, A x K).
    """
    num_classes = logits.shape[-1]
    rows = smaller(k, ops.shape(logits)[1])
    _, anchor = ops.top_k(ops.max(logits, axis=-1), rows)  # [B, rows]
    anchor = ops.cast(anchor, "int32")
    best_rows = _rows(logits, anchor)  # [B, rows, K]
    flat = ops.reshape(best_rows, (ops.shape(logits)[0], -1))
    values, index = ops.top_k(flat, smaller(k, rows * num_classes))
    index = ops.cast(index, "int32")
    row, label = index // num_classes, index % num_classes
    return values, ops.take_along_axis(anchor, row, axis=1), label


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, A, C] by int32 [B, k] -> [B, k, C]: `take_along_axis` would look up each of the C numbers."""
    batch, count = ops.shape(values)[:2]
    first = ops.arange(batch, dtype="int32")[:, None] * count
    return ops.take(ops.reshape(values, (-1, values.shape[-1])), first + index, axis=0)
