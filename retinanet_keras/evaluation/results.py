"""Detections of a whole split as arrays, and as COCO's results format: a list of objects in JSON.

Boxes are absolute `x1, y1, x2, y2` everywhere else; they become COCO's `x, y, width, height` here.
"""

import json
import os

import numpy as np

from retinanet_keras.data.coco_rules import LARGEST
from retinanet_keras.errors import DataError
from retinanet_keras.evaluation import coco_json
from retinanet_keras.storage import disk

KEYS = ("image_id", "category_id", "bbox", "score")
DECIMALS = 12  # up to which a float32 times that power of ten is exact in float64: 24 + 28 bits
CHUNK = 10_000  # detections written at once


class Records:
    """Detections in the order they were given; 48 bytes each, where a dict takes ten times that.

    Numbers are float64 with the shortest decimals that name their float32, which is what the file holds: what is
    scored in memory and what is scored from the file are equal to the bit.

    Attributes:
        source: what messages call the detections.
    """

    def __init__(self, source="The results"):
        self.source = source
        self._image_ids, self._category_ids = {}, {}  # id -> its number in the arrays
        self._columns = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0)  # as `columns`
        self._added = []  # such columns, one image each, still in float32
        self._order = None

    def __len__(self):
        return len(self._columns[0]) + sum(len(added[0]) for added in self._added)

    def append(self, image_id, boxes, scores, labels, categories):
        """Add the detections of one image.

        Args:
            image_id: the image's id in the annotations.
            boxes: [n, 4] absolute x1, y1, x2, y2 in pixels of the original image.
            scores: [n].
            labels: [n] in 0..K-1; rows of label -1, the padding of `model.detect`, are ignored.
            categories: data.coco.Categories.

        Raises:
            DataError: for a label without a category, and for boxes or scores that are not finite.
        """
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)  # [n, 4]
        scores = np.asarray(scores, np.float32).reshape(-1)  # [n]
        labels = np.asarray(labels).astype(np.int64).reshape(-1)  # [n]
        if not len(boxes) == len(scores) == len(labels):
            raise DataError(
                f"Image {image_id!r}: expected as many boxes as scores and labels, "
                f"got {len(boxes)}, {len(scores)} and {len(labels)}"
            )
        kept = labels >= 0
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
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
        found, places = np.unique(labels, return_inverse=True)
        category = np.array([_number_of(int(categories.ids[label]), self._category_ids) for label in found], np.int32)
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)  # [n, 4]
        self._added.append((np.full(len(labels), image, np.int32), category[places], xywh, scores))

    @classmethod
    def from_json(cls, results):
        """The Records of a list of dicts in COCO's results format, or of a path to its JSON.

        Raises:
            DataError: naming the entry that is malformed, what was expected and what came.
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
            ("image_id", "image id", records._image_ids), ("category_id", "category id", records._category_ids)
        ):  # fmt: skip
            for id_ in coco_json.count((r[key] for r in results), records.source, what):
                _number_of(id_, numbers)
            columns.append(np.fromiter((numbers[r[key]] for r in results), np.int32, len(results)))
        boxes = np.array([r["bbox"] for r in results], np.float64).reshape(-1, 4)
        records._columns = (*columns, boxes, np.array([r["score"] for r in results], np.float64))
        return records

    def columns(self):
        """(image numbers [N], category numbers [N], boxes float64 [N, 4] x, y, width, height, scores float64 [N]).

        The numbers are places in `image_ids` and `category_ids`.
        """
        if self._added:
            image, category, boxes, scores = (np.concatenate(parts) for parts in zip(*self._added, strict=True))
            added = image, category, shortest(boxes), shortest(scores)
            self._columns = tuple(np.concatenate(parts) for parts in zip(self._columns, added, strict=True))
            self._added, self._order = [], None
        return self._columns

    @property
    def image_ids(self):
        """The ids of the images that have detections, in the order they came."""
        return list(self._image_ids)

    @property
    def category_ids(self):
        """The ids of the categories of the detections, in the order they came."""
        return list(self._category_ids)

    def of_image(self, image_id, categories):
        """(boxes float32 [n, 4] absolute x1, y1, x2, y2, scores float32 [n], labels int64 [n]) of one image.

        Args:
            categories: data.coco.Categories, which give the labels.

        Raises:
            DataError: for detections of another category.
        """
        image, category, boxes, scores = self.columns()
        if self._order is None:
            self._order = np.argsort(image, kind="stable")
        number = self._image_ids.get(image_id, -1)
        start, stop = np.searchsorted(image, (number, number + 1), sorter=self._order)
        rows = self._order[start:stop]
        label_of, ids = {id_: label for label, id_ in enumerate(categories.ids)}, self.category_ids
        try:
            labels = np.array([label_of[ids[c]] for c in category[rows]], np.int64)
        except KeyError as error:
            raise DataError(
                f"{self.source}: image {image_id!r} has a detection of category {error.args[0]!r}, which is none of "
                f"the {len(label_of)} categories of the dataset"
            ) from None
        xywh = boxes[rows]
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        return xyxy.astype(np.float32), scores[rows].astype(np.float32), labels

    def to_list(self):
        """The detections as dicts in COCO's results format, of plain ints and floats; `from_json` is the inverse."""
        image, category, boxes, scores = (column.tolist() for column in self.columns())
        images, categories = self.image_ids, self.category_ids
        return [
            {"image_id": images[i], "category_id": categories[c], "bbox": box, "score": score}
            for i, c, box, score in zip(image, category, boxes, scores, strict=True)
        ]

    def write(self, path):
        """Write COCO's results JSON; the earlier file stays whole until the new one is complete."""
        images, categories = ([json.dumps(i) for i in ids] for ids in (self.image_ids, self.category_ids))
        columns = self.columns()
        with disk.replacing_text(path) as file:
            file.write("[")
            for start in range(0, len(self), CHUNK):
                image, category, boxes, scores = (column[start : start + CHUNK].tolist() for column in columns)
                file.write("," if start else "")
                file.write(
                    ",".join(
                        f'{{"image_id":{images[i]},"category_id":{categories[c]},'
                        f'"bbox":[{x!r},{y!r},{width!r},{height!r}],"score":{score!r}}}'
                        for i, c, (x, y, width, height), score in zip(image, category, boxes, scores, strict=True)
                    )
                )
            file.write("]")


def shortest(values):
    """float64 of the shortest decimals that name these float32: what `float(str(value))` gives for each."""
    flat = np.asarray(values, np.float32).reshape(-1)
    out = flat.astype(np.float64)
    left = np.flatnonzero((np.abs(flat) < 2**23) & (flat != np.rint(flat)))  # whole numbers are their own names
    for decimals in range(1, DECIMALS + 1):
        shorter = np.rint(out[left] * 10.0**decimals) / 10.0**decimals  # a whole number by a power of ten is exact
        names = shorter.astype(np.float32) == flat[left]
        out[left[names]] = shorter[names]
        left = left[~names]
    left = np.concatenate([left, np.flatnonzero(np.abs(flat) >= 2**23)])
    out[left] = [float(str(value)) for value in flat[left]]
    return out.reshape(np.shape(values))


def _check(results, where):
    """A DataError where entries are malformed; one without a fault is found so in passes that run in C."""
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


def _is_plain(results):
    """Whether these are dicts of the keys, with finite ints and floats where numbers belong, no size below 0."""
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


def _number_of(id_, numbers):
    """The number of an id, a new one where it has none yet; ids of NumPy become Python's, which JSON knows."""
    id_ = id_.item() if isinstance(id_, np.generic) else id_
    return numbers.setdefault(id_, len(numbers))
