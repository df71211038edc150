"""COCO's 12 metrics of detections, overall and for each class, with curves, score histograms and ranked images."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet_keras.data.coco import Categories
from retinanet_keras.evaluation import coco_json, matching, precision_recall
from retinanet_keras.evaluation.ground_truth import number, read
from retinanet_keras.evaluation.precision_recall import ALL, LARGE, MEDIUM, SMALL
from retinanet_keras.evaluation.results import ImageDetections, Records
from retinanet_keras.storage import disk
from retinanet_keras.storage.printable import printable

MEANINGS = {
    "AP": "average precision, mean over IoU 0.50:0.95",
    "AP50": "average precision at IoU 0.50",
    "AP75": "average precision at IoU 0.75",
    "APs": "average precision, small objects (area up to 32^2)",
    "APm": "average precision, medium objects (32^2 to 96^2)",
    "APl": "average precision, large objects (from 96^2)",
    "AR1": "average recall with 1 detection per image",
    "AR10": "average recall with 10 detections per image",
    "AR100": "average recall with 100 detections per image",
    "ARs": "average recall, small objects",
    "ARm": "average recall, medium objects",
    "ARl": "average recall, large objects",
}
METRICS = tuple(MEANINGS)  # in the order of pycocotools' stats
LIBRARIES = {
    "pycocotools": precision_recall.pycocotools,
    "hotcoco": precision_recall.hotcoco,
}  # the choices of eval.library
IOUS = {"0.50": slice(0, 1), "0.75": slice(5, 6), "0.50:0.95": slice(None)}  # of the curves, among the 10 IoUs
AREAS = {"small": SMALL, "medium": MEDIUM, "large": LARGE}
CURVE_DIGITS = 5
LONGEST = 40  # characters of a class's name in the table


def to_results(
    image_id: Any, boxes: npt.ArrayLike, scores: npt.ArrayLike, labels: npt.ArrayLike, categories: Categories
) -> list[dict[str, Any]]:
    """One image's detections as dicts in COCO's results format.

    Args:
        image_id, boxes, scores, labels: as for `results.ImageDetections`.
        categories: data.coco.Categories.

    Raises:
        DataError: as for `Records.append`.
    """
    records = Records()
    records.append(ImageDetections(image_id, boxes, scores, labels), categories)
    return records.to_list()


def coco_metrics(
    annotations: str | os.PathLike[str] | dict[str, Any],
    results: Records | Sequence[dict[str, Any]] | str | os.PathLike[str],
    *,
    image_ids: Iterable[Any] | None = None,
    library: str = "pycocotools",
) -> dict[str, Any]:
    """COCO's 12 bounding-box metrics, and the same for each class, with curves, scores, and best and worst images.

    Args:
        annotations: a path to COCO's annotation JSON, or its dict (not modified). `id`, `area` and `iscrowd` of an
            annotation may be missing.
        results: Records, a list of dicts in COCO's results format, or a path to its JSON.
        image_ids: the ids of the images to evaluate; by default all images of the annotations.
        library: str. "pycocotools", or "hotcoco", which gives the same numbers in a fraction of the time.

    Returns:
        a JSON-able dict; a number is None where there is no ground truth to compute it from:
        {
            name: number, for METRICS;
            "per_class": {class: {name: number, for METRICS; "ground_truth": objects, without crowds; "detections"}};
            "counts": {"images", "objects", "small", "medium", "large", "crowds", "detections"};
            "curves": {"recall": [101], "all": {"0.50", "0.75", "0.50:0.95": precision [101]}, "per_class": {class: the
                same, or None}};
            "scores": of `matching.histogram`; "images": of `matching.rank_images`.
        }

    Raises:
        DataError: naming the malformed or unknown entries.
    """
    truth = read(annotations)
    records = results if isinstance(results, Records) else Records.from_json(results)
    detections = number(records, truth)
    if image_ids is None:
        images = np.array(sorted(truth.images.values()), np.int64)
    else:
        ids = [i.item() if isinstance(i, np.generic) else i for i in image_ids]
        coco_json.check_known(coco_json.count(ids, "image_ids", "image id"), truth.images, "image_ids", "image id")
        images = np.array(sorted({truth.images[i] for i in ids}), np.int64)

    precision, recall = LIBRARIES[library](truth, detections, images)
    stats = precision_recall.twelve(precision, recall)
    metrics: dict[str, Any] = {name: float(v) if v > -1 else None for name, v in zip(METRICS, stats, strict=True)}
    counted = ~truth.crowd & np.isin(truth.image, images)
    evaluated = np.isin(detections.image, images)
    object_counts, detection_counts = (
        np.bincount(categories, minlength=len(truth.names)).tolist()
        for categories in (truth.category[counted], detections.category[evaluated])
    )
    metrics["per_class"] = {
        name: {
            **_twelve_of_class(precision[:, :, k], recall[:, k]),
            "ground_truth": object_counts[k],
            "detections": detection_counts[k],
        }
        for k, name in enumerate(truth.names)
    }
    sizes = {name: np.array(precision_recall.PARAMS.areaRng[index]) for name, index in AREAS.items()}
    metrics["counts"] = {
        "images": len(images),
        "objects": int(counted.sum()),
        # An object on the border of two sizes counts as both, as in pycocotools.
        **{n: int((counted & (truth.area >= low) & (truth.area <= high)).sum()) for n, (low, high) in sizes.items()},
        "crowds": int((truth.crowd & np.isin(truth.image, images)).sum()),
        "detections": int(evaluated.sum()),
    }
    metrics["curves"] = {
        "recall": precision_recall.PARAMS.recThrs.round(2).tolist(),
        "all": _curves(precision[:, :, :, ALL, -1]),
        "per_class": {name: _curves(precision[:, :, k : k + 1, ALL, -1]) for k, name in enumerate(truth.names)},
    }
    verdicts = matching.match(truth, detections, images)
    metrics["scores"] = matching.histogram(detections.scores, verdicts)
    metrics["images"] = matching.rank_images(truth, detections, verdicts, images, list(truth.images))
    return metrics


def format_metrics(metrics: dict[str, Any]) -> str:
    """The dict of `coco_metrics` as a text table, in percent, as the paper prints them."""
    lines = [f"{name:>6} {_percent(metrics[name])}  {meaning}" for name, meaning in MEANINGS.items()]
    per_class = metrics.get("per_class") or {}
    if per_class:
        per_class = [(printable(name, LONGEST), row) for name, row in per_class.items()]
        width = max(5, *(len(name) for name, _ in per_class))
        lines += ["", f"{'class':{width}} {'AP':>6} {'AP50':>6} {'AR100':>6} {'objects':>8}"]
        lines += [
            f"{name:{width}} {_percent(row['AP'])} {_percent(row['AP50'])} {_percent(row['AR100'])} "
            f"{row['ground_truth']:>8}"
            for name, row in per_class
        ]
    return "\n".join(lines)


def write_metrics(path: str | os.PathLike[str], metrics: dict[str, Any]) -> None:
    """Write the dict of `coco_metrics` as JSON; an earlier file is replaced only when the new one is complete."""
    text = json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False)
    with disk.replacing_text(path) as file:
        # Each curve goes on one line: it contains no quotes, and no JSON string contains a line break.
        file.write(re.sub(r"\[\n[^\[\]{}\"]+\]", lambda match: " ".join(match[0].split()), text) + "\n")


def write_results(path: str | os.PathLike[str], results: Records | Sequence[dict[str, Any]]) -> None:
    """Write Records, or dicts in COCO's results format, as JSON; an earlier file is replaced as by `write_metrics`."""
    if isinstance(results, Records):
        results.write(path)
        return
    with disk.replacing_text(path) as file:
        file.write(json.dumps(results, separators=(",", ":"), allow_nan=False))


def _twelve_of_class(precision: npt.NDArray, recall: npt.NDArray) -> dict[str, float | None]:
    """{name of METRICS: number} of one class, from precision [10, 101, 4, 3] and recall [10, 4, 3]."""
    values = {
        "AP": precision[:, :, ALL, -1],
        "AP50": precision[0, :, ALL, -1],
        "AP75": precision[5, :, ALL, -1],
        "APs": precision[:, :, SMALL, -1],
        "APm": precision[:, :, MEDIUM, -1],
        "APl": precision[:, :, LARGE, -1],
        "AR1": recall[:, ALL, 0],
        "AR10": recall[:, ALL, 1],
        "AR100": recall[:, ALL, 2],
        "ARs": recall[:, SMALL, -1],
        "ARm": recall[:, MEDIUM, -1],
        "ARl": recall[:, LARGE, -1],
    }
    return {name: _mean(values[name]) for name in METRICS}


def _curves(precision: npt.NDArray) -> dict[str, list[float]] | None:
    """{IoU: precision at the 101 recalls, mean over IoUs and classes} from [10, 101, k]; None without objects."""
    precision = precision[:, :, (precision > -1).all(axis=(0, 1))]
    if not precision.size:
        return None
    return {name: precision[ious].mean(axis=(0, 2)).round(CURVE_DIGITS).tolist() for name, ious in IOUS.items()}


def _mean(values: npt.NDArray) -> float | None:
    """The mean of the values that are not -1, pycocotools' mark for "undefined"."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _percent(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{100 * value:6.1f}"
