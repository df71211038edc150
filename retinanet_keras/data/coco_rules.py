"""What COCO's annotation JSON must hold, each rule once.

The functions take the JSON's lists and return what they found wrong beside arrays of what is usable, so that loading
can refuse a file and the dataset check can report all of its faults.
"""

import itertools
import json
from dataclasses import dataclass

import numpy as np

from retinanet_keras.storage.printable import printable

ERROR, WARNING, NOTE = "error", "warning", "note"  # loading stops; loading logs it; only the dataset check tells
CROWD, NOT_FINITE, NO_AREA, OUTSIDE = "crowd", "not finite", "without area", "outside the image"
SHOWN = 3  # offenders named in a message
LONGEST = 300  # characters of such a name
LARGEST = 1e15  # of a coordinate: its square, and sums of such, are finite in float32, too
OVERHANG = 1.0  # pixels beyond the image that annotation tools reach by rounding


@dataclass(frozen=True)
class Finding:
    """One kind of fault: its rule's name, how grave it is, how many offenders, a few of them, what to do."""

    rule: str
    level: str
    count: int
    what: str
    examples: tuple[str, ...] = ()
    fix: str = ""

    def __str__(self):
        more = ", ..." if self.count > len(self.examples) else ""
        examples = f": {', '.join(self.examples)}{more}" if self.examples else ""
        return f"{self.count} {self.what}{examples}. {self.fix}".rstrip()


def find(rule, level, offends, show, what, fix=""):
    """A list of the one Finding where any of `offends` (bool [n]) holds, else []. `show(i)` tells what i is."""
    offenders = np.flatnonzero(offends)
    examples = tuple(printable(show(int(i)), LONGEST) for i in offenders[:SHOWN])
    return [Finding(rule, level, len(offenders), what, examples, fix)] if len(offenders) else []


def check_lists(tree):
    """The lists `images`, `categories` and `annotations` of a JSON object; the last may be absent or empty."""
    findings, lists = [], {}
    for key in ("images", "categories", "annotations"):
        value = tree.get(key)
        if value is None and key == "annotations":
            value = []
        if not isinstance(value, list) or (not value and key != "annotations"):
            got = f"it is {show(value)}" if key in tree else f"the file has {show(list(tree)[:8])}"
            fix = f"Expected a list of JSON objects; {got}. Is this COCO's format for detection?"
            findings.append(Finding("key", ERROR, 1, f"list that is missing or empty: `{key}`", (), fix))
            value = []
        lists[key] = [entry if isinstance(entry, dict) else {} for entry in value]
    return findings, lists


def check_categories(rows):
    """Findings, category ids int64 [K] in increasing order, names [K]."""
    ids, whole = _integers(rows, "id")
    names = [row.get("name") for row in rows]
    named = np.array([isinstance(name, str) for name in names], bool)
    broken = np.array([isinstance(name, str) and not _is_text(name) for name in names], bool)
    usable = whole & named & ~broken
    again = _repeated(ids, whole)
    findings = find(
        "category", ERROR, ~usable, lambda i: f"categories[{i}] is {show(rows[i])}",
        "categories without a whole number as `id` and a text as `name`",
        "Add them; a text has no halves of characters (\\ud800 to \\udfff alone).",
    )  # fmt: skip
    findings += find(
        "category-id-twice", ERROR, again, lambda i: f"{ids[i]} ({names[i]})",
        "categories whose id another has", "Give each category its own id.",
    )  # fmt: skip
    findings += find(
        "category-name-twice", NOTE, _repeated(_codes(names), named), lambda i: names[i],
        "categories whose name another has", "Results per class are told apart by name: rename one.",
    )  # fmt: skip
    kept = np.flatnonzero(usable & ~again)
    kept = kept[np.argsort(ids[kept], kind="stable")]
    return findings, ids[kept], tuple(names[i] for i in kept)


def check_images(rows):
    """Findings, every whole id int64 [I]; of the usable images ids int64 [N], file names, sizes int32 [N, 2] (h, w)."""
    ids, whole = _integers(rows, "id")
    again = _repeated(ids, whole)
    names = [row.get("file_name") for row in rows]
    named = np.array([isinstance(name, str) and name != "" for name in names], bool)
    heights, tall = _integers(rows, "height")
    widths, wide = _integers(rows, "width")
    sizes = np.stack([heights, widths], axis=1)  # [I, 2]
    sized = tall & wide & (sizes > 0).all(axis=1) & (sizes < 2**31).all(axis=1)
    findings = find(
        "image-id", ERROR, ~whole, lambda i: f"images[{i}] has {show(rows[i].get('id'))}",
        "images without a whole number as `id`", "Annotations refer to it as `image_id`.",
    )  # fmt: skip
    findings += find(
        "image-id-twice", ERROR, again, lambda i: f"{ids[i]} ({names[i]})",
        "images whose id another has", "Give each image its own id, and its annotations that `image_id`.",
    )  # fmt: skip
    findings += find(
        "file-name", ERROR, ~named, lambda i: f"images[{i}] has {show(names[i])}",
        "images without a `file_name`", "It is the path of the file inside the image folder.",
    )  # fmt: skip
    findings += find(
        "image-size", ERROR, ~sized, lambda i: f"{names[i]} has {show([rows[i].get('width'), rows[i].get('height')])}",
        "images without whole numbers above 0 as `width` and `height`", "Write the files' sizes.",
    )  # fmt: skip
    findings += find(
        "file-twice", NOTE, _repeated(_codes(names), named), lambda i: names[i],
        "images whose file another has", "The same picture counts more than once.",
    )  # fmt: skip
    kept = np.flatnonzero(whole & named & sized & ~again)
    return findings, ids[whole], ids[kept], [names[i] for i in kept], sizes[kept].astype(np.int32)


def check_annotations(rows, known_ids, image_ids, sizes, category_ids):
    """Check the annotations against the images and categories.

    Args:
        rows: the JSON's list.
        known_ids: int64 [I], the ids in `images`, usable or not.
        image_ids, sizes: int64 [N] and int32 [N, 2] (height, width) of the usable images.
        category_ids: int64 [K].

    Returns:
        findings; of the M usable boxes the index of their image int64 [M] in increasing order, boxes float32 [M, 4]
        (x1, y1, x2, y2, clipped), labels int32 [M]; and a dict from the reason to the number of boxes ignored.
    """
    own, whole = _integers(rows, "id")
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

    def tell(key):
        def one(i):
            return f"annotation {own[i] if whole[i] else f'number {i}'} ({key} {show(rows[i].get(key))})"

        return one

    findings = find(
        "annotation-image", ERROR, ~known, tell("image_id"),
        "annotations of an image that is not in `images`", "Remove them, or add the images.",
    )  # fmt: skip
    findings += find(
        "annotation-category", ERROR, label < 0, tell("category_id"),
        "annotations of a category that is not in `categories`", f"The ids there: {show(category_ids.tolist())}.",
    )  # fmt: skip
    findings += find(
        "bbox", ERROR, ~is_box, tell("bbox"),
        "annotations whose `bbox` is not 4 numbers", "Expected [x, y, width, height] in pixels.",
    )  # fmt: skip
    findings += find(
        "annotation-id", NOTE, ~whole, tell("id"),
        "annotations without a whole number as `id`", "Harmless here, but pycocotools needs one for each.",
    )  # fmt: skip
    findings += find(
        "annotation-id-twice", NOTE, _repeated(own, whole), tell("image_id"),
        "annotations whose id another has", "Harmless here, but other tools keep one box of an id: renumber them.",
    )  # fmt: skip
    for reason in (NOT_FINITE, NO_AREA, OUTSIDE):
        findings += find(
            reason.replace(" ", "-"), WARNING, ignored[reason], tell("bbox"),
            f"boxes {reason}", "They are ignored in training, but count against AP. A `bbox` is [x, y, width, "
            "height] in pixels.",
        )  # fmt: skip
    findings += find(
        "overhang", NOTE, box & inside & (beyond > OVERHANG), tell("bbox"),
        "boxes that reach more than a pixel beyond the image",
        "They are clipped. Many of them mean that `bbox` holds x1, y1, x2, y2 in place of x, y, width, height, "
        "or that the annotations were made on files of another size.",
    )  # fmt: skip

    kept = np.flatnonzero(box & inside)
    kept = kept[np.argsort(image[kept], kind="stable")]
    dropped = {reason: int(mask.sum()) for reason, mask in ignored.items() if mask.any()}
    return findings, image[kept], clipped[kept], label[kept].astype(np.int32), dropped


def show(value):
    """A value as short JSON."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:  # it may be nested as deeply as can be read
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= 60 else text[:57] + "..."


def _integers(rows, key, missing=0):
    """int64 [n] and bool [n], which of the values are whole numbers; the others hold `missing`."""
    values = [row.get(key) for row in rows]
    array = _array(values)
    if array.dtype.kind == "i" and array.shape == (len(values),) and not _has_booleans(values):
        return array.astype(np.int64), np.ones([len(values)], bool)
    whole = [_is_number(value) and abs(value) < 2**63 and value == int(value) for value in values]
    array = [int(value) if ok else missing for value, ok in zip(values, whole, strict=True)]
    return np.array(array, np.int64), np.array(whole, bool)


def _boxes(rows):
    """float64 [n, 4] and bool [n], which `bbox`es are lists of four numbers; the others hold zeros."""
    values = [row.get("bbox") for row in rows]
    array = _array(values)
    plain = array.dtype.kind in "if" and array.shape == (len(values), 4)
    if plain and not _has_booleans(itertools.chain.from_iterable(values)):
        return array.astype(np.float64), np.ones([len(values)], bool)
    is_box = [isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)) for value in values]
    array = [value if ok else [0.0] * 4 for value, ok in zip(values, is_box, strict=True)]
    return np.array(array, np.float64).reshape(-1, 4), np.array(is_box, bool)


def _array(values):
    """NumPy's array of a JSON list, an empty one where it has none (lists of several lengths, huge numbers)."""
    try:
        return np.asarray(values)
    except (ValueError, OverflowError):
        return np.zeros([0], object)


def _has_booleans(values):
    """Whether any is true or false, which NumPy takes for 1 or 0 among numbers."""
    return bool in set(map(type, values))


def _is_number(value):
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _is_text(value):
    """Whether UTF-8 can write a str: JSON may name half a character."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _codes(values):
    """int64 [n]: equal for equal texts."""
    codes = {}
    return np.array([codes.setdefault(str(value), len(codes)) for value in values], np.int64)


def _repeated(values, valid):
    """bool [n]: a valid value that an earlier valid one equals."""
    rows = np.flatnonzero(valid)
    first = np.unique(values[rows], return_index=True)[1]
    again = np.zeros([len(values)], bool)
    again[np.delete(rows, first)] = True
    return again


def _position(keys, values):
    """int64 [n]: where each value stands first in `keys`, -1 where it does not."""
    if not len(keys):
        return np.full([len(values)], -1)
    order = np.argsort(keys, kind="stable")
    at = order[np.minimum(np.searchsorted(keys, values, sorter=order), len(keys) - 1)]
    return np.where(keys[at] == values, at, -1)
