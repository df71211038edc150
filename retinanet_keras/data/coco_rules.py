"""The rules for COCO's annotation JSON, each in one place.

The functions take the JSON's lists and return the faults together with arrays of what is usable, so that loading can
reject a file and the dataset check can report all of its faults.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet_keras.storage.printable import printable

ERROR, WARNING, NOTE = "error", "warning", "note"  # loading fails; loading logs it; only the dataset check reports it
CROWD, NOT_FINITE, NO_AREA, OUTSIDE = "crowd", "not finite", "without area", "outside the image"
SHOWN = 3  # offenders named in a message
LONGEST = 300  # characters shown of an offender
LARGEST = 1e15  # of a coordinate: squares and sums of squares are still finite in float32
OVERHANG = 1.0  # pixels beyond the image that can result from rounding in annotation tools


@dataclass(frozen=True)
class Finding:
    """One kind of fault in a dataset."""

    rule: str  # name of the rule that is violated
    level: str  # ERROR, WARNING or NOTE
    count: int  # number of offenders
    what: str  # what they are, in the plural
    examples: tuple[str, ...] = ()  # the first few offenders
    fix: str = ""  # what to do, as sentences

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        examples = f": {', '.join(self.examples)}{more}" if self.examples else ""
        return f"{self.count} {self.what}{examples}. {self.fix}".rstrip()


def find(
    rule: str, level: str, offends: npt.NDArray, show: Callable[[int], str], what: str, fix: str = ""
) -> list[Finding]:
    """Report the offenders of a rule.

    Args:
        rule, level, what, fix: str. See `Finding`.
        offends: bool [n]. Which entries violate the rule.
        show: a function of an index that describes the entry.

    Returns:
        a list of one Finding, or an empty list if there are no offenders.
    """
    offenders = np.flatnonzero(offends)
    examples = tuple(printable(show(int(i)), LONGEST) for i in offenders[:SHOWN])
    return [Finding(rule, level, len(offenders), what, examples, fix)] if len(offenders) else []


def check_lists(tree: dict[str, Any]) -> tuple[list[Finding], dict[str, list[dict[str, Any]]]]:
    """Check that a JSON object has the lists `images`, `categories` and `annotations`; the last is optional.

    Returns:
        findings; and the lists by their keys, with {} in place of entries that are no objects.
    """
    findings, lists = [], {}
    for key in ("images", "categories", "annotations"):
        value = tree.get(key)
        if value is None and key == "annotations":
            value = []
        if not isinstance(value, list) or (not value and key != "annotations"):
            got = f"got {show(value)}" if key in tree else f"the file has the keys {show(list(tree)[:8])}"
            fix = f"Expected a list of JSON objects; {got}. Use COCO's format for object detection."
            findings.append(Finding("key", ERROR, 1, f"list that is missing or empty: `{key}`", (), fix))
            value = []
        lists[key] = [entry if isinstance(entry, dict) else {} for entry in value]
    return findings, lists


def check_categories(rows: Sequence[dict[str, Any]]) -> tuple[list[Finding], npt.NDArray, tuple[str, ...]]:
    """Check the list of categories.

    Returns:
        findings; of the usable categories the ids, int64 [K] in increasing order, and the names [K].
    """
    ids, whole = _integers(rows, "id")
    names: list[Any] = [row.get("name") for row in rows]
    named = np.array([isinstance(name, str) for name in names], bool)
    broken = np.array([isinstance(name, str) and not _is_text(name) for name in names], bool)
    usable = whole & named & ~broken
    again = _repeated(ids, whole)
    findings = find(
        "category",
        ERROR,
        ~usable,
        lambda i: f"categories[{i}] is {show(rows[i])}",
        "categories without a whole number as `id` and a string as `name`",
        "Add them; a name must not contain lone surrogates (\\ud800 to \\udfff).",
    )
    findings += find(
        "category-id-twice",
        ERROR,
        again,
        lambda i: f"{ids[i]} ({names[i]})",
        "categories with a duplicate id",
        "Give each category its own id.",
    )
    findings += find(
        "category-name-twice",
        NOTE,
        _repeated(_codes(names), named),
        lambda i: names[i],
        "categories with a duplicate name",
        "Results per class are listed by name: rename one of them.",
    )
    valid = np.flatnonzero(usable & ~again)
    valid = valid[np.argsort(ids[valid], kind="stable")]
    return findings, ids[valid], tuple(names[i] for i in valid)


def check_images(
    rows: Sequence[dict[str, Any]],
) -> tuple[list[Finding], npt.NDArray, npt.NDArray, list[str], npt.NDArray]:
    """Check the list of images.

    Returns:
        findings; every valid id, int64 [I]; of the usable images the ids, int64 [N], file names [N] and sizes, int32
        [N, 2], height and width.
    """
    ids, whole = _integers(rows, "id")
    again = _repeated(ids, whole)
    names: list[Any] = [row.get("file_name") for row in rows]
    named = np.array([isinstance(name, str) and name != "" for name in names], bool)
    heights, tall = _integers(rows, "height")
    widths, wide = _integers(rows, "width")
    sizes = np.stack([heights, widths], axis=1)  # [I, 2]
    sized = tall & wide & (sizes > 0).all(axis=1) & (sizes < 2**31).all(axis=1)
    findings = find(
        "image-id",
        ERROR,
        ~whole,
        lambda i: f"images[{i}] has {show(rows[i].get('id'))}",
        "images without a whole number as `id`",
        "Add it: annotations refer to it as `image_id`.",
    )
    findings += find(
        "image-id-twice",
        ERROR,
        again,
        lambda i: f"{ids[i]} ({names[i]})",
        "images with a duplicate id",
        "Give each image its own id, and use it as `image_id` of its annotations.",
    )
    findings += find(
        "file-name",
        ERROR,
        ~named,
        lambda i: f"images[{i}] has {show(names[i])}",
        "images without a `file_name`",
        "Add it: the path of the file relative to the image folder.",
    )
    findings += find(
        "image-size",
        ERROR,
        ~sized,
        lambda i: f"{names[i]} has {show([rows[i].get('width'), rows[i].get('height')])}",
        "images without whole numbers above 0 as `width` and `height`",
        "Enter the sizes of the image files.",
    )
    findings += find(
        "file-twice",
        NOTE,
        _repeated(_codes(names), named),
        lambda i: names[i],
        "images with a duplicate file",
        "The same picture counts more than once: remove one of them.",
    )
    valid = np.flatnonzero(whole & named & sized & ~again)
    return findings, ids[whole], ids[valid], [names[i] for i in valid], sizes[valid].astype(np.int32)


def check_annotations(
    rows: Sequence[dict[str, Any]],
    known_ids: npt.NDArray,
    image_ids: npt.NDArray,
    sizes: npt.NDArray,
    category_ids: npt.NDArray,
) -> tuple[list[Finding], npt.NDArray, npt.NDArray, npt.NDArray, dict[str, int]]:
    """Check the annotations against the images and categories.

    Args:
        rows: list of dicts. The JSON's `annotations`.
        known_ids: int64 [I]. The ids in `images`, usable or not.
        image_ids: int64 [N]. The ids of the usable images.
        sizes: int32 [N, 2]. Height and width of the usable images.
        category_ids: int64 [K].

    Returns:
        findings; of the M usable boxes the index of their image, int64 [M] in increasing order, boxes, float32 [M, 4]
        (x1, y1, x2, y2, clipped to the image), and labels, int32 [M]; and a dict from the reason to the number of boxes
        ignored.
    """
    ids, whole = _integers(rows, "id")
    image_of, _ = _integers(rows, "image_id", missing=-(2**63))
    category_of, _ = _integers(rows, "category_id", missing=-(2**63))
    xywh, is_box = _boxes(rows)
    crowd = np.array([bool(row.get("iscrowd")) for row in rows], bool)
    known = _position(known_ids, image_of) >= 0
    label = _position(category_ids, category_of)  # [R]
    image = _position(image_ids, image_of)  # [R], index among the usable images
    sound = known & (label >= 0) & is_box & (image >= 0)

    limits = np.zeros([len(rows), 4])  # width, height, width, height
    limits[sound] = np.tile(sizes[image[sound], ::-1], 2)
    with np.errstate(invalid="ignore", over="ignore"):
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)  # [R, 4]
        finite = (np.abs(xyxy) <= LARGEST).all(axis=1)
        clipped = np.clip(xyxy, 0, limits).astype(np.float32)  # [R, 4]
        beyond = np.maximum(-xyxy, xyxy - limits).max(axis=1)  # [R] pixels
    area = finite & (xywh[:, 2:] > 0).all(axis=1)
    inside = area & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    box = sound & ~crowd
    ignored = {
        CROWD: sound & crowd,
        NOT_FINITE: box & ~finite,
        NO_AREA: box & finite & ~area,
        OUTSIDE: box & area & ~inside,
    }

    def describe(key: str) -> Callable[[int], str]:
        def annotation(i: int) -> str:
            return f"annotation {ids[i] if whole[i] else f'number {i}'} ({key} {show(rows[i].get(key))})"

        return annotation

    findings = find(
        "annotation-image",
        ERROR,
        ~known,
        describe("image_id"),
        "annotations of an image that is not in `images`",
        "Remove them, or add the images.",
    )
    findings += find(
        "annotation-category",
        ERROR,
        label < 0,
        describe("category_id"),
        "annotations of a category that is not in `categories`",
        f"Use one of its ids: {show(category_ids.tolist())}.",
    )
    findings += find(
        "bbox",
        ERROR,
        ~is_box,
        describe("bbox"),
        "annotations whose `bbox` is not 4 numbers",
        "Expected [x, y, width, height] in pixels.",
    )
    findings += find(
        "annotation-id",
        NOTE,
        ~whole,
        describe("id"),
        "annotations without a whole number as `id`",
        "Harmless here, but pycocotools needs one for each.",
    )
    findings += find(
        "annotation-id-twice",
        NOTE,
        _repeated(ids, whole),
        describe("image_id"),
        "annotations with a duplicate id",
        "Harmless here, but other tools keep only one box per id: renumber them.",
    )
    for reason in (NOT_FINITE, NO_AREA, OUTSIDE):
        findings += find(
            reason.replace(" ", "-"),
            WARNING,
            ignored[reason],
            describe("bbox"),
            f"boxes {reason}",
            "They are ignored in training, but count against AP. A `bbox` is [x, y, width, height] in pixels.",
        )
    findings += find(
        "overhang",
        NOTE,
        box & inside & (beyond > OVERHANG),
        describe("bbox"),
        "boxes that reach more than a pixel beyond the image",
        "They are clipped. If there are many, `bbox` may hold x1, y1, x2, y2 instead of x, y, width, height, or the "
        "annotations were made on files of another size.",
    )

    valid = np.flatnonzero(box & inside)
    valid = valid[np.argsort(image[valid], kind="stable")]
    dropped = {reason: int(mask.sum()) for reason, mask in ignored.items() if mask.any()}
    return findings, image[valid], clipped[valid], label[valid].astype(np.int32), dropped


def show(value: Any) -> str:
    """Format a value as short JSON."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:  # nested too deeply to be written
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= 60 else text[:57] + "..."


def _integers(rows: Sequence[dict[str, Any]], key: str, missing: int = 0) -> tuple[npt.NDArray, npt.NDArray]:
    """The values of a key, int64 [n], and which are whole numbers, bool [n]; the others are `missing`."""
    values: list[Any] = [row.get(key) for row in rows]
    array = _array(values)
    if array.dtype.kind == "i" and array.shape == (len(values),) and not _has_booleans(values):
        return array.astype(np.int64), np.ones([len(values)], bool)
    whole = [_is_number(value) and abs(value) < 2**63 and value == int(value) for value in values]
    array = [int(value) if ok else missing for value, ok in zip(values, whole, strict=True)]
    return np.array(array, np.int64), np.array(whole, bool)


def _boxes(rows: Sequence[dict[str, Any]]) -> tuple[npt.NDArray, npt.NDArray]:
    """The `bbox`es, float64 [n, 4], and which are lists of four numbers, bool [n]; the others are zeros."""
    values: list[Any] = [row.get("bbox") for row in rows]
    array = _array(values)
    plain = array.dtype.kind in "if" and array.shape == (len(values), 4)
    if plain and not _has_booleans(itertools.chain.from_iterable(values)):
        return array.astype(np.float64), np.ones([len(values)], bool)
    is_box = [isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)) for value in values]
    array = [value if ok else [0.0] * 4 for value, ok in zip(values, is_box, strict=True)]
    return np.array(array, np.float64).reshape(-1, 4), np.array(is_box, bool)


def _array(values: list[Any]) -> npt.NDArray:
    """A JSON list as an array; an empty one if NumPy cannot represent it (lists of several lengths, huge numbers)."""
    try:
        return np.asarray(values)
    except (ValueError, OverflowError):
        return np.zeros([0], object)


def _has_booleans(values: Iterable[Any]) -> bool:
    """Whether any value is true or false, which NumPy converts to 1 or 0 among numbers."""
    return bool in set(map(type, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _is_text(value: str) -> bool:
    """Whether a str can be encoded as UTF-8: JSON may contain lone surrogates."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _codes(values: Iterable[Any]) -> npt.NDArray:
    """A number for each value, int64 [n], equal for equal strings."""
    codes: dict[str, int] = {}
    return np.array([codes.setdefault(str(value), len(codes)) for value in values], np.int64)


def _repeated(values: npt.NDArray, valid: npt.NDArray) -> npt.NDArray:
    """Which valid values equal an earlier valid value, bool [n]."""
    rows = np.flatnonzero(valid)
    first = np.unique(values[rows], return_index=True)[1]
    again: npt.NDArray = np.zeros([len(values)], bool)
    again[np.delete(rows, first)] = True
    return again


def _position(keys: npt.NDArray, values: npt.NDArray) -> npt.NDArray:
    """The first position of each value in `keys`, int64 [n], -1 if it is not there."""
    if not len(keys):
        return np.full([len(values)], -1)
    order = np.argsort(keys, kind="stable")
    at = order[np.minimum(np.searchsorted(keys, values, sorter=order), len(keys) - 1)]
    return np.where(keys[at] == values, at, -1)
