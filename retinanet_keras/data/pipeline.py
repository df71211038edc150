"""Images and boxes to batches. Everything that resizes or pads an image is here.

The canvas: an image is resized so that its shorter side is `short_side`, its longer at most `max_side`, and padded
right and bottom with the mean colour to the next multiples of 32. At inference that is a function of the image's own
size alone. In training one canvas serves all landscape images and another all portrait ones, the smallest that hold
them, for XLA.
"""

import numpy as np
import tensorflow as tf

from retinanet_keras.data import sources
from retinanet_keras.model import PAD_COLOR, SIZE_MULTIPLE

MIN_VISIBLE = 0.3  # share of a box's area that must be left after a random crop; this project's choice


def resized(sizes, short_side, max_side):
    """What an image is resized to.

    Args:
        sizes: [..., 2], height and width in pixels.

    Returns:
        int32 [..., 2], height and width, at least 1; and the scale, float32 [...], network pixels per image pixel.
    """
    sizes = tf.cast(sizes, tf.float32)
    scale = tf.minimum(short_side / tf.reduce_min(sizes, -1), max_side / tf.reduce_max(sizes, -1))
    target = tf.floor(sizes * scale[..., None] + 0.5)
    return tf.cast(tf.clip_by_value(target, 1.0, float(max_side)), tf.int32), scale


def padded(size):
    """The next multiples of 32; size: ints or integer tensors [..., 2]."""
    return -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE


def fit(images, short_side, max_side, canvas=None):
    """Resize and pad images of one size.

    Args:
        images: uint8 [B, H, W, 3].
        canvas: int [2], height and width to pad to; None: the next multiples of 32.

    Returns:
        uint8 [B, H', W', 3]; the size before padding, int32 [2]; the scale, float32 scalar.
    """
    size, scale = resized(tf.shape(images)[1:3], short_side, max_side)
    if canvas is None:
        canvas = padded(size)
    color = tf.constant(PAD_COLOR, tf.float32)
    pixels = tf.round(tf.image.resize(images, size)) - color
    right_bottom = tf.stack([tf.zeros(2, tf.int32), canvas - size], axis=1)  # [2, 2]
    pixels = tf.pad(pixels, tf.concat([tf.zeros((1, 2), tf.int32), right_bottom, tf.zeros((1, 2), tf.int32)], 0))
    return tf.saturate_cast(pixels + color, tf.uint8), size, scale


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


class TrainingOrder:
    """Which images a step sees: a pure function of the step, so that a resumed run sees what it would have seen.

    Each epoch is a new shuffle. Batches hold images of one orientation (as Detectron's), and the last of each
    orientation is filled from a further shuffle, so that every image comes at least once.
    """

    def __init__(self, sizes, batch_size, seed):
        """sizes: int [N, 2], height and width."""
        sizes = np.asarray(sizes)
        portrait = sizes[:, 0] > sizes[:, 1]
        self.groups = [np.flatnonzero(portrait == side) for side in (False, True)]
        self.batch_size, self.seed = batch_size, seed
        self.batches = [-(-len(group) // batch_size) for group in self.groups]
        self.steps_per_epoch = sum(self.batches)
        self._cached = (None, None)

    def epoch(self, number):
        """int64 [steps_per_epoch, batch_size], the indices of the epoch's images."""
        if self._cached[0] != number:
            rng = np.random.default_rng([self.seed, number])
            rows = []
            for group, batches in zip(self.groups, self.batches, strict=True):
                shuffled = rng.permutation(group)
                while 0 < len(shuffled) < batches * self.batch_size:
                    shuffled = np.concatenate([shuffled, rng.permutation(group)])
                rows.append(shuffled[: batches * self.batch_size].reshape(batches, self.batch_size))
            self._cached = (number, rng.permutation(np.concatenate(rows)))
        return self._cached[1]

    def batch(self, step):
        """int64 [batch_size], the indices of the images of a step, counted from 0."""
        return self.epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]


def training_canvases(sizes, config):
    """The smallest canvas that holds every landscape image, and that for portrait: int32 [2, 2], heights and widths."""
    sizes = np.asarray(sizes)
    fitted = padded(resized(sizes, config.short_side, config.max_side)[0].numpy())
    portrait = sizes[:, 0] > sizes[:, 1]
    return np.stack([fitted[portrait == side].max(axis=0, initial=SIZE_MULTIPLE) for side in (False, True)])


def training_batches(dataset, config, *, batch_size, seed, start=0):
    """Endless batches from step `start` on.

    Args:
        dataset: a CocoDataset.
        config: a DataConfig.

    Returns:
        a tf.data.Dataset of (images uint8 [B, H, W, 3], dict of boxes [B, N, 4] in network pixels and labels [B, N],
        padded with -1, image_id [B], size [B, 2] before padding, scale [B]); N is the same for all.
    """
    order = TrainingOrder(dataset.sizes, batch_size, seed)
    canvases = tf.constant(training_canvases(dataset.sizes, config))
    portrait = tf.constant(dataset.sizes[:, 0] > dataset.sizes[:, 1])
    example = example_reader(dataset)

    def epochs():
        number, offset = divmod(start, order.steps_per_epoch)
        while True:
            indices = order.epoch(number)[offset:].reshape(-1)
            first = (number * order.steps_per_epoch + offset) * batch_size
            yield indices, np.arange(first, first + len(indices))
            number, offset = number + 1, 0

    def prepare(index, sample):
        image, truth = example(index)
        canvas = canvases[tf.cast(portrait[index], tf.int32)]
        return augment(image, truth, canvas, config, tf.stack([tf.cast(seed, tf.int64), sample]))

    spec = tf.TensorSpec([None], tf.int64)
    stream = tf.data.Dataset.from_generator(epochs, output_signature=(spec, spec))
    stream = stream.flat_map(lambda *epoch: tf.data.Dataset.from_tensor_slices(epoch))
    stream = stream.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return stream.batch(batch_size, drop_remainder=True).prefetch(2)


def inference_batches(dataset, config, batch_size):
    """Every image once, on its own canvas; only images of equal canvas share a batch.

    Returns:
        a tf.data.Dataset of (images uint8 [B, H, W, 3], dict of image_id [B], size [B, 2] before padding, scale [B],
        original_size [B, 2]).
    """
    fitted = padded(resized(dataset.sizes, config.short_side, config.max_side)[0].numpy())
    canvas = fitted[:, 0].astype(np.int64) * 1_000_000 + fitted[:, 1]  # one number each
    order = np.argsort(canvas, kind="stable")
    read = example_reader(dataset)

    def prepare(index, image_id, canvas):
        image, _ = read(index)
        pixels, size, scale = fit(image[None], config.short_side, config.max_side)
        return canvas, (
            pixels[0],
            {"image_id": image_id, "size": size, "scale": scale, "original_size": tf.shape(image)[:2]},
        )

    stream = tf.data.Dataset.from_tensor_slices((order, dataset.image_ids[order], canvas[order]))
    stream = stream.map(prepare, num_parallel_calls=tf.data.AUTOTUNE)
    stream = stream.group_by_window(
        lambda canvas, _: canvas, lambda _, group: group.map(lambda _, x: x).batch(batch_size), window_size=batch_size
    )
    return stream.prefetch(2)


def example_reader(dataset):
    """A function of the graph: index -> (image uint8 [H, W, 3], dict of boxes [N, 4], labels [N], image_id).

    N is the dataset's largest number of boxes; rows past an image's own have box 0 and label -1.
    """
    files, ids = tf.constant(dataset.files), tf.constant(dataset.image_ids)
    sizes, offsets = tf.constant(dataset.sizes), tf.constant(dataset.offsets)
    boxes, labels = tf.constant(dataset.boxes), tf.constant(dataset.labels)

    def read(index):
        image = sources.decode(tf.io.read_file(files[index]))
        same = tf.debugging.assert_equal(tf.shape(image)[:2], sizes[index], "image and annotation differ in size")
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


def augment(image, truth, canvas, config, seed):
    """One training example on its canvas: resize, zoom and stretch, flips, colour shift, as far as `config` says.

    Args:
        image: uint8 [H, W, 3].
        truth: dict with boxes [N, 4] in the image's pixels and labels [N], -1 in padding.
        canvas: int [2], height and width.
        seed: int64 [2]; equal seeds give equal results.

    Returns:
        (uint8 [canvas height, canvas width, 3], truth with boxes in canvas pixels, and size [2] and scale added).
    """
    draw = tf.random.stateless_uniform([9], seed)  # one number a decision, whatever is switched on
    boxes, labels = truth["boxes"], truth["labels"]
    if config.scale_jitter == (1.0, 1.0) and config.aspect_jitter == 1.0:
        pixels, size, scale = fit(image[None], config.short_side, config.max_side, canvas)
        pixels, boxes = pixels[0], boxes * scale
    else:
        pixels, boxes, labels, size, scale = _zoom(image, boxes, labels, canvas, config, draw[:4])
    if config.flip or config.vertical_flip:
        pixels, boxes = _flip(pixels, boxes, labels, size, draw[4] < config.flip, draw[5] < config.vertical_flip)
    if config.color_jitter:
        shift = (2.0 * draw[5:9] - 1.0) * 255.0 * config.color_jitter  # of brightness, and half as far of each channel
        pixels = tf.cast(pixels, tf.float32) + shift[0] + 0.5 * shift[1:]
        pixels = tf.saturate_cast(tf.round(pixels), tf.uint8)
    return pixels, {**truth, "boxes": boxes, "labels": labels, "size": size, "scale": scale}


def _zoom(image, boxes, labels, canvas, config, draw):
    """Resize by a random factor and stretch, then crop, or place on mean colour, at random; draw: uniform [4]."""
    height_width = tf.cast(tf.shape(image)[:2], tf.float32)
    room = tf.cast(canvas, tf.float32)
    _, base = resized(height_width, config.short_side, config.max_side)
    low, high = config.scale_jitter
    zoom = tf.exp(tf.math.log(low) + draw[0] * (tf.math.log(high) - tf.math.log(low)))
    stretch = tf.exp((draw[1] - 0.5) * tf.math.log(config.aspect_jitter))  # its square is the change of h / w
    scale = base * zoom * tf.stack([stretch, 1.0 / stretch])  # [2], y before x, as in all below
    offset = draw[2:4] * (room - height_width * scale)  # negative where it is cropped

    # Crop whole pixels first: only what will be seen is resized. The scale and offset that result are exact.
    first = tf.floor(tf.maximum(0.0, -offset / scale))
    last = tf.minimum(height_width, tf.math.ceil((room - offset) / scale))
    target = tf.clip_by_value(tf.round((last - first) * scale), 1.0, room)
    place = tf.clip_by_value(tf.round(offset), 0.0, room - target)
    (y1, x1), (y2, x2) = tf.unstack(tf.cast(first, tf.int32)), tf.unstack(tf.cast(last, tf.int32))
    pixels = tf.round(tf.image.resize(image[y1:y2, x1:x2], tf.cast(target, tf.int32)))
    color = tf.constant(PAD_COLOR, tf.float32)
    around = tf.cast(tf.stack([place, room - target - place], axis=1), tf.int32)  # [2, 2]
    pixels = tf.pad(pixels - color, tf.concat([around, tf.zeros((1, 2), tf.int32)], 0))
    pixels = tf.saturate_cast(pixels + color, tf.uint8)
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
    return pixels, tf.where(labels[:, None] >= 0, boxes, 0.0), labels, tf.cast(canvas, tf.int32), base * zoom


def _flip(pixels, boxes, labels, size, horizontal, vertical):
    """Mirror the image within its own size; the padding stays right and bottom."""
    height, width = size[0], size[1]
    axes = tf.reshape(tf.where(tf.stack([vertical, horizontal])), [-1])  # none, one or both
    content = tf.reverse(pixels[:height, :width], axes)
    pixels = tf.concat([tf.concat([content, pixels[:height, width:]], 1), pixels[height:]], 0)
    height, width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    x1, x2 = tf.where(horizontal, width - x2, x1), tf.where(horizontal, width - x1, x2)
    y1, y2 = tf.where(vertical, height - y2, y1), tf.where(vertical, height - y1, y2)
    return pixels, tf.where(labels[:, None] >= 0, tf.stack([x1, y1, x2, y2], -1), 0.0)


def _area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
