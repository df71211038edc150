"""The canvas of an image: the size it is resized to, the padding around it, and the way back.

The shorter side becomes `short_side`, the longer at most `max_side`; padding goes right and bottom, in the mean color,
up to the next multiples of 32. At inference that is a function of the image's own size alone.
"""

import tensorflow as tf

from retinanet_keras.data import augmentation
from retinanet_keras.model import SIZE_MULTIPLE


def resized(sizes, short_side, max_side):
    """What an image is resized to.

    Args:
        sizes: [..., 2], height and width in pixels.

    Returns:
        int32 [..., 2], height and width, at least 1; and the scale, float32 [...], network pixels per image pixel.
    """
    sizes = tf.cast(sizes, tf.float32)
    scale = tf.minimum(short_side / tf.reduce_min(sizes, -1), max_side / tf.reduce_max(sizes, -1))
    target = tf.floor(sizes * tf.expand_dims(scale, -1) + 0.5)
    return tf.cast(tf.clip_by_value(target, 1.0, float(max_side)), tf.int32), scale


def padded(size):
    """The next multiples of 32; size: ints or integer tensors [..., 2]."""
    return (size + SIZE_MULTIPLE - 1) // SIZE_MULTIPLE * SIZE_MULTIPLE  # ONNX rounds negative quotients up


def fit(images, short_side, max_side, canvas=None, resize=augmentation.resize):
    """Resize and pad images of one size.

    Args:
        images: uint8 [B, H, W, 3].
        canvas: int [2], height and width to pad to; None: the next multiples of 32.
        resize: `augmentation.resize`, or what does the same.

    Returns:
        uint8 [B, H', W', 3]; the size before padding, int32 [2]; the scale, float32 scalar.
    """
    size, scale = resized(tf.shape(images)[1:3], short_side, max_side)
    canvas = padded(size) if canvas is None else canvas
    return augmentation.pad(resize(images, size), canvas), size, scale


def to_original(boxes, scale, sizes):
    """Boxes of the network's pixels in those of the image given, clipped to it.

    Args:
        boxes: [B, N, 4], x1, y1, x2, y2.
        scale: scalar or [B], network pixels per image pixel.
        sizes: [2] or [B, 2], height and width of the images given.
    """
    sizes = tf.cast(tf.reshape(sizes, (-1, 2)), tf.float32)
    limit = tf.gather(sizes, [1, 0, 1, 0], axis=1)[:, None]  # [B or 1, 1, 4]
    return tf.clip_by_value(boxes / tf.reshape(scale, (-1, 1, 1)), 0.0, limit)
