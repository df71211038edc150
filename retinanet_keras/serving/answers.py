"""Checks of a server's response: it must be the outputs of a RetinaNet for as many images as were sent.

A server may serve another model, be broken, or be hostile; no part of a response is used before it is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet_keras.storage.printable import printable

MOST_BYTES = 2**26  # of a response: 400 images with 1,000 detections each, as JSON
MOST_VALUES = 2**24  # of one output
MOST_DETECTIONS = 10**5  # of an image: the largest `detection.max_detections`
OUTPUTS = {
    "boxes": "float32",
    "scores": "float32",
    "labels": "int32",
    "category_ids": "int64",
    "names": "str",
    "num_detections": "int32",
}
ROUNDING = 1.0  # pixels that a box may exceed its image by


class BadAnswer(ValueError):
    """A response that no RetinaNet gives; the message says what is wrong, as part of a sentence."""


def checked(outputs: Any, images: int, size: npt.ArrayLike = (np.inf, np.inf)) -> dict[str, npt.NDArray]:
    """Check a response and convert its outputs to the types of `export.signatures`.

    Args:
        outputs: {name: NumPy array, or its nested lists from JSON}.
        images: int. Number of images that were sent.
        size: (height, width) of all images, or of each, [B, 2]; infinite if unknown.

    Returns:
        {name: array}; names are str.

    Raises:
        BadAnswer: if an output is missing or has another type or shape, a number is out of range, or num_detections is
            more than there are rows.
    """
    if not isinstance(outputs, dict):
        raise BadAnswer(f"expected outputs by name, got {_kind(outputs)}")
    _check_names(outputs)
    arrays = {name: _array(name, outputs[name], kind) for name, kind in OUTPUTS.items()}
    check_shapes({name: array.shape for name, array in arrays.items()}, images)
    count, detections = arrays["num_detections"], arrays["scores"].shape[1]
    if not ((0 <= count) & (count <= detections)).all():
        raise BadAnswer(f"num_detections of {_worst(count, detections)}, expected 0 to {detections}")
    used = np.arange(detections) < count[:, None]  # [B, D]
    sizes = np.broadcast_to(np.reshape(np.asarray(size, np.float32), (-1, 2)), (images, 2))
    boxes, scores, labels = (arrays[name][used] for name in ("boxes", "scores", "labels"))
    _check_used(boxes, scores, labels, np.repeat(sizes, count, axis=0))
    return arrays


def check_shapes(shapes: Mapping[str, tuple[int, ...]], images: int) -> None:
    """Check the shapes that a response claims, before its values are read.

    Args:
        shapes: {output: tuple of int}; outputs that are not in OUTPUTS are ignored.
        images: int. Number of images that were sent.

    Raises:
        BadAnswer: if an output is missing, or the shapes are not [B, D, 4], [B, D] and [B] with the same D, at most
            MOST_DETECTIONS.
    """
    _check_names(shapes)
    detections: Any = shapes["scores"][1] if len(shapes["scores"]) == 2 else "D"
    for name in OUTPUTS:
        shape = (images,) + {"boxes": (detections, 4), "num_detections": ()}.get(name, (detections,))
        if shapes[name] != shape:
            expected = ", ".join(map(str, shape))
            raise BadAnswer(f"{name} of shape {list(shapes[name][:10])}, expected [{expected}] for {images} images")
    if not 0 <= shapes["scores"][1] <= MOST_DETECTIONS:
        raise BadAnswer(f"{detections:,} detections an image, expected at most {MOST_DETECTIONS:,}")


def _check_names(outputs: Iterable[str]) -> None:
    if missing := sorted(set(OUTPUTS) - set(outputs)):
        others = ", ".join(sorted(printable(name)[:40] for name in outputs)[:10])
        raise BadAnswer(f"no output {', '.join(missing)}, but {others or 'none at all'}")


def _check_used(boxes: npt.NDArray, scores: npt.NDArray, labels: npt.NDArray, sizes: npt.NDArray) -> None:
    """Check the detections of all images, without padding.

    Args:
        boxes: [N, 4], x1, y1, x2, y2.
        scores: [N].
        labels: [N].
        sizes: [N, 2]. Height and width of the image of each.
    """
    if not np.isfinite(boxes).all():
        raise BadAnswer("boxes that are not finite")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise BadAnswer("boxes with x2 < x1 or y2 < y1")
    high = np.tile(sizes[:, ::-1], 2) + ROUNDING  # [N, 4]
    outside = ((boxes < -ROUNDING) | (boxes > high)).any(axis=1)
    if outside.any():
        height, width = sizes[outside][0]
        told = f", which has {width:.0f}x{height:.0f} pixels" if np.isfinite(width) else ""
        raise BadAnswer(f"boxes outside of the image{told}")
    if not ((scores >= 0) & (scores <= 1)).all():  # NaN is in no range
        raise BadAnswer("scores that are not from 0 to 1")
    if (labels < 0).any():
        raise BadAnswer("labels below 0 among the first num_detections")


def _array(name: str, value: Any, kind: str) -> npt.NDArray:
    """An output as an array of its type; numbers from JSON may be too large, or mixed with strings."""
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
            numbers: npt.NDArray = array.astype("int64" if whole else "float64").astype(kind)
    except OverflowError:
        raise BadAnswer(f"{name} with a number too large for {kind}") from None
    if whole and (numbers != array).any():
        raise BadAnswer(f"{name} with a number too large for {kind}")
    return numbers


def _texts(name: str, array: npt.NDArray) -> npt.NDArray:
    if array.dtype != object or {type(item) for item in array.ravel()} - {str, bytes}:
        raise BadAnswer(f"{name} that are not strings")
    if sum(map(len, array.ravel())) > MOST_BYTES:  # a tensor can repeat its last value without sending it
        raise BadAnswer(f"{name} of more than {MOST_BYTES >> 20} MB")
    texts = [item.decode(errors="replace") if isinstance(item, bytes) else item for item in array.ravel()]
    return np.array([*texts, None], object)[:-1].reshape(array.shape)  # the None prevents a fixed-width type


def _worst(count: npt.NDArray, detections: int) -> int:
    return int(count[(count < 0) | (count > detections)][0])


def _kind(value: Any) -> str:
    return {list: "a list", type(None): "nothing"}.get(type(value), type(value).__name__)
