"""Boxes: float32 absolute pixels `x1, y1, x2, y2` in continuous coordinates, and the deltas of §4.

Deltas are R-CNN's parametrization of a box relative to an anchor: `dx, dy` the shift of the center in anchor widths
and heights, `dw, dh` the logarithm of the ratio of the sides.
"""

import math

from keras import ops

MAX_LOG_RATIO = math.log(1000.0 / 16.0)  # Detectron: not in the paper; keeps exp from overflowing


def area(boxes):
    """Areas in square pixels; 0 for an inverted box. boxes [..., 4] -> [...]."""
    sides = ops.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)  # [..., 2]
    return sides[..., 0] * sides[..., 1]


def iou(a, b):
    """Intersection over union of every pair.

    Args:
        a: boxes [..., M, 4], absolute pixels x1, y1, x2, y2.
        b: boxes [..., N, 4].

    Returns:
        float32 [..., M, N] in [0, 1]; 0, never NaN, where a box has no area.
    """
    a, b = _float32(a), _float32(b)
    first, second = a[..., :, None, :], b[..., None, :, :]
    x1 = ops.maximum(
        first[..., 0], second[..., 0]
    )  # [..., M, N]; one coordinate at a time: no [..., M, N, 2] temporaries
    y1 = ops.maximum(first[..., 1], second[..., 1])
    x2 = ops.minimum(first[..., 2], second[..., 2])
    y2 = ops.minimum(first[..., 3], second[..., 3])
    shared = ops.maximum(x2 - x1, 0.0) * ops.maximum(y2 - y1, 0.0)
    union = area(a)[..., :, None] + area(b)[..., None, :] - shared
    return ops.where(union > 0, shared / ops.where(union > 0, union, 1.0), 0.0)


def clip(boxes, height, width, least=0.0):
    """Boxes cut to an image.

    Args:
        boxes: [..., N, 4], absolute pixels x1, y1, x2, y2.
        height, width: of the image in pixels, scalars or, for boxes [B, N, 4], [B].
        least: pixels of the image that x1 stays left of its right side and x2 right of its left one, y alike.

    Returns:
        float32 boxes of the same shape, 0 <= x <= width and 0 <= y <= height.
    """
    boxes = _float32(boxes)
    sides = ops.stack([_float32(width), _float32(height)], axis=-1)  # [2] or [B, 2]
    limit = ops.concatenate([sides, sides], axis=-1)
    if len(limit.shape) > 1:
        limit = limit[:, None, :]  # [B, 1, 4]
    low, below = (ops.convert_to_tensor(corner) for corner in ([0.0, 0.0, least, least], [least, least, 0.0, 0.0]))
    return ops.minimum(ops.maximum(boxes, low), limit - below)


def encode(anchors, boxes):
    """Deltas that turn anchors into boxes: `decode(anchors, encode(anchors, boxes)) == boxes`.

    The law holds for sides up to 1000/16 of the anchor's, where `decode` clips.

    Args:
        anchors: [..., A, 4], absolute pixels x1, y1, x2, y2, with positive sides.
        boxes: [..., A, 4], one for each anchor, with positive sides.

    Returns:
        float32 deltas dx, dy, dw, dh, [..., A, 4].
    """
    anchor_center, anchor_size = _center_size(_float32(anchors))
    center, size = _center_size(_float32(boxes))
    return ops.concatenate([(center - anchor_center) / anchor_size, ops.log(size / anchor_size)], axis=-1)


def decode(anchors, deltas):
    """Boxes from anchors and deltas, the inverse of `encode`; dw and dh are clipped at log(1000/16).

    Args:
        anchors: [..., A, 4], absolute pixels x1, y1, x2, y2.
        deltas: dx, dy, dw, dh, [..., A, 4].

    Returns:
        float32 boxes [..., A, 4], not clipped to any image.
    """
    anchor_center, anchor_size = _center_size(_float32(anchors))
    deltas = _float32(deltas)
    center = anchor_center + deltas[..., :2] * anchor_size
    half = 0.5 * anchor_size * ops.exp(ops.minimum(deltas[..., 2:], MAX_LOG_RATIO))
    return ops.concatenate([center - half, center + half], axis=-1)


def _center_size(boxes):
    """Centers and sides, [..., 2] each, x before y."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def _float32(x):
    """Boxes stay float32 under mixed precision: half a thousand pixels do not fit a bfloat16."""
    return ops.cast(ops.convert_to_tensor(x), "float32")
