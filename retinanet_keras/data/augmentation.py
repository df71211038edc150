"""Random zoom, crop, flips and color shift of one training image, and padding, as TensorFlow graph operations."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from retinanet_keras.model import PAD_COLOR

MIN_VISIBLE = 0.3  # fraction of a box's area that must remain visible after a random crop; this project's choice


def pad(images: tf.Tensor, canvas: Any, offset: Any = (0, 0)) -> tf.Tensor:
    """Place images on a canvas of the mean color.

    Args:
        images: uint8 [B, H, W, 3].
        canvas: int [2]. Height and width of the canvas.
        offset: int [2]. Rows and columns of padding above and left of the images.

    Returns:
        uint8 [B, canvas height, canvas width, 3].
    """
    shape, canvas = tf.shape(images), tf.cast(canvas, tf.int32)
    above, left = offset[0], offset[1]
    below, right = canvas[0] - above - shape[1], canvas[1] - left - shape[2]

    def color(height: Any, width: Any) -> tf.Tensor:
        return tf.broadcast_to(tf.constant(PAD_COLOR, tf.uint8), [shape[0], height, width, 3])

    # Takes half the time of tf.pad, which supports only one value for all channels.
    images = tf.concat([color(shape[1], left), images, color(shape[1], right)], axis=2)
    return tf.concat([color(above, canvas[1]), images, color(below, canvas[1])], axis=1)


def zoom_factor(jitter: tuple[float, float], draw: tf.Tensor) -> tf.Tensor:
    """A random zoom factor, log-uniform between two limits.

    Args:
        jitter: (float, float). Smallest and largest factor.
        draw: float32 scalar. A uniform random number in 0..1.
    """
    low, high = jitter
    return tf.exp(tf.math.log(low) + draw * (tf.math.log(high) - tf.math.log(low)))


def zoom(
    image: tf.Tensor,
    boxes: tf.Tensor,
    labels: tf.Tensor,
    fitted: tf.Tensor,
    canvas: tf.Tensor,
    factor: tf.Tensor,
    stretch: tuple[float, tf.Tensor],
    draw: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Resize an image by a factor and a random stretch, then crop it or place it on the canvas at random.

    Args:
        image: uint8 [H, W, 3].
        boxes: float32 [N, 4]. x1, y1, x2, y2 in the image's pixels.
        labels: int32 [N].
        fitted: int [2]. Height and width of the image on the canvas at a factor of 1.
        canvas: int [2]. Height and width of the canvas.
        factor: float32 scalar. The zoom factor.
        stretch: (largest stretch, uniform random scalar).
        draw: float32 [2]. Uniform random numbers for the position of the image or the crop, y before x.

    Returns:
        (image uint8 [canvas height, canvas width, 3], boxes in canvas pixels, labels). Boxes of which less than
        `MIN_VISIBLE` remains are replaced by padding, which comes last.
    """
    height_width = tf.cast(tf.shape(image)[:2], tf.float32)
    limits = tf.cast(canvas, tf.float32)
    ratio = tf.exp((stretch[1] - 0.5) * tf.math.log(stretch[0]))  # its square is the change of h / w
    full = tf.cast(fitted, tf.float32) * factor * tf.stack([ratio, 1.0 / ratio])  # [2], y before x, as in all below
    scale = full / height_width
    offset = draw * (limits - full)  # negative where the image is cropped

    # Crop whole pixels first, so that only the visible part is resized. The resulting scale and offset are exact.
    first = tf.floor(tf.maximum(0.0, -offset / scale))
    last = tf.minimum(height_width, tf.math.ceil((limits - offset) / scale))
    target = tf.clip_by_value(tf.round((last - first) * scale), 1.0, limits)
    position = tf.clip_by_value(tf.round(offset), 0.0, limits - target)
    (y1, x1), (y2, x2) = tf.unstack(tf.cast(first, tf.int32)), tf.unstack(tf.cast(last, tf.int32))
    pixels = resize(image[None, y1:y2, x1:x2], tf.cast(target, tf.int32))
    pixels = pad(pixels, canvas, tf.cast(position, tf.int32))[0]
    scale = target / (last - first)
    offset = position - first * scale

    xyxy = tf.constant([1, 0, 1, 0])
    whole = boxes * tf.gather(scale, xyxy) + tf.gather(offset, xyxy)  # [N, 4]
    inside = tf.clip_by_value(whole, 0.0, tf.gather(limits, xyxy))
    visible = _area(inside) >= MIN_VISIBLE * _area(whole)
    labels = tf.where(visible, labels, -1)
    # `targets.assign` expects padding last.
    order = tf.argsort(tf.cast(labels < 0, tf.int32), stable=True)
    boxes, labels = tf.gather(inside, order), tf.gather(labels, order)
    return pixels, tf.where(labels[:, None] >= 0, boxes, 0.0), labels


def resize(images: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Resize images bilinearly, sampled at pixel centers, and round.

    Args:
        images: uint8 [B, H, W, 3].
        size: int [2]. New height and width.
    """
    return tf.cast(tf.round(tf.image.resize(images, size)), tf.uint8)


def flip(
    pixels: tf.Tensor, boxes: tf.Tensor, labels: tf.Tensor, horizontal: tf.Tensor, vertical: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Flip an image and its boxes.

    Args:
        pixels: uint8 [H, W, 3].
        boxes: float32 [N, 4]. x1, y1, x2, y2 in pixels.
        labels: int32 [N]. Padding has label -1; its boxes stay 0.
        horizontal, vertical: bool scalars. Whether to flip in that direction.

    Returns:
        (pixels, boxes).
    """
    axes = tf.reshape(tf.where(tf.stack([vertical, horizontal])), [-1])  # none, one or both
    height, width = tf.unstack(tf.cast(tf.shape(pixels)[:2], tf.float32))
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    x1, x2 = tf.where(horizontal, width - x2, x1), tf.where(horizontal, width - x1, x2)
    y1, y2 = tf.where(vertical, height - y2, y1), tf.where(vertical, height - y1, y2)
    boxes = tf.where(labels[:, None] >= 0, tf.stack([x1, y1, x2, y2], -1), 0.0)
    return tf.reverse(pixels, axes), boxes


def shift_color(pixels: tf.Tensor, largest: float, draw: tf.Tensor) -> tf.Tensor:
    """Shift the brightness at random, and each channel by up to half as much.

    Args:
        pixels: uint8 [H, W, 3].
        largest: float. Largest shift of the brightness, as a fraction of 255.
        draw: float32 [4]. Uniform random numbers for the brightness and the three channels.
    """
    shift = (2.0 * draw - 1.0) * 255.0 * largest
    pixels = tf.cast(pixels, tf.float32) + shift[0] + 0.5 * shift[1:]
    return tf.saturate_cast(tf.round(pixels), tf.uint8)


def _area(boxes: tf.Tensor) -> tf.Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
