"""JSON in COCO's formats: read, and checked entry by entry."""

import collections
import numbers

from retinanet_keras.data import coco_rules
from retinanet_keras.errors import DataError
from retinanet_keras.storage import strict_json
from retinanet_keras.storage.printable import printable


def read_json(path):
    """The tree of a JSON file, or a DataError that names it."""
    try:
        return strict_json.read(path, strict=False)  # which for millions of detections would take seconds
    except (OSError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except strict_json.JsonError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def check_entries(entries, keys, where):
    """Every entry is a dict with these keys, `bbox` a list of four numbers."""
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{where}: entry {position}: expected an object, got {kind(entry)}")
        missing = [key for key in keys if key not in entry]
        if missing:
            raise DataError(f"{where}: entry {position} lacks {', '.join(missing)}")
        box = entry["bbox"]
        if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(map(is_number, box))):
            raise DataError(
                f"{where}: entry {position}: expected bbox as a list of four numbers, got {coco_rules.show(box)}"
            )


def check_known(times, known, where, what):
    """Every id is known, or a DataError says which are not and how many entries have them.

    Args:
        times: {id: entries that have it}.
        known: the ids that there are.
    """
    unknown = {key: count for key, count in times.items() if key not in known}
    if unknown:
        shown = ", ".join(_named(i) for i in list(unknown)[:5]) + (", ..." if len(unknown) > 5 else "")
        have = f"such as {_named(next(iter(known)))}" if known else "none at all"
        raise DataError(
            f"{where}: {sum(unknown.values())} of {sum(times.values())} entries have an unknown {what}: {shown} "
            f"({len(unknown)} in all). The annotations have {len(known)}, {have}. Do both belong to one split?"
        )


def count(ids, where, what):
    """{id: how often it comes}, in the order of first appearance, or a DataError where one can be no id."""
    ids = list(ids)
    if {bool, list, dict, type(None)} & set(map(type, ids)):  # true would pass for 1
        raise DataError(f"{where}: expected each {what} as a number or string")
    return collections.Counter(ids)


def numbered(entries, where):
    """{id: its place in the order of ids} of a list of dicts."""
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    odd = sum(not (is_number(i) or isinstance(i, str)) for i in ids)
    if odd:
        raise DataError(f"{where}: expected objects with a number or string as `id`, got {odd} without")
    double = [i for i, times in collections.Counter(ids).items() if times > 1]
    if double:
        raise DataError(f"{where}: expected each id once, {len(double)} come more often, such as {_named(double[0])}")
    return {key: index for index, key in enumerate(sorted(ids, key=lambda i: (isinstance(i, str), i)))}


def finite(value):
    """Whether it is a number with which float32 can compute."""
    return is_number(value) and abs(value) <= coco_rules.LARGEST


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _named(id_):
    return printable(repr(id_), 60)


def kind(value):
    return "nothing" if value is None else type(value).__name__
