"""Kills at every file operation: each is tried once, and what is on the disk afterwards is the test's to judge.

    for folder, operation in kills.everywhere(make, act):
        assert is_whole(folder), operation

Counted are the operations of Python that change a folder: opening a file for writing, renaming, making and removing.
What happens in C++ or in a library of its own counts where it is named in `functions`, as one operation each.
"""

import builtins
import contextlib
import functools
import io
import itertools
import os
import sys
from unittest import mock

from retinanet_keras.storage import disk

TENSORFLOW = ("copy", "makedirs", "mkdir", "remove", "rename", "rmtree")  # of tf.io.gfile


class Killed(BaseException):
    """Takes the place of a process's end: nothing but `everywhere` catches it, and no cleaning up changes a file."""


class Kills:
    """A context in which the process is "killed" before its n-th operation: that one and all later ones raise Killed.

    Opening a file for writing counts twice: before it, and when the file is there, emptied, but nothing is written.

    Args:
        folder: path. Operations elsewhere neither count nor fail.
        at: int, from 0. None: never, to count them.
        functions: iterable of (owner, name). Further functions that change files, such as
            (keras.export.ExportArchive, "write_out"), wherever they do so.

    Attributes:
        operations: list of str. The operations until the kill, the one that it prevented included.
    """

    def __init__(self, folder, at=None, functions=()):
        self.folder, self.at, self.functions = os.path.realpath(folder), at, functions
        self.operations = []
        self._dead = False

    def __enter__(self):
        self._patches = contextlib.ExitStack()
        places = [(os, name, 2) for name in ("rename", "replace", "link", "symlink")]
        places += [(os, name, 1) for name in ("mkdir", "rmdir", "unlink", "remove", "truncate")]
        places += [(disk, "_rename", 2)]
        if tensorflow := sys.modules.get("tensorflow"):
            places += [(tensorflow.io.gfile, name, 2) for name in TENSORFLOW]
        for owner, name, paths in places:
            self._patch(owner, name, self._counted(getattr(owner, name), name, paths))
        for owner, name in self.functions:
            self._patch(owner, name, self._anywhere(getattr(owner, name), name))
        self._patch(os, "open", self._opened(os.open, lambda flags, *_: flags & (os.O_CREAT | os.O_TRUNC)))
        opened = self._opened(io.open, lambda mode="r", *_: set(mode) & set("wax+"))
        for owner in (io, builtins):
            self._patch(owner, "open", opened)
        return self

    def __exit__(self, *_):
        self._patches.close()

    def _patch(self, owner, name, function):
        self._patches.enter_context(mock.patch.object(owner, name, function))

    def _inside(self, path, directory=None):
        if isinstance(path, int):  # a file that is open already
            return False
        if directory is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), os.fsdecode(path))
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        return f"{os.path.join(os.path.realpath(folder), name)}/".startswith(f"{self.folder}/")

    def _count(self, operation):
        if not self._dead:
            self.operations.append(operation)
            self._dead = self.at is not None and len(self.operations) > self.at
        if self._dead:
            raise Killed(operation)

    def _counted(self, function, name, paths):
        @functools.wraps(function)
        def call(*args, dir_fd=None, **kwargs):
            if any(self._inside(path, dir_fd) for path in args[:paths]):
                self._count(f"{name} {' '.join(map(str, args[:paths]))}")
            return function(*args, **kwargs, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        return call

    def _anywhere(self, function, name):
        @functools.wraps(function)
        def call(*args, **kwargs):
            self._count(name)
            return function(*args, **kwargs)

        return call

    def _opened(self, function, writes):
        @functools.wraps(function)
        def call(path, *args, dir_fd=None, **kwargs):
            kwargs |= {} if dir_fd is None else {"dir_fd": dir_fd}
            how = args or [kwargs[key] for key in ("mode", "flags") if key in kwargs]
            if not writes(*how) or not self._inside(path, dir_fd):
                return function(path, *args, **kwargs)
            self._count(f"open {path}")
            file = function(path, *args, **kwargs)
            try:
                self._count(f"write {path}")
            except Killed:
                os.close(file) if isinstance(file, int) else file.close()
                raise
            return file

        return call


def everywhere(make, act, functions=(), most=None):
    """Kill an act before its file operations, once for each, until it comes to its end.

    Args:
        make: function of int, the number of the kill, to the path of a folder that nothing has changed yet.
        act: function of that path. It is called once more than it is killed.
        functions: as for `Kills`.
        most: int. Of the operations, this many, spread evenly, and the last ones; None: all.

    Yields:
        (folder, operation): the folder after a kill, and the operation that it prevented.
    """
    numbers = itertools.count()
    if most is not None:
        with Kills(folder := make(-1), functions=functions) as kills:
            act(folder)
        last = max(0, len(kills.operations) - 6)
        numbers = itertools.chain(range(0, last, -(-last // most) or 1), itertools.count(last))
    for n in numbers:
        folder = make(n)
        try:
            with Kills(folder, n, functions) as kills:
                act(folder)
        except Killed:
            yield folder, kills.operations[-1]
        else:
            return
