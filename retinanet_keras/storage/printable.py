"""Names of strangers, shown as text: a file or a class may be called by what a terminal obeys, or by a whole book."""

import unicodedata

ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of controls, halves of characters, line breaks
JOINERS = "\u200c\u200d"  # of category Cf, and needed to write Persian and some emoji


def printable(value, most=None, keep=""):
    r"""Text that a terminal, a picture, a table and a page show as it is, and that UTF-8 can write.

    Args:
        value: shown by `str`.
        most: characters, of which the last is then an ellipsis; None: any number.
        keep: control characters to be left as they are, such as "\n".

    Returns:
        str; controls are written as in Python (`\x1b`, `\u202e`), bytes of a file's name that are not UTF-8 as `\xff`.
    """
    text = str(value)
    text = text if most is None else text[: most + 1]
    if not text.isprintable():
        text = "".join(_shown(character, keep) for character in text)
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


def _shown(character, keep):
    if character in keep or character in JOINERS or unicodedata.category(character) not in ESCAPED:
        return character
    if "\udc80" <= character <= "\udcff":  # as Python reads names that are not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
