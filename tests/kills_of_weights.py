"""Code that is stopped at any of its file operations, as by a kill: what it does after that has no effect."""

import builtins
import contextlib
import io
import os
import zipfile

import h5py
import pytest


class Killed(BaseException):
    """Raised in place of a file operation, and of all that follow."""


class _Operations:
    """Counts operations, and from number `last` on lets none happen."""

    def __init__(self, last):
        self.last, self.names = last, []

    def __call__(self, name):
        self.names.append(name)
        if self.last is not None and len(self.names) > self.last:
            raise Killed(name)


class _File:
    """A file opened for writing, of which each write is an operation; one that is stopped has written half."""

    def __init__(self, file, operation):
        self._file, self._operation = file, operation

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, content):
        try:
            self._operation("write")
        except Killed:
            self._file.write(content[: len(content) // 2])
            raise
        return self._file.write(content)


@contextlib.contextmanager
def at(last):
    """Stop the block before its file operation number `last`, counted from 0; None: let it end.

    Yields:
        an object whose `names` are the operations so far: opening for writing, writing, renaming, removing, making
        folders, and those of HDF5 and zip files.
    """
    operation = _Operations(last)
    with pytest.MonkeyPatch.context() as patch:

        def counted(owner, name, what=None):
            original = getattr(owner, name)

            def call(*args, **kwargs):
                operation(what or name)
                return original(*args, **kwargs)

            patch.setattr(owner, name, call)

        original_open = builtins.open

        def opened(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+"):
                return original_open(file, mode, *args, **kwargs)
            operation("open")
            return _File(original_open(file, mode, *args, **kwargs), operation)

        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fsync", "truncate"):
            counted(os, name)
        for name in ("create_group", "__setitem__", "create_dataset"):
            counted(h5py.Group, name, f"HDF5 {name}")
        counted(h5py.AttributeManager, "__setitem__", "HDF5 attribute")
        counted(h5py.File, "close", "HDF5 close")
        counted(zipfile.ZipFile, "writestr", "zip member")
        with contextlib.suppress(Killed):
            yield operation
    killed = last is not None and len(operation.names) > last
    assert killed or last is None, f"it has {len(operation.names)} operations, not {last}"


def everywhere(act, check, most=None):
    """Call `act` once for each of its file operations, stopped there, and `check` with their names after each call.

    Args:
        most: of the operations, spread evenly, and the last six; None: all.

    Returns:
        the names of all operations, of an undisturbed call.
    """
    with at(None) as whole:
        act()
    count = len(whole.names)
    places = range(count) if most is None else {*range(0, count, -(-count // most)), *range(max(0, count - 6), count)}
    for place in sorted(places):
        with at(place) as stopped:
            act()
        check(stopped.names)
    return whole.names
