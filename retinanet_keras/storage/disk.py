"""Atomic replacement of files and folders, written beside their path and moved there, and locks on folders.

A kill or a full disk leaves the earlier content in place. What an interrupted process wrote beside it is removed by the
next write to the same path.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from retinanet_keras.errors import InUse, RunError, UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("retinanet_keras")
SUFFIXES = (".weights.h5", ".keras", ".npz", ".png", ".jpg", ".zip")  # by which writers choose a format
LOCK = ".lock"
AT_FDCWD, NO_REPLACE, EXCHANGE = -100, 1, 2  # of Linux's renameat2
_numbers = itertools.count()
_writing: set[str] = set()  # names of the unfinished files of this process
NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # not supported by the system or the file system
AnyPath = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(path: AnyPath, like: AnyPath | None = None) -> Iterator[Path]:
    """Write a file that replaces another only when it is complete.

    Args:
        path: path of the file, which may exist, in a folder that exists.
        like: a name whose suffix tells a writer the format. None: that of `path`.

    Yields:
        the path of a file beside it, to write within the block. If the block ends without an error, the file is moved
        to `path` in one step; otherwise it is removed.

    Raises:
        UserError: if `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is written there. Remove or rename it")
    with _beside(path, like) as partial:
        try:
            yield partial
            _flush(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_text(path: AnyPath, **kwargs: Any) -> Iterator[Any]:
    """Write a text file in UTF-8 that replaces another only when it is complete; its folder is created.

    Args:
        path: path of the file.
        kwargs: further arguments of `open`.

    Yields:
        the open file. A lone surrogate, which JSON can contain, is written as an escape, which is valid JSON.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as partial,
        open(partial, "w", encoding="utf-8", errors="backslashreplace", **kwargs) as file,
    ):
        yield file


def write(path: AnyPath, content: str | bytes) -> None:
    """Replace a file's content, a str (stored as UTF-8) or bytes, in one step; see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Create an empty folder beside a path, to be renamed within the block, or removed at its end."""
    with _beside(path) as partial:
        partial.mkdir(parents=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(path: AnyPath) -> Iterator[Path]:
    """Write a folder that replaces another only when it is complete.

    On Linux the two are exchanged, so that one of them is there at any moment. Elsewhere neither is between two
    renames.

    Args:
        path: path of the folder, which may exist; it must not be a file.

    Yields:
        the path of an empty folder beside it, to fill within the block.
    """
    path = Path(path)
    with folder_beside(path) as partial:
        yield partial
        try:
            if path.exists():
                _rename(partial, path, EXCHANGE)  # the old one is at `partial` then, and removed
            else:
                os.rename(partial, path)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            old = partial.with_name(f"{partial.name}.old")
            os.rename(path, old)
            os.rename(partial, path)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_folder(choose: Callable[[], Path]) -> Iterator[_Made]:
    """Write a folder and move it to an unused path when it is complete; nothing is ever replaced.

    Args:
        choose: a function that returns an unused path; called again if another process took it in the meantime.

    Yields:
        an object whose `path` is an empty folder to fill within the block, and afterwards the folder's final path.
    """
    made = _Made()
    with folder_beside(choose()) as partial:
        made.path = partial
        yield made
        while True:
            place = choose()
            try:
                _rename(partial, place, NO_REPLACE)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise
                try:
                    place.mkdir()
                except FileExistsError:
                    continue
                os.rename(partial, place)  # over an empty folder
            made.path = place
            return


class _Made:
    path: Path | None = None


def check_folder(path: AnyPath, option: str) -> None:
    """Check, before the work whose results go there, that a path is a folder or can become one.

    Args:
        path: the path.
        option: str. The option that named it, for the message.

    Raises:
        UserError: if the path or one of its parents exists and is not a folder.
    """
    path = Path(path)
    try:
        there = next((one for one in (path, *path.parents) if os.path.lexists(one)), None)
    except (OSError, ValueError) as error:  # a null character in it
        raise UserError(f"{option}: {str(path)!r} is not a path ({error}). Name a folder") from None
    if there is not None and not there.is_dir():
        raise UserError(f"{option}: {there} is not a folder. Name another, or move that file away")


def check_file(path: AnyPath, option: str) -> None:
    """Check that a path is a file or can become one; arguments and errors are those of `check_folder`."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder. Name a file in it")
    check_folder(path.parent, option)


@contextlib.contextmanager
def locked(
    folder: AnyPath, doing: str, *, name: str = LOCK, waiting: Callable[[str], Any] | None = None
) -> Iterator[int]:
    """Lock a folder for this process; the lock is released when the process ends, in whatever way.

    If the file system has no locks, a warning is logged and the block runs without one.

    Args:
        folder: path of a folder that exists.
        doing: str. What this process does there, for the message to others, such as "training".
        name: str. Name of the lock file; locks of different names are independent.
        waiting: a function that is called with the holder before waiting for the lock. None: do not wait.

    Yields:
        the file descriptor of the lock; a child process that inherits it holds the lock, too, until it ends.

    Raises:
        InUse: if another process holds the lock, and `waiting` is None.
    """
    path = Path(folder, name)
    if path.is_dir():
        raise UserError(f"{path} is a folder, and the lock of {folder} is a file there. Remove or rename it")
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no file locks on this system")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(500).strip() or "another process"
            if waiting is None:
                raise InUse(
                    f"{folder} is in use: {holder}. Two at once would overwrite each other's files. Wait for it to "
                    "end, stop it, or use another folder"
                ) from None
            waiting(holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): take care that no other process works in it", folder, error.strerror or error
            )
        file.seek(0)
        file.truncate()
        file.write(
            f"{doing}, process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        file.flush()
        yield file.fileno()


def set_aside(path: AnyPath) -> Path:
    """Copy a damaged file to the first unused of NAME.damaged, NAME.damaged-2, ..., unless there is a copy already.

    The file itself is not changed, so it is recognized as damaged until the caller replaces or removes it.

    Returns:
        the path of the copy.
    """
    path = Path(path)
    number = 1
    while True:
        place = path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}")
        if not place.exists():
            with replacing(place) as partial:
                shutil.copyfile(path, partial)
            return place
        if place.is_file() and filecmp.cmp(path, place, shallow=False):
            return place
        number += 1


def digest(*parts: Any) -> str:
    """A short digest of some content: 16 hexadecimal digits of SHA-256.

    Args:
        parts: parts of the content: bytes, NumPy arrays, or JSON-able values.
    """
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes) or hasattr(part, "tobytes"):
            part = part if isinstance(part, bytes) else f"{part.dtype}{part.shape}".encode() + part.tobytes()
        else:
            part = json.dumps(part, sort_keys=True).encode()
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:16]


def clear_remains(path: AnyPath) -> None:
    """Remove the unfinished files and folders that dead processes left beside a path they were writing to."""
    path = Path(path)
    prefix = _prefix(path)
    for other in path.parent.glob(f"{prefix}*"):
        process = re.match("[0-9]+", other.name.removeprefix(prefix))
        if process and other.name not in _writing and not _alive(int(process[0])):
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)


@contextlib.contextmanager
def _beside(path: Path, like: AnyPath | None = None) -> Iterator[Path]:
    """A path for an unfinished file of this process, in the same folder; those of dead processes are removed."""
    clear_remains(path)
    ending = next((suffix for suffix in SUFFIXES if os.fspath(like or path).endswith(suffix)), "")
    name = f"{_prefix(path)}{os.getpid()}-{next(_numbers)}.partial{ending}"
    _writing.add(name)
    try:
        yield path.with_name(name)
    finally:
        _writing.discard(name)


def _prefix(path: Path) -> str:
    return f".{zlib.crc32(os.fsencode(path.name)):08x}-{zlib.crc32(socket.gethostname().encode()):08x}-"


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # an earlier process with the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _rename(old: Path, new: Path, flag: int) -> None:
    """Rename by Linux's renameat2; raise an OSError of NOT_HERE if there is none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flag):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(new))


def _flush(path: Path) -> None:
    """Flush a file to disk, so that a crash of the machine cannot leave its name without its content."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_place(path: Path) -> None:
    """Raise a RunError if a path or one of its parents exists and is not a folder."""
    for place in (path, *path.parents):
        if place.is_dir():
            return
        if place.exists() or place.is_symlink():
            raise RunError(f"{place} is not a folder, and {path} has to be one. Choose another folder with --workdir")
