"""COCO's precision and recall of detections, by pycocotools or by a faster library with bit-identical results.

Both libraries are given images and categories by their numbers in `ground_truth.Truth`; `ground_truth.number` gives
detections these numbers.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet_keras.evaluation.ground_truth import Truth
from retinanet_keras.evaluation.results import DetectionColumns

PARAMS = COCOeval(iouType="bbox").params  # 10 IoUs, 101 recalls, areas all, small, medium, large; 1, 10, 100 detections
ALL, SMALL, MEDIUM, LARGE = range(4)  # indices into `areaRng`
SHAPE = len(PARAMS.iouThrs), len(PARAMS.recThrs), len(PARAMS.areaRng), len(PARAMS.maxDets)


def pycocotools(
    truth: Truth, detections: DetectionColumns, images: npt.NDArray
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Precision and recall by pycocotools.

    The classes are evaluated one by one, each over the images that have it in the ground truth or the detections.
    pycocotools scores classes separately and skips other images, so the numbers equal those of a single call, which
    would hold 1.5 GB of matches in memory for 500,000 detections.

    Args:
        truth: Truth.
        detections: DetectionColumns, numbered as the ground truth.
        images: int [n]. Sorted numbers of the images to evaluate.

    Returns:
        (precision [10 IoUs, 101 recalls, K, 4 areas, 3], recall [10, K, 4, 3]); the last axis is for 1, 10 and 100
        detections per image. Undefined values are -1.
    """
    ious, recalls, areas, limits = SHAPE
    count = len(truth.categories)
    precision, recall = -np.ones((ious, recalls, count, areas, limits)), -np.ones((ious, count, areas, limits))
    chosen = np.isin(np.arange(len(truth.images)), images)
    areas_of_boxes = detections.boxes[:, 2] * detections.boxes[:, 3]  # [N]
    of_class = [np.flatnonzero((truth.category == k) & chosen[truth.image]) for k in range(count)]
    order = np.argsort(detections.category, kind="stable")
    order = order[chosen[detections.image[order]]]
    starts: npt.NDArray = np.searchsorted(detections.category[order], np.arange(count + 1))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for k in range(count):
            objects, rows = of_class[k], order[starts[k] : starts[k + 1]]
            if not len(objects):
                continue  # undefined
            expected = _annotations(truth.image, truth.category, truth.boxes, truth.area, objects, iscrowd=truth.crowd)
            detected = _annotations(
                detections.image, detections.category, detections.boxes, areas_of_boxes, rows, score=detections.scores
            )
            images_of_class = np.union1d(truth.image[objects], detections.image[rows])
            evaluation = COCOeval(_index(images_of_class, k, expected), _index(images_of_class, k, detected), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            precision[:, :, k], recall[:, k] = evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]
    return precision, recall


def hotcoco(
    truth: Truth, detections: DetectionColumns, images: npt.NDArray
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Precision and recall by hotcoco; arguments and results are those of `pycocotools`."""
    import hotcoco as library

    ious, recalls, areas, limits = SHAPE
    count = len(truth.categories)
    if not (count and len(images)):
        return -np.ones((ious, recalls, count, areas, limits)), -np.ones((ious, count, areas, limits))
    ground = library.COCO.from_arrays(
        [{"id": number} for number in truth.images.values()],
        [{"id": number, "name": str(number)} for number in truth.categories.values()],
        truth.image,
        truth.category,
        truth.boxes,
        area=truth.area,
        iscrowd=truth.crowd,
    )
    columns = [detections.image, detections.boxes, detections.scores, detections.category]
    detected = ground.load_res(np.column_stack(columns).astype(np.float64))
    evaluation = library.COCOeval(ground, detected, "bbox")
    evaluation.params.img_ids = [int(number) for number in images]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    accumulated: Any = evaluation.eval
    return accumulated["precision"], accumulated["recall"]


def twelve(precision: npt.NDArray, recall: npt.NDArray) -> npt.NDArray[np.float64]:
    """COCO's 12 metrics [12] from these arrays, by pycocotools' own summary."""
    evaluation = COCOeval(iouType="bbox")
    evaluation.eval = {"precision": precision, "recall": recall}
    with contextlib.redirect_stdout(io.StringIO()):  # its table
        evaluation.summarize()
    return evaluation.stats


def _annotations(
    image: npt.NDArray,
    category: npt.NDArray,
    boxes: npt.NDArray,
    area: npt.NDArray,
    rows: npt.NDArray,
    *,
    iscrowd: npt.NDArray | None = None,
    score: npt.NDArray | None = None,
) -> list[dict[str, Any]]:
    """These rows as pycocotools' dicts, numbered from 1: it takes a match with annotation 0 for no match."""
    columns = {"image_id": image, "category_id": category, "bbox": boxes, "area": area}
    columns |= {key: column for key, column in (("iscrowd", iscrowd), ("score", score)) if column is not None}
    values = zip(*(column[rows].tolist() for column in columns.values()), strict=True)
    return [
        {"id": number, "iscrowd": 0, **dict(zip(columns, row, strict=True))} for number, row in enumerate(values, 1)
    ]


def _index(images: npt.NDArray, category: int, annotations: list[dict[str, Any]]) -> COCO:
    """pycocotools' COCO object for the annotations of one class."""
    index = COCO()
    index.dataset = {
        "images": [{"id": image} for image in images.tolist()],
        "categories": [{"id": category}],
        "annotations": annotations,
    }
    index.createIndex()
    return index
