"""COCO's precision and recall of detections, by pycocotools or by a faster library that gives equal bits.

Both libraries get images and categories as their numbers in `truth.Truth`. Detections are columns as of
`records.Records.columns`, with the truth's numbers.
"""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

PARAMS = COCOeval(iouType="bbox").params  # 10 IoUs, 101 recalls, areas all, small, medium, large; 1, 10, 100 detections
ALL, SMALL, MEDIUM, LARGE = range(4)  # places of `areaRng`
SHAPE = len(PARAMS.iouThrs), len(PARAMS.recThrs), len(PARAMS.areaRng), len(PARAMS.maxDets)


def pycocotools(truth, detections, images):
    """(precision [10 IoUs, 101 recalls, K, 4 areas, 3], recall [10, K, 4, 3]); the last axis: 1, 10, 100 detections.

    What cannot be told is -1. The classes are evaluated one after the other, each over the images that have it in the
    ground truth or the detections: pycocotools scores classes apart and skips the other images, so that the numbers are
    those of one call, which would keep 1.5 GB of matches for 500,000 detections.

    Args:
        truth: a Truth.
        detections: (image [N], category [N], boxes [N, 4], scores [N]).
        images: sorted numbers of the images to evaluate.
    """
    ious, recalls, areas, limits = SHAPE
    count = len(truth.categories)
    precision, recall = -np.ones((ious, recalls, count, areas, limits)), -np.ones((ious, count, areas, limits))
    chosen = np.isin(np.arange(len(truth.images)), images)
    found = (detections[0], detections[1], detections[2], detections[2][:, 2] * detections[2][:, 3])
    of_class = [np.flatnonzero((truth.category == k) & chosen[truth.image]) for k in range(count)]
    order = np.argsort(detections[1], kind="stable")
    order = order[chosen[detections[0][order]]]
    starts = np.searchsorted(detections[1][order], np.arange(count + 1))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for k in range(count):
            objects, rows = of_class[k], order[starts[k] : starts[k + 1]]
            if not len(objects):
                continue  # nothing to be told
            known = _annotations(truth.image, truth.category, truth.boxes, truth.area, objects, iscrowd=truth.crowd)
            guessed = _annotations(*found, rows, score=detections[3])
            here = np.union1d(truth.image[objects], detections[0][rows])
            evaluation = COCOeval(_index(here, k, known), _index(here, k, guessed), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            precision[:, :, k], recall[:, k] = evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]
    return precision, recall


def hotcoco(truth, detections, images):
    """What `pycocotools` gives, by hotcoco."""
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
    image, category, boxes, scores = detections
    found = ground.load_res(np.column_stack([image, boxes, scores, category]).astype(np.float64))
    evaluation = library.COCOeval(ground, found, "bbox")
    evaluation.params.img_ids = [int(number) for number in images]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def twelve(precision, recall):
    """COCO's 12 numbers [12] of these arrays, by pycocotools' own summary."""
    evaluation = COCOeval(iouType="bbox")
    evaluation.eval = {"precision": precision, "recall": recall}
    with contextlib.redirect_stdout(io.StringIO()):  # its table
        evaluation.summarize()
    return evaluation.stats


def _annotations(image, category, boxes, area, rows, *, iscrowd=None, score=None):
    """These rows as pycocotools' dicts, numbered from 1: it takes a match with annotation 0 for no match."""
    columns = {"image_id": image, "category_id": category, "bbox": boxes, "area": area}
    columns |= {key: column for key, column in (("iscrowd", iscrowd), ("score", score)) if column is not None}
    values = zip(*(column[rows].tolist() for column in columns.values()), strict=True)
    return [
        {"id": number, "iscrowd": 0, **dict(zip(columns, row, strict=True))} for number, row in enumerate(values, 1)
    ]


def _index(images, category, annotations):
    """pycocotools' COCO object of annotations of one class."""
    index = COCO()
    index.dataset = {
        "images": [{"id": image} for image in images.tolist()],
        "categories": [{"id": category}],
        "annotations": annotations,
    }
    index.createIndex()
    return index
