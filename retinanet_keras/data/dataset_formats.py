"""Datasets by their format: the place to add a new one.

Formats so far are the values of `data.source`: "coco" (`coco.py`, with the paper's splits in `coco_splits.py`),
"shapes" (`shapes.py`) and "tfds" (`tfds.py`). Each ends in a `coco.CocoDataset`, which is all that training, evaluation
and the dataset check use.

To add a format:

1. Write a module in this folder that writes COCO JSON, as `shapes.py` and `tfds.py` do, or builds a `CocoDataset`.
2. Add a branch to `open_split`, `examine` and `annotation_file` below. For a format that writes COCO JSON with image
   files beside it, a branch of `_files` is enough.
3. Add its name to the choices of `DataConfig.source` in `config.py`, and its settings, if any, to `DataConfig`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from retinanet_keras.config import DataConfig
from retinanet_keras.data import coco, coco_splits, shapes, tfds
from retinanet_keras.data.coco_rules import Finding


def open_split(config: DataConfig, split: str, *, keep_empty: bool = True) -> coco.CocoDataset:
    """Load the images and boxes of a split.

    Args:
        config: DataConfig.
        split: str. The split's name, as in `data.train_split`.
        keep_empty: bool. Whether to keep images without boxes.

    Returns:
        a coco.CocoDataset.

    Raises:
        DataError: saying what is missing or wrong, and where.
    """
    if config.source == "tfds":
        dataset = tfds.open_split(config, split, keep_empty=keep_empty)
    else:
        dataset = coco.load(*_files(config, split), keep_empty=keep_empty)
    return dataclasses.replace(dataset, max_pixels=config.max_pixels)


def examine(config: DataConfig, split: str) -> tuple[list[Finding], coco.CocoDataset]:
    """List every fault of a split, and load what is usable: see `coco.examine`."""
    if config.source == "tfds":
        dataset = tfds.open_split(config, split)
        findings, _ = coco.examine(coco.read(dataset.annotation_file), dataset.annotation_file, config.dir)
    else:
        file, images = _files(config, split)
        findings, dataset = coco.examine(coco.read(file), file, images)
    return findings, dataclasses.replace(dataset, max_pixels=config.max_pixels)


def annotation_file(config: DataConfig, split: str) -> Path:
    """The path of a split's COCO JSON."""
    return tfds.annotation_file(config, split) if config.source == "tfds" else _files(config, split)[0]


def _files(config: DataConfig, split: str) -> tuple[Path, Path]:
    """The annotation file and the image folder of a split."""
    if config.source == "shapes":
        shapes.generate(config.dir, config.shapes)
    return coco_splits.resolve(config, split)
