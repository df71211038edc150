"""Random zoom, flips and color of one training image, and padding. Functions of the graph."""

import tensorflow as tf

from retinanet_keras.model import PAD_COLOR

MIN_VISIBLE = 0.3  # share of a box's area that must be left after a random crop; this project's choice


def pad(images, canvas, offset=(0, 0)):
    """Images on a canvas of the mean color.

    Args:
        images: uint8 [B, H, W, 3].
        canvas: int [2], height and width.
        offset: int [2], rows and columns of padding above and left of the images.
    """
    shape, canvas = tf.shape(images), tf.cast(canvas, tf.int32)
    above, left = offset[0], offset[1]
    below, right = canvas[0] - above - shape[1], canvas[1] - left - shape[2]

    def color(height, width):
        return tf.broadcast_to(tf.constant(PAD_COLOR, tf.uint8), [shape[0], height, width, 3])

    # Half the time of tf.pad, which has one color for all channels only.
    images = tf.concat([color(shape[1], left), images, color(shape[1], right)], axis=2)
    return tf.concat([color(above, canvas[1]), images, color(below, canvas[1])], axis=1)


def zoom_factor(jitter, draw):
    """The factor of a random zoom, evenly spread in its logarithm; jitter: the smallest and largest; draw: uniform."""
    low, high = jitter
    return tf.exp(tf.math.log(low) + draw * (tf.math.log(high) - tf.math.log(low)))


def zoom(image, boxes, labels, fitted, canvas, factor, stretch, draw):
    """Resize by a factor and a random stretch, then crop, or place on mean color, at random.

    Args:
        image: uint8 [H, W, 3].
        boxes: [N, 4] in the image's pixels, and labels [N].
        fitted: int [2], height and width the image has on the canvas at a factor of 1.
        canvas: int [2], height and width.
        factor: of the zoom.
        stretch: (largest stretch, uniform scalar).
        draw: uniform [2], where the image or the crop lies.

    Returns:
        (uint8 [canvas height, canvas width, 3], boxes in canvas pixels, labels).
    """
    height_width = tf.cast(tf.shape(image)[:2], tf.float32)
    room = tf.cast(canvas, tf.float32)
    stretch = tf.exp((stretch[1] - 0.5) * tf.math.log(stretch[0]))  # its square is the change of h / w
    full = tf.cast(fitted, tf.float32) * factor * tf.stack([stretch, 1.0 / stretch])  # [2], y before x, as in all below
    scale = full / height_width
    offset = draw * (room - full)  # negative where it is cropped

    # Crop whole pixels first: only what will be seen is resized. The scale and offset that result are exact.
    first = tf.floor(tf.maximum(0.0, -offset / scale))
    last = tf.minimum(height_width, tf.math.ceil((room - offset) / scale))
    target = tf.clip_by_value(tf.round((last - first) * scale), 1.0, room)
    place = tf.clip_by_value(tf.round(offset), 0.0, room - target)
    (y1, x1), (y2, x2) = tf.unstack(tf.cast(first, tf.int32)), tf.unstack(tf.cast(last, tf.int32))
    pixels = resize(image[None, y1:y2, x1:x2], tf.cast(target, tf.int32))
    pixels = pad(pixels, canvas, tf.cast(place, tf.int32))[0]
    scale = target / (last - first)
    offset = place - first * scale

    xyxy = tf.constant([1, 0, 1, 0])
    whole = boxes * tf.gather(scale, xyxy) + tf.gather(offset, xyxy)  # [N, 4]
    inside = tf.clip_by_value(whole, 0.0, tf.gather(room, xyxy))
    visible = _area(inside) >= MIN_VISIBLE * _area(whole)
    labels = tf.where(visible, labels, -1)
    # `assign` expects padding last.
    order = tf.argsort(tf.cast(labels < 0, tf.int32), stable=True)
    boxes, labels = tf.gather(inside, order), tf.gather(labels, order)
    return pixels, tf.where(labels[:, None] >= 0, boxes, 0.0), labels


def resize(images, size):
    """Bilinear, sampled at pixel centers, rounded; images: uint8 [B, H, W, 3]; size: int [2], height and width."""
    return tf.cast(tf.round(tf.image.resize(images, size)), tf.uint8)


def flip(pixels, boxes, labels, horizontal, vertical):
    """Mirror an image [H, W, 3] and its boxes; horizontal, vertical: whether, bool scalars."""
    axes = tf.reshape(tf.where(tf.stack([vertical, horizontal])), [-1])  # none, one or both
    height, width = tf.unstack(tf.cast(tf.shape(pixels)[:2], tf.float32))
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    x1, x2 = tf.where(horizontal, width - x2, x1), tf.where(horizontal, width - x1, x2)
    y1, y2 = tf.where(vertical, height - y2, y1), tf.where(vertical, height - y1, y2)
    boxes = tf.where(labels[:, None] >= 0, tf.stack([x1, y1, x2, y2], -1), 0.0)
    return tf.reverse(pixels, axes), boxes


def shift_color(pixels, largest, draw):
    """Shift brightness by up to `largest`, in parts of 255, and each channel half as far; draw: uniform [4]."""
    shift = (2.0 * draw - 1.0) * 255.0 * largest
    pixels = tf.cast(pixels, tf.float32) + shift[0] + 0.5 * shift[1:]
    return tf.saturate_cast(tf.round(pixels), tf.uint8)


def _area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
