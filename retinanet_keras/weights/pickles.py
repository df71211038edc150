"""Pickles of arrays, read without running what is in them.

A pickle is a program that may call anything. Here it may call nothing of its own: each global that it names is replaced
by one of `stand_ins`, and every other global is refused.

A few bytes can also ask for much memory or time: a length of gigabytes, one list copied a million times, a tuple of
tuples of tuples as a key. So lengths are compared with what is left of the file, the number of instructions is limited,
only those that weights need are carried out, and keys are str or int.
"""

import pickle
import pickletools
import re

from retinanet_keras.weights import stand_ins

MOST_OPERATIONS = 2_000_000  # some seconds and 300 MB; the weights of a large detector take 50,000


class _Bounded:
    """A file of `size` bytes of which no more is asked for than is left."""

    def __init__(self, file, size):
        self._file, self._size, self.readline = file, size, file.readline

    def read(self, count):
        if count > 2**16 and count > self._size - self._file.tell():
            raise EOFError(f"{count} bytes are announced, and fewer are left")
        return self._file.read(count)


class _Opcodes:
    """What an Unpickler does for each opcode, counted."""

    def __init__(self, dispatch):
        self._dispatch, self._left = dispatch, MOST_OPERATIONS

    def __getitem__(self, code):
        self.spend(1)
        if code in self._dispatch:
            return self._dispatch[code]
        known = pickletools.code2op.get(chr(code))
        if known is None:
            raise pickle.UnpicklingError(f"{code:#04x} is no instruction of a pickle")
        raise stand_ins.Refused(f"has the pickle instruction {known.name}, which no weights need; refused.")

    def spend(self, operations):
        self._left -= operations
        if self._left < 0:
            raise stand_ins.Refused(
                f"takes more than {MOST_OPERATIONS} instructions to read, which no weights need; refused."
            )


class Unpickler(pickle._Unpickler):  # in Python: the one in C allocates as much memory as a damaged index says
    def __init__(self, file, size, *, storages=False):
        """size: of the file in bytes; storages: whether it refers to PyTorch's."""
        super().__init__(_Bounded(file, size), encoding="latin1")  # of Python 2's strings
        self.storages = {} if storages else None  # key -> stand_ins.Storage
        self.dispatch = _Opcodes(self.ADMITTED)

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self):
        self._set_items(self.pop_mark())

    def _set_items(self, items):
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError(f"an item of a {type(target).__name__.strip('_')}, which is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            stand_ins.check_key(key)
            target[key] = value

    def load_reduce(self):
        arguments = self.stack[-1]
        if not isinstance(arguments, tuple):
            raise ValueError("a call without a tuple of arguments")
        copied = (arguments, *(one for one in arguments if isinstance(one, (list, tuple, dict))))
        self.dispatch.spend(sum(map(len, copied)))
        super().load_reduce()

    def load_put(self):
        index = int(self.readline()[:-1])
        if not 0 <= index <= MOST_OPERATIONS:
            raise ValueError(f"an index {index:.0e} of what to remember")
        self.memo[index] = self.stack[-1]

    ADMITTED = {
        **{
            getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
            for name in (
                "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "INT",
                "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
                "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE",
                "SHORT_BINUNICODE", "BINUNICODE8", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST",
                "EMPTY_LIST", "EMPTY_DICT", "APPEND", "APPENDS", "GET", "BINGET", "LONG_BINGET", "BINPUT",
                "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "BUILD", "BINPERSID",
            )
        },
        # As bytes: Python's own takes the memory first.
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,  # type: ignore[attr-defined]
        pickle.DICT[0]: load_dict, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.REDUCE[0]: load_reduce, pickle.PUT[0]: load_put,
    }  # fmt: skip

    def find_class(self, module, name):
        key = (re.sub(r"^numpy\.core\.", "numpy._core.", module), name)
        if key not in stand_ins.GLOBALS:
            raise stand_ins.Refused(
                f"holds {ascii(f'{module}.{name}')[1:-1]:.100}, which is not an array or a plain container; refused, "
                "since it could run any program. Save the weights alone: in PyTorch, "
                "torch.save(model.state_dict(), FILE)."
            )
        return stand_ins.GLOBALS[key]

    def get_extension(self, code):
        raise stand_ins.Refused(f"holds extension {code}, which is not an array or a plain container; refused.")

    def persistent_load(self, pid):
        """A storage of PyTorch: ("storage", type, key, device, elements), in the older format with None or a view."""
        if self.storages is None:
            raise ValueError("a reference to something outside of the pickle")
        if not isinstance(pid, tuple):
            raise ValueError("a reference to something outside of the pickle")
        tag, kind, key, _, numel, *view = pid
        if tag != "storage" or not isinstance(kind, str) or kind not in stand_ins.STORAGES:
            raise stand_ins.Refused(
                f"holds a {stand_ins.short(tag)} of {stand_ins.short(kind)} in place of a storage of numbers; refused."
            )
        stand_ins.check_key(key)
        _, first, count = (view and view[0]) or (None, 0, numel)
        stand_ins.check_naturals((numel, first, count))
        if first + count > numel:
            raise ValueError(f"elements {first} to {first + count} of a storage of {numel}")
        storage = stand_ins.Storage(kind, key, numel, first, count)
        if self.storages.setdefault(key, storage)[:3] != storage[:3]:
            raise ValueError(f"storage {key} is given two types or lengths")
        return storage
