"""Detections of an image and of a whole split, and COCO's results format: a list of objects in JSON.

Boxes are absolute `x1, y1, x2, y2` everywhere else; they become COCO's `x, y, width, height` here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet_keras.data.coco import Categories
from retinanet_keras.data.coco_rules import LARGEST
from retinanet_keras.errors import DataError
from retinanet_keras.evaluation import coco_json
from retinanet_keras.storage import disk

KEYS = ("image_id", "category_id", "bbox", "score")
DECIMALS = 12  # up to which a float32 times that power of ten is exact in float64: 24 + 28 bits
CHUNK = 10_000  # detections written at once


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """The detections of one image."""

    image_id: Any  # the image's id in the annotations, a number or a string
    boxes: npt.ArrayLike  # [n, 4], absolute x1, y1, x2, y2 in pixels of the original image
    scores: npt.ArrayLike  # [n]
    labels: npt.ArrayLike  # [n], 0..K-1


@dataclass(frozen=True, eq=False)
class DetectionColumns:
    """The detections of many images, one array for each field; images and categories are numbered from 0."""

    image: npt.NDArray  # int [N]
    category: npt.NDArray  # int [N]
    boxes: npt.NDArray  # float64 [N, 4], x, y, width, height
    scores: npt.NDArray  # float64 [N]


class Records:
    """Detections in the order they were added; 48 bytes each, where a dict takes ten times that.

    Each number is the float64 of the shortest decimal that rounds to its float32. The file holds the same decimals, so
    scores computed from memory and from the file are bit-identical.

    Args:
        source: str. What error messages call the detections.
    """

    def __init__(self, source: str = "The results") -> None:
        self.source = source
        self._image_ids: dict[Any, int] = {}  # id -> its number in the arrays
        self._category_ids: dict[Any, int] = {}
        self._columns = DetectionColumns(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0))
        self._added: list[DetectionColumns] = []  # one image each, still in float32
        self._order: npt.NDArray | None = None

    def __len__(self) -> int:
        return len(self._columns.image) + sum(len(added.image) for added in self._added)

    def append(self, detections: ImageDetections, categories: Categories) -> None:
        """Add the detections of one image.

        Args:
            detections: ImageDetections. Rows of label -1, the padding of `model.detect`, are ignored.
            categories: data.coco.Categories.

        Raises:
            DataError: for a label without a category, and for boxes or scores that are not finite.
        """
        image_id = detections.image_id
        boxes = np.asarray(detections.boxes, np.float32).reshape(-1, 4)  # [n, 4]
        scores = np.asarray(detections.scores, np.float32).reshape(-1)  # [n]
        labels = np.asarray(detections.labels).astype(np.int64).reshape(-1)  # [n]
        if not len(boxes) == len(scores) == len(labels):
            raise DataError(
                f"Image {image_id!r}: expected as many boxes as scores and labels, "
                f"got {len(boxes)}, {len(scores)} and {len(labels)}"
            )
        real = labels >= 0
        boxes, scores, labels = boxes[real], scores[real], labels[real]
        if labels.size and labels.max() >= len(categories.ids):
            raise DataError(
                f"Image {image_id!r}: a detection has label {labels.max()}, but the {len(categories.ids)} categories "
                f"are labels 0 to {len(categories.ids) - 1}. Were the weights trained on another set of categories?"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise DataError(f"Image {image_id!r}: a detection's box or score is not finite. Did the training diverge?")
        if not labels.size:
            return
        image = _number_of(image_id, self._image_ids)
        distinct, positions = np.unique(labels, return_inverse=True)
        category = np.array(
            [_number_of(int(categories.ids[label]), self._category_ids) for label in distinct], np.int32
        )
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)  # [n, 4]
        self._added.append(DetectionColumns(np.full(len(labels), image, np.int32), category[positions], xywh, scores))

    @classmethod
    def from_json(cls, results: Sequence[dict[str, Any]] | str | os.PathLike[str]) -> Records:
        """Read COCO's results format.

        Args:
            results: a list of dicts in that format, or a path to its JSON.

        Raises:
            DataError: naming the malformed entry, what was expected and what was given.
        """
        records = cls()
        if isinstance(results, (str, os.PathLike)):
            records.source, results = str(results), coco_json.read_json(results)
        if not isinstance(results, (list, tuple)):
            raise DataError(
                f"{records.source}: expected a list of detections, each with image_id, category_id, bbox and score, "
                f"got {coco_json.kind(results)}"
            )
        _check(results, records.source)
        columns = []
        for key, what, numbers in (
            ("image_id", "image id", records._image_ids),
            ("category_id", "category id", records._category_ids),
        ):
            for id_ in coco_json.count((r[key] for r in results), records.source, what):
                _number_of(id_, numbers)
            columns.append(np.fromiter((numbers[r[key]] for r in results), np.int32, len(results)))
        boxes = np.array([r["bbox"] for r in results], np.float64).reshape(-1, 4)
        image, category = columns
        records._columns = DetectionColumns(image, category, boxes, np.array([r["score"] for r in results], np.float64))
        return records

    def columns(self) -> DetectionColumns:
        """All detections as arrays; images and categories are indices into `image_ids` and `category_ids`."""
        if self._added:
            earlier, added = self._columns, self._added
            self._columns = DetectionColumns(
                image=np.concatenate([earlier.image, *(one.image for one in added)]),
                category=np.concatenate([earlier.category, *(one.category for one in added)]),
                boxes=np.concatenate([earlier.boxes, shortest(np.concatenate([one.boxes for one in added]))]),
                scores=np.concatenate([earlier.scores, shortest(np.concatenate([one.scores for one in added]))]),
            )
            self._added, self._order = [], None
        return self._columns

    @property
    def image_ids(self) -> list[Any]:
        """The ids of the images with detections, in the order they were added."""
        return list(self._image_ids)

    @property
    def category_ids(self) -> list[Any]:
        """The ids of the categories with detections, in the order they were added."""
        return list(self._category_ids)

    def of_image(self, image_id: Any, categories: Categories) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
        """The boxes, scores and labels of one image.

        Args:
            image_id: the image's id in the annotations.
            categories: data.coco.Categories, which map category ids to labels.

        Returns:
            (boxes float32 [n, 4], absolute x1, y1, x2, y2; scores float32 [n]; labels int64 [n]).

        Raises:
            DataError: for a detection of a category that is not among them.
        """
        columns = self.columns()
        if self._order is None:
            self._order = np.argsort(columns.image, kind="stable")
        number = self._image_ids.get(image_id, -1)
        start = np.searchsorted(columns.image, number, sorter=self._order)
        stop = np.searchsorted(columns.image, number + 1, sorter=self._order)
        rows = self._order[start:stop]
        label_of, ids = {id_: label for label, id_ in enumerate(categories.ids)}, self.category_ids
        try:
            labels = np.array([label_of[ids[c]] for c in columns.category[rows]], np.int64)
        except KeyError as error:
            raise DataError(
                f"{self.source}: image {image_id!r} has a detection of category {error.args[0]!r}, which is none of "
                f"the {len(label_of)} categories of the dataset. Were the detections made for another dataset?"
            ) from None
        xywh = columns.boxes[rows]
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        return xyxy.astype(np.float32), columns.scores[rows].astype(np.float32), labels

    def to_list(self) -> list[dict[str, Any]]:
        """The detections as dicts in COCO's results format, of plain ints and floats; `from_json` is the inverse."""
        columns = self.columns()
        fields = (columns.image, columns.category, columns.boxes, columns.scores)
        images, categories = self.image_ids, self.category_ids
        return [
            {"image_id": images[i], "category_id": categories[c], "bbox": box, "score": score}
            for i, c, box, score in zip(*(values.tolist() for values in fields), strict=True)
        ]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write COCO's results JSON; an earlier file is replaced only when the new one is complete."""
        images, categories = ([json.dumps(i) for i in ids] for ids in (self.image_ids, self.category_ids))
        columns = self.columns()
        fields = (columns.image, columns.category, columns.boxes, columns.scores)
        with disk.replacing_text(path) as file:
            file.write("[")
            for start in range(0, len(self), CHUNK):
                image, category, boxes, scores = (values[start : start + CHUNK].tolist() for values in fields)
                file.write("," if start else "")
                file.write(
                    ",".join(
                        f'{{"image_id":{images[i]},"category_id":{categories[c]},'
                        f'"bbox":[{x!r},{y!r},{width!r},{height!r}],"score":{score!r}}}'
                        for i, c, (x, y, width, height), score in zip(image, category, boxes, scores, strict=True)
                    )
                )
            file.write("]")


def shortest(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The float64 of the shortest decimals that round to these float32 values: `float(str(value))` of each."""
    flat = np.asarray(values, np.float32).reshape(-1)
    out = flat.astype(np.float64)
    left = np.flatnonzero((np.abs(flat) < 2**23) & (flat != np.rint(flat)))  # whole numbers are exact
    for decimals in range(1, DECIMALS + 1):
        shorter = np.rint(out[left] * 10.0**decimals) / 10.0**decimals  # a whole number by a power of ten is exact
        exact = shorter.astype(np.float32) == flat[left]
        out[left[exact]] = shorter[exact]
        left = left[~exact]
    left = np.concatenate([left, np.flatnonzero(np.abs(flat) >= 2**23)])
    out[left] = [float(str(value)) for value in flat[left]]
    return out.reshape(np.shape(values))


def _check(results: Sequence[Any], where: str) -> None:
    """Raise a DataError for malformed entries; `_is_plain` first, which is fast, as its loops run in C."""
    if _is_plain(results):
        return
    coco_json.check_entries(results, KEYS, where)
    for position, r in enumerate(results):
        if not (all(map(coco_json.finite, r["bbox"])) and min(r["bbox"][2:]) >= 0):
            raise DataError(
                f"{where}: entry {position}: expected bbox as x, y, width, height, finite and without a negative size, "
                f"at most {LARGEST:g}, got {r['bbox']!r}"
            )
        if not coco_json.finite(r["score"]):
            raise DataError(
                f"{where}: entry {position}: expected score as a finite number of at most {LARGEST:g}, "
                f"got {r['score']!r}"
            )


def _is_plain(results: Sequence[Any]) -> bool:
    """Whether these are dicts of the keys, with finite ints and floats as numbers and no negative size."""
    try:
        boxes, scores = [r["bbox"] for r in results], [r["score"] for r in results]
        if not all("image_id" in r and "category_id" in r for r in results):
            return False
        if {type(box) for box in boxes} - {list} or {len(box) for box in boxes} - {4}:
            return False
        if {type(v) for box in boxes for v in box} - {int, float} or {type(s) for s in scores} - {int, float}:
            return False
        boxes, scores = np.array(boxes, np.float64).reshape(-1, 4), np.array(scores, np.float64)
    except (TypeError, KeyError, OverflowError):
        return False
    small = all((np.abs(values) <= LARGEST).all() for values in (boxes, scores))  # and finite
    return bool(small and (boxes[:, 2:] >= 0).all())


def _number_of(id_: Any, numbers: dict[Any, int]) -> int:
    """The number of an id, a new one if it has none yet; NumPy scalars become Python's, for JSON."""
    id_ = id_.item() if isinstance(id_, np.generic) else id_
    return numbers.setdefault(id_, len(numbers))
