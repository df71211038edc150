"""§4, Anchors: boxes at every position of P3 to P7. The order of anchors is fixed here and nowhere else.

Flattened as level (P3 first), row, column, then scale 2^(k/n) (outer), then ratio h / w (inner).

`levels` "last" is for the ablation of §5.1 without a pyramid: one level, of C5's stride, whose positions have the
anchors of all five, the sizes of P3 first.

The paper's anchors are not rounded. Weights trained by other frameworks expect theirs, which are settings: `offset`,
and `rounding`, "cell" as Detectron's, "integers" as torchvision's.
"""

import dataclasses
import math

import numpy as np
from keras import ops

from retinanet_keras.config import AnchorConfig

LEVELS = (3, 4, 5, 6, 7)  # §4: P3 to P7
STRIDES = tuple(2**level for level in LEVELS)
LAST_STRIDE = 32  # of C5


def strides(config=AnchorConfig()):  # noqa: B008 (frozen)
    """The strides of the levels that have anchors, in their order."""
    return (LAST_STRIDE,) if config.levels == "last" else STRIDES


def cell_anchors(stride, config=AnchorConfig()):  # noqa: B008
    """The anchors of one cell around its center.

    Args:
        stride: of the level, in pixels.

    Returns:
        float32 NumPy [A, 4], offsets x1, y1, x2, y2 from the center in pixels, A = scales x ratios; on the last ResNet
        layer five times that.
    """
    if config.levels == "last":
        pyramid = dataclasses.replace(config, levels="pyramid")
        return np.concatenate([cell_anchors(size, pyramid) for size in STRIDES])
    offsets = []
    for k in range(config.scales):
        scale = 2 ** (k / config.scales)
        for ratio in config.ratios:
            if config.rounding == "cell":
                width = round(math.sqrt(stride * stride / ratio))
                height = round(width * ratio)
                width, height = config.size * scale * width, config.size * scale * height
            else:
                side = config.size * stride * scale
                side = int(side) if config.rounding == "integers" else side
                width, height = side / math.sqrt(ratio), side * math.sqrt(ratio)
            corner = [width / 2, height / 2]
            if config.rounding == "integers":
                corner = [round(length) for length in corner]
            offsets.append([-corner[0], -corner[1], *corner])
    return np.array(offsets, "float32")


def grid(height, width, stride):
    """(rows, columns) of a level for an image of height x width pixels: partial cells count."""
    return (height + stride - 1) // stride, (width + stride - 1) // stride


def spacing(side, cells, stride, config=AnchorConfig()):  # noqa: B008
    """Pixels from one cell's center to the next, along a side of the image.

    Args:
        side: height or width of the image in pixels; an int, an array of them, or an integer tensor of the graph.
        cells: rows or columns of the level, as `grid` gives them for that side.
        stride: of the level, in pixels.

    Returns:
        the stride; with rounding "integers" float32 of the shape of `side`, torchvision's whole pixels per cell: less
        than the stride where the last cell is partial.
    """
    return ops.cast(side // cells, "float32") if config.rounding == "integers" else stride


def cell_centers(cells, spacing, config=AnchorConfig()):  # noqa: B008
    """Centers of cells along a side of the image.

    Args:
        cells: numbers of rows or columns, from 0.
        spacing: of that side, from `spacing`.

    Returns:
        float32 of the shape of `cells`, in pixels.
    """
    return (ops.cast(cells, "float32") + config.offset) * spacing


def level_sizes(height, width, config=AnchorConfig()):  # noqa: B008
    """Anchors on each level, the finest first, for an image of height x width pixels (ints or integer tensors)."""
    counts = []
    for stride in strides(config):
        rows, columns = grid(height, width, stride)
        counts.append(rows * columns * config.per_cell)
    return counts


def anchor_boxes(height, width, config=AnchorConfig()):  # noqa: B008
    """All anchors of an image.

    Args:
        height, width: of the image in pixels, ints or integer scalars of the graph.
        config: sizes, scales, ratios and rounding.

    Returns:
        float32 [A, 4], absolute pixels x1, y1, x2, y2, in the order above; not clipped to the image.
    """
    return ops.concatenate(anchors_by_level(height, width, config), axis=0)


def anchors_by_level(height, width, config=AnchorConfig()):  # noqa: B008
    """The parts of `anchor_boxes`: float32 [A_l, 4] for each level, P3 first."""
    levels = []
    for stride in strides(config):
        rows, columns = grid(height, width, stride)
        x = cell_centers(ops.arange(columns), spacing(width, columns, stride, config), config)  # [columns]
        y = cell_centers(ops.arange(rows), spacing(height, rows, stride, config), config)  # [rows]
        offsets = cell_anchors(stride, config)  # [a, 4]
        shape = (rows, columns, config.per_cell)
        corners = [
            ops.broadcast_to(center + offsets[None, None, :, side], shape)
            for side, center in enumerate([x[None, :, None], y[:, None, None]] * 2)
        ]
        levels.append(ops.reshape(ops.stack(corners, axis=-1), (-1, 4)))
    return levels
