"""True and false positives at IoU 0.5: matching, histograms by score, best and worst images.

The matching is that of pycocotools: within an image and class, in the order of falling scores, each detection takes the
unmatched object of the highest IoU. It is computed here because neither library returns its matches without a second
evaluation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask

from retinanet_keras.evaluation.ground_truth import Truth
from retinanet_keras.evaluation.results import DetectionColumns

IOU = 0.5
LIMIT = 100  # detections of one class in an image that count, as in pycocotools
MATCHED, UNMATCHED, IGNORED = 1, 0, -1  # true positive; false positive; matches a crowd, or is past the limit
BINS = 20
SHOWN = 8  # best and worst images, at most


def match(truth: Truth, detections: DetectionColumns, images: npt.NDArray) -> npt.NDArray[np.int8]:
    """Match detections to ground truth.

    Args:
        truth, detections, images: as for `precision_recall.pycocotools`.

    Returns:
        int8 [N]: MATCHED, UNMATCHED or IGNORED; the detections in other images are IGNORED.
    """
    image, category = detections.image, detections.category
    boxes, scores = detections.boxes, detections.scores
    count = max(1, len(truth.categories))
    key, object_key = image.astype(np.int64) * count + category, truth.image * count + truth.category
    order = np.lexsort((-scores, key))  # stable: keeps the order of equal scores
    key = key[order]
    rank = np.arange(len(key)) - np.searchsorted(key, key)  # within its image and class
    verdicts = np.where(rank < LIMIT, UNMATCHED, IGNORED).astype(np.int8)  # in sorted order

    objects = np.lexsort((truth.crowd, object_key))  # crowds last
    groups, starts = np.unique(object_key[objects], return_index=True)
    stops: npt.NDArray = np.append(starts, len(objects))[1:]
    firsts: npt.NDArray = np.searchsorted(key, groups)
    lasts = np.minimum(np.searchsorted(key, groups, side="right"), firsts + LIMIT)
    for first, last, start, stop in zip(firsts, lasts, starts, stops, strict=True):
        if first < last:
            rows, candidates = order[first:last], objects[start:stop]
            crowd = truth.crowd[candidates]
            overlap = mask.iou(boxes[rows], truth.boxes[candidates], crowd.astype(np.uint8))  # [n, m]
            verdicts[first:last] = _greedy(overlap, int(np.count_nonzero(~crowd)))
    result: npt.NDArray = np.empty(len(key), np.int8)
    result[order] = verdicts
    result[~np.isin(image, images)] = IGNORED
    return result


def _greedy(overlap: npt.NDArray, count: int) -> npt.NDArray[np.int8]:
    """Match the detections of one image and class greedily.

    Args:
        overlap: [n, m]. IoU of detections, by falling score, with objects, of which the first `count` are not crowds.

    Returns:
        int8 [n]: MATCHED, UNMATCHED or IGNORED.
    """
    verdicts: npt.NDArray = np.full(len(overlap), UNMATCHED, np.int8)
    overlap = overlap.copy()
    for n in np.flatnonzero((overlap >= IOU).any(axis=1)):
        free = overlap[n, :count]
        best = count - 1 - int(free[::-1].argmax()) if count else 0  # the last of equals, as in pycocotools
        if count and free[best] >= IOU:
            verdicts[n] = MATCHED
            overlap[:, best] = -1
        elif (overlap[n, count:] >= IOU).any():
            verdicts[n] = IGNORED
    return verdicts


def histogram(scores: npt.NDArray, verdicts: npt.NDArray) -> dict[str, Any]:
    """Histograms of the scores of true and of false positives.

    Args:
        scores: [N].
        verdicts: [N]. As of `match`.

    Returns:
        {"iou", "edges" [21], "matched" [20], "unmatched" [20]}; the edges are from 0 to 1, wider if scores are beyond.
    """
    scores, verdicts = scores[verdicts != IGNORED], verdicts[verdicts != IGNORED]
    edges = np.linspace(min(0.0, scores.min(initial=0)), max(1.0, scores.max(initial=1)), BINS + 1)
    counts = {
        name: np.histogram(scores[verdicts == verdict], edges)[0].tolist()
        for name, verdict in (("matched", MATCHED), ("unmatched", UNMATCHED))
    }
    return {"iou": IOU, "edges": edges.round(10).tolist(), **counts}


def best_score(scores: npt.NDArray, verdicts: npt.NDArray, objects: int) -> float:
    """The score threshold with the highest F1 over all images; 0.5 if no detection matches.

    Args:
        scores: [N].
        verdicts: [N]. As of `match`.
        objects: int. Number of objects in the ground truth, without crowds.
    """
    scores, matched = scores[verdicts != IGNORED], verdicts[verdicts != IGNORED] == MATCHED
    if not matched.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    f1 = 2 * np.cumsum(matched[order]) / (np.arange(1, len(order) + 1) + objects)
    last: npt.NDArray = np.append(np.diff(scores[order]) != 0, True)  # equal scores pass the threshold together
    return float(scores[order][last][f1[last].argmax()])


def rank_images(
    truth: Truth,
    detections: DetectionColumns,
    verdicts: npt.NDArray,
    images: npt.NDArray,
    image_ids: list[Any],
) -> dict[str, Any]:
    """The best and the worst images, by F1 at IoU 0.5 over the detections that score at least `best_score`.

    F1 is 2 found / (2 found + missed + false), all classes together; crowds are ignored. Images with neither objects
    nor such detections are not ranked. Among equals, more objects found are better, and more errors worse.

    Args:
        truth, detections, images: as for `precision_recall.pycocotools`.
        verdicts: [N]. As of `match`.
        image_ids: the ids of all images of the ground truth, in order.

    Returns:
        {"iou", "min_score", "f1": over all images or None, "best": [...], "worst": [...]}, at most 8 of each, of
        {"image_id", "f1", "found", "missed", "false"}. No image is in both; one without a match is not among the best,
        one without an error not among the worst.
    """
    image, scores = detections.image, detections.scores
    total = len(truth.images)
    wanted = np.bincount(truth.image[~truth.crowd], minlength=total)
    wanted[~np.isin(np.arange(total), images)] = 0
    min_score = best_score(scores, verdicts, int(wanted.sum()))
    shown = scores >= min_score
    found = np.bincount(image[shown & (verdicts == MATCHED)], minlength=total)
    false = np.bincount(image[shown & (verdicts == UNMATCHED)], minlength=total)
    missed = wanted - found
    ranked = np.flatnonzero(wanted + false)
    errors = missed + false
    f1 = 2 * found / np.maximum(2 * found + errors, 1)

    best = ranked[np.lexsort((ranked, -found[ranked], -f1[ranked]))]
    best = best[found[best] > 0][: min(SHOWN, -(-len(ranked) // 2))]
    worst = ranked[np.lexsort((ranked, -errors[ranked], f1[ranked]))]
    worst = worst[(errors[worst] > 0) & ~np.isin(worst, best)][:SHOWN]
    total_found, total_errors = found.sum(), errors.sum()
    overall = float(2 * total_found / (2 * total_found + total_errors)) if len(ranked) else None

    def rows(chosen):
        return [
            {
                "image_id": image_ids[i],
                "f1": round(float(f1[i]), 4),
                "found": int(found[i]),
                "missed": int(missed[i]),
                "false": int(false[i]),
            }
            for i in chosen
        ]

    return {"iou": IOU, "min_score": min_score, "f1": overall, "best": rows(best), "worst": rows(worst)}
