"""The size of an encoded image, read from its header in TensorFlow's graph.

An image too large for memory is rejected before it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

START = 32  # bytes that hold the size in PNG, GIF, BMP and WebP
OLD_BITMAP = 12  # length in bytes of the BMP header with 16-bit sides, that of OS/2
MOST_BLOCKS = 20_000  # blocks of a GIF that are scanned: about 5 MB, in a second or two


def checked(encoded: tf.Tensor, max_pixels: int) -> tf.Tensor:
    """Return the encoded bytes unchanged if the image has at most `max_pixels`; all frames of a GIF count.

    Args:
        encoded: string scalar. JPEG, PNG, GIF, BMP or WebP. Other formats are rejected even where TensorFlow can decode
            them, now or in another release, because their size is not known here.
        max_pixels: int. Largest number of pixels.

    Raises, when run:
        InvalidArgumentError: the image is larger, its header is truncated, or its format is not supported.
    """
    count = pixels(encoded)
    known = require(count >= 0, ["expected JPEG, PNG, GIF, BMP or WebP, the first bytes match none of these"])
    fits = require(count <= max_pixels, ["expected an image of at most", max_pixels, "pixels, its header says", count])
    with tf.control_dependencies([known, fits]):
        return tf.identity(encoded)


def require(condition: tf.Tensor, message: Sequence[Any]) -> tf.Operation:
    """The operation that fails with a message if a condition does not hold; in eager execution it fails at once.

    `tf.debugging.Assert` does the same within a `tf.cond`, which takes longer than everything else here.
    """
    data = [tf.convert_to_tensor(part) for part in message]
    return tf.raw_ops.Assert(condition=condition, data=data, summarize=8)


def pixels(encoded: tf.Tensor) -> tf.Tensor:
    """The number of pixels to be decoded, int64 scalar; -1 for an unknown format."""
    return tf.cond(tf.io.is_jpeg(encoded), lambda: _jpeg(encoded), lambda: _other(encoded))  # the most common first


def _other(encoded: tf.Tensor) -> tf.Tensor:
    data = tf.io.decode_raw(encoded, tf.uint8, fixed_length=START)  # zeros where the file is shorter
    data = tf.cast(tf.ensure_shape(data, [START]), tf.int64)

    def begins(text: bytes, at: int = 0) -> tf.Tensor:
        return tf.reduce_all(data[at : at + len(text)] == list(text))

    return tf.case(
        [
            (begins(b"\x89PNG"), lambda: _big(data[16:20]) * _big(data[20:24])),
            (begins(b"GIF8"), lambda: _gif(encoded)),
            (begins(b"BM"), lambda: tf.reduce_prod(tf.abs(bitmap_sides(data)))),
            (begins(b"RIFF") & begins(b"WEBP", 8), lambda: _webp(data, begins)),
        ],
        default=lambda: tf.constant(-1, tf.int64),
    )


def _jpeg(encoded: tf.Tensor) -> tf.Tensor:
    return tf.reduce_prod(tf.image.extract_jpeg_shape(encoded, tf.int64)[:2])


def _webp(data: tf.Tensor, begins: Callable[..., tf.Tensor]) -> tf.Tensor:
    """The three kinds of WebP: lossy and lossless have 14 bits per side, the extended format has 24."""
    lossy = (little(data[26:28]) % 2**14) * (little(data[28:30]) % 2**14)
    packed = little(data[21:25])
    lossless = (packed % 2**14 + 1) * (packed // 2**14 % 2**14 + 1)
    extended = (little(data[24:27]) + 1) * (little(data[27:30]) + 1)
    return tf.where(begins(b"VP8X", 12), extended, tf.where(begins(b"VP8L", 12), lossless, lossy))


def _gif(encoded: tf.Tensor) -> tf.Tensor:
    """The pixels of all frames: TensorFlow's decoder holds every frame in memory to return the first.

    Walks over the blocks: header and color table, then extensions (0x21) and frames (0x2C), each followed by sub-blocks
    that begin with their length, up to one of length 0. A file that does not end within MOST_BLOCKS counts as the
    largest int64.
    """
    data = tf.io.decode_raw(encoded, tf.uint8)
    end = tf.size(data)

    def at(position: Any) -> tf.Tensor:
        return tf.cast(data[tf.minimum(position, end - 1)], tf.int64)

    def table_bytes(flags: tf.Tensor) -> tf.Tensor:  # size of the color table
        return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(tf.constant(2, tf.int64), flags % 8), 0)

    def step(position: tf.Tensor, in_subblocks: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        kind = at(position)
        side = [at(position + 5 + 2 * i) + 256 * at(position + 6 + 2 * i) for i in (0, 1)]
        frame, extension = ~in_subblocks & (kind == 0x2C), ~in_subblocks & (kind == 0x21)
        table = tf.cast(table_bytes(at(position + 9)), tf.int32)
        length = tf.cast(kind, tf.int32)
        move = tf.where(in_subblocks, 1 + length, tf.where(frame, 11 + table, tf.where(extension, 2, end)))
        return (
            position + move,
            tf.where(in_subblocks, kind != 0, frame | extension),
            total + tf.where(frame, side[0] * side[1], 0),
        )

    first = 13 + tf.cast(table_bytes(at(10)), tf.int32)
    start = (first, tf.constant(False), tf.constant(0, tf.int64))
    position, _, total = tf.while_loop(
        lambda position, *_: position < end, step, start, parallel_iterations=1, maximum_iterations=MOST_BLOCKS
    )
    return tf.where(position < end, tf.int64.max, total)


def bitmap_sides(data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Width and height of a BMP, int64 scalars; the height is negative if the top row comes first.

    Args:
        data: int64 [26 or more]. The first bytes of the file.
    """
    old = little(data[14:18]) == OLD_BITMAP
    width = tf.where(old, little(data[18:20]), _signed(data[18:22]))
    return width, tf.where(old, little(data[20:22]), _signed(data[22:26]))


def little(data: tf.Tensor) -> tf.Tensor:
    """The little-endian number in some bytes, given as int64 [n]."""
    return tf.reduce_sum(data * [256**i for i in range(data.shape[0])])


def _big(data: tf.Tensor) -> tf.Tensor:
    return little(data[::-1])


def _signed(data: tf.Tensor) -> tf.Tensor:
    value = little(data)
    return tf.where(value >= 2**31, value - 2**32, value)
