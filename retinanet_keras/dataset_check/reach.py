"""How well the configured anchors overlap the boxes at the training size.

A box whose best anchor overlaps it too little does not contribute to training; if most boxes are like that, AP stays 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from retinanet_keras import anchors
from retinanet_keras import boxes as box_ops
from retinanet_keras.config import AnchorConfig, Config, TargetConfig
from retinanet_keras.data import canvas
from retinanet_keras.data.coco import CocoDataset

CHUNK = 20_000  # boxes at a time: with 45 anchors each, 14 MB
WORTH_TELLING = 0.02  # fraction of the boxes that a suggestion must add
ENOUGH = 0.9  # fraction of the boxes above which changing two settings at once is not tried
SIZES = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12)  # values of anchors.size that are tried
ZOOMS = (1.25, 1.5, 2, 3, 4)  # factors of the image size that are tried
RATIOS = ((1 / 3, 1, 3), (0.25, 0.5, 1, 2, 4), (0.125, 0.25, 0.5, 1, 2, 4, 8))


def best_iou(boxes: npt.NDArray, canvases: npt.NDArray, config: AnchorConfig) -> npt.NDArray:
    """The exact largest IoU of each box with any anchor, computed without listing all anchors.

    Of the anchors of one level and shape, the one whose center is nearest in x and in y overlaps a box most.

    Args:
        boxes: float [M, 4]. x1, y1, x2, y2 in network pixels.
        canvases: int [M, 2]. Height and width of each box's canvas.
        config: AnchorConfig.

    Returns:
        float32 [M].
    """
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # [M, 2], x, y
    sides = canvases[:, ::-1]  # [M, 2], width, height
    of_levels = []
    for stride in anchors.strides(config):
        cells = np.stack(anchors.grid(sides[:, 0], sides[:, 1], stride), axis=1)  # [M, 2], columns, rows
        spacing = np.asarray(anchors.spacing(sides, cells, stride, config))  # [M, 2] or []
        cell = np.clip(np.round(centers / spacing - config.offset), 0, cells - 1)  # [M, 2]
        center = np.tile(np.asarray(anchors.cell_centers(cell, spacing, config)), 2)[:, None]  # [M, 1, 4]
        of_levels.append(center + anchors.cell_anchors(stride, config))  # [M, a, 4]
    nearest = np.concatenate(of_levels, axis=1).astype(np.float32)  # [M, 5a, 4]
    overlap = box_ops.iou(boxes[:, None].astype(np.float32), nearest)  # [M, 1, 5a]
    return np.asarray(overlap).max(axis=(1, 2), initial=0)


def best_iou_of(
    dataset: CocoDataset, config: Config, limit: int | None = None
) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """The `best_iou` of a dataset's boxes, resized as in training, without jitter.

    Args:
        dataset: CocoDataset.
        config: Config.
        limit: int. Use at most this many boxes, chosen at random with a fixed seed; None: all.

    Returns:
        float32 [M]; labels int32 [M]; and sides float32 [M], the square roots of the areas in network pixels.
    """
    count = len(dataset.boxes)
    rows: npt.NDArray = np.arange(count)
    if limit and count > limit:
        rows = np.sort(np.random.default_rng(0).choice(count, limit, replace=False))
    image: npt.NDArray = np.searchsorted(dataset.offsets, rows, side="right") - 1  # [M]
    best: list[npt.NDArray] = [np.zeros([0], np.float32)]
    sides: list[npt.NDArray] = [np.zeros([0], np.float32)]
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        fitted, scale = canvas.resized(dataset.sizes[image[chunk]], config.data.short_side, config.data.max_side)
        boxes = dataset.boxes[rows[chunk]] * scale.numpy()[:, None]
        best.append(best_iou(boxes, canvas.padded(fitted.numpy()), config.anchors))
        sides.append(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)))
    return np.concatenate(best), dataset.labels[rows], np.concatenate(sides)


def anchor_sides(config: AnchorConfig) -> tuple[float, float]:
    """Square roots of the areas of the smallest and of the largest anchor of an AnchorConfig, in network pixels."""
    sides = [
        math.sqrt(np.prod(a[2:] - a[:2])) for s in anchors.strides(config) for a in anchors.cell_anchors(s, config)
    ]
    return min(sides), max(sides)


def needed_iou(targets: TargetConfig) -> float:
    """The smallest IoU at which a box's best anchor is positive, given the thresholds and `low_quality`."""
    return {"none": targets.positive_iou, "detectron": targets.negative_iou, "all": 0.0}[targets.low_quality]


def suggestions(dataset: CocoDataset, config: Config, limit: int = 2000) -> list[tuple[float, str]]:
    """Suggest at most two changes of settings with which anchors overlap more boxes.

    Args:
        dataset: CocoDataset.
        config: Config.
        limit: int. Largest number of boxes to try the changes on.

    Returns:
        a list of (fraction of the boxes with an anchor of `targets.positive_iou`, text), best first.
    """

    def reached(changed: Config) -> float:
        return float((best_iou_of(dataset, changed, limit)[0] >= config.targets.positive_iou).mean())

    def best(changes: Iterable[tuple[Config, str]]) -> tuple[float, str]:
        tried = ((round(reached(changed), 2), text) for changed, text in changes)
        return max(tried, key=lambda pair: pair[0])  # the first, and so the smallest change, of equals

    now = reached(config)
    candidates = [best(_other_sizes(config)), best(_larger_images(config)), best(_other_ratios(config))]
    if max(candidates)[0] < ENOUGH:
        both = [(twice, f"{a} {b}") for larger, a in _larger_images(config) for twice, b in _other_sizes(larger)]
        candidates.append(best(both))
    return sorted((pair for pair in candidates if pair[0] >= now + WORTH_TELLING), key=lambda pair: -pair[0])[:2]


def _other_sizes(config: Config) -> Iterator[tuple[Config, str]]:
    for size in sorted(SIZES, key=lambda size: abs(math.log(size / config.anchors.size))):
        anchor = dataclasses.replace(config.anchors, size=float(size))
        yield dataclasses.replace(config, anchors=anchor), f"anchors.size={size:g}"


def _larger_images(config: Config) -> Iterator[tuple[Config, str]]:
    for zoom in ZOOMS:
        short, longest = round(config.data.short_side * zoom), round(config.data.max_side * zoom)
        data = dataclasses.replace(config.data, short_side=short, max_side=longest)
        yield dataclasses.replace(config, data=data), f"data.short_side={short} data.max_side={longest}"


def _other_ratios(config: Config) -> Iterator[tuple[Config, str]]:
    for ratios in RATIOS:
        anchor = dataclasses.replace(config.anchors, ratios=ratios)
        text = ",".join(f"{ratio:.3g}" for ratio in ratios)
        yield dataclasses.replace(config, anchors=anchor), f"anchors.ratios=[{text}]"
