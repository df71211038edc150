"""Batches for detection: images of equal canvas, each on a canvas of its own size."""

import numpy as np
import tensorflow as tf

from retinanet_keras.data import examples
from retinanet_keras.data.canvas import fit, padded, resized


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
    batch: np.ndarray = np.repeat(np.arange(len(plan)), [len(indices) for indices in plan])
    counts = tf.constant([len(indices) for indices in plan], tf.int64)
    read = examples.example_reader(dataset)

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
    return stream.prefetch(2).with_options(examples.stream_options())
