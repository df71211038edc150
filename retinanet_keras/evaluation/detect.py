"""Detection over a whole split, batch by batch, timed, and resumed where it was interrupted."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tqdm import tqdm

from retinanet_keras import errors, folding
from retinanet_keras.data import canvas, image_decoding, inference_batches
from retinanet_keras.data.fingerprint import fingerprint
from retinanet_keras.evaluation.results import ImageDetections

if TYPE_CHECKING:
    from retinanet_keras.config import Config, DataConfig
    from retinanet_keras.data.coco import Categories, CocoDataset
    from retinanet_keras.evaluation.unfinished import Unfinished
    from retinanet_keras.model import RetinaNet

Batch = tuple[list[ImageDetections], dict[str, float]]  # with the seconds that each of PARTS took
PARTS = ("input", "network", "post_processing")  # the stages that are timed
BATCH = [tf.TensorSpec([None, None, None, 3], tf.uint8), tf.TensorSpec([None, 2], tf.int32)]  # images and their sizes


def detect_split(
    model: RetinaNet, dataset: CocoDataset, config: Config, *, folded: bool = True, **kwargs: Any
) -> Iterator[ImageDetections]:
    """Run a model over a dataset, each image on its own canvas, images of equal canvas in batches.

    Under MirroredStrategy whole batches are spread over the replicas; the batches are those of a single device.

    Args:
        model: RetinaNet.
        dataset: CocoDataset.
        config: Config.
        folded: bool. Use the graph of an export, which is faster, but retraced for each call.
        kwargs: `label`, `unfinished` and `speed` of `_detect_plan`.

    Yields:
        the ImageDetections of each image: NumPy arrays, boxes in pixels of the original image.
    """
    plan = inference_batches.inference_plan(dataset.sizes, config.eval.batch_size, config.data)
    return _detect_plan(functools.partial(_by_model, model, folded, dataset, config.data), dataset, plan, **kwargs)


def detect_split_by_export(
    detect: Callable[[npt.NDArray], dict[str, npt.NDArray]], dataset: CocoDataset, config: Config, **kwargs: Any
) -> Iterator[ImageDetections]:
    """Run a detector of `serving.detector` over a dataset, images of equal size in batches.

    Args:
        detect: a function as `serving.detector.of_model` returns.
        dataset: CocoDataset.
        config: Config.
        kwargs: `label`, `unfinished` and `speed` of `_detect_plan`.

    Yields:
        the same as `detect_split`.
    """
    plan = inference_batches.inference_plan(dataset.sizes, config.eval.batch_size)
    return _detect_plan(functools.partial(_by_export, detect, dataset), dataset, plan, **kwargs)


def _detect_plan(
    detect_batches: Callable[[Sequence[npt.NDArray]], Iterable[Batch]],
    dataset: CocoDataset,
    plan: Sequence[npt.NDArray],
    *,
    label: str = "Evaluating",
    unfinished: Unfinished | None = None,
    speed: dict[str, float] | None = None,
) -> Iterator[ImageDetections]:
    """Detections of every image of a plan, beginning with those that an interrupted evaluation stored.

    Args:
        detect_batches: a function of a plan that yields a Batch for each of its batches.
        dataset: CocoDataset.
        plan: of `inference_batches.inference_plan`.
        label: str. Label of the progress bar.
        unfinished: Unfinished, which stores every batch.
        speed: dict to which the number of `images` and the seconds by PARTS are added, without the first batch of each
            shape, which includes tracing.
    """
    done = unfinished.batches if unfinished else []
    stored_ids = [[one.image_id for one in batch] for batch in done]
    if unfinished and stored_ids != [dataset.image_ids[indices].tolist() for indices in plan[: len(done)]]:
        raise errors.DataError(f"{unfinished.path} does not belong to this evaluation. Remove it")
    with tqdm(total=len(dataset), desc=label, unit="image", mininterval=1.0, leave=False) as bar:
        for batch in done:
            bar.update(len(batch))
            yield from batch
        with _naming_bad_files(dataset):
            for batch, seconds in detect_batches(plan[len(done) :]):
                if unfinished:
                    unfinished.add(batch)
                if speed is not None and seconds:
                    for key, value in {"images": len(batch), **seconds}.items():
                        speed[key] = speed.get(key, 0) + value
                yield from batch
                bar.update(len(batch))


def _by_model(
    model: RetinaNet, folded: bool, dataset: CocoDataset, data: DataConfig, plan: Sequence[npt.NDArray]
) -> Iterator[Batch]:
    strategy = model.distribute_strategy
    # With several workers the chief evaluates alone: the others do not run these steps.
    mirrored = type(strategy) is tf.distribute.MirroredStrategy
    replicas = strategy.num_replicas_in_sync if mirrored else 1

    def compiled(network, decode):
        if mirrored:
            runs = (lambda *args, f=f: strategy.run(f, args=args) for f in (network, decode))
            return [tf.function(run, reduce_retracing=True, autograph=False) for run in runs]
        network = tf.function(network, input_signature=BATCH, autograph=False)  # one trace serves every canvas
        outputs = tf.nest.map_structure(tf.TensorSpec.from_tensor, network.get_concrete_function().structured_outputs)
        return network, tf.function(decode, input_signature=[outputs, *BATCH], autograph=False)

    def distribute(values):
        if not mirrored:
            return values[0]
        return strategy.experimental_distribute_values_from_function(
            lambda context: values[min(context.replica_id_in_sync_group, len(values) - 1)]
        )

    def gather(values):
        """The values of each replica as NumPy arrays; waits until they are computed."""
        nested = tf.nest.map_structure(lambda v: [x.numpy() for x in strategy.experimental_local_results(v)], values)
        return [{name: value[replica] for name, value in nested.items()} for replica in range(replicas)]

    if folded:
        # With several workers, creating a variable in the strategy's scope would wait for the other workers.
        with strategy.scope() if mirrored else contextlib.nullcontext():
            network, decode = compiled(*folding.halves(model))
    else:  # cached: training evaluates repeatedly
        model.evaluation_graphs = model.evaluation_graphs or compiled(model._outputs_in_graph, model._decode_in_graph)
        network, decode = model.evaluation_graphs
    batches, seen = iter(inference_batches.inference_batches(dataset, plan, data)), set()
    clock = _Clock()
    while group := list(itertools.islice(batches, replicas)):
        clock.lap("input")
        shapes = tuple(images.shape for images, _ in group)
        images = distribute([images for images, _ in group])
        sizes = distribute([about["size"] for _, about in group])
        outputs = network(images, sizes)
        for last in tf.nest.flatten(outputs["deltas"], expand_composites=True):
            last[:, :1].numpy()  # waits until it is computed
        clock.lap("network")
        results = gather(decode(outputs, images, sizes))
        clock.lap("post_processing")
        seconds = clock.seconds
        for (_, about), detections in zip(group, results, strict=False):  # the last group may be smaller
            boxes = canvas.to_original(detections["boxes"], about["scale"], about["original_size"]).numpy()
            batch = _by_image(about["image_id"].numpy(), {**detections, "boxes": boxes}, detections["count"])
            yield batch, {part: value / len(group) for part, value in seconds.items()} if shapes in seen else {}
        seen.add(shapes)
        clock.restart()


def _by_export(
    detect: Callable[[npt.NDArray], dict[str, npt.NDArray]], dataset: CocoDataset, plan: Sequence[npt.NDArray]
) -> Iterator[Batch]:
    clock, seen = _Clock(), set()
    for images, about in inference_batches.inference_batches(dataset, plan):
        clock.lap("input")
        detections = detect(images)
        clock.lap("network")
        batch = _by_image(about["image_id"].numpy(), detections, detections["num_detections"])
        yield batch, clock.seconds if images.shape in seen else {}
        seen.add(images.shape)
        clock.restart()


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.start = now - self.start, now

    def restart(self) -> None:
        self.seconds, self.start = {}, time.perf_counter()


def _by_image(
    image_ids: npt.NDArray, detections: Mapping[str, npt.NDArray], counts: npt.NDArray
) -> list[ImageDetections]:
    """Split the detections of a batch by image, without the padding past each image's count."""
    boxes, scores, labels = (detections[name] for name in ("boxes", "scores", "labels"))
    rows = enumerate(zip(image_ids.tolist(), counts.tolist(), strict=True))
    return [ImageDetections(image_id, boxes[i, :n], scores[i, :n], labels[i, :n]) for i, (image_id, n) in rows]


def milliseconds(speed: Mapping[str, float]) -> dict[str, float] | None:
    """Milliseconds per image and images per second, as `report.write_report` takes them.

    Args:
        speed: dict. As `detect_split` fills it.

    Returns:
        {part: milliseconds, for PARTS; "images_per_second"}; None if no batch was timed.
    """
    if not speed.get("images"):
        return None
    parts = {part: 1000 * speed[part] / speed["images"] for part in PARTS if part in speed}
    return {**parts, "images_per_second": 1000 / sum(parts.values())}


def depends_on(dataset: CocoDataset, config: Config, weights: str, model: Any) -> dict[str, Any]:
    """What the detections of a split depend on, as a JSON-able dict: images, settings, model and weights.

    Args:
        dataset: CocoDataset.
        config: Config.
        weights: str. A digest of the weights, or a text that changes when they do.
        model: JSON-able. What else identifies the model.
    """
    data = config.data
    return {
        "annotation_file": dataset.annotation_file,
        "dataset": fingerprint(dataset),
        "image_sizes": [data.short_side, data.max_side],
        "batch_size": config.eval.batch_size,
        "detection_settings": config.to_dict()["detection"],
        "model": model,
        "weights": weights,
    }


def check_categories(dataset: CocoDataset, categories: Categories) -> None:
    """Raise a DataError if a model's categories are not those of a dataset."""
    if dataset.categories == categories:
        return
    ours, theirs = (set(zip(c.ids, c.names, strict=True)) for c in (categories, dataset.categories))
    raise errors.DataError(
        f"The model's categories are not those of {dataset.annotation_file}: only the model has "
        f"{sorted(ours - theirs)[:5]}, only the annotations have {sorted(theirs - ours)[:5]} (id, name). Use a model "
        "that was trained on these categories, or annotations with the model's"
    )


@contextlib.contextmanager
def _naming_bad_files(dataset: CocoDataset) -> Iterator[None]:
    """Turn TensorFlow's input errors into a DataError that names the files."""
    try:
        yield
    except tf.errors.ResourceExhaustedError:
        raise
    except tf.errors.OpError:
        problems = image_decoding.unusable_images(dataset, np.arange(len(dataset)))
        if not problems:
            raise
        raise errors.DataError("; ".join(problems[:5])) from None
