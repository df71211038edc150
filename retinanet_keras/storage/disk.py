"""Files that are whole whatever happens: written beside their place and moved into it, and locks on folders.

A kill or a full disk leaves what was there before; what an interrupted process wrote beside it is removed by the next
write to the same place.
"""

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
from pathlib import Path

from retinanet_keras.errors import InUse, RunError, UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("retinanet_keras")
SUFFIXES = (".weights.h5", ".keras", ".npz", ".png", ".jpg", ".zip")  # by which those who write choose a format
LOCK = ".lock"
AT_FDCWD, NO_REPLACE, EXCHANGE = -100, 1, 2  # of Linux's renameat2
_numbers = itertools.count()
_writing: set[str] = set()  # names of the unfinished files of this process
NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # a system or a file system without it


@contextlib.contextmanager
def replacing(path, like=None):
    """Write a file that takes the place of another only when it is whole.

    Args:
        path: the file's place, there already or not, in a folder that exists.
        like: a name by whose ending a writer is to choose the format; None: that of `path`.

    Yields:
        the path of a file beside it, to be written within the block. Where the block ends without an error the file is
        moved to `path` in one step; else it is removed.

    Raises:
        UserError: where the place is a folder.
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
def replacing_text(path, **kwargs):
    """Write a text file in UTF-8 that takes the place of another only when it is whole; its folder is made.

    Args:
        path: the file's place.
        kwargs: of `open`.

    Yields:
        the open file. Half a character, which JSON may name, becomes an escape, with which JSON is JSON again.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as partial,
        open(partial, "w", encoding="utf-8", errors="backslashreplace", **kwargs) as file,
    ):
        yield file


def write(path, content):
    """Replace a file's content, a str (stored as UTF-8) or bytes, in one step; see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def folder_beside(path):
    """An empty folder beside a path, to be renamed within the block, or removed at its end."""
    with _beside(path) as partial:
        partial.mkdir(parents=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(path):
    """Write a folder that takes the place of another only when it is whole.

    The other is there until then, and on Linux at every moment: the two are exchanged. Elsewhere, between two renames,
    neither is.

    Args:
        path: the folder's place, there already or not. What is there must be a folder.

    Yields:
        the path of an empty folder beside it, to be filled within the block.
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
def new_folder(choose):
    """Write a folder to a place that is free when it is whole; nothing is ever replaced.

    Args:
        choose: a function that gives a free place, called again where another process was faster.

    Yields:
        an object whose `path` is an empty folder to be filled within the block, and afterwards the place.
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
    path = None


def check_folder(path, option):
    """Check a place before the work whose results go there: a folder, or nothing yet, below folders.

    Args:
        path: the place.
        option: str. What named it, for the message.

    Raises:
        UserError: where it, or what it should lie in, is no folder.
    """
    path = Path(path)
    try:
        there = next((one for one in (path, *path.parents) if os.path.lexists(one)), None)
    except (OSError, ValueError) as error:  # a null character in it
        raise UserError(f"{option}: {str(path)!r} is no path ({error}). Name a folder") from None
    if there is not None and not there.is_dir():
        raise UserError(f"{option}: {there} is not a folder. Name another, or move that file away")


def check_file(path, option):
    """The same for a file: a file, or nothing yet, in a folder that is there or can be made."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder. Name a file in it")
    check_folder(path.parent, option)


@contextlib.contextmanager
def locked(folder, doing, *, name=LOCK, waiting=None):
    """Hold a folder for this process alone. The end of the process, however it comes, lets go of it.

    Where the file system has no locks a warning says so, once for each folder, and the block runs all the same.

    Args:
        folder: a folder that exists.
        doing: what this process does there, for the message to others, such as "training".
        name: of the lock's file; locks of different names exclude nobody.
        waiting: None, or a function that is given the holder before the lock is waited for.

    Yields:
        the file descriptor of the lock; a child process that inherits it holds the folder, too, until it ends.

    Raises:
        InUse: where another process holds it, and `waiting` is None.
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


def set_aside(path):
    """Copy a damaged file to the first free of NAME.damaged, NAME.damaged-2, ..., unless one of them is such a copy.

    The file itself stays: it is damaged and seen to be so until the caller replaces or removes it.

    Returns:
        the path of the copy.
    """
    path = Path(path)
    for number in itertools.count(1):
        place = path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}")
        if not place.exists():
            with replacing(place) as partial:
                shutil.copyfile(path, partial)
            return place
        if place.is_file() and filecmp.cmp(path, place, shallow=False):
            return place


def digest(*parts):
    """A short name of some content, the same for the same content: 16 hexadecimal digits of SHA-256.

    Args:
        parts: of the content; bytes, NumPy arrays, or what JSON can hold.
    """
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes) or hasattr(part, "tobytes"):
            part = part if isinstance(part, bytes) else f"{part.dtype}{part.shape}".encode() + part.tobytes()
        else:
            part = json.dumps(part, sort_keys=True).encode()
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:16]


def clear_remains(path):
    """Remove the unfinished files and folders that dead processes left beside a place they were writing to."""
    path = Path(path)
    prefix = _prefix(path)
    for other in path.parent.glob(f"{prefix}*"):
        process = re.match("[0-9]+", other.name.removeprefix(prefix))
        if process and other.name not in _writing and not _alive(int(process[0])):
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)


@contextlib.contextmanager
def _beside(path, like=None):
    """A path for an unfinished file of this process, in the same folder; those of dead processes are removed."""
    clear_remains(path)
    ending = next((suffix for suffix in SUFFIXES if os.fspath(like or path).endswith(suffix)), "")
    name = f"{_prefix(path)}{os.getpid()}-{next(_numbers)}.partial{ending}"
    _writing.add(name)
    try:
        yield path.with_name(name)
    finally:
        _writing.discard(name)


def _prefix(path):
    return f".{zlib.crc32(os.fsencode(path.name)):08x}-{zlib.crc32(socket.gethostname().encode()):08x}-"


def _alive(process):
    if process == os.getpid():
        return False  # a process of this number that ended
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _rename(old, new, flag):
    """Linux's renameat2; an OSError of NOT_HERE where there is none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flag):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(new))


def _flush(path):
    """Bring a file to the disk, so that a crash of the machine cannot leave its name without its content."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_place(path):
    """A RunError where something else is in the place of a folder, or of one above it."""
    for place in (path, *path.parents):
        if place.is_dir():
            return
        if place.exists() or place.is_symlink():
            raise RunError(f"{place} is not a folder, and {path} has to be one. Choose another folder with --workdir")
