"""Untrusted zip archives: their unpacked size is checked before anything is unpacked."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import BinaryIO

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the methods used for files of weights
END, LONGEST_END = b"PK\x05\x06", 22 + 2**16  # the record at the end of an archive, with its comment
ALLOWANCE, EXPANSION = 2**26, 20  # weights are noise: compressed they keep more than half of their size
# What the zipfile module raises for damaged archives.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


class Refused(Exception):
    """Why an archive is not unpacked, as the rest of a sentence that begins with its path."""


def most(size: int) -> int:
    """The largest number of bytes that the content of a file of `size` bytes may take in memory."""
    return ALLOWANCE + EXPANSION * size


def opened(file: BinaryIO) -> zipfile.ZipFile:
    """Open a binary file as a ZipFile.

    Raises:
        Refused: if its members are much larger than the file, or use a compression that no file of weights uses.
        one of DAMAGE: if it is not a zip archive.
    """
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    methods = {member.compress_type for member in members} - set(METHODS)
    if methods:
        raise Refused(f"has members compressed by zip's method {min(methods)}. Unpack it and pack it again with zip.")
    size = file.seek(0, 2)
    file.seek(max(0, size - LONGEST_END))
    end = file.read()
    stated = int.from_bytes(end[end.rfind(END) + 10 :][:2], "little")
    # zipfile does not check this: a damaged length in the directory makes other members part of a comment.
    if stated not in (len(members), 2**16 - 1):  # the latter: the number is stored elsewhere (zip64)
        raise zipfile.BadZipFile(f"the directory has {len(members)} members of {stated}")
    total = sum(member.file_size for member in members)
    if total > most(size):
        raise Refused(
            f"has {size} bytes that would unpack to {total}, more than weights compress to; refused. Get the file "
            "from another source."
        )
    return archive
