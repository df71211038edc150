"""The images and boxes of a split, whatever the format: COCO files, generated shapes, TensorFlow Datasets.

A new format is a branch of `open_split` and `examine`.
"""

import dataclasses

from retinanet_keras.data import coco, coco_splits, shapes, tfds


def open_split(config, split, *, keep_empty=True):
    """The images and boxes of a split.

    Args:
        config: a DataConfig.
        split: its name, as in `data.train_split`.
        keep_empty: keep images without boxes.

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


def examine(config, split):
    """Every fault of a split, and what of it is usable: as `coco.examine`."""
    if config.source == "tfds":
        dataset = tfds.open_split(config, split)
        findings, _ = coco.examine(coco.read(dataset.annotation_file), dataset.annotation_file, config.dir)
    else:
        file, images = _files(config, split)
        findings, dataset = coco.examine(coco.read(file), file, images)
    return findings, dataclasses.replace(dataset, max_pixels=config.max_pixels)


def annotation_file(config, split):
    """The path of a split's annotation JSON."""
    return tfds.annotation_file(config, split) if config.source == "tfds" else _files(config, split)[0]


def _files(config, split):
    """A split's annotation file and image folder."""
    if config.source == "shapes":
        shapes.generate(config.dir, config.shapes)
    return coco_splits.resolve(config, split)
