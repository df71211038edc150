"""The ground truth that detections are scored against, as arrays."""

from dataclasses import dataclass

import numpy as np

from retinanet_keras.data import coco
from retinanet_keras.errors import DataError
from retinanet_keras.evaluation import coco_json


@dataclass(frozen=True, eq=False)
class Truth:
    """Objects in the order of the file. Images and categories are numbered in the order of their ids.

    That leaves pycocotools' order, and so its treatment of equal scores, as it is.
    """

    images: dict  # id -> number
    categories: dict  # id -> number
    names: tuple[str, ...]  # one per category, all different
    image: np.ndarray  # int64 [M]
    category: np.ndarray  # int64 [M]
    boxes: np.ndarray  # float64 [M, 4], x, y, width, height
    area: np.ndarray  # float64 [M]
    crowd: np.ndarray  # bool [M]


def read(annotations):
    """The Truth of a path to COCO's annotation JSON, or of its dict.

    `id`, `area` and `iscrowd` of an annotation may be missing; boxes that are not finite are ignored, as
    `data.coco.load` does, and boxes without area count as pycocotools counts them.

    Raises:
        DataError: naming what is malformed or unknown.
    """
    where = "The annotations"
    if not isinstance(annotations, dict):
        where, annotations = str(annotations), coco.read(annotations)
    lists = {key: annotations.get(key) for key in ("images", "annotations", "categories")}
    lists["annotations"] = lists["annotations"] or []  # absent in test-dev's
    for key, value in lists.items():
        if not isinstance(value, list):
            raise DataError(f"{where}: expected a list under {key!r}, got {coco_json.kind(value)}")
    images = coco_json.numbered(lists["images"], f"{where}, images")
    categories = coco_json.numbered(lists["categories"], f"{where}, categories")
    names = {c["id"]: str(c.get("name", c["id"])) for c in lists["categories"]}
    where = f"{where}, annotations"
    coco_json.check_entries(lists["annotations"], ("image_id", "category_id", "bbox"), where)
    for key, known, what in (("image_id", images, "image id"), ("category_id", categories, "category id")):
        coco_json.check_known(coco_json.count((a[key] for a in lists["annotations"]), where, what), known, where, what)
    kept = [a for a in lists["annotations"] if all(map(coco_json.finite, a["bbox"]))]
    boxes = np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4)
    return Truth(
        images=images,
        categories=categories,
        names=_distinct({key: names[key] for key in categories}),
        image=np.array([images[a["image_id"]] for a in kept], np.int64),
        category=np.array([categories[a["category_id"]] for a in kept], np.int64),
        boxes=boxes,
        area=np.array(
            [a["area"] if coco_json.finite(a.get("area")) else a["bbox"][2] * a["bbox"][3] for a in kept], float
        ),
        crowd=np.array([bool(a.get("iscrowd")) for a in kept], bool),
    )


def number(records, truth):
    """`records.columns()` with the truth's numbers of images and categories (int64), which scoring takes.

    Raises:
        DataError: for detections of images or categories that the truth does not have.
    """
    image, category, boxes, scores = records.columns()
    columns = []
    for numbers, ids, known, what in (
        (image, records.image_ids, truth.images, "image id"),
        (category, records.category_ids, truth.categories, "category id"),
    ):
        times = np.bincount(numbers, minlength=len(ids)).tolist()
        coco_json.check_known(dict(zip(ids, times, strict=True)), known, records.source, what)
        columns.append(np.array([known[i] for i in ids], np.int64)[numbers])
    return *columns, boxes, scores


def _distinct(names):
    """The names of {category id: name} in order; those that come twice get the category id."""
    twice = {name for name, times in coco_json.count(names.values(), "", "").items() if times > 1}
    taken = []
    for key, name in names.items():
        if name in twice:
            name = f"{name} (id {key})"
        while name in taken:
            name += "'"
        taken.append(name)
    return tuple(taken)
