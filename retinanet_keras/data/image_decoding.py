"""Where a split's images and boxes are: COCO files, the generated shapes, TensorFlow Datasets."""

import os
import stat

import numpy as np
import tensorflow as tf

from retinanet_keras import errors
from retinanet_keras.data import bitmaps, image_headers
from retinanet_keras.errors import first_line


def encoded_reader(dataset):
    """A function of the graph: index -> the encoded bytes of that image, which has at most `dataset.max_pixels`."""
    files = tf.constant([os.fsencode(file) for file in dataset.files], tf.string)
    spans = None if dataset.spans is None else tf.constant(dataset.spans)

    def read(index):
        if spans is None:
            encoded = tf.io.read_file(files[index])
        else:
            encoded = tf.ensure_shape(tf.numpy_function(_part, [files[index], spans[index]], tf.string), [])
        return encoded if dataset.max_pixels is None else image_headers.checked(encoded, dataset.max_pixels)

    return read


def _part(file, span=(0, -1)):
    """Bytes of a file: (where they begin, how many, -1 for all the rest)."""
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except ValueError as error:  # a name that no file can have
        raise OSError(str(error)) from None
    if not regular:  # opening a named pipe waits for a writer, perhaps forever
        raise OSError("it is not a regular file")
    with open(file, "rb") as opened:
        opened.seek(span[0])
        return opened.read(span[1])


def decode(image_bytes):
    """Encoded JPEG, PNG, BMP, GIF or WebP bytes -> RGB uint8 [H, W, 3]. EXIF and transparency are ignored everywhere.

    Raises, when run:
        InvalidArgumentError: they are none of these, an animated WebP, or a compressed BMP.
    """
    image = tf.cond(
        tf.io.is_jpeg(image_bytes),  # the common one first
        lambda: tf.io.decode_jpeg(image_bytes, channels=3),
        lambda: _decode_other(image_bytes),
    )
    image.set_shape([None, None, 3])
    return image


def _decode_other(image_bytes):
    start = tf.ensure_shape(tf.io.decode_raw(image_bytes, tf.uint8, fixed_length=25), [25])  # zeros where it is shorter
    return tf.case(
        [
            (_is(start[:4], b"RIFF") & _is(start[8:12], b"WEBP"), lambda: _decode_webp(image_bytes, start)),
            (_is(start[:2], b"BM"), lambda: bitmaps.decode(image_bytes)),
        ],
        default=lambda: tf.io.decode_image(image_bytes, channels=3, expand_animations=False),
    )


def _decode_webp(image_bytes, start):
    """TensorFlow decodes a still WebP with exactly the channels that it has: four where it is transparent."""
    extended, lossless = _is(start[12:16], b"VP8X"), _is(start[12:16], b"VP8L")
    flags = tf.where(extended, start[20], tf.where(lossless, start[24], 0))
    still = tf.debugging.Assert(
        ~extended | (tf.bitwise.bitwise_and(flags, 2) == 0), ["expected a still WebP, this one is animated"]
    )
    with tf.control_dependencies([still]):
        return tf.cond(
            tf.bitwise.bitwise_and(flags, 16) > 0,
            lambda: tf.io.decode_image(image_bytes, channels=4, expand_animations=False)[..., :3],
            lambda: tf.io.decode_image(image_bytes, channels=3, expand_animations=False),
        )


def _is(values, text):
    return tf.reduce_all(values == list(text))


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


def read_image(path, max_pixels):
    """The RGB pixels of a file, uint8 NumPy [H, W, 3].

    Raises:
        DataError: where the file is missing, no image, or one of more than `max_pixels` by its header.
    """
    return _decoded(lambda: _part(path), path, max_pixels)


def image_of(dataset, i):
    """The same of image i of a dataset."""
    return _decoded(lambda: encoded_image(dataset, i), dataset.name_of(i), dataset.max_pixels)


def encoded_image(dataset, i):
    """The bytes of image i of a dataset, as they are stored."""
    return _part(dataset.files[i], (0, -1) if dataset.spans is None else dataset.spans[i])


def _decoded(read, name, max_pixels):
    try:
        encoded = read()
        found = int(_pixels(encoded))
        if max_pixels is None or found <= max_pixels:
            return _graph(encoded).numpy()
    except (OSError, tf.errors.OpError) as error:
        raise errors.DataError(f"{name} cannot be read as an image: {first_line(error)}") from None
    raise errors.DataError(
        f"{name} has {found:,} pixels by its header, more than data.max_pixels, {max_pixels:,}. Make it smaller, or "
        "set more where there is a configuration"
    )


# Compiled: op by op, looking through a GIF takes minutes.
_pixels = tf.function(image_headers.pixels, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
_graph = tf.function(decode, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)


def unusable_images(dataset, indices):
    """Sentences on the images, among those of these indices, that cannot be decoded or differ in size from the JSON."""
    problems = []
    for i in np.unique(indices):
        try:
            size = image_of(dataset, i).shape[:2]
        except errors.DataError as error:
            problems.append(str(error))
            continue
        if size != tuple(dataset.sizes[i]):
            told = "x".join(str(side) for side in dataset.sizes[i])
            problems.append(f"{dataset.name_of(i)} is {size[0]}x{size[1]} (height x width), its annotation says {told}")
    return problems
