"""Which detections find an object, at IoU 0.5; how scores tell them apart, and images good and bad.

The matching is pycocotools': within an image and class, detections by falling score each take the free object of the
highest IoU. One library's matches would cost it a second evaluation, so they are made here.
"""

import numpy as np
from pycocotools import mask

IOU = 0.5
LIMIT = 100  # detections of one class in an image, as pycocotools counts
MATCHED, UNMATCHED, IGNORED = 1, 0, -1  # found an object; none; a crowd, or past the limit
BINS = 20
SHOWN = 8  # images of each end


def match(truth, detections, images):
    """int8 [N]: MATCHED, UNMATCHED or IGNORED, for each detection; those outside of the images are IGNORED.

    Args:
        truth, detections, images: as of `scoring.pycocotools`.
    """
    image, category, boxes, scores = detections
    count = max(1, len(truth.categories))
    key, object_key = image.astype(np.int64) * count + category, truth.image * count + truth.category
    order = np.lexsort((-scores, key))  # stable: equal scores stay in their order
    key = key[order]
    rank = np.arange(len(key)) - np.searchsorted(key, key)  # place in its image and class
    verdicts = np.where(rank < LIMIT, UNMATCHED, IGNORED).astype(np.int8)  # in sorted order

    objects = np.lexsort((truth.crowd, object_key))  # crowds last
    groups, starts = np.unique(object_key[objects], return_index=True)
    stops = np.append(starts, len(objects))[1:]
    firsts = np.searchsorted(key, groups)
    lasts = np.minimum(np.searchsorted(key, groups, side="right"), firsts + LIMIT)
    for first, last, start, stop in zip(firsts, lasts, starts, stops, strict=True):
        if first < last:
            rows, known = order[first:last], objects[start:stop]
            crowd = truth.crowd[known]
            overlap = mask.iou(boxes[rows], truth.boxes[known], crowd.astype(np.uint8))  # [n, m]
            verdicts[first:last] = _greedy(overlap, int(np.count_nonzero(~crowd)))
    result = np.empty(len(key), np.int8)
    result[order] = verdicts
    result[~np.isin(image, images)] = IGNORED
    return result


def _greedy(overlap, count):
    """The verdicts of detections by falling score. overlap: [n, m], the first `count` objects are no crowds."""
    verdicts = np.full(len(overlap), UNMATCHED, np.int8)
    overlap = overlap.copy()
    for n in np.flatnonzero((overlap >= IOU).any(axis=1)):
        free = overlap[n, :count]
        best = count - 1 - int(free[::-1].argmax()) if count else 0  # the last of equals, as pycocotools
        if count and free[best] >= IOU:
            verdicts[n] = MATCHED
            overlap[:, best] = -1
        elif (overlap[n, count:] >= IOU).any():
            verdicts[n] = IGNORED
    return verdicts


def histogram(scores, verdicts):
    """{"edges" [21], "matched" [20], "unmatched" [20]}: detections by score, and how many found an object.

    The edges are 0 to 1, further where scores are beyond.
    """
    scores, verdicts = scores[verdicts != IGNORED], verdicts[verdicts != IGNORED]
    edges = np.linspace(min(0.0, scores.min(initial=0)), max(1.0, scores.max(initial=1)), BINS + 1)
    counts = {
        name: np.histogram(scores[verdicts == verdict], edges)[0].tolist()
        for name, verdict in (("matched", MATCHED), ("unmatched", UNMATCHED))
    }
    return {"iou": IOU, "edges": edges.round(10).tolist(), **counts}


def best_score(scores, verdicts, objects):
    """The score from which on the detections of all images have the highest F1; 0.5 where none finds an object.

    Args:
        scores: [N].
        verdicts: [N], of `match`.
        objects: how many there are to find.
    """
    scores, matched = scores[verdicts != IGNORED], verdicts[verdicts != IGNORED] == MATCHED
    if not matched.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    f1 = 2 * np.cumsum(matched[order]) / (np.arange(1, len(order) + 1) + objects)
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores pass together
    return float(scores[order][last][f1[last].argmax()])


def rank_images(truth, detections, verdicts, images, names):
    """The images found best and worst, by their F1 at IoU 0.5 over detections from `best_score` on.

    F1 is 2 found / (2 found + missed + false), all classes together; crowds count neither way. Images without objects
    and without such detections are neither good nor bad. Among equals, more objects found are better and more errors
    worse.

    Args:
        truth, detections, images: as of `scoring.pycocotools`.
        verdicts: of `match`.
        names: the ids of all the truth's images, in order.

    Returns:
        {"iou", "min_score", "f1": over all images or None, "best": [...], "worst": [...]}, at most 8 of each, of
        {"image_id", "f1", "found", "missed", "false"}. No image is in both, one without a match is not among the best,
        and one without an error not among the worst.
    """
    image, _, _, scores = detections
    total = len(truth.images)
    wanted = np.bincount(truth.image[~truth.crowd], minlength=total)
    wanted[~np.isin(np.arange(total), images)] = 0
    least = best_score(scores, verdicts, int(wanted.sum()))
    shown = scores >= least
    found = np.bincount(image[shown & (verdicts == MATCHED)], minlength=total)
    false = np.bincount(image[shown & (verdicts == UNMATCHED)], minlength=total)
    missed = wanted - found
    judged = np.flatnonzero(wanted + false)
    errors = missed + false
    f1 = 2 * found / np.maximum(2 * found + errors, 1)

    best = judged[np.lexsort((judged, -found[judged], -f1[judged]))]
    best = best[found[best] > 0][: min(SHOWN, -(-len(judged) // 2))]
    worst = judged[np.lexsort((judged, -errors[judged], f1[judged]))]
    worst = worst[(errors[worst] > 0) & ~np.isin(worst, best)][:SHOWN]
    sums = found.sum(), errors.sum()
    rows = {
        end: [
            {"image_id": names[i], "f1": round(float(f1[i]), 4), "found": int(found[i]), "missed": int(missed[i]),
             "false": int(false[i])}
            for i in chosen
        ]
        for end, chosen in (("best", best), ("worst", worst))
    }  # fmt: skip
    overall = float(2 * sums[0] / (2 * sums[0] + sums[1])) if len(judged) else None
    return {"iou": IOU, "min_score": least, "f1": overall, **rows}
