"""Detections against ground truth: COCO's results format and its 12 numbers, by pycocotools.

Boxes are absolute `x1, y1, x2, y2` everywhere else; they become COCO's `x, y, width, height` here and nowhere else.
"""

import collections
import contextlib
import io
import json
import math
import numbers
import os
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet_keras.data import coco
from retinanet_keras.data.coco import DataError

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


def to_results(image_id, boxes, scores, labels, categories):
    """One image's detections in COCO's results format.

    Args:
        image_id: the image's id in the annotations.
        boxes: [N, 4] absolute x1, y1, x2, y2 in pixels of the original image.
        scores: [N].
        labels: [N] in 0..K-1; rows of label -1, the padding of `model.detect`, are left out.
        categories: data.coco.Categories.

    Returns:
        a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, plain ints and floats. A float
        is the shortest decimal that names its float32, so JSON stays small and nothing is rounded.

    Raises:
        DataError: for a label without a category, and for boxes or scores that are not finite.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)  # [N, 4]
    scores = np.asarray(scores, np.float32).reshape(-1)  # [N]
    labels = np.asarray(labels).astype(np.int64).reshape(-1)  # [N]
    if not len(boxes) == len(scores) == len(labels):
        raise DataError(
            f"Image {image_id!r}: expected as many boxes as scores and labels, "
            f"got {len(boxes)}, {len(scores)} and {len(labels)}"
        )
    kept = labels >= 0
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    if labels.size and labels.max() >= len(categories.ids):
        raise DataError(
            f"Image {image_id!r}: a detection has label {labels.max()}, but the {len(categories.ids)} categories are "
            f"labels 0 to {len(categories.ids) - 1}. Were the weights trained on another set of categories?"
        )
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise DataError(f"Image {image_id!r}: a detection's box or score is not finite. Did the training diverge?")
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)  # [N, 4]
    if isinstance(image_id, np.generic):
        image_id = image_id.item()
    return [
        {
            "image_id": image_id,
            "category_id": int(categories.ids[label]),
            "bbox": [float(str(value)) for value in box],  # str: float(value) would write 17 digits
            "score": float(str(score)),
        }
        for box, score, label in zip(xywh, scores, labels, strict=True)
    ]


def coco_metrics(annotations, results, *, image_ids=None):
    """COCO's 12 bounding-box numbers, and three per class.

    Args:
        annotations: a path to COCO's annotation JSON, or its dict (left as it is). `id`, `area` and `iscrowd` of an
            annotation may be missing.
        results: a list of dicts in COCO's results format, or a path to its JSON.
        image_ids: the images to evaluate; all of the annotations' by default.

    Returns:
        {name: number for METRICS, "per_class": {class: {"AP", "AP50", "AR100", "ground_truth"}}}; a number is None
        where there is no ground truth to tell it from. `ground_truth` counts the objects that are no crowd.

    Raises:
        DataError: naming what is malformed or unknown.
    """
    truth, images, categories = _ground_truth(annotations)
    detections = _detections(results, images, categories)
    if image_ids is None:
        chosen = sorted(images.values())
    else:
        image_ids = [i.item() if isinstance(i, np.generic) else i for i in image_ids]
        _check_known(image_ids, images, "image_ids", "image id")
        chosen = sorted({images[i] for i in image_ids})

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and its table
        evaluation = COCOeval(_index(images, categories, truth), _index(images, categories, detections), "bbox")
        evaluation.params.imgIds = chosen
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {name: float(v) if v > -1 else None for name, v in zip(METRICS, evaluation.stats, strict=True)}

    chosen = set(chosen)
    counts = collections.Counter(t["category_id"] for t in truth if t["image_id"] in chosen and not t["iscrowd"])
    # [10 IoUs, 101 recalls, K] and [10 IoUs, K], at all areas and 100 detections
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    recall = evaluation.eval["recall"][:, :, 0, -1]
    metrics["per_class"] = {
        name: {
            "AP": _mean(precision[:, :, k]),
            "AP50": _mean(precision[0, :, k]),
            "AR100": _mean(recall[:, k]),
            "ground_truth": counts[k],
        }
        for k, name in enumerate(_class_names(categories))
    }
    return metrics


def format_metrics(metrics):
    """The numbers of `coco_metrics` as a table for people; percentages, as the paper prints them."""
    lines = [f"{name:>6} {_percent(metrics[name])}  {meaning}" for name, meaning in MEANINGS.items()]
    per_class = metrics.get("per_class") or {}
    if per_class:
        width = max(5, *(len(name) for name in per_class))
        lines += ["", f"{'class':{width}} {'AP':>6} {'AP50':>6} {'AR100':>6} {'objects':>8}"]
        lines += [
            f"{name:{width}} {_percent(row['AP'])} {_percent(row['AP50'])} {_percent(row['AR100'])} "
            f"{row['ground_truth']:>8}"
            for name, row in per_class.items()
        ]
    return "\n".join(lines)


def write_metrics(path, metrics):
    """Write `coco_metrics`' dict as JSON; the earlier file stays whole until the new one is complete."""
    _write_atomically(path, json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_results(path, results):
    """Write detections in COCO's results format as JSON; the earlier file stays whole until the new one is complete."""
    _write_atomically(path, json.dumps(results, separators=(",", ":"), allow_nan=False))


def _ground_truth(annotations):
    """(annotations as pycocotools needs them, {image id: index}, {category id: (index, name)}).

    Images and categories are numbered in the order of their ids, which leaves pycocotools' order and so its treatment
    of equal scores as it is. Annotations are numbered from 1: it takes a match with annotation 0 for no match.
    """
    where = "The annotations"
    if not isinstance(annotations, dict):
        where, annotations = str(annotations), coco.read(annotations)
    lists = {key: annotations.get(key) for key in ("images", "annotations", "categories")}
    lists["annotations"] = lists["annotations"] or []  # absent in test-dev's
    for key, value in lists.items():
        if not isinstance(value, list):
            raise DataError(f"{where}: expected a list under {key!r}, got {_kind(value)}")
    images = _numbered(lists["images"], f"{where}, images")
    categories = _numbered(lists["categories"], f"{where}, categories")
    names = {c["id"]: str(c.get("name", c["id"])) for c in lists["categories"]}
    _check_entries(lists["annotations"], ("image_id", "category_id", "bbox"), f"{where}, annotations")
    _check_known([a["image_id"] for a in lists["annotations"]], images, f"{where}, annotations", "image id")
    _check_known([a["category_id"] for a in lists["annotations"]], categories, f"{where}, annotations", "category id")
    truth = [
        {
            "id": number,
            "image_id": images[a["image_id"]],
            "category_id": categories[a["category_id"]],
            "bbox": a["bbox"],
            "area": a["area"] if _finite(a.get("area")) else a["bbox"][2] * a["bbox"][3],
            "iscrowd": int(bool(a.get("iscrowd"))),
        }
        for number, a in enumerate(lists["annotations"], 1)
        if all(map(_finite, a["bbox"]))  # as `coco.load`; boxes without area count as pycocotools counts them
    ]
    return truth, images, {key: (index, names[key]) for key, index in categories.items()}


def _detections(results, images, categories):
    """Results as pycocotools' `loadRes` would make them; it fails on an empty list and writes into its argument."""
    where = "The results"
    if isinstance(results, (str, os.PathLike)):
        where, results = str(results), _read_json(results)
    if not isinstance(results, (list, tuple)):
        raise DataError(
            f"{where}: expected a list of detections, each with image_id, category_id, bbox and score, "
            f"got {_kind(results)}"
        )
    _check_entries(results, ("image_id", "category_id", "bbox", "score"), where)
    for position, r in enumerate(results):
        if not (all(map(_finite, r["bbox"])) and min(r["bbox"][2:]) >= 0):
            raise DataError(
                f"{where}: entry {position}: expected bbox as x, y, width, height, finite and without a negative size, "
                f"got {r['bbox']!r}"
            )
        if not _finite(r["score"]):
            raise DataError(f"{where}: entry {position}: expected score as a finite number, got {r['score']!r}")
    _check_known([r["image_id"] for r in results], images, where, "image id")
    _check_known([r["category_id"] for r in results], categories, where, "category id")
    return [
        {
            "id": number,
            "image_id": images[r["image_id"]],
            "category_id": categories[r["category_id"]][0],
            "bbox": r["bbox"],
            "area": r["bbox"][2] * r["bbox"][3],
            "iscrowd": 0,
            "score": r["score"],
        }
        for number, r in enumerate(results, 1)
    ]


def _index(images, categories, annotations):
    """pycocotools' COCO object of these annotations."""
    index = COCO()
    index.dataset = {
        "images": [{"id": image} for image in images.values()],
        "categories": [{"id": category} for category, _ in categories.values()],
        "annotations": annotations,
    }
    index.createIndex()
    return index


def _numbered(entries, where):
    """{id: its place in the order of ids} of a list of dicts."""
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    odd = sum(not (_is_number(i) or isinstance(i, str)) for i in ids)
    if odd:
        raise DataError(f"{where}: expected objects with a number or string as `id`, got {odd} without")
    double = [i for i, count in collections.Counter(ids).items() if count > 1]
    if double:
        raise DataError(f"{where}: expected each id once, {len(double)} come more often, such as {double[0]!r}")
    return {key: index for index, key in enumerate(sorted(ids, key=lambda i: (isinstance(i, str), i)))}


def _check_entries(entries, keys, where):
    """Every entry is a dict with these keys, `bbox` a list of four numbers."""
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{where}: entry {position}: expected an object, got {_kind(entry)}")
        missing = [key for key in keys if key not in entry]
        if missing:
            raise DataError(f"{where}: entry {position} lacks {', '.join(missing)}")
        box = entry["bbox"]
        if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(map(_is_number, box))):
            raise DataError(f"{where}: entry {position}: expected bbox as a list of four numbers, got {box!r}")


def _check_known(ids, known, where, what):
    """Every id is known, or a DataError says which are not and how many."""
    try:
        unknown = collections.Counter(i for i in ids if i not in known)
    except TypeError:  # a list or dict as id
        raise DataError(f"{where}: expected each {what} as a number or string") from None
    if unknown:
        shown = ", ".join(repr(i) for i in list(unknown)[:5]) + (", ..." if len(unknown) > 5 else "")
        have = f"such as {next(iter(known))!r}" if known else "none at all"
        raise DataError(
            f"{where}: {sum(unknown.values())} of {len(ids)} entries have an unknown {what}: {shown} "
            f"({len(unknown)} in all). The annotations have {len(known)}, {have}. Do both belong to one split?"
        )


def _class_names(categories):
    """Names in the order of ids; names that come twice get the category id."""
    times = collections.Counter(name for _, name in categories.values())
    taken = []
    for key, (_, name) in categories.items():
        if times[name] > 1:
            name = f"{name} (id {key})"
        while name in taken:
            name += "'"
        taken.append(name)
    return taken


def _write_atomically(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # the same disk, so that replacing is one step
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{path} is not JSON: {error}") from None


def _finite(value):
    return _is_number(value) and math.isfinite(value)


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _kind(value):
    return "nothing" if value is None else type(value).__name__


def _mean(values):
    """The mean of what pycocotools could tell; it marks the rest -1."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _percent(value):
    return f"{'-':>6}" if value is None else f"{100 * value:6.1f}"
