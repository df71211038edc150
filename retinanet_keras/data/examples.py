"""One image and its boxes from the files: at reduced scale where that is enough, another in place of a bad one."""

import numpy as np
import tensorflow as tf

from retinanet_keras.data import image_decoding

REPLACEMENTS = 3  # how many other images are tried in place of one that cannot be used; this project's choice


def example_reader(dataset, halvings=None):
    """A function of the graph: index -> (image uint8 [H, W, 3], dict of boxes [N, 4], labels [N], image_id).

    N is the dataset's largest number of boxes; rows past an image's own have box 0 and label -1. Boxes are in the
    pixels of the file, whatever its reduction. An image that cannot be decoded or is not of its annotation's size is an
    error.

    Args:
        halvings: int [N], how often a JPEG's sides may be halved in decoding, see `image_decoding.decode_reduced`.
    """
    encoded_of, ids = image_decoding.encoded_reader(dataset), tf.constant(dataset.image_ids)
    sizes, offsets = tf.constant(dataset.sizes), tf.constant(dataset.offsets)
    boxes, labels = tf.constant(dataset.boxes), tf.constant(dataset.labels)
    if halvings is not None:
        halvings = tf.constant(halvings, tf.int32)

    def read(index):
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


def replacing(read, dataset, bucket, seed, skipped=None):
    """A function of the graph: (index, sample) -> (index, what `read` gives of it), of another image where it fails.

    The others are drawn from the image's bucket by (seed, sample), so that what a step sees stays a function of the
    step. Where none of `REPLACEMENTS` can be used either, the last one's error is raised.

    Args:
        read: as `example_reader` gives it.
        bucket: int [N], each image's.
        skipped: a Python function of (index, message), called, from any thread, for each image skipped.
    """
    members = np.argsort(bucket, kind="stable")  # by bucket
    places = tf.constant(np.argsort(members))  # of each image among them
    firsts = tf.constant(np.searchsorted(bucket[members], bucket))  # of its bucket among them, [N]
    counts = tf.constant(np.bincount(bucket)[bucket])  # [N]
    members = tf.constant(members)

    def tell(index):
        if skipped is not None:
            problems = image_decoding.unusable_images(dataset, [index]) or [
                f"{dataset.name_of(index)} could not be read"
            ]
            skipped(int(index), problems[0])
        return index

    def candidates(index, sample):
        seeds = tf.stack([tf.cast(seed, tf.int64), -1 - sample])  # augmentation has [seed, sample]
        count = counts[index]
        away = tf.random.stateless_uniform([REPLACEMENTS], seeds, 1, tf.maximum(count, 2), tf.int64)
        first = firsts[index]
        return tf.concat([[index], tf.gather(members, first + (places[index] - first + away) % count)], 0)

    def read_one(index, sample):
        tried = candidates(index, sample)  # [1 + REPLACEMENTS]

        def attempt(number):
            failed = number > 0  # the one before, then
            tf.cond(failed, lambda: tf.numpy_function(tell, [tried[number - 1]], tf.int64), lambda: tried[0])
            return tried[number], *read(tried[number])

        # A graph has no `except`; a dataset has, and asks for an element only when those before it have failed.
        lenient = tf.data.Dataset.range(REPLACEMENTS).map(attempt).ignore_errors()
        strict = tf.data.Dataset.range(REPLACEMENTS, REPLACEMENTS + 1).map(attempt)
        return lenient.concatenate(strict).take(1).get_single_element()

    return read_one


MEMORY = 1 << 30  # bytes that tf.data may let its parallel stages hold; this project's choice


def stream_options():
    options = tf.data.Options()
    options.autotune.ram_budget = MEMORY
    # Each worker's stream is its share already.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options
