"""Batches for detection: each image padded to its own canvas, batched with images of the same canvas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from retinanet_keras.config import DataConfig
from retinanet_keras.data import examples
from retinanet_keras.data.canvas import fit, padded, resized
from retinanet_keras.data.coco import CocoDataset


def inference_plan(sizes: npt.ArrayLike, batch_size: int, config: DataConfig | None = None) -> list[npt.NDArray]:
    """Group images of equal canvas into batches.

    Args:
        sizes: int [N, 2]. Heights and widths.
        batch_size: int. Largest number of images in a batch.
        config: DataConfig. None: images are not resized, and only those of equal size share a batch.

    Returns:
        a list of int64 [B] arrays of indices, B at most `batch_size`; each index once.
    """
    sizes = np.asarray(sizes).reshape(-1, 2)
    if config is not None:
        sizes = padded(resized(sizes, config.short_side, config.max_side)[0].numpy())
    canvas = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1]  # height and width as one number
    order = np.argsort(canvas, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(canvas[order])) + 1)
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def inference_batches(
    dataset: CocoDataset, plan: Sequence[npt.NDArray], config: DataConfig | None = None
) -> tf.data.Dataset:
    """The batches of a plan, each image on its own canvas.

    Args:
        dataset: CocoDataset.
        plan: list of int64 [B]. The result of `inference_plan` for the dataset's sizes, or a part of it.
        config: DataConfig. The one given to `inference_plan`; None: images are not resized.

    Returns:
        a tf.data.Dataset of (images uint8 [B, H, W, 3], dict of image_id [B], size [B, 2] before padding, scale [B],
        original_size [B, 2]), in the order of the plan.
    """
    order = np.concatenate([*plan, np.zeros(0, np.int64)]).astype(np.int64)
    batch: npt.NDArray = np.repeat(np.arange(len(plan)), [len(indices) for indices in plan])
    counts = tf.constant([len(indices) for indices in plan], tf.int64)
    read = examples.example_reader(dataset)

    @tf.autograph.experimental.do_not_convert
    def prepare(index: tf.Tensor, batch: tf.Tensor) -> Any:
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
    return stream.prefetch(2).with_options(examples.stream_options())
