"""Where a split's images and boxes are: COCO files, the generated shapes, TensorFlow Datasets."""

import re
from pathlib import Path

import numpy as np
import tensorflow as tf

from retinanet_keras.data import coco, shapes
from retinanet_keras.settings import ConfigError


def open_split(config, split, *, keep_empty=True):
    """The images and boxes of a split.

    Args:
        config: a DataConfig.
        split: its name, as in `data.train_split`.
        keep_empty: keep images without boxes.

    Returns:
        a coco.CocoDataset.

    Raises:
        DataError, ConfigError: saying what is missing or wrong, and where.
    """
    if config.source == "shapes":
        shapes.generate(config.dir, config.shapes)
    return coco.load(annotation_file(config, split), image_dir(config, split), keep_empty=keep_empty)


def annotation_file(config, split):
    """The path of a split's annotation JSON."""
    if config.source == "tfds":
        raise ConfigError(
            f'data.source: "tfds" ({config.name}) is not available in this release. Use "coco" with the official '
            "files: data.source=coco data.dir=FOLDER, and data.annotations, data.images and the splits to suit "
            "(see the README, Train on COCO)"
        )
    return Path(config.dir) / config.annotations.format(split=split)


def image_dir(config, split):
    """The folder of a split's images."""
    return Path(config.dir) / config.images.format(split=split)


def decode(image_bytes):
    """Encoded JPEG, PNG, BMP, GIF or WebP bytes -> RGB uint8 [H, W, 3]. EXIF is ignored everywhere."""
    image = tf.io.decode_image(image_bytes, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image


def decode_reduced(image_bytes, halvings):
    """As `decode`, but a JPEG at 1 / 2^halvings of its size, each side rounded up.

    Args:
        halvings: int32 scalar, 0 to 3; ignored where the bytes are no JPEG.

    Returns:
        uint8 [H, W, 3]; by how much its sides were divided: int32 scalar, 1, 2, 4 or 8.
    """
    halvings = tf.where(tf.io.is_jpeg(image_bytes), halvings, 0)
    ways = [lambda: decode(image_bytes)]
    ways += [lambda ratio=ratio: tf.io.decode_jpeg(image_bytes, channels=3, ratio=ratio) for ratio in (2, 4, 8)]
    image = tf.switch_case(halvings, ways)
    return image, tf.bitwise.left_shift(1, halvings)


def read_image(path):
    """The RGB pixels of a file, uint8 NumPy [H, W, 3].

    Raises:
        DataError: where the file is missing or no image.
    """
    try:
        return decode(tf.io.read_file(str(path))).numpy()
    except tf.errors.OpError as error:
        raise coco.DataError(f"{path} cannot be read as an image: {first_line(error)}") from None


def unusable_images(dataset, indices):
    """Sentences on the images, among those of these indices, that cannot be decoded or differ in size from the JSON."""
    problems = []
    for i in np.unique(indices):
        try:
            size = read_image(dataset.files[i]).shape[:2]
        except coco.DataError as error:
            problems.append(str(error))
            continue
        if size != tuple(dataset.sizes[i]):
            told = "x".join(str(side) for side in dataset.sizes[i])
            problems.append(f"{dataset.files[i]} is {size[0]}x{size[1]} (height x width), its annotation says {told}")
    return problems


def first_line(error):
    """What an error says, without the names of graph nodes that TensorFlow adds."""
    message = getattr(error, "message", None) or str(error)
    return re.sub(r"\{\{.*?\}\}", "", message).strip().split("\n")[0].split(" [Op:")[0]
