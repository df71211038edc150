"""Images and boxes to batches: the size an image is resized to, its canvas, training and inference.

The canvas: an image is resized so that its shorter side is `short_side`, its longer at most `max_side`, and padded
right and bottom with the mean color to the next multiples of 32. At inference that is a function of the image's own
size alone. In training a few canvases serve all images, the smallest that hold them, for XLA.
"""

import numpy as np
import tensorflow as tf

from retinanet_keras.data import augmentation, examples
from retinanet_keras.data.buckets import TrainingOrder, divide
from retinanet_keras.data.canvas import padded, resized
from retinanet_keras.errors import ConfigError


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
    read = examples.example_reader(dataset, halvings)
    replaced = examples.replacing(read, dataset, bucket, seed, skipped)

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
    return stream.prefetch(2 * parts).with_options(examples.stream_options())


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
    """One training example on its canvas: resize, zoom and stretch, flips, color shift, as far as `config` says.

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
