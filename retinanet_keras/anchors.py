"""§4, Anchors: boxes at every position of P3 to P7. The order of anchors is fixed here and nowhere else.

Anchors are flattened as level (P3 first), row, column, then scale 2^(k/n) (outer), then ratio h / w (inner).

`levels` "last" is for the ablation of §5.1 without a pyramid: one level, of C5's stride, whose positions have the
anchors of all five, the sizes of P3 first.

The paper's anchors are not rounded. Weights of other frameworks were trained with other anchors, which are settings:
`offset`, and `rounding`, "cell" as Detectron's, "integers" as torchvision's.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from keras import ops

from retinanet_keras.config import AnchorConfig
from retinanet_keras.tensors import Size, Tensor

LEVELS = (3, 4, 5, 6, 7)  # §4: P3 to P7
STRIDES = tuple(2**level for level in LEVELS)
LAST_STRIDE = 32  # of C5


def strides(config: AnchorConfig = AnchorConfig()) -> tuple[int, ...]:  # noqa: B008 (frozen)
    """The strides in pixels of the levels that have anchors, the finest first."""
    return (LAST_STRIDE,) if config.levels == "last" else STRIDES


def cell_anchors(stride: int, config: AnchorConfig = AnchorConfig()) -> npt.NDArray[np.float32]:  # noqa: B008
    """The anchors of one cell around its center.

    Args:
        stride: int. Stride of the level in pixels.
        config: AnchorConfig. Sizes, scales, ratios and rounding.

    Returns:
        float32 array [A, 4], offsets x1, y1, x2, y2 from the center in pixels, A = scales x ratios; with levels "last"
        five times that.
    """
    if config.levels == "last":
        pyramid = dataclasses.replace(config, levels="pyramid")
        return np.concatenate([cell_anchors(size, pyramid) for size in STRIDES])
    offsets = []
    for k in range(config.scales):
        scale = 2 ** (k / config.scales)
        for ratio in config.ratios:
            if config.rounding == "cell":
                columns = round(math.sqrt(stride * stride / ratio))
                rows = round(columns * ratio)
                width, height = config.size * scale * columns, config.size * scale * rows
            else:
                side = config.size * stride * scale
                side = int(side) if config.rounding == "integers" else side
                width, height = side / math.sqrt(ratio), side * math.sqrt(ratio)
            corner = [width / 2, height / 2]
            if config.rounding == "integers":
                corner = [round(length) for length in corner]
            offsets.append([-corner[0], -corner[1], *corner])
    return np.array(offsets, "float32")


def grid(height: Size, width: Size, stride: int) -> tuple[Size, Size]:
    """(rows, columns) of a level for an image of height x width pixels, partial cells included."""
    return (height + stride - 1) // stride, (width + stride - 1) // stride


def spacing(
    side: Size | Tensor,
    cells: Size | Tensor,
    stride: int,
    config: AnchorConfig = AnchorConfig(),  # noqa: B008
) -> int | Tensor:
    """Pixels from one cell's center to the next, along a side of the image.

    Args:
        side: int, or integer tensor. Height or width of the image in pixels.
        cells: int, or integer tensor. Rows or columns of the level for that side, from `grid`.
        stride: int. Stride of the level in pixels.
        config: AnchorConfig. Its rounding.

    Returns:
        The stride; with rounding "integers" a float32 tensor of the shape of `side`, torchvision's whole pixels per
        cell: less than the stride where the last cell is partial.
    """
    return ops.cast(side // cells, "float32") if config.rounding == "integers" else stride


def cell_centers(
    cells: Tensor,
    spacing: int | Tensor,
    config: AnchorConfig = AnchorConfig(),  # noqa: B008
) -> Tensor:
    """Centers of cells along a side of the image.

    Args:
        cells: integer tensor of any shape. Indices of rows or columns, from 0.
        spacing: int, or tensor. Pixels between centers along that side, from `spacing`.
        config: AnchorConfig. Its offset of the first center, in cells.

    Returns:
        float32 tensor of the shape of `cells`, in pixels.
    """
    return (ops.cast(cells, "float32") + config.offset) * spacing


def level_sizes(height: Size, width: Size, config: AnchorConfig = AnchorConfig()) -> list[Size]:  # noqa: B008
    """Number of anchors on each level, the finest first, for an image of height x width pixels."""
    counts = []
    for stride in strides(config):
        rows, columns = grid(height, width, stride)
        counts.append(rows * columns * config.per_cell)
    return counts


def anchor_boxes(height: Size, width: Size, config: AnchorConfig = AnchorConfig()) -> Tensor:  # noqa: B008
    """All anchors of an image.

    Args:
        height: int, or integer scalar of the graph. Height of the image in pixels.
        width: int, or integer scalar of the graph. Width of the image in pixels.
        config: AnchorConfig. Sizes, scales, ratios and rounding.

    Returns:
        float32 tensor [A, 4], absolute pixels x1, y1, x2, y2, in the order at the top of this module; not clipped to
        the image.
    """
    return ops.concatenate(anchors_by_level(height, width, config), axis=0)


def anchors_by_level(height: Size, width: Size, config: AnchorConfig = AnchorConfig()) -> list[Tensor]:  # noqa: B008
    """The anchors of `anchor_boxes` by level: float32 tensors [A_l, 4], P3 first."""
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
