"""The same maths a second time: float64 NumPy, in the plainest form, for tests to compare with."""

import numpy as np


def areas(boxes):
    return np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)


def iou(a, b):
    """IoU of boxes [M, 4] and [N, 4] by loops over b; 0 where the union has no area. -> [M, N]"""
    a, b = np.asarray(a, "float64").reshape(-1, 4), np.asarray(b, "float64").reshape(-1, 4)
    out = np.zeros((len(a), len(b)))
    for n, box in enumerate(b):
        width = np.minimum(a[:, 2], box[2]) - np.maximum(a[:, 0], box[0])
        height = np.minimum(a[:, 3], box[3]) - np.maximum(a[:, 1], box[1])
        shared = np.where((width > 0) & (height > 0), width * height, 0.0)
        union = areas(a) + areas(box[None]) - shared
        out[:, n] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return out


def encode(anchors, boxes):
    """Deltas dx, dy, dw, dh, [A, 4]."""
    anchors, boxes = np.asarray(anchors, "float64"), np.asarray(boxes, "float64")
    aw, ah = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    bw, bh = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    dx = ((boxes[:, 0] + boxes[:, 2]) - (anchors[:, 0] + anchors[:, 2])) / (2 * aw)
    dy = ((boxes[:, 1] + boxes[:, 3]) - (anchors[:, 1] + anchors[:, 3])) / (2 * ah)
    return np.stack([dx, dy, np.log(bw / aw), np.log(bh / ah)], axis=1)


def decode(anchors, deltas):
    """Boxes x1, y1, x2, y2, [A, 4]; dw and dh at most log(1000 / 16)."""
    anchors, deltas = np.asarray(anchors, "float64"), np.asarray(deltas, "float64")
    aw, ah = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    x = (anchors[:, 0] + anchors[:, 2]) / 2 + deltas[:, 0] * aw
    y = (anchors[:, 1] + anchors[:, 3]) / 2 + deltas[:, 1] * ah
    width = aw * np.exp(np.minimum(deltas[:, 2], np.log(62.5)))
    height = ah * np.exp(np.minimum(deltas[:, 3], np.log(62.5)))
    return np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)


def anchors(height, width, size=4, scales=3, ratios=(0.5, 1, 2)):
    """Anchors one at a time, the paper's by default. -> [A, 4]"""
    boxes = []
    for stride in (8, 16, 32, 64, 128):
        for row in range(int(np.ceil(height / stride))):
            for column in range(int(np.ceil(width / stride))):
                for side in [size * stride * 2 ** (k / scales) for k in range(scales)]:
                    for ratio in ratios:
                        w, h = side / ratio**0.5, side * ratio**0.5
                        x, y = (column + 0.5) * stride, (row + 0.5) * stride
                        boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return np.array(boxes)


def assign(anchors, boxes, labels, low_quality, positive=0.5, negative=0.4):
    """Targets of one image from the whole IoU matrix: classes [A] (-1 background, -2 ignore) and deltas [A, 4]."""
    anchors = np.asarray(anchors, "float64")
    boxes, labels = np.asarray(boxes, "float64").reshape(-1, 4), np.asarray(labels).reshape(-1)
    real = (labels >= 0) & (areas(boxes) > 0)
    boxes, labels = boxes[real], labels[real]
    classes, deltas = np.full(len(anchors), -1), np.zeros((len(anchors), 4))
    if len(boxes) == 0:
        return classes, deltas
    overlap = iou(anchors, boxes)  # [A, N]
    own, best = overlap.argmax(axis=1), overlap.max(axis=1)
    classes[best >= negative] = -2
    chosen = best >= positive
    forced = ((overlap == overlap.max(axis=0)) & (overlap > 0)).any(axis=1)
    if low_quality == "all":
        chosen |= forced
    elif low_quality == "detectron":
        chosen |= forced & (best >= negative)
    classes[chosen] = labels[own[chosen]]
    deltas[chosen] = encode(anchors[chosen], boxes[own[chosen]])
    return classes, deltas


def assigned(anchors, boxes, labels, positive=0.5):
    """Detectron's count for its normalizer: best anchors of a box count even under the lower threshold."""
    boxes = np.asarray(boxes, "float64").reshape(-1, 4)[np.asarray(labels).reshape(-1) >= 0]
    if len(boxes) == 0:
        return 0
    overlap = iou(anchors, boxes)
    forced = ((overlap == overlap.max(axis=0)) & (overlap > 0)).any(axis=1)
    return int(((overlap.max(axis=1) >= positive) | forced).sum())


def nms(boxes, scores, labels, threshold, most):
    """Indices kept, best first; scores of 0 are no candidates."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if scores[i] > 0 and len(kept) < most:
            rivals = [j for j in kept if labels[j] == labels[i]]
            if not rivals or iou(boxes[i][None], boxes[rivals]).max() <= threshold:
                kept.append(i)
    return kept


def log_sigmoid(x):
    x = np.asarray(x, "float64")
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def focal(x, y, alpha=0.25, gamma=2.0):
    """-alpha_t (1 - p_t)^gamma log(p_t), element by element; x logits, y 0 or 1."""
    x, y = np.asarray(x, "float64"), np.asarray(y)
    x_t = np.where(y == 1, x, -x)
    alpha_t = 1.0 if alpha is None else np.where(y == 1, alpha, 1 - alpha)
    return -alpha_t * np.exp(gamma * log_sigmoid(-x_t)) * log_sigmoid(x_t)


def smooth_l1(error, beta=0.11):
    error = np.abs(np.asarray(error, "float64"))
    return np.where(error < beta, error**2 / (2 * beta), error - beta / 2)


def conv(x, kernel, bias, stride=1):
    """A convolution padded by half the kernel on all sides. x [B, H, W, C], kernel [k, k, C, D] -> [B, ., ., D]"""
    size = kernel.shape[0]
    half = size // 2
    x = np.pad(np.asarray(x, "float64"), [(0, 0), (half, half), (half, half), (0, 0)])
    rows = range(0, x.shape[1] - size + 1, stride)
    columns = range(0, x.shape[2] - size + 1, stride)
    windows = np.array([[x[:, r : r + size, c : c + size] for c in columns] for r in rows])  # [H, W, B, k, k, C]
    return np.einsum("hwbijc,ijcd->bhwd", windows, np.asarray(kernel, "float64")) + bias


def ohem(losses, anchors, positive, valid, batch_size, nms_iou, ratio=None):
    """§5.1, hard examples of one image by a whole NMS over the valid anchors. -> bool [A]"""
    overlap = iou(anchors, anchors) > nms_iou
    kept = []
    for i in np.argsort(-np.asarray(losses, "float64"), kind="stable"):
        if valid[i] and not overlap[i, kept].any():
            kept.append(i)
    chosen = kept[:batch_size]
    if ratio is not None:
        positives = [i for i in kept if positive[i]][:batch_size]
        room = min(ratio * len(positives), batch_size - len(positives))
        chosen = positives + [i for i in kept if not positive[i]][:room]
    return np.isin(np.arange(len(losses)), chosen)
