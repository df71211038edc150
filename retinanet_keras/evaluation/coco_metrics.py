"""Detections against ground truth: COCO's 12 numbers, and what tells where they come from."""

import json
import re

import numpy as np

from retinanet_keras.evaluation import coco_json, matching, precision_recall
from retinanet_keras.evaluation.ground_truth import number, read
from retinanet_keras.evaluation.precision_recall import ALL, LARGE, MEDIUM, SMALL
from retinanet_keras.evaluation.results import Records
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
IOUS = {"0.50": slice(0, 1), "0.75": slice(5, 6), "0.50:0.95": slice(None)}  # of the curves: places of the 10 IoUs
AREAS = {"small": SMALL, "medium": MEDIUM, "large": LARGE}
CURVE_DIGITS = 5
LONGEST = 40  # characters of a class's name in the table


def to_results(image_id, boxes, scores, labels, categories):
    """One image's detections as dicts in COCO's results format; arguments and errors are those of `Records.append`."""
    records = Records()
    records.append(image_id, boxes, scores, labels, categories)
    return records.to_list()


def coco_metrics(annotations, results, *, image_ids=None, library="pycocotools"):
    """COCO's 12 bounding-box numbers, and the same for each class, with curves, scores and the images at both ends.

    Args:
        annotations: a path to COCO's annotation JSON, or its dict (left as it is). `id`, `area` and `iscrowd` of an
            annotation may be missing.
        results: Records, a list of dicts in COCO's results format, or a path to its JSON.
        image_ids: the images to evaluate; all of the annotations' by default.
        library: "pycocotools", or "hotcoco", which gives the same numbers in a fraction of the time.

    Returns:
        a JSON-able dict; a number is None where there is no ground truth to tell it from:
        {
            name: number, for METRICS;
            "per_class": {class: {name: number, for METRICS; "ground_truth": objects that are no crowd; "detections"}};
            "counts": {"images", "objects", "small", "medium", "large", "crowds", "detections"};
            "curves": {"recall": [101], "all": {"0.50", "0.75", "0.50:0.95": precision [101]}, "per_class": {class: the
                same, or None}};
            "scores": of `matching.histogram`; "images": of `matching.rank_images`.
        }

    Raises:
        DataError: naming what is malformed or unknown.
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
    metrics = {name: float(v) if v > -1 else None for name, v in zip(METRICS, stats, strict=True)}
    counted = ~truth.crowd & np.isin(truth.image, images)
    evaluated = np.isin(detections[0], images)
    objects, found = (
        np.bincount(column, minlength=len(truth.names)).tolist()
        for column in (truth.category[counted], detections[1][evaluated])
    )
    metrics["per_class"] = {
        name: {
            **_twelve_of_class(precision[:, :, k], recall[:, k]),
            "ground_truth": objects[k],
            "detections": found[k],
        }
        for k, name in enumerate(truth.names)
    }
    sizes = {name: np.array(precision_recall.PARAMS.areaRng[place]) for name, place in AREAS.items()}
    metrics["counts"] = {
        "images": len(images),
        "objects": int(counted.sum()),
        # An object on the border counts as both sizes, as it does for pycocotools.
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
    metrics["scores"] = matching.histogram(detections[3], verdicts)
    metrics["images"] = matching.rank_images(truth, detections, verdicts, images, list(truth.images))
    return metrics


def format_metrics(metrics):
    """The numbers of `coco_metrics` as a text table, in percent, as the paper prints them."""
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


def write_metrics(path, metrics):
    """Write `coco_metrics`' dict as JSON; the earlier file stays whole until the new one is complete."""
    text = json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False)
    with disk.replacing_text(path) as file:
        # A curve is one line. Quotes cannot be in it, and a line break cannot be in a string.
        file.write(re.sub(r"\[\n[^\[\]{}\"]+\]", lambda found: " ".join(found[0].split()), text) + "\n")


def write_results(path, results):
    """Write Records, or COCO's results as dicts, as JSON; the earlier file stays until the new one is complete."""
    if isinstance(results, Records):
        return results.write(path)
    with disk.replacing_text(path) as file:
        file.write(json.dumps(results, separators=(",", ":"), allow_nan=False))


def _twelve_of_class(precision, recall):
    """{name of METRICS: number} of one class: precision [10, 101, 4, 3], recall [10, 4, 3]."""
    values = (
        precision[:, :, ALL, -1], precision[0, :, ALL, -1], precision[5, :, ALL, -1],
        precision[:, :, SMALL, -1], precision[:, :, MEDIUM, -1], precision[:, :, LARGE, -1],
        recall[:, ALL, 0], recall[:, ALL, 1], recall[:, ALL, 2],
        recall[:, SMALL, -1], recall[:, MEDIUM, -1], recall[:, LARGE, -1],
    )  # fmt: skip
    return {name: _mean(v) for name, v in zip(METRICS, values, strict=True)}


def _curves(precision):
    """{IoU: precision at the 101 recalls, mean over the IoUs and classes} of [10, 101, k], or None without objects."""
    precision = precision[:, :, (precision > -1).all(axis=(0, 1))]
    if not precision.size:
        return None
    return {name: precision[places].mean(axis=(0, 2)).round(CURVE_DIGITS).tolist() for name, places in IOUS.items()}


def _mean(values):
    """The mean of what pycocotools could tell; it marks the rest -1."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _percent(value):
    return f"{'-':>6}" if value is None else f"{100 * value:6.1f}"
