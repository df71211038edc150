"""Decoding of BMP files in TensorFlow's graph.

TensorFlow's own decoder supports only 8, 24 and 32 bits per pixel, and returns palette indices as pixel values.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from retinanet_keras.data import image_headers

START = 66  # bytes that hold the whole header except the colors of the palette
DEPTHS = (1, 2, 4, 8, 24, 32)  # bits per pixel; up to 8 they are an index into the palette
MASKS = (0xFF0000, 0xFF00, 0xFF)  # of red, green and blue, the default for 32 bits per pixel
RAW, MASKED = (0,), (3, 6)  # kinds of compression: none; none, but with the order of the channels in the header


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode a BMP to RGB. Transparency is ignored, and a color missing from the palette becomes black.

    Args:
        encoded: string scalar. The bytes of the file.

    Returns:
        uint8 [H, W, 3].

    Raises, when run:
        InvalidArgumentError: the file is compressed, truncated, or has a number of bits per pixel not in DEPTHS.
    """
    data = tf.io.decode_raw(encoded, tf.uint8)
    head = tf.ensure_shape(tf.io.decode_raw(encoded, tf.uint8, fixed_length=START), [START])
    head = tf.cast(head, tf.int64)  # zeros where the file is shorter
    little = image_headers.little
    width, height = image_headers.bitmap_sides(head)
    after = 14 + little(head[14:18])  # where the header ends
    old = after == 14 + image_headers.OLD_BITMAP
    bits = tf.where(old, little(head[24:26]), little(head[28:30]))
    compression = tf.where(old, tf.constant(0, tf.int64), little(head[30:34]))
    used = tf.where(old, tf.constant(0, tf.int64), little(head[46:50]))
    first, end, count = little(head[10:14]), tf.size(data, tf.int64), tf.abs(height)
    stride = tf.maximum(width * bits + 31, 32) // 32 * 4  # bytes of a row

    masks = [little(head[at : at + 4]) for at in (54, 58, 62)]
    usual = tf.reduce_all([mask == value for mask, value in zip(masks, MASKS, strict=True)])
    plain = _is_one_of(compression, RAW) | (_is_one_of(compression, MASKED) & (bits == 32) & usual)
    whole = (width > 0) & (count > 0) & (first >= after) & (count <= (end - first) // stride)
    checks = [
        image_headers.require(
            _is_one_of(bits, DEPTHS), ["expected a BMP of", DEPTHS, "bits per pixel, this one has", bits]
        ),
        image_headers.require(
            plain, ["expected a BMP that is not compressed, with 8 bits each of red, green and blue"]
        ),
        image_headers.require(whole, ["this BMP is truncated, or its header is damaged"]),
    ]
    with tf.control_dependencies(checks):
        rows = tf.reshape(data[first : first + stride * count], [count, stride])
    rows = tf.cond(height > 0, lambda: rows[::-1], lambda: tf.identity(rows))  # bottom row first, unless negative
    image = tf.cond(
        bits <= 8,
        lambda: tf.gather(_palette(data, after, old, bits, used), _indices(rows, width, bits)),
        lambda: tf.reshape(rows[:, : width * bits // 8], [count, width, bits // 8])[..., 2::-1],
    )
    return tf.ensure_shape(image, [None, None, 3])


def _indices(rows: tf.Tensor, width: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Palette indices, int32 [H, W], from rows of bytes [H, stride]; the first pixel is in the highest bits."""
    shifts = tf.cast(8 - bits * (1 + tf.range(8 // bits)), tf.uint8)
    ones = tf.bitwise.right_shift(tf.constant(255, tf.uint8), tf.cast(8 - bits, tf.uint8))
    values = tf.bitwise.bitwise_and(tf.bitwise.right_shift(rows[:, :, None], shifts), ones)
    return tf.cast(tf.reshape(values, [tf.shape(rows)[0], -1])[:, :width], tf.int32)


def _palette(data: tf.Tensor, first: tf.Tensor, old: tf.Tensor, bits: tf.Tensor, used: tf.Tensor) -> tf.Tensor:
    """The palette, RGB uint8 [256, 3]; `used`: the number of its colors, 0 for 2^bits."""
    most = tf.bitwise.left_shift(tf.constant(1, tf.int64), bits)
    used = tf.where((used < 1) | (used > most), most, used)
    entry = tf.where(old, tf.constant(3, tf.int64), 4)  # bytes: blue, green, red, and in newer files one unused
    table = data[first : first + used * entry]
    table = tf.pad(table, [[0, 256 * entry - tf.size(table, tf.int64)]])
    return tf.reshape(table, [256, entry])[:, 2::-1]


def _is_one_of(value: tf.Tensor, choices: Sequence[int]) -> tf.Tensor:
    return tf.reduce_any(value == tf.constant(choices, tf.int64))
