"""What a pickle of weights gets in place of the globals it names: makers of arrays and plain containers.

Their arguments are checked. NumPy's own unpickling is not used, since it trusts what it is given about dtypes. A pickle
can set the state of whatever it holds, so each stand-in is immutable or has its own `__setstate__`. No array is copied
before its size is known.
"""

import math
import re
from typing import NamedTuple

import numpy as np

MOST_AXES = 64  # of NumPy
LARGEST = 2**63 - 1  # of a size, stride or offset
ORDERS = ("<", ">", "=", "|")  # of bytes
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

    def __init__(self, pairs=()):
        if not isinstance(pairs, (list, tuple)):
            raise ValueError("an ordered dict that is made of no list")
        for key, value in pairs:
            check_key(key)
            self[key] = value

    def __setstate__(self, state):
        pass


class _Dtype:
    """For numpy.dtype: numbers and strings only."""

    __slots__ = ("dtype",)

    def __init__(self, code, *_):
        if isinstance(code, str) and code.startswith("O"):
            raise Refused(OBJECTS)
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSU][1-9]\d{0,5}", code):
            raise Refused(f"holds an array of dtype {short(code)}, which is not an array of numbers; refused.")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        _, order, *structure = state[:5]  # version, byte order, subarray, names, fields, and what the code has said
        if any(part is not None for part in structure):
            raise Refused("holds an array of records, which is not an array of numbers; refused.")
        if order not in ORDERS:
            raise ValueError(f"a byte order {short(order)}")
        self.dtype = self.dtype.newbyteorder(order)


class Array:
    """For numpy.ndarray and NumPy's scalars; `dtype` is None until the state has come."""

    __slots__ = ("_order", "_raw", "_shape", "dtype")

    def __init__(self, raw=None, dtype=None, shape=(), order="C"):
        self.dtype = None
        if raw is not None:
            self._set(raw, dtype, shape, order)

    def __setstate__(self, state):
        _, shape, dtype, column_major, raw = state
        self._set(raw, dtype, shape, "F" if column_major else "C")

    def _set(self, raw, dtype, shape, order):
        check_naturals(shape)
        if not isinstance(raw, (str, bytes)) or not isinstance(dtype, _Dtype) or order not in ("C", "F"):
            raise ValueError("an array without bytes, dtype or order")
        if len(raw) != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError(f"an array of shape {shape} and dtype {dtype.dtype} has {len(raw)} bytes")
        self.dtype, self._raw, self._shape, self._order = dtype.dtype, raw, shape, order

    @property
    def nbytes(self):
        return 0 if self.dtype is None else len(self._raw)

    def build(self):
        """The numpy.ndarray."""
        raw = self._raw.encode("latin1") if isinstance(self._raw, str) else self._raw  # Python 2 has no other bytes
        return np.ndarray(self._shape, self.dtype, raw, order=self._order)


class Storage(NamedTuple):
    """Elements in a PyTorch file: `count` from `first` on, out of the `numel` under a key."""

    kind: str
    key: str | int
    numel: int
    first: int
    count: int  # type: ignore[assignment]  # tuple.count is not used

    @property
    def dtype(self):
        return np.dtype(STORAGES[self.kind])


class Tensor(NamedTuple):
    """A PyTorch tensor: a view of a storage; offset and stride in elements."""

    storage: Storage
    offset: int
    size: tuple
    stride: tuple

    @property
    def nbytes(self):
        return math.prod(self.size) * max(self.storage.dtype.itemsize, 4 * (self.storage.kind == BFLOAT16))


def _rebuild_tensor(storage, offset, size, stride, *_):
    for naturals in ((offset,), size, stride):
        check_naturals(naturals)
    if not isinstance(storage, Storage) or len(size) != len(stride):
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
        raise ValueError(f"a NumPy array of type {short(kind)}")
    return Array()


def _encode(text, encoding):
    """Bytes in a pickle of protocol 2 or lower that Python 3 wrote; like Python 2's they stay a str of latin1."""
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {short(encoding)}")
    return text


def _size(numbers=()):
    """For torch.Size."""
    check_naturals(numbers)
    return tuple(numbers)


def check_naturals(numbers):
    if not isinstance(numbers, (tuple, list)) or len(numbers) > MOST_AXES:
        raise ValueError(f"sizes or strides that are no tuple of at most {MOST_AXES} numbers")
    for n in numbers:
        if type(n) is not int or not 0 <= n <= LARGEST:
            raise ValueError(f"sizes, strides or offsets that are no natural numbers of 63 bits: {short(n)}")


def check_key(key):
    """Hashing nested tuples, or many large integers that hash alike, takes time without end."""
    if type(key) is not str and not (type(key) is int and abs(key) <= LARGEST):
        raise Refused(f"has a dict with a key ({short(key)}) that is no str or int of 64 bits; refused.")


def short(value):
    """A value in a message; of anything but a str or int the type, since writing it out may have no end."""
    if type(value) is str:
        value = value[:60]
    elif type(value) is not int or abs(value) > LARGEST:
        return type(value).__name__.strip("_")
    return f"{value!r:.40}"


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
    ("torch", "Size"): _Global(_size),
    ("torch._utils", "_rebuild_tensor"): _Global(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Global(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Global(lambda tensor, *_: tensor),
    **{("torch", name): name for name in STORAGES},
}
