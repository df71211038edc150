"""A detector over a split: what it finds, batch by batch, and what is written of it."""

import contextlib
import functools
import itertools
import time

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from retinanet_keras import errors, folding
from retinanet_keras.data import canvas, image_decoding, inference_batches
from retinanet_keras.data.fingerprint import fingerprint

PARTS = ("input", "network", "post_processing")  # of the time of an image
BATCH = [tf.TensorSpec([None, None, None, 3], tf.uint8), tf.TensorSpec([None, 2], tf.int32)]  # images and their sizes


def detect_split(model, dataset, config, *, folded=True, **how):
    """Run a model over a dataset, each image on its own canvas, images of equal canvas in batches.

    Under MirroredStrategy the replicas take turns at the batches, which stay what they are on one device.

    Args:
        model: a RetinaNet.
        dataset: a CocoDataset.
        config: a Config.
        folded: by the graph of an export, which is sooner done, but is traced anew by each call.
        how: as for `_run`.

    Yields:
        (image_id, boxes [n, 4], scores [n], labels [n]) of each image: NumPy, boxes in the image's own pixels.
    """
    plan = inference_batches.inference_plan(dataset.sizes, config.eval.batch_size, config.data)
    return _run(functools.partial(_by_model, model, folded, dataset, config.data), dataset, plan, **how)


def detect_split_by_export(detect, dataset, config, **how):
    """The same with a detector of `serving.detector`, which takes images as they are, of one size in a batch."""
    plan = inference_batches.inference_plan(dataset.sizes, config.eval.batch_size)
    return _run(functools.partial(_by_export, detect, dataset), dataset, plan, **how)


def _run(compute, dataset, plan, *, label="Evaluating", unfinished=None, speed=None):
    """Every image of a plan, those of an interrupted evaluation from its file.

    Args:
        compute: a function of a plan that yields (list of what was found in each image, seconds by PARTS) per batch.
        label: of the progress bar.
        unfinished: an `Unfinished`, which is told of every batch.
        speed: a dict that receives `images` and the seconds by PARTS, without those of first batches of a shape.
    """
    done = unfinished.batches if unfinished else []
    told = [[one[0] for one in batch] for batch in done]
    if told != [dataset.image_ids[indices].tolist() for indices in plan[: len(done)]]:
        raise errors.DataError(f"{unfinished.path} does not belong to this evaluation. Remove it")
    with tqdm(total=len(dataset), desc=label, unit="image", mininterval=1.0, leave=False) as bar:
        for batch in done:
            bar.update(len(batch))
            yield from batch
        with _naming_bad_files(dataset):
            for batch, seconds in compute(plan[len(done) :]):
                if unfinished:
                    unfinished.add(batch)
                if speed is not None and seconds:
                    for key, value in {"images": len(batch), **seconds}.items():
                        speed[key] = speed.get(key, 0) + value
                yield from batch
                bar.update(len(batch))


def _by_model(model, folded, dataset, data, plan):
    strategy = model.distribute_strategy
    # Of several workers the chief evaluates alone: the others have not the same step to take.
    mirrored = type(strategy) is tf.distribute.MirroredStrategy
    replicas = strategy.num_replicas_in_sync if mirrored else 1

    def on_all(first, second):
        if mirrored:
            runs = (lambda *args, f=f: strategy.run(f, args=args) for f in (first, second))
            return [tf.function(run, reduce_retracing=True, autograph=False) for run in runs]
        network = tf.function(first, input_signature=BATCH, autograph=False)  # one trace serves every canvas
        outputs = tf.nest.map_structure(tf.TensorSpec.from_tensor, network.get_concrete_function().structured_outputs)
        return network, tf.function(second, input_signature=[outputs, *BATCH], autograph=False)

    def give(values):
        if not mirrored:
            return values[0]
        return strategy.experimental_distribute_values_from_function(
            lambda context: values[min(context.replica_id_in_sync_group, len(values) - 1)]
        )

    def take(values):
        """Of each replica, as NumPy, which waits for the result."""
        nested = tf.nest.map_structure(lambda v: [x.numpy() for x in strategy.experimental_local_results(v)], values)
        return [{name: value[replica] for name, value in nested.items()} for replica in range(replicas)]

    if folded:
        # Among workers a variable made in the strategy's scope would wait for the others.
        with strategy.scope() if mirrored else contextlib.nullcontext():
            network, decode = on_all(*folding.halves(model))
    else:  # kept: a training evaluates again and again
        model.evaluation_graphs = model.evaluation_graphs or on_all(model._outputs_in_graph, model._decode_in_graph)
        network, decode = model.evaluation_graphs
    batches, seen = iter(inference_batches.inference_batches(dataset, plan, data)), set()
    clock = _Clock()
    while group := list(itertools.islice(batches, replicas)):
        clock.lap("input")
        shapes = tuple(images.shape for images, _ in group)
        images, sizes = give([images for images, _ in group]), give([about["size"] for _, about in group])
        outputs = network(images, sizes)
        for last in tf.nest.flatten(outputs["deltas"], expand_composites=True):
            last[:, :1].numpy()  # waits
        clock.lap("network")
        results = take(decode(outputs, images, sizes))
        clock.lap("post_processing")
        seconds = clock.seconds
        for (_, about), found in zip(group, results, strict=False):  # fewer at the end
            boxes = canvas.to_original(found["boxes"], about["scale"], about["original_size"]).numpy()
            batch = _images(about["image_id"].numpy(), {**found, "boxes": boxes}, found["count"])
            yield batch, {part: value / len(group) for part, value in seconds.items()} if shapes in seen else {}
        seen.add(shapes)
        clock.restart()


def _by_export(detect, dataset, plan):
    clock, seen = _Clock(), set()
    for images, about in inference_batches.inference_batches(dataset, plan):
        clock.lap("input")
        found = detect(images)
        clock.lap("network")
        batch = _images(about["image_id"].numpy(), found, found["num_detections"])
        yield batch, clock.seconds if images.shape in seen else {}
        seen.add(images.shape)
        clock.restart()


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self):
        self.restart()

    def lap(self, name):
        now = time.perf_counter()
        self.seconds[name], self.start = now - self.start, now

    def restart(self):
        self.seconds, self.start = {}, time.perf_counter()


def _images(ids, found, counts):
    rows = zip(ids.tolist(), counts.tolist(), strict=True)
    return [(id_, *(found[name][i, :n] for name in ("boxes", "scores", "labels"))) for i, (id_, n) in enumerate(rows)]


def milliseconds(speed):
    """What `detect_split` measured, as `report.write_report` takes it; None where it was too little to tell."""
    if not speed.get("images"):
        return None
    parts = {part: 1000 * speed[part] / speed["images"] for part in PARTS if part in speed}
    return {**parts, "images_per_second": 1000 / sum(parts.values())}


def depends_on(dataset, config, weights, model):
    """What the detections of a split depend on, JSON-able: images, the sizes they are given, the model, its weights.

    Args:
        weights: str. A digest of them, or a text that changes when they do.
        model: JSON-able. What the weights do not tell.
    """
    data = config.data
    return {
        "annotation_file": dataset.annotation_file, "dataset": fingerprint(dataset),
        "image_sizes": [data.short_side, data.max_side], "batch_size": config.eval.batch_size,
        "detection_settings": config.to_dict()["detection"], "model": model, "weights": weights,
    }  # fmt: skip


def check_categories(dataset, categories):
    """A DataError where a model's categories are not those of a dataset."""
    if dataset.categories == categories:
        return
    ours, theirs = (set(zip(c.ids, c.names, strict=True)) for c in (categories, dataset.categories))
    raise errors.DataError(
        f"The model's categories are not those of {dataset.annotation_file}: only the model has "
        f"{sorted(ours - theirs)[:5]}, only the annotations have {sorted(theirs - ours)[:5]} (id, name)"
    )


@contextlib.contextmanager
def _naming_bad_files(dataset):
    """TensorFlow's input errors as one that names the files."""
    try:
        yield
    except tf.errors.ResourceExhaustedError:
        raise
    except tf.errors.OpError:
        problems = image_decoding.unusable_images(dataset, np.arange(len(dataset)))
        if not problems:
            raise
        raise errors.DataError("; ".join(problems[:5])) from None
