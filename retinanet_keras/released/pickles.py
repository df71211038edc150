"""Pickles of arrays, read without running what is in them.

A pickle is a program that may call anything. Here it may call nothing of its own: each global that it names is replaced
by a stand-in of this module, which builds an array or a plain container from checked arguments, and every other global
is refused. NumPy's own unpickling is not used either, since it trusts what it is given about dtypes. A pickle can set
the state of whatever it holds, so each stand-in is immutable or has its own `__setstate__`.
"""

import math
import pickle
import re
from typing import NamedTuple

import numpy as np

OBJECTS = "holds an array of Python objects, which is not an array of numbers; refused."
BFLOAT16 = "BFloat16Storage"
STORAGES = {  # the name in `torch` -> dtype of an element
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", BFLOAT16: "u2", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip


class Refused(Exception):
    """Why the file is not read, as the rest of a sentence that begins with its path."""


class _Global:
    """A callable of which a pickle can get the result, and nothing else."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setstate__(self, state):
        raise Refused("sets the state of a function, which is not an array or a plain container; refused.")


class _Dict(dict):
    """For OrderedDict; drops attributes, such as the `_metadata` of a state dict."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _Dtype:
    """For numpy.dtype: numbers and strings only."""

    __slots__ = ("dtype",)

    def __init__(self, code, *_):
        if isinstance(code, str) and code.startswith("O"):
            raise Refused(OBJECTS)
        if not re.fullmatch(r"[biufcSU][1-9]\d{0,5}", code):
            raise Refused(f"holds an array of dtype {code!r:.40}, which is not an array of numbers; refused.")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        _, order, *structure = state[:5]  # version, byte order, subarray, names, fields, and what the code has said
        if any(part is not None for part in structure):
            raise Refused("holds an array of records, which is not an array of numbers; refused.")
        self.dtype = self.dtype.newbyteorder(order)


class Array:
    """For numpy.ndarray and NumPy's scalars; `array` is None until the state has come."""

    __slots__ = ("array",)

    def __init__(self, raw=None, dtype=None, shape=(), order="C"):
        self.array = None if raw is None else self._build(raw, dtype, shape, order)

    def __setstate__(self, state):
        _, shape, dtype, column_major, raw = state
        self.array = self._build(raw, dtype, shape, "F" if column_major else "C")

    @staticmethod
    def _build(raw, dtype, shape, order):
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 has no other bytes
        _check_naturals(shape)
        dtype = dtype.dtype
        if len(raw) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"an array of shape {shape} and dtype {dtype} has {len(raw)} bytes")
        return np.ndarray(shape, dtype, raw, order={"C": "C", "F": "F"}[order])


class _Storage(NamedTuple):
    """Elements in a PyTorch file: `count` from `first` on, out of the `numel` under a key."""

    kind: str
    key: object
    numel: int
    first: int
    count: int  # type: ignore[assignment]  # tuple.count is not used

    @property
    def dtype(self):
        return np.dtype(STORAGES[self.kind])


class Tensor(NamedTuple):
    """A PyTorch tensor: a view of a storage; offset and stride in elements."""

    storage: _Storage
    offset: int
    size: tuple
    stride: tuple


def _rebuild_tensor(storage, offset, size, stride, *_):
    _check_naturals((offset, *size, *stride))
    if not isinstance(storage, _Storage) or len(size) != len(stride):
        raise ValueError("a tensor without a storage, or with sizes and strides of unequal number")
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A view with more elements than its storage (stride 0) is no weight, and could fill the memory.
    if elements and not (last < storage.count and elements <= storage.count):
        raise ValueError(
            f"a tensor of size {tuple(size)}, stride {tuple(stride)}, offset {offset} leaves its storage of "
            f"{storage.count} elements"
        )
    return Tensor(storage, offset, tuple(size), tuple(stride))


def _reconstruct(kind, *_):
    if kind != "numpy.ndarray":
        raise ValueError(f"a NumPy array of type {kind!r}")
    return Array()


def _encode(text, encoding):
    """Bytes in a pickle of protocol 2 or lower that Python 3 wrote."""
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _check_naturals(numbers):
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"sizes, strides or offsets that are no natural numbers: {numbers!r:.80}")


NO_BYTES = _Global(lambda: b"")
GLOBALS = {
    ("collections", "OrderedDict"): _Global(_Dict),
    ("_codecs", "encode"): _Global(_encode),
    ("__builtin__", "bytes"): NO_BYTES,
    ("builtins", "bytes"): NO_BYTES,
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): _Global(_Dtype),
    ("numpy._core.multiarray", "_reconstruct"): _Global(_reconstruct),
    ("numpy._core.multiarray", "scalar"): _Global(lambda dtype, raw: Array(raw, dtype)),
    ("numpy._core.numeric", "_frombuffer"): _Global(Array),
    ("torch", "Size"): _Global(tuple),
    ("torch._utils", "_rebuild_tensor"): _Global(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Global(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Global(lambda tensor, *_: tensor),
    **{("torch", name): name for name in STORAGES},
}


class Unpickler(pickle._Unpickler):  # in Python: the one in C allocates as much memory as a damaged index says
    def __init__(self, file, *, storages=False):
        super().__init__(file, encoding="latin1")  # of Python 2's strings
        self.storages = {} if storages else None  # key -> _Storage

    def find_class(self, module, name):
        key = (re.sub(r"^numpy\.core\.", "numpy._core.", module), name)
        if key not in GLOBALS:
            raise Refused(
                f"holds {ascii(f'{module}.{name}')[1:-1]:.100}, which is not an array or a plain container; refused, "
                "since it could run any program. Save the weights alone: in PyTorch, "
                "torch.save(model.state_dict(), FILE)."
            )
        return GLOBALS[key]

    def get_extension(self, code):
        raise Refused(f"holds extension {code}, which is not an array or a plain container; refused.")

    def persistent_load(self, pid):
        """A storage of PyTorch: ("storage", type, key, device, elements), in the older format with None or a view."""
        if self.storages is None:
            raise ValueError("a reference to something outside of the pickle")
        tag, kind, key, _, numel, *view = pid
        if tag != "storage" or kind not in STORAGES:
            raise Refused(f"holds a {tag!r:.40} of {kind!r:.40} in place of a storage of numbers; refused.")
        _, first, count = (view and view[0]) or (None, 0, numel)
        _check_naturals((numel, first, count))
        if first + count > numel:
            raise ValueError(f"elements {first} to {first + count} of a storage of {numel}")
        storage = _Storage(kind, key, numel, first, count)
        if self.storages.setdefault(key, storage)[:3] != storage[:3]:
            raise ValueError(f"storage {key} is given two types or lengths")
        return storage
