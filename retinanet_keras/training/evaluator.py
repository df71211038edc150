"""A detector over a split: results, the COCO numbers, pictures."""

import contextlib

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from retinanet_keras.data import coco, pipeline, sources
from retinanet_keras.results import draw, evaluation
from retinanet_keras.serving import detector
from retinanet_keras.training.folder import RunError


def detect_split(detect, dataset, config, label="Evaluating"):
    """Run a model over a dataset, each image on its own canvas, images of equal canvas in batches.

    Args:
        detect: `RetinaNet.detect`.
        dataset: a CocoDataset.
        config: a Config.

    Yields:
        (image_id, boxes [n, 4], scores [n], labels [n]) of each image: NumPy, boxes in the image's own pixels.
    """
    with _progress(dataset, label) as bar, _naming_bad_files(dataset):
        for images, info in pipeline.inference_batches(dataset, config.data, config.eval.batch_size):
            found = detect(images, info["size"])
            boxes = pipeline.to_original(found["boxes"], info["scale"], info["original_size"]).numpy()
            scores, labels, counts = (np.asarray(found[key]) for key in ("scores", "labels", "count"))
            for i, n in enumerate(counts):
                yield int(info["image_id"][i]), boxes[i, :n], scores[i, :n], labels[i, :n]
            bar.update(len(counts))


def detect_split_one_by_one(detect, dataset, label="Evaluating"):
    """The same with a detector of `serving.detector`, which takes images as they are."""
    with _progress(dataset, label) as bar:
        rows = zip(dataset.image_ids.tolist(), dataset.files, dataset.sizes.tolist(), strict=True)
        for row, (image_id, file, size) in enumerate(rows):
            image = sources.read_image(file)
            if image.shape[:2] != tuple(size):
                raise coco.DataError(sources.unusable_images(dataset, [row])[0])
            yield image_id, *detector.detections_of(detect, image)
            bar.update()


def check_categories(dataset, categories):
    """A DataError where a model's categories are not those of a dataset."""
    if dataset.categories == categories:
        return
    ours, theirs = (set(zip(c.ids, c.names, strict=True)) for c in (categories, dataset.categories))
    raise coco.DataError(
        f"The model's categories are not those of {dataset.annotation_file}: only the model has "
        f"{sorted(ours - theirs)[:5]}, only the annotations have {sorted(theirs - ours)[:5]} (id, name)"
    )


def _progress(dataset, label):
    return tqdm(total=len(dataset), desc=label, unit="image", mininterval=1.0, leave=False)


@contextlib.contextmanager
def _naming_bad_files(dataset):
    """TensorFlow's input errors as one that names the files."""
    try:
        yield
    except tf.errors.OpError:
        problems = sources.unusable_images(dataset, np.arange(len(dataset)))
        if not problems:
            raise
        raise coco.DataError("; ".join(problems[:5])) from None


def evaluate(found, dataset):
    """Score detections.

    Args:
        found: (image_id, boxes, scores, labels) of each image, as `detect_split` yields them.

    Returns:
        (metrics, results): the dict of `evaluation.coco_metrics`, and COCO's list of results.
    """
    results = []
    for one in found:
        results += evaluation.to_results(*one, dataset.categories)
    return evaluation.coco_metrics(dataset.annotation_file, results, image_ids=dataset.image_ids.tolist()), results


def evaluate_to(folder, found, dataset, pictures):
    """`evaluate`, with metrics.json, results.json and as many pictures as asked for written into a folder.

    Returns:
        metrics.

    Raises:
        RunError: where the folder cannot be written.
    """
    metrics, results = evaluate(found, dataset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        evaluation.write_results(folder / "results.json", results)
        evaluation.write_metrics(folder / "metrics.json", metrics)
        if pictures:
            draw_pictures(folder / "pictures", dataset, results, pictures)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror or error})") from None
    return metrics


def comparisons(dataset, results, count):
    """Ground truth beside detections, for `count` images spread evenly over the dataset: (image id, uint8 image)."""
    by_image = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    label_of = {id_: label for label, id_ in enumerate(dataset.categories.ids)}
    for i in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)):
        image_id = int(dataset.image_ids[i])
        found = by_image.get(image_id, [])
        boxes = np.array([r["bbox"] for r in found], "float32").reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # COCO's x, y, width, height
        detections = boxes, np.array([r["score"] for r in found]), np.array([label_of[r["category_id"]] for r in found])
        truth, image = (dataset.boxes_of(i), dataset.labels_of(i)), sources.read_image(dataset.files[i])
        yield image_id, draw.side_by_side(image, truth, detections, dataset.categories.names)


def draw_pictures(folder, dataset, results, count):
    """Write the `comparisons`, one file each and all in grid.png."""
    pictures = []
    for image_id, picture in comparisons(dataset, results, count):
        draw.save(folder / f"{image_id}.jpg", picture)
        pictures.append(picture)
    draw.save(folder / "grid.png", draw.grid(pictures, columns=2))
