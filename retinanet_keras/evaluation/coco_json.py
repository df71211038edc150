"""Reading JSON in COCO's formats, and checking it entry by entry."""

from __future__ import annotations

import collections
import numbers
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from retinanet_keras.data import coco_rules
from retinanet_keras.errors import DataError
from retinanet_keras.storage import strict_json
from retinanet_keras.storage.printable import printable


def read_json(path: str | os.PathLike[str]) -> Any:
    """The tree of a JSON file; a DataError names the file."""
    try:
        return strict_json.read(path, strict=False)  # strict would take seconds for millions of detections
    except (OSError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except strict_json.JsonError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def check_entries(entries: Iterable[Any], keys: Sequence[str], where: str) -> None:
    """Check that every entry is a dict with these keys, `bbox` a list of four numbers."""
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


def check_known(times: Mapping[Any, int], known: Collection[Any], where: str, what: str) -> None:
    """Check that every id is known; a DataError lists unknown ids and the number of entries that have them.

    Args:
        times: {id: number of entries that have it}.
        known: the existing ids.
        where: str. What the entries belong to, for the message.
        what: str. The kind of id, for the message.
    """
    unknown = {key: count for key, count in times.items() if key not in known}
    if unknown:
        shown = ", ".join(_named(i) for i in list(unknown)[:5]) + (", ..." if len(unknown) > 5 else "")
        have = f"such as {_named(next(iter(known)))}" if known else "none at all"
        raise DataError(
            f"{where}: {sum(unknown.values())} of {sum(times.values())} entries have an unknown {what}: {shown} "
            f"({len(unknown)} in all). The annotations have {len(known)}, {have}. Do both belong to one split?"
        )


def count(ids: Iterable[Any], where: str, what: str) -> collections.Counter:
    """Count ids, in the order of first appearance; a DataError if one is neither a number nor a string."""
    ids = list(ids)
    if {bool, list, dict, type(None)} & set(map(type, ids)):  # true would pass for 1
        raise DataError(f"{where}: expected each {what} as a number or string")
    return collections.Counter(ids)


def numbered(entries: Sequence[Any], where: str) -> dict[Any, int]:
    """{id: its index in the order of ids} of a list of dicts."""
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    odd = sum(not (is_number(i) or isinstance(i, str)) for i in ids)
    if odd:
        raise DataError(f"{where}: expected objects with a number or string as `id`, got {odd} without")
    double = [i for i, times in collections.Counter(ids).items() if times > 1]
    if double:
        raise DataError(f"{where}: expected each id once, {len(double)} come more often, such as {_named(double[0])}")
    return {key: index for index, key in enumerate(sorted(ids, key=lambda i: (isinstance(i, str), i)))}


def finite(value: Any) -> bool:
    """Whether a value is a number that float32 can compute with."""
    return is_number(value) and abs(value) <= coco_rules.LARGEST


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _named(id_: Any) -> str:
    return printable(repr(id_), 60)


def kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
