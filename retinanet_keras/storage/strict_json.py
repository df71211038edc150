"""JSON of strangers: what cannot be read is told in one sentence, and reading takes no more than the text is worth."""

import collections
import json
from pathlib import Path

LARGEST = 2**63 - 1  # of an integer, as NumPy and COCO's tools hold it


class JsonError(ValueError):
    """Text that is no JSON, or JSON that is refused; the message goes after "FILE is not valid JSON: "."""


def parse(text, strict=True):
    """The value of a JSON text.

    Args:
        text: str or bytes in UTF-8; a byte-order mark is skipped.
        strict: also refuse keys that occur twice in an object, and integers of more than 64 bits. Costs time in
            large files.

    Raises:
        JsonError: where it is no JSON, is nested deeper than Python reads, or has a number that no file needs.
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
    except ValueError:  # of int, past Python's limit of digits
        raise JsonError("a number has thousands of digits") from None


def read(path, strict=True):
    """`parse` of a file.

    Raises:
        JsonError, OSError.
    """
    return parse(Path(path).read_bytes(), strict)


def _once(pairs):
    tree = dict(pairs)
    if len(tree) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise JsonError(f"the key {twice[:60]!r} occurs twice in one object. Remove one of the two")
    return tree


def _integer(digits):
    value = int(digits) if len(digits) <= 20 else LARGEST + 1
    if abs(value) > LARGEST:
        raise JsonError(f"the integer {digits[:20]}{'...' if len(digits) > 20 else ''} needs more than 64 bits")
    return value
