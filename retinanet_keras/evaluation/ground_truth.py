"""Ground truth as arrays, and detections numbered like it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet_keras.data import coco
from retinanet_keras.errors import DataError
from retinanet_keras.evaluation import coco_json
from retinanet_keras.evaluation.results import DetectionColumns, Records


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth of a dataset, objects in the order of the file.

    Images and categories are numbered in the order of their ids, which preserves pycocotools' order and so its
    treatment of equal scores.
    """

    images: dict[Any, int]  # id -> number
    categories: dict[Any, int]  # id -> number
    names: tuple[str, ...]  # one per category, all different
    image: npt.NDArray[np.int64]  # [M]
    category: npt.NDArray[np.int64]  # [M]
    boxes: npt.NDArray[np.float64]  # [M, 4], x, y, width, height
    area: npt.NDArray[np.float64]  # [M]
    crowd: npt.NDArray[np.bool_]  # [M]


def read(annotations: str | os.PathLike[str] | dict[str, Any]) -> Truth:
    """Read ground truth from COCO's annotation JSON.

    `id`, `area` and `iscrowd` of an annotation may be missing. Boxes that are not finite are ignored, as in
    `data.coco.load`; boxes without area count as in pycocotools.

    Args:
        annotations: path of the JSON, or its dict.

    Raises:
        DataError: naming the malformed or unknown entries.
    """
    if isinstance(annotations, dict):
        where, tree = "The annotations", annotations
    else:
        where, tree = str(annotations), coco.read(annotations)
    lists: dict[str, Any] = {key: tree.get(key) for key in ("images", "annotations", "categories")}
    lists["annotations"] = lists["annotations"] or []  # missing in those of test-dev
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
    usable = [a for a in lists["annotations"] if all(map(coco_json.finite, a["bbox"]))]
    boxes = np.array([a["bbox"] for a in usable], np.float64).reshape(-1, 4)
    return Truth(
        images=images,
        categories=categories,
        names=_distinct({key: names[key] for key in categories}),
        image=np.array([images[a["image_id"]] for a in usable], np.int64),
        category=np.array([categories[a["category_id"]] for a in usable], np.int64),
        boxes=boxes,
        area=np.array(
            [a["area"] if coco_json.finite(a.get("area")) else a["bbox"][2] * a["bbox"][3] for a in usable], float
        ),
        crowd=np.array([bool(a.get("iscrowd")) for a in usable], bool),
    )


def number(records: Records, truth: Truth) -> DetectionColumns:
    """The columns of records, with images and categories numbered as in the ground truth (int64).

    Raises:
        DataError: for detections of images or categories that the ground truth does not have.
    """
    columns = records.columns()
    renumbered = []
    for numbers, ids, known, what in (
        (columns.image, records.image_ids, truth.images, "image id"),
        (columns.category, records.category_ids, truth.categories, "category id"),
    ):
        times = np.bincount(numbers, minlength=len(ids)).tolist()
        coco_json.check_known(dict(zip(ids, times, strict=True)), known, records.source, what)
        renumbered.append(np.array([known[i] for i in ids], np.int64)[numbers])
    image, category = renumbered
    return DetectionColumns(image, category, columns.boxes, columns.scores)


def _distinct(names: dict[Any, str]) -> tuple[str, ...]:
    """The names of {category id: name} in order, made unique: repeated ones get the category id."""
    twice = {name for name, times in coco_json.count(names.values(), "", "").items() if times > 1}
    taken: list[str] = []
    for key, name in names.items():
        if name in twice:
            name = f"{name} (id {key})"
        while name in taken:
            name += "'"
        taken.append(name)
    return tuple(taken)
