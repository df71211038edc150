"""Checks of what a server answers: the outputs of a RetinaNet for as many images as were sent, or one sentence.

A server may be another model's, broken, or hostile; nothing of an answer is used before it has passed.
"""

import numpy as np

from retinanet_keras.storage.printable import printable

MOST_BYTES = 2**26  # of an answer: those to 400 images with 1,000 detections each, as JSON
MOST_VALUES = 2**24  # of one output
MOST_DETECTIONS = 10**5  # in an image, as many as `detection.max_detections` may ask for
OUTPUTS = {
    "boxes": "float32", "scores": "float32", "labels": "int32", "category_ids": "int64", "names": "str",
    "num_detections": "int32",
}  # fmt: skip
ROUNDING = 1.0  # pixels that a box may be outside of its image


class BadAnswer(ValueError):
    """An answer that is not one of a RetinaNet; the message says what is wrong, as part of a sentence."""


def checked(outputs, images, size=(np.inf, np.inf)):
    """The outputs of `export.signatures` in their types.

    Args:
        outputs: {name: NumPy array, or what JSON has for it}.
        images: int. Images that were sent.
        size: (height, width) of all of them, or of each, [B, 2]; infinite where it is not known.

    Returns:
        {name: array}; names are str.

    Raises:
        BadAnswer: where an output is missing or has another type or shape, a number is out of its range, or rows past
            the number of detections count.
    """
    if not isinstance(outputs, dict):
        raise BadAnswer(f"expected outputs by name, got {_kind(outputs)}")
    _check_names(outputs)
    found = {name: _array(name, outputs[name], kind) for name, kind in OUTPUTS.items()}
    check_shapes({name: array.shape for name, array in found.items()}, images)
    count, detections = found["num_detections"], found["scores"].shape[1]
    if not ((0 <= count) & (count <= detections)).all():
        raise BadAnswer(f"num_detections of {_worst(count, detections)}, expected 0 to {detections}")
    used = np.arange(detections) < count[:, None]  # [B, D]
    sizes = np.broadcast_to(np.reshape(np.asarray(size, np.float32), (-1, 2)), (images, 2))
    _check_used({name: found[name][used] for name in ("boxes", "scores", "labels")}, np.repeat(sizes, count, axis=0))
    return found


def check_shapes(shapes, images):
    """Check what an answer says of itself before its values are looked at.

    Args:
        shapes: {output: tuple of int}; others than OUTPUTS are ignored.
        images: int. Images that were sent.

    Raises:
        BadAnswer: where an output is missing, or the shapes are not [B, D, 4] and [B, D] of the same D, at most
            MOST_DETECTIONS, and [B].
    """
    _check_names(shapes)
    detections = shapes["scores"][1] if len(shapes["scores"]) == 2 else "D"
    for name in OUTPUTS:
        shape = (images,) + {"boxes": (detections, 4), "num_detections": ()}.get(name, (detections,))
        if shapes[name] != shape:
            expected = ", ".join(map(str, shape))
            raise BadAnswer(f"{name} of shape {list(shapes[name][:10])}, expected [{expected}] for {images} images")
    if not 0 <= shapes["scores"][1] <= MOST_DETECTIONS:
        raise BadAnswer(f"{detections:,} detections an image, expected at most {MOST_DETECTIONS:,}")


def _check_names(outputs):
    if missing := sorted(set(OUTPUTS) - set(outputs)):
        others = ", ".join(sorted(printable(name)[:40] for name in outputs)[:10])
        raise BadAnswer(f"no output {', '.join(missing)}, but {others or 'none at all'}")


def _check_used(found, sizes):
    """Of the rows that count, of all images: boxes [N, 4], scores [N], labels [N], and their images' sizes [N, 2]."""
    boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
    if not np.isfinite(boxes).all():
        raise BadAnswer("boxes that are not finite")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise BadAnswer("boxes whose right or lower side is before the other")
    high = np.tile(sizes[:, ::-1], 2) + ROUNDING  # [N, 4]
    outside = ((boxes < -ROUNDING) | (boxes > high)).any(axis=1)
    if outside.any():
        height, width = sizes[outside][0]
        told = f", which has {width:.0f}x{height:.0f} pixels" if np.isfinite(width) else ""
        raise BadAnswer(f"boxes outside of the image{told}")
    if not ((scores >= 0) & (scores <= 1)).all():  # NaN is in no range
        raise BadAnswer("scores that are not from 0 to 1")
    if (labels < 0).any():
        raise BadAnswer("labels below 0 among those that count")


def _array(name, value, kind):
    """An output as an array of its type; from JSON, whose numbers may be too large, or a text among them."""
    try:
        array = value if isinstance(value, np.ndarray) else np.array(value, object)
    except ValueError as error:  # lists of several lengths
        raise BadAnswer(f"{name} that is no array ({error})") from None
    if array.size > MOST_VALUES:
        raise BadAnswer(f"{name} of {array.size:,} values")
    if kind == "str":
        return _texts(name, array)
    whole = np.dtype(kind).kind == "i"
    if array.dtype == object:
        allowed = {int} if whole else {int, float}
        if other := {type(item) for item in array.ravel()} - allowed:
            raise BadAnswer(f"{name} with {min(t.__name__ for t in other)} in it, expected numbers")
    elif array.dtype.kind not in ("iu" if whole else "f"):
        raise BadAnswer(f"{name} of type {array.dtype}, expected {kind}")
    try:
        with np.errstate(over="ignore"):
            numbers = array.astype("int64" if whole else "float64").astype(kind)
    except OverflowError:
        raise BadAnswer(f"{name} with a number too large for {kind}") from None
    if whole and (numbers != array).any():
        raise BadAnswer(f"{name} with a number too large for {kind}")
    return numbers


def _texts(name, array):
    if array.dtype != object or {type(item) for item in array.ravel()} - {str, bytes}:
        raise BadAnswer(f"{name} that are not texts")
    if sum(map(len, array.ravel())) > MOST_BYTES:  # a tensor repeats its last value without sending it again
        raise BadAnswer(f"{name} of more than {MOST_BYTES >> 20} MB")
    texts = [item.decode(errors="replace") if isinstance(item, bytes) else item for item in array.ravel()]
    return np.array([*texts, None], object)[:-1].reshape(array.shape)  # the None keeps NumPy from making fixed widths


def _worst(count, detections):
    return int(count[(count < 0) | (count > detections)][0])


def _kind(value):
    return {list: "a list", type(None): "nothing"}.get(type(value), type(value).__name__)
