"""Untrusted text made printable: names of files and classes may contain control sequences, or be very long."""

from __future__ import annotations

import unicodedata

ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of controls, surrogates, line breaks
JOINERS = "\u200c\u200d"  # of category Cf, and needed to write Persian and some emoji


def printable(value: object, most: int | None = None, keep: str = "") -> str:
    r"""Text that is safe in a terminal, picture, table or page, and can be encoded as UTF-8.

    Args:
        value: converted by `str`.
        most: int. Largest number of characters; a longer text ends in an ellipsis. None: any number.
        keep: str. Control characters to leave unchanged, such as "\n".

    Returns:
        str; controls are written as in Python (`\x1b`, `\u202e`), bytes of a file's name that are not UTF-8 as `\xff`.
    """
    text = str(value)
    text = text if most is None else text[: most + 1]
    if not text.isprintable():
        text = "".join(_shown(character, keep) for character in text)
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


def _shown(character: str, keep: str) -> str:
    if character in keep or character in JOINERS or unicodedata.category(character) not in ESCAPED:
        return character
    if "\udc80" <= character <= "\udcff":  # as Python reads names that are not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
