"""Training batches: images and boxes, augmented, resized and padded.

An image is resized as in `canvas.py`. In training it is padded to one of a few canvases that serve all images, each the
smallest that holds its images, for XLA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from retinanet_keras.config import DataConfig
from retinanet_keras.data import augmentation, examples
from retinanet_keras.data.buckets import TrainingOrder, divide
from retinanet_keras.data.canvas import padded, resized
from retinanet_keras.data.coco import CocoDataset
from retinanet_keras.errors import ConfigError


def training_canvases(sizes: npt.ArrayLike, config: DataConfig) -> tuple[npt.NDArray, npt.NDArray]:
    """Choose the canvases of training, at most `config.buckets`, and the canvas of each image.

    Args:
        sizes: int [N, 2]. Heights and widths.
        config: DataConfig.

    Returns:
        canvases, int32 [C, 2], heights and widths; bucket, int64 [N], the index of each image's canvas.
    """
    sizes = np.asarray(sizes)
    fitted = padded(resized(sizes, config.short_side, config.max_side)[0].numpy())
    return divide(fitted, sizes[:, 0] > sizes[:, 1], config.buckets)


def training_batches(
    dataset: CocoDataset,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    share: tuple[int, int] = (0, 1),
    parts: int = 1,
    produced: Callable[[], Any] | None = None,
    skipped: Callable[[int, str], Any] | None = None,
) -> tf.data.Dataset:
    """An infinite dataset of batches, which sees the same images however they are divided among workers and replicas.

    Args:
        dataset: CocoDataset.
        config: DataConfig.
        batch_size: int. Images per step, over all devices.
        seed: int. Seed of the order and of augmentation.
        start: int. First step, counted from 0.
        share: (index, count). This worker's shard: a step's images are divided into `count` equal consecutive shards.
        parts: int. Replica batches that the shard of a step is divided into, in order, one for each replica of the
            worker.
        produced: a Python function of no arguments, called whenever a batch is ready; batches are prepared ahead.
        skipped: a Python function of (index, message), called for each image skipped, if `config.bad_images` is "skip";
            from any thread, ahead of the step, and again in each epoch.

    Returns:
        a tf.data.Dataset of (images uint8 [B, H, W, 3], dict of boxes [B, N, 4] in network pixels and labels [B, N],
        padded with -1, image_id [B], size [B, 2] before padding, scale [B], network pixels per pixel of the file); B is
        batch_size / count / parts, N is the same for all.

    Raises:
        ConfigError: the batch size cannot be divided evenly.
    """
    worker, workers = share
    size = batch_size // (workers * parts)
    if size * workers * parts != batch_size:
        raise ConfigError(
            f"train.batch_size: {batch_size} images per step cannot be divided evenly among {workers} workers with "
            f"{parts} replicas each; expected a multiple of {workers * parts}"
        )
    canvases, bucket = training_canvases(dataset.sizes, config)
    order = TrainingOrder(bucket, batch_size, seed)
    shard = slice(worker * size * parts, (worker + 1) * size * parts)

    def epochs() -> Iterator[tuple[npt.NDArray, npt.NDArray]]:
        number, offset = divmod(start, order.steps_per_epoch)
        while True:
            steps = order.epoch(number)[offset:]  # [S, batch_size]
            first = (number * order.steps_per_epoch + offset) * batch_size
            samples: npt.NDArray = first + np.arange(steps.size).reshape(
                steps.shape
            )  # numbers all images of a training in the order seen
            yield steps[:, shard].reshape(-1), samples[:, shard].reshape(-1)
            number, offset = number + 1, 0

    canvas_of, size_of = tf.constant(canvases[bucket]), tf.constant(dataset.sizes)
    halvings = reducible(dataset.sizes, config) if config.decode == "reduced" else None
    read = examples.example_reader(dataset, halvings)
    read_or_replace = examples.replacing(read, dataset, bucket, seed, skipped)

    @tf.autograph.experimental.do_not_convert
    def prepare(index: tf.Tensor, sample: tf.Tensor) -> Any:
        if config.bad_images == "skip":
            index, image, truth = read_or_replace(index, sample)
        else:
            image, truth = read(index)
        return augment(image, size_of[index], truth, canvas_of[index], config, tf.stack([seed, sample]))

    def ready(*batch: Any) -> Any:
        tf.numpy_function(produced, [], [])
        return batch

    spec = tf.TensorSpec([None], tf.int64)
    stream = tf.data.Dataset.from_generator(epochs, output_signature=(spec, spec))
    stream = stream.flat_map(lambda *epoch: tf.data.Dataset.from_tensor_slices(epoch))
    # AUTOTUNE uses up to the number of CPUs, and a map holds one finished image per parallel call.
    stream = stream.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    stream = stream.batch(size, drop_remainder=True)
    if produced is not None:
        stream = stream.map(ready)
    return stream.prefetch(2 * parts).with_options(examples.stream_options())


def reducible(sizes: npt.ArrayLike, config: DataConfig) -> npt.NDArray:
    """How often a JPEG's sides may be halved in decoding without becoming smaller than on the canvas.

    Args:
        sizes: int [N, 2]. Heights and widths.
        config: DataConfig.

    Returns:
        int32 [N], 0 to 3, at the largest zoom and stretch that `config` allows.
    """
    _, scale = resized(sizes, config.short_side, config.max_side)
    largest = scale.numpy() * config.scale_jitter[1] * config.aspect_jitter**0.5
    return sum((largest * divisor <= 1.0).astype(np.int32) for divisor in (2, 4, 8))


def augment(
    image: tf.Tensor,
    size: tf.Tensor,
    truth: dict[str, tf.Tensor],
    canvas: tf.Tensor,
    config: DataConfig,
    seed: tf.Tensor,
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Resize, augment and pad one training example: zoom and stretch, flips, color shift, as configured.

    Without enlarging zoom or stretch, the image is placed at the top left, as in detection; otherwise it is cropped or
    placed at random.

    Args:
        image: uint8 [H, W, 3]. Decoded in full or at reduced scale.
        size: int32 [2]. Height and width of the image in the file.
        truth: dict with boxes [N, 4] in the file's pixels and labels [N], -1 in padding.
        canvas: int32 [2]. Height and width of the canvas.
        config: DataConfig.
        seed: int64 [2]. Equal seeds give equal results.

    Returns:
        (uint8 [canvas height, canvas width, 3], truth with boxes in canvas pixels, and size [2] and scale added).
    """
    draw = tf.random.stateless_uniform([9], seed)  # one per random decision, whatever is enabled
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
    if not zoomed:  # after the flip, so that the padding is right and bottom
        pixels = augmentation.pad(pixels[None], canvas)[0]
    if config.color_jitter:
        pixels = augmentation.shift_color(pixels, config.color_jitter, draw[5:9])
    return pixels, {**truth, "boxes": boxes, "labels": labels, "size": fitted, "scale": scale}
