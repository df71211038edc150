"""Reading and decoding of encoded images: JPEG, PNG, BMP, GIF and WebP."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from retinanet_keras import errors
from retinanet_keras.data import bitmaps, image_headers
from retinanet_keras.data.coco import CocoDataset
from retinanet_keras.errors import first_line


def encoded_reader(dataset: CocoDataset) -> Callable[[tf.Tensor], tf.Tensor]:
    """A graph function: index -> the encoded bytes of that image; an error above `dataset.max_pixels`."""
    files = tf.constant([os.fsencode(file) for file in dataset.files], tf.string)
    spans = None if dataset.spans is None else tf.constant(dataset.spans)

    def read(index: tf.Tensor) -> tf.Tensor:
        if spans is None:
            encoded = tf.io.read_file(files[index])
        else:
            encoded = tf.ensure_shape(tf.numpy_function(_read_span, [files[index], spans[index]], tf.string), [])
        return encoded if dataset.max_pixels is None else image_headers.checked(encoded, dataset.max_pixels)

    return read


def _read_span(file: str | bytes | os.PathLike[str], span: Sequence[int] = (0, -1)) -> bytes:
    """Read part of a file; span: (offset of its first byte, number of bytes, -1 for the rest of the file)."""
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except ValueError as error:  # the name is not a valid path
        raise OSError(str(error)) from None
    if not regular:  # opening a named pipe blocks until there is a writer
        raise OSError("it is not a regular file")
    with open(file, "rb") as opened:
        opened.seek(span[0])
        return opened.read(span[1])


def decode(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decode JPEG, PNG, BMP, GIF or WebP to RGB. EXIF orientation and transparency are ignored everywhere.

    Args:
        image_bytes: string scalar. The encoded bytes.

    Returns:
        uint8 [H, W, 3]; of a GIF the first frame.

    Raises, when run:
        InvalidArgumentError: the format is another, or the image is an animated WebP or a compressed BMP.
    """
    image = tf.cond(
        tf.io.is_jpeg(image_bytes),  # the most common first
        lambda: tf.io.decode_jpeg(image_bytes, channels=3),
        lambda: _decode_other(image_bytes),
    )
    image.set_shape([None, None, 3])
    return image


def _decode_other(image_bytes: tf.Tensor) -> tf.Tensor:
    start = tf.ensure_shape(
        tf.io.decode_raw(image_bytes, tf.uint8, fixed_length=25), [25]
    )  # zeros where the file is shorter
    return tf.case(
        [
            (_is(start[:4], b"RIFF") & _is(start[8:12], b"WEBP"), lambda: _decode_webp(image_bytes, start)),
            (_is(start[:2], b"BM"), lambda: bitmaps.decode(image_bytes)),
        ],
        default=lambda: tf.io.decode_image(image_bytes, channels=3, expand_animations=False),
    )


def _decode_webp(image_bytes: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """TensorFlow decodes a still WebP only with its exact number of channels: four if it has transparency."""
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


def _is(values: tf.Tensor, text: bytes) -> tf.Tensor:
    return tf.reduce_all(values == list(text))


def decode_reduced(image_bytes: tf.Tensor, halvings: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Decode an image like `decode`, but a JPEG at 1 / 2^halvings of its size, each side rounded up.

    Args:
        image_bytes: string scalar. The encoded bytes.
        halvings: int32 scalar. 0 to 3; ignored if the image is no JPEG.

    Returns:
        uint8 [H, W, 3]; and the divisor of its sides, int32 scalar: 1, 2, 4 or 8.
    """
    halvings = tf.where(tf.io.is_jpeg(image_bytes), halvings, 0)
    ways = [lambda: decode(image_bytes)]
    ways += [functools.partial(tf.io.decode_jpeg, image_bytes, channels=3, ratio=ratio) for ratio in (2, 4, 8)]
    image = tf.switch_case(halvings, ways)
    return image, tf.bitwise.left_shift(1, halvings)


def read_image(path: str | os.PathLike[str], max_pixels: int | None) -> npt.NDArray:
    """Read the RGB pixels of an image file, uint8 [H, W, 3].

    Args:
        path: path of the file.
        max_pixels: int. Largest number of pixels by the image's header; None: no limit.

    Raises:
        DataError: the file is missing, cannot be decoded, or has more than `max_pixels`.
    """
    return _decoded(lambda: _read_span(path), path, max_pixels)


def image_of(dataset: CocoDataset, i: int) -> npt.NDArray:
    """Read the RGB pixels of image i of a dataset, like `read_image`."""
    return _decoded(lambda: encoded_image(dataset, i), dataset.name_of(i), dataset.max_pixels)


def encoded_image(dataset: CocoDataset, i: int) -> bytes:
    """Read the encoded bytes of image i of a dataset."""
    return _read_span(dataset.files[i], (0, -1) if dataset.spans is None else dataset.spans[i])


def _decoded(read: Callable[[], bytes], name: Any, max_pixels: int | None) -> npt.NDArray:
    try:
        encoded = read()
        count = int(_pixels(encoded))
        if max_pixels is None or count <= max_pixels:
            return _graph(encoded).numpy()
    except (OSError, tf.errors.OpError) as error:
        raise errors.DataError(f"{name} cannot be read as an image: {first_line(error)}") from None
    raise errors.DataError(
        f"{name} has {count:,} pixels by its header, more than data.max_pixels, {max_pixels:,}. Make it smaller, or "
        "raise that limit in the configuration if there is one"
    )


# Compiled, because scanning a GIF op by op takes minutes.
_pixels = tf.function(image_headers.pixels, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
_graph = tf.function(decode, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)


def unusable_images(dataset: CocoDataset, indices: Any) -> list[str]:
    """Describe the images, among those of the given indices, that cannot be decoded or differ in size from the JSON.

    Returns:
        a list with one sentence for each unusable image.
    """
    problems = []
    for i in np.unique(indices):
        try:
            size = image_of(dataset, i).shape[:2]
        except errors.DataError as error:
            problems.append(str(error))
            continue
        if size != tuple(dataset.sizes[i]):
            annotated = "x".join(str(side) for side in dataset.sizes[i])
            problems.append(
                f"{dataset.name_of(i)} is {size[0]}x{size[1]} (height x width), its annotation says {annotated}"
            )
    return problems
