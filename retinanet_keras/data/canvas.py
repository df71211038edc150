"""The canvas of an image: the size it is resized to, the padding around it, and the way back for boxes.

The shorter side becomes `short_side` pixels, the longer at most `max_side`. Padding in the mean color is added at the
right and the bottom, up to the next multiples of 32. At inference the canvas depends only on the image's own size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from retinanet_keras.data import augmentation
from retinanet_keras.model import SIZE_MULTIPLE
from retinanet_keras.tensors import round_up


def resized(sizes: Any, short_side: int, max_side: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The size that an image is resized to, and its scale.

    Args:
        sizes: [..., 2]. Height and width in pixels.
        short_side: int. Length of the shorter side after resizing.
        max_side: int. Largest length of the longer side after resizing.

    Returns:
        int32 [..., 2], height and width, at least 1; and the scale, float32 [...], network pixels per image pixel.
    """
    sizes = tf.cast(sizes, tf.float32)
    scale = tf.minimum(short_side / tf.reduce_min(sizes, -1), max_side / tf.reduce_max(sizes, -1))
    target = tf.floor(sizes * tf.expand_dims(scale, -1) + 0.5)
    return tf.cast(tf.clip_by_value(target, 1.0, float(max_side)), tf.int32), scale


def padded(size: Any) -> Any:
    """Round a size up to the next multiples of 32.

    Args:
        size: int, or integer array or tensor [..., 2].
    """
    return round_up(size, SIZE_MULTIPLE)


def fit(
    images: tf.Tensor,
    short_side: int,
    max_side: int,
    canvas: Any = None,
    resize: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = augmentation.resize,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Resize and pad images of one size.

    Args:
        images: uint8 [B, H, W, 3].
        short_side, max_side: int. See `resized`.
        canvas: int [2]. Height and width to pad to; None: the next multiples of 32.
        resize: `augmentation.resize`, or a function with the same results.

    Returns:
        uint8 [B, H', W', 3]; the size before padding, int32 [2]; the scale, float32 scalar.
    """
    size, scale = resized(tf.shape(images)[1:3], short_side, max_side)
    canvas = padded(size) if canvas is None else canvas
    return augmentation.pad(resize(images, size), canvas), size, scale


def to_original(boxes: tf.Tensor, scale: Any, sizes: Any) -> tf.Tensor:
    """Convert boxes from network pixels to pixels of the original image, clipped to it.

    Args:
        boxes: float32 [B, N, 4]. x1, y1, x2, y2 in network pixels.
        scale: scalar or [B]. Network pixels per image pixel.
        sizes: [2] or [B, 2]. Height and width of the original images.

    Returns:
        float32 [B, N, 4].
    """
    sizes = tf.cast(tf.reshape(sizes, (-1, 2)), tf.float32)
    limit = tf.gather(sizes, [1, 0, 1, 0], axis=1)[:, None]  # [B or 1, 1, 4]
    return tf.clip_by_value(boxes / tf.reshape(scale, (-1, 1, 1)), 0.0, limit)
