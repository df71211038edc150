"""Reading one training or evaluation example: an image and its boxes.

Large JPEGs can be decoded at reduced scale, and an image that cannot be used can be replaced by another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from retinanet_keras.data import image_decoding
from retinanet_keras.data.coco import CocoDataset

REPLACEMENTS = 3  # how many other images are tried in place of one that cannot be used; this project's choice

Reader = Callable[[tf.Tensor], tuple[tf.Tensor, dict[str, tf.Tensor]]]


def example_reader(dataset: CocoDataset, halvings: npt.ArrayLike | None = None) -> Reader:
    """A graph function: index -> (image uint8 [H, W, 3], dict of boxes [N, 4], labels [N], image_id).

    N is the dataset's largest number of boxes in an image; rows after an image's last box have box 0 and label -1.
    Boxes are in pixels of the file, even if the image is decoded at reduced scale. An image that cannot be decoded or
    differs in size from its annotation is an error.

    Args:
        dataset: CocoDataset.
        halvings: int [N]. How often a JPEG's sides may be halved in decoding, see `image_decoding.decode_reduced`.
    """
    encoded_of, ids = image_decoding.encoded_reader(dataset), tf.constant(dataset.image_ids)
    sizes, offsets = tf.constant(dataset.sizes), tf.constant(dataset.offsets)
    boxes, labels = tf.constant(dataset.boxes), tf.constant(dataset.labels)
    if halvings is not None:
        halvings = tf.constant(halvings, tf.int32)

    def read(index: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        encoded, size = encoded_of(index), sizes[index]
        if halvings is None:
            image = image_decoding.decode(encoded)
        else:
            image, divisor = image_decoding.decode_reduced(encoded, halvings[index])
            size = -(-size // divisor)
        same = tf.debugging.assert_equal(tf.shape(image)[:2], size, "image and annotation differ in size")
        with tf.control_dependencies([same]):
            image = tf.identity(image)
        first, last = offsets[index], offsets[index + 1]
        missing = [0, dataset.max_boxes - tf.cast(last - first, tf.int32)]
        return image, {
            "boxes": tf.ensure_shape(tf.pad(boxes[first:last], [missing, [0, 0]]), [dataset.max_boxes, 4]),
            "labels": tf.ensure_shape(tf.pad(labels[first:last], [missing], constant_values=-1), [dataset.max_boxes]),
            "image_id": ids[index],
        }

    return read


def replacing(
    read: Reader,
    dataset: CocoDataset,
    bucket: npt.NDArray,
    seed: int,
    skipped: Callable[[int, str], Any] | None = None,
) -> Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]]:
    """A graph function: (index, sample) -> (index, image, truth), of another image if `read` fails.

    The replacements are drawn from the image's bucket by (seed, sample), so that the images of a step remain a function
    of the step. If none of `REPLACEMENTS` images can be used either, the last one's error is raised.

    Args:
        read: the result of `example_reader`.
        dataset: CocoDataset.
        bucket: int [N]. The bucket of each image.
        seed: int. Seed of the replacements.
        skipped: a Python function of (index, message), called, from any thread, for each image skipped.
    """
    members = np.argsort(bucket, kind="stable")  # sorted by bucket
    positions = tf.constant(np.argsort(members))  # of each image in `members`
    firsts = tf.constant(np.searchsorted(bucket[members], bucket))  # of each image's bucket in `members`, [N]
    counts = tf.constant(np.bincount(bucket)[bucket])  # [N]
    members = tf.constant(members)

    def report(index: Any) -> Any:
        if skipped is not None:
            problems = image_decoding.unusable_images(dataset, [index]) or [
                f"{dataset.name_of(index)} could not be read"
            ]
            skipped(int(index), problems[0])
        return index

    def candidates(index: tf.Tensor, sample: tf.Tensor) -> tf.Tensor:
        seeds = tf.stack([tf.cast(seed, tf.int64), -1 - sample])  # augmentation uses [seed, sample]
        count = counts[index]
        away = tf.random.stateless_uniform([REPLACEMENTS], seeds, 1, tf.maximum(count, 2), tf.int64)
        first = firsts[index]
        return tf.concat([[index], tf.gather(members, first + (positions[index] - first + away) % count)], 0)

    def read_one(index: tf.Tensor, sample: tf.Tensor) -> Any:
        tried = candidates(index, sample)  # [1 + REPLACEMENTS]

        def attempt(number: tf.Tensor) -> Any:
            failed = number > 0  # the attempt before this one
            tf.cond(failed, lambda: tf.numpy_function(report, [tried[number - 1]], tf.int64), lambda: tried[0])
            return tried[number], *read(tried[number])

        # A graph has no `except`, but a dataset can ignore errors, and runs an attempt only if those before it failed.
        lenient = tf.data.Dataset.range(REPLACEMENTS).map(attempt).ignore_errors()
        strict = tf.data.Dataset.range(REPLACEMENTS, REPLACEMENTS + 1).map(attempt)
        return lenient.concatenate(strict).take(1).get_single_element()

    return read_one


MEMORY = 1 << 30  # bytes that tf.data may use for its parallel stages; this project's choice


def stream_options() -> tf.data.Options:
    """The tf.data options of all input pipelines."""
    options = tf.data.Options()
    options.autotune.ram_budget = MEMORY
    # Each worker's dataset is already its own shard.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options
