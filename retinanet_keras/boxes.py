"""Boxes: float32 absolute pixels `x1, y1, x2, y2` in continuous coordinates, and the deltas of §4.

Deltas are R-CNN's parametrization of a box relative to an anchor: `dx, dy` the shift of the center in anchor widths
and heights, `dw, dh` the logarithm of the ratio of the sides.
"""

import math

from keras import ops

from retinanet_keras.tensors import Size, Tensor

MAX_LOG_RATIO = math.log(1000.0 / 16.0)  # Detectron: not in the paper; keeps exp from overflowing


def area(boxes: Tensor) -> Tensor:
    """Areas in square pixels; 0 for an inverted box. boxes [..., 4] -> [...]."""
    sides = ops.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)  # [..., 2]
    return sides[..., 0] * sides[..., 1]


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes.

    Args:
        a: tensor [..., M, 4]. Boxes in absolute pixels x1, y1, x2, y2.
        b: tensor [..., N, 4]. Boxes in the same pixels.

    Returns:
        float32 tensor [..., M, N] in [0, 1]; 0, never NaN, where a box has no area.
    """
    a, b = _float32(a), _float32(b)
    first, second = a[..., :, None, :], b[..., None, :, :]
    # One coordinate at a time: no [..., M, N, 2] temporaries.
    x1 = ops.maximum(first[..., 0], second[..., 0])  # [..., M, N]
    y1 = ops.maximum(first[..., 1], second[..., 1])
    x2 = ops.minimum(first[..., 2], second[..., 2])
    y2 = ops.minimum(first[..., 3], second[..., 3])
    shared = ops.maximum(x2 - x1, 0.0) * ops.maximum(y2 - y1, 0.0)
    union = area(a)[..., :, None] + area(b)[..., None, :] - shared
    return ops.where(union > 0, shared / ops.where(union > 0, union, 1.0), 0.0)


def clip(boxes: Tensor, height: Size | Tensor, width: Size | Tensor, least: float = 0.0) -> Tensor:
    """Clip boxes to an image.

    Args:
        boxes: tensor [..., N, 4]. Absolute pixels x1, y1, x2, y2.
        height: scalar, or for boxes [B, N, 4] tensor [B]. Height of the image in pixels.
        width: scalar, or for boxes [B, N, 4] tensor [B]. Width of the image in pixels.
        least: float. Pixels by which x1 stays left of the image's right side and x2 right of its left side; y alike.

    Returns:
        float32 tensor of the same shape, 0 <= x <= width and 0 <= y <= height.
    """
    boxes = _float32(boxes)
    sides = ops.stack([_float32(width), _float32(height)], axis=-1)  # [2] or [B, 2]
    limit = ops.concatenate([sides, sides], axis=-1)
    if len(limit.shape) > 1:
        limit = limit[:, None, :]  # [B, 1, 4]
    low, below = (ops.convert_to_tensor(corner) for corner in ([0.0, 0.0, least, least], [least, least, 0.0, 0.0]))
    return ops.minimum(ops.maximum(boxes, low), limit - below)


def encode(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Deltas that turn anchors into boxes: `decode(anchors, encode(anchors, boxes)) == boxes`.

    The law holds for sides up to 1000/16 of the anchor's, where `decode` clips.

    Args:
        anchors: tensor [..., A, 4]. Absolute pixels x1, y1, x2, y2, with positive sides.
        boxes: tensor [..., A, 4]. One box for each anchor, in the same pixels, with positive sides.

    Returns:
        float32 tensor [..., A, 4], deltas dx, dy, dw, dh.
    """
    anchor_center, anchor_size = _center_size(_float32(anchors))
    center, size = _center_size(_float32(boxes))
    return ops.concatenate([(center - anchor_center) / anchor_size, ops.log(size / anchor_size)], axis=-1)


def decode(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes from anchors and deltas, the inverse of `encode`; dw and dh are clipped at log(1000/16).

    Args:
        anchors: tensor [..., A, 4]. Absolute pixels x1, y1, x2, y2.
        deltas: tensor [..., A, 4]. dx, dy, dw, dh.

    Returns:
        float32 tensor [..., A, 4], boxes in absolute pixels x1, y1, x2, y2, not clipped to any image.
    """
    anchor_center, anchor_size = _center_size(_float32(anchors))
    deltas = _float32(deltas)
    center = anchor_center + deltas[..., :2] * anchor_size
    half = 0.5 * anchor_size * ops.exp(ops.minimum(deltas[..., 2:], MAX_LOG_RATIO))
    return ops.concatenate([center - half, center + half], axis=-1)


def _center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centers and sides, [..., 2] each, x before y."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def _float32(x: Tensor) -> Tensor:
    """Convert to float32, also under mixed precision: a bfloat16 does not hold every pixel coordinate above 256."""
    return ops.cast(ops.convert_to_tensor(x), "float32")
