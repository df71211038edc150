"""Untrusted JSON: errors in one sentence, and limits on nesting and on the size of numbers."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import Any

LARGEST = 2**63 - 1  # of an integer, as NumPy and COCO's tools hold it


class JsonError(ValueError):
    """Text that is no JSON, or JSON that is refused; the message goes after "FILE is not valid JSON: "."""


def parse(text: str | bytes, strict: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: str or bytes in UTF-8; a byte-order mark is skipped.
        strict: bool. Also reject keys that occur twice in an object, and integers of more than 64 bits; slow for large
            files.

    Raises:
        JsonError: if it is not JSON, is nested too deeply for Python, or has a number of thousands of digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        text = text.removeprefix("\ufeff")
        return json.loads(text, object_pairs_hook=_once, parse_int=_integer) if strict else json.loads(text)
    except UnicodeDecodeError as error:
        raise JsonError(f"byte {error.start} is not UTF-8. Save it as UTF-8") from None
    except RecursionError:
        raise JsonError("lists or objects are nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except JsonError:
        raise
    except ValueError:  # of int: Python limits the number of digits
        raise JsonError("a number has thousands of digits") from None


def read(path: str | os.PathLike[str], strict: bool = True) -> Any:
    """`parse` for a file.

    Raises:
        JsonError, OSError.
    """
    return parse(Path(path).read_bytes(), strict)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise JsonError(f"the key {twice[:60]!r} occurs twice in one object. Remove one of the two")
    return tree


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else LARGEST + 1
    if abs(value) > LARGEST:
        raise JsonError(f"the integer {digits[:20]}{'...' if len(digits) > 20 else ''} needs more than 64 bits")
    return value
