"""What an evaluation leaves in its folder: results, metrics, pictures, a report; or a submission to COCO's server."""

import os
import re
import zipfile
from pathlib import Path

import numpy as np

from retinanet_keras.data import fingerprint, image_decoding
from retinanet_keras.errors import RunError
from retinanet_keras.evaluation import coco_metrics, report
from retinanet_keras.evaluation.results import Records
from retinanet_keras.storage import disk
from retinanet_keras.storage.disk import check_place as check_folder
from retinanet_keras.visualization import draw

SHOWN_SCORE = 0.3  # detections drawn


def check(folder):
    """A RunError where something is in the way of what an evaluation writes.

    Args:
        folder: its path, of `RunFolder.evaluation`.
    """
    check_folder(folder / "pictures")
    for name in ("results.json", "metrics.json", "report.html", "unfinished.jsonl", "pictures/grid.png", disk.LOCK):
        if (folder / name).is_dir():
            raise RunError(f"{folder / name} is a folder, and an evaluation writes a file there. Remove or rename it")
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise RunError(f"{there} cannot be written (no permission). Change its permissions, or use another --workdir")


def collect(found, dataset):
    """The Records of (image_id, boxes, scores, labels), as `detect.detect_split` yields them."""
    records = Records()
    for one in found:
        records.append(*one, dataset.categories)
    return records


def score(records, dataset, config):
    """`coco_metrics.coco_metrics` of a dataset's images."""
    return coco_metrics.coco_metrics(
        dataset.annotation_file, records, image_ids=dataset.image_ids.tolist(), library=config.eval.library
    )


def write(folder, records, dataset, config, split, about, speed=None, identity=None):
    """Score, and write results.json, metrics.json, report.html and pictures; without labels, what a server takes.

    Args:
        folder: a path, made where it does not exist.
        records: Records.
        split: its name, for the report and the submission.
        about: {"model": its name, ...: further text for the report}.
        speed: as of `detect.milliseconds`.
        identity: dict, JSON-able. Added to the metrics: their "step", "weights" and "settings"; "dataset", a digest of
            the annotations, always is.

    Returns:
        the metrics; None where the dataset has no labels.

    Raises:
        RunError: where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        records.write(folder / "results.json")
        metrics = None
        if dataset.labeled:
            metrics = score(records, dataset, config) | (identity or {})
            metrics["dataset"] = fingerprint.of_annotations(dataset)
            about = {**about, "annotations": dataset.annotation_file}
            write_scored(folder, metrics, records, dataset, config, split, about, speed)
        else:
            _write_submission(folder, dataset, about)
        if config.eval.pictures:
            _draw_pictures(folder / "pictures", dataset, records, config.eval.pictures)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror or error})") from None
    return metrics


def write_scored(folder, metrics, records, dataset, config, split, about, speed=None):
    """Write metrics.json and report.html. `dataset`: None where the images are not there; none are drawn then."""
    ends = {"best": [], "worst": []}
    if dataset is not None:
        place = {int(image_id): i for i, image_id in enumerate(dataset.image_ids)}
        ranked = metrics["images"]
        for end, pictures in ends.items():
            for row in ranked[end]:
                picture = _compare(dataset, records, place[row["image_id"]], ranked["min_score"])
                pictures.append((report.caption(row), picture))
    coco_metrics.write_metrics(folder / "metrics.json", metrics)
    about = {**about, "split": split, "scored by": config.eval.library}
    title = f"{about['model']} on {split}"
    report.write_report(folder / "report.html", metrics, title=title, about=about, speed=speed, **ends)


def comparisons(dataset, records, count):
    """Ground truth beside detections, for `count` images spread evenly over the dataset: (image id, uint8 image)."""
    count = min(count, len(dataset))
    for i in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)) if count else ():
        yield int(dataset.image_ids[i]), _compare(dataset, records, i, SHOWN_SCORE)


def _compare(dataset, records, i, min_score):
    found = records.of_image(int(dataset.image_ids[i]), dataset.categories)
    truth = (dataset.boxes_of(i), dataset.labels_of(i)) if dataset.labeled else None
    image = image_decoding.image_of(dataset, i)
    return draw.side_by_side(image, truth, found, dataset.categories.names, min_score=min_score)


def _draw_pictures(folder, dataset, records, count):
    """Write the `comparisons`, one file each and all in grid.png."""
    pictures = []
    for image_id, picture in comparisons(dataset, records, count):
        draw.save(folder / f"{image_id}.jpg", picture)
        pictures.append(picture)
    draw.save(folder / "grid.png", draw.grid(pictures, columns=2))


def _write_submission(folder, dataset, about):
    """The zip file as COCO's server asks for it: detections_[testset]_[alg]_results.zip with a .json of that name."""
    testset = re.sub(r"^image_info_", "", Path(dataset.annotation_file).stem)
    algorithm = re.sub(r"[^A-Za-z0-9-]+", "-", about["model"]).strip("-") or "retinanet"
    name = f"detections_{testset}_{algorithm}_results"
    with disk.replacing(folder / f"{name}.zip") as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(folder / "results.json", f"{name}.json")
