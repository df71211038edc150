"""Images and boxes to batches: the size an image is resized to, its canvas, training and inference.

The canvas: an image is resized so that its shorter side is `short_side`, its longer at most `max_side`, and padded
right and bottom with the mean colour to the next multiples of 32. At inference that is a function of the image's own
size alone. In training a few canvases serve all images, the smallest that hold them, for XLA.
"""

import numpy as np
import tensorflow as tf

from retinanet_keras.data import augmentation, reading
from retinanet_keras.data.buckets import TrainingOrder, divide
from retinanet_keras.model import SIZE_MULTIPLE
from retinanet_keras.settings import ConfigError

MEMORY = 1 << 30  # bytes that tf.data may let its parallel stages hold; this project's choice


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


def training_canvases(sizes, config):
    """The canvases of training, at most `config.buckets`, and which of them each image has.

    Args:
        sizes: int [N, 2], heights and widths.
        config: a DataConfig.

    Returns:
        canvases, int32 [C, 2], heights and widths; bucket, int64 [N], the index of each image's canvas.
    """
    sizes = np.asarray(sizes)
    fitted = padded(resized(sizes, config.short_side, config.max_side)[0].numpy())
    return divide(fitted, sizes[:, 0] > sizes[:, 1], config.buckets)


def training_batches(dataset, config, *, batch_size, seed, start=0, share=(0, 1), parts=1, produced=None, skipped=None):
    """Endless batches from step `start` on: the same stream in whatever shares and parts it is prepared.

    Args:
        dataset: a CocoDataset.
        config: a DataConfig.
        batch_size: images of a step, over all devices.
        share: (index, count), which of `count` equal runs of each step's images this worker prepares.
        parts: batches that this share of a step is split into, in order, one for each of the worker's replicas.
        produced: a Python function of no arguments, called whenever a batch is ready; batches are prepared ahead.
        skipped: a Python function of (index, message), called for each image skipped, where `config.bad_images` is
            "skip"; from any thread, ahead of the step, and again whenever it is that image's turn.

    Returns:
        a tf.data.Dataset of (images uint8 [B, H, W, 3], dict of boxes [B, N, 4] in network pixels and labels [B, N],
        padded with -1, image_id [B], size [B, 2] before padding, scale [B], network pixels per pixel of the file); B is
        batch_size / count / parts, N is the same for all.
    """
    worker, workers = share
    size = batch_size // (workers * parts)
    if size * workers * parts != batch_size:
        raise ConfigError(
            f"train.batch_size: {batch_size} images a step cannot be divided evenly among {workers} workers with "
            f"{parts} replicas each; expected a multiple of {workers * parts}"
        )
    canvases, bucket = training_canvases(dataset.sizes, config)
    order = TrainingOrder(bucket, batch_size, seed)
    own = slice(worker * size * parts, (worker + 1) * size * parts)

    def epochs():
        number, offset = divmod(start, order.steps_per_epoch)
        while True:
            steps = order.epoch(number)[offset:]  # [S, batch_size]
            first = (number * order.steps_per_epoch + offset) * batch_size
            samples = first + np.arange(steps.size).reshape(steps.shape)  # one number for each image ever seen
            yield steps[:, own].reshape(-1), samples[:, own].reshape(-1)
            number, offset = number + 1, 0

    canvas_of, size_of = tf.constant(canvases[bucket]), tf.constant(dataset.sizes)
    halvings = reducible(dataset.sizes, config) if config.decode == "reduced" else None
    read = reading.example_reader(dataset, halvings)
    replaced = reading.replacing(read, dataset, bucket, seed, skipped)

    @tf.autograph.experimental.do_not_convert
    def prepare(index, sample):
        if config.bad_images == "skip":
            index, image, truth = replaced(index, sample)
        else:
            image, truth = read(index)
        return augment(image, size_of[index], truth, canvas_of[index], config, tf.stack([seed, sample]))

    def ready(*batch):
        tf.numpy_function(produced, [], [])
        return batch

    spec = tf.TensorSpec([None], tf.int64)
    stream = tf.data.Dataset.from_generator(epochs, output_signature=(spec, spec))
    stream = stream.flat_map(lambda *epoch: tf.data.Dataset.from_tensor_slices(epoch))
    # AUTOTUNE goes up to the number of CPUs, and a map holds one finished image for each of its calls.
    stream = stream.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    stream = stream.batch(size, drop_remainder=True)
    if produced is not None:
        stream = stream.map(ready)
    return stream.prefetch(2 * parts).with_options(_options())


def _options():
    options = tf.data.Options()
    options.autotune.ram_budget = MEMORY
    # Each worker's stream is its share already.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options


def reducible(sizes, config):
    """How often a training image's sides may be halved in decoding without falling below those on the canvas.

    Args:
        sizes: int [N, 2], heights and widths.

    Returns:
        int32 [N], 0 to 3, for the largest zoom and stretch that `config` allows.
    """
    _, scale = resized(sizes, config.short_side, config.max_side)
    largest = scale.numpy() * config.scale_jitter[1] * config.aspect_jitter**0.5
    return sum((largest * divisor <= 1.0).astype(np.int32) for divisor in (2, 4, 8))


def augment(image, size, truth, canvas, config, seed):
    """One training example on its canvas: resize, zoom and stretch, flips, colour shift, as far as `config` says.

    An image that only shrinks lies at the top left, as in detection; one that may grow or stretch is cropped, or has
    its place, at random.

    Args:
        image: uint8 [H, W, 3], decoded in full or at reduced scale.
        size: int32 [2], height and width of the file's image.
        truth: dict with boxes [N, 4] in the file's pixels and labels [N], -1 in padding.
        canvas: int32 [2], height and width.
        seed: int64 [2]; equal seeds give equal results.

    Returns:
        (uint8 [canvas height, canvas width, 3], truth with boxes in canvas pixels, and size [2] and scale added).
    """
    draw = tf.random.stateless_uniform([9], seed)  # one number a decision, whatever is switched on
    boxes, labels = truth["boxes"], truth["labels"]
    fitted, scale = resized(size, config.short_side, config.max_side)
    factor = augmentation.zoom_factor(config.scale_jitter, draw[0])
    zoomed = config.scale_jitter[1] > 1.0 or config.aspect_jitter != 1.0
    if zoomed:
        decoded = tf.cast(tf.shape(image)[:2] / size, tf.float32)  # pixels per pixel of the file, [2]
        boxes = boxes * tf.gather(decoded, [1, 0, 1, 0])
        stretch = config.aspect_jitter, draw[1]
        pixels, boxes, labels = augmentation.zoom(image, boxes, labels, fitted, canvas, factor, stretch, draw[2:4])
        fitted, scale = canvas, scale * factor
    else:
        scale = scale * factor
        fitted = tf.minimum(fitted, tf.maximum(1, tf.cast(tf.round(tf.cast(size, tf.float32) * scale), tf.int32)))
        pixels, boxes = augmentation.resize(image[None], fitted)[0], boxes * scale
    if config.flip or config.vertical_flip:
        pixels, boxes = augmentation.flip(pixels, boxes, labels, draw[4] < config.flip, draw[5] < config.vertical_flip)
    if not zoomed:  # after the flip, for the padding stays right and bottom
        pixels = augmentation.pad(pixels[None], canvas)[0]
    if config.color_jitter:
        pixels = augmentation.shift_color(pixels, config.color_jitter, draw[5:9])
    return pixels, {**truth, "boxes": boxes, "labels": labels, "size": fitted, "scale": scale}


def inference_plan(sizes, batch_size, config=None):
    """Which images share a batch: only those of equal canvas.

    Args:
        sizes: int [N, 2], heights and widths.
        config: a DataConfig; None: for images as they are, of equal size.

    Returns:
        a list of int64 [B] arrays of indices, B at most `batch_size`; each index once.
    """
    sizes = np.asarray(sizes).reshape(-1, 2)
    if config is not None:
        sizes = padded(resized(sizes, config.short_side, config.max_side)[0].numpy())
    canvas = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1]  # one number each
    order = np.argsort(canvas, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(canvas[order])) + 1)
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def inference_batches(dataset, plan, config=None):
    """The batches of a plan, each image on its own canvas.

    Args:
        dataset: a CocoDataset.
        plan: as `inference_plan` gives it for the dataset's sizes, or a part of it.
        config: the DataConfig of the plan; None: images as they are.

    Returns:
        a tf.data.Dataset of (images uint8 [B, H, W, 3], dict of image_id [B], size [B, 2] before padding, scale [B],
        original_size [B, 2]), in the order of the plan.
    """
    order = np.concatenate([*plan, np.zeros(0, np.int64)]).astype(np.int64)
    batch = np.repeat(np.arange(len(plan)), [len(indices) for indices in plan])
    counts = tf.constant([len(indices) for indices in plan], tf.int64)
    read = reading.example_reader(dataset)

    @tf.autograph.experimental.do_not_convert
    def prepare(index, batch):
        image, truth = read(index)
        pixels, size, scale = image, tf.shape(image)[:2], 1.0
        if config is not None:
            pixels, size, scale = fit(image[None], config.short_side, config.max_side)
            pixels = pixels[0]
        about = {"image_id": truth["image_id"], "size": size, "scale": scale, "original_size": tf.shape(image)[:2]}
        return batch, (pixels, about)

    stream = tf.data.Dataset.from_tensor_slices((order, batch))
    stream = stream.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    stream = stream.group_by_window(
        lambda batch, _: batch,
        lambda batch, group: group.map(lambda _, x: x).batch(counts[batch]),
        window_size_func=lambda batch: counts[batch],
    )
    return stream.prefetch(2).with_options(_options())
