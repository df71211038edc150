"""Keras's files of weights: written in one step with a checksum, and checked before they are read.

A `.keras` file is a zip archive, whose members have checksums of their own. A `.weights.h5` file is given one: after
its end, where HDF5 does not look, follow MARK and the SHA-256 of all bytes before it, and an attribute tells that they
have to be there. Both survive copying and renaming. Files without a checksum are read, too.
"""

import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from retinanet_keras.errors import UserError
from retinanet_keras.storage import archives, disk, strict_json

MARK = b"\nretinanet_keras SHA-256 of all above: "
SEALED = "retinanet_keras_checksum"  # attribute of a .weights.h5 file that ends in MARK and a checksum
CONFIG, WEIGHTS = "config.json", "model.weights.h5"  # of Keras, in a .keras file
DEEPEST = 100  # of lists and objects in CONFIG; those of models are some 20 deep, and Keras reads them recursively
DAMAGE = (KeyError, OSError, RuntimeError, TypeError, ValueError)  # what h5py raises for damaged files
AGAIN = "Copy or download it again, or write it again from what it was made of."


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Any]:
    """Write a `.keras` or `.weights.h5` file that takes the place of another only when it is whole.

    Args:
        path: the file's place, there already or not. What Keras does not write as one file on this machine (addresses
            such as gs://, folders, other suffixes) is left to it.

    Yields:
        where to write within the block: a file beside `path` that is moved there at the end.
    """
    path = os.fspath(path)
    target = Path(os.path.realpath(path))  # a link stays one
    alone = path.endswith((".keras", ".weights.h5")) and "://" not in path
    if not alone or target.is_dir() or not target.parent.is_dir():  # Keras's own error tells of the last two
        yield path
        return
    with disk.replacing(target, like=path) as partial:
        yield partial
        if path.endswith(".weights.h5"):
            _seal(partial)


def may_replace(path: str | os.PathLike) -> bool:
    """Ask at the terminal whether a file, if it is there, may be overwritten: `overwrite=False` of Keras."""
    while os.path.exists(path):
        answer = input(f"{path} already exists. Overwrite it? [y/n] ").strip().lower()
        if answer in ("y", "n"):
            return answer == "y"
    return True


def check(path: str | os.PathLike) -> None:
    """Reject a damaged `.keras` or `.h5` file; other files pass.

    Raises:
        UserError: If it is not such a file, is truncated or changed, or would take far more memory than it has bytes.
        OSError: If it cannot be opened.
    """
    path = os.fspath(path)
    if "://" in path or not path.endswith((".keras", ".h5")) or os.path.isdir(path):
        return
    with open(path, "rb") as file:
        if path.endswith(".keras"):
            _check_archive(path, file)
        else:
            _check_hdf5(path, file)


def check_store(store: Any) -> None:
    """Reject the weights of a damaged `.keras` file while Keras loads it.

    Keras reads the member of the archive whole, which compares its checksum, and where that fails reads it in parts,
    which does not.
    """
    archive = getattr(store, "archive", None)
    if archive is None:
        return
    damaged = archive.testzip()
    if damaged:
        raise _damaged(archive.filename, f"{damaged} in it is not what its checksum says")


def _seal(path):
    with h5py.File(path, "a") as file:
        file.attrs[SEALED] = True
    with open(path, "r+b") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0, os.SEEK_END)
        file.write(MARK + digest)


def _check_archive(path, file):
    try:
        archive = archives.opened(file)
        missing = {CONFIG, WEIGHTS} - set(archive.namelist())
        if missing:
            raise UserError(f"{path} is no model of Keras: {' and '.join(sorted(missing))} is missing in it. {AGAIN}")
        for name in archive.namelist():
            content = archive.read(name)  # and compare its checksum
            if name == CONFIG:
                _check_depth(path, strict_json.parse(content, strict=False))
            if name == WEIGHTS:
                _check_datasets(path, io.BytesIO(content), len(content))
    except archives.Refused as error:
        raise UserError(f"{path} {error}") from None
    except strict_json.JsonError as error:
        raise _damaged(path, f"{CONFIG} in it is not valid JSON, {error}") from None
    except UserError:
        raise
    except archives.DAMAGE as error:
        raise _damaged(path, _words(error)) from error


def _check_depth(path, tree):
    level = [tree]
    for _ in range(DEEPEST):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = list(itertools.chain.from_iterable(inside))
    if any(isinstance(one, (dict, list)) for one in level):
        raise _damaged(path, f"lists and objects in its {CONFIG} are nested more than {DEEPEST} deep")


def _check_hdf5(path, file):
    size = os.fstat(file.fileno()).st_size
    ending = len(MARK) + hashlib.sha256().digest_size
    file.seek(max(0, size - ending))
    end = file.read()
    sealed = end.startswith(MARK)
    if sealed and end[len(MARK) :] != _digest(file, size - ending):
        raise _damaged(path, "its content is not what its checksum says")
    if _check_datasets(path, path, size) and not sealed:
        raise _damaged(path, "its checksum is missing at the end")


def _digest(file, size):
    """SHA-256 of a file's first bytes."""
    file.seek(0)
    whole, chunk = hashlib.sha256(), memoryview(bytearray(2**18))
    while size:
        count = file.readinto(chunk[: min(size, len(chunk))])
        whole.update(chunk[:count])
        size -= count
    return whole.digest()


def _check_datasets(path, file, size):
    """Refuse HDF5 that cannot be read, or whose arrays are much larger than the file. Whether it should be sealed."""
    total = 0

    try:
        with h5py.File(file, "r") as content:

            def add(name, item):
                nonlocal total
                if item.type == h5py.h5o.TYPE_DATASET:
                    dataset = h5py.h5d.open(content.id, name)
                    total += dataset.get_space().get_simple_extent_npoints() * dataset.get_type().get_size()

            h5py.h5o.visit(content.id, add, info=True)  # `visititems` takes four times as long
            sealed = SEALED in content.attrs
    except DAMAGE as error:
        raise _damaged(path, _words(error)) from error
    if total > archives.most(size):
        raise UserError(f"{path} has {size} bytes, but arrays of {total}; refused. Get the file from another source.")
    return sealed


def _damaged(path, how):
    return UserError(f"{path} is damaged or cut short: {how}. {AGAIN}")


def _words(error):
    return (
        f"{type(error).__name__}, {str(error).strip().splitlines()[0] if str(error).strip() else 'no more is known'}"[
            :200
        ]
    )
