"""The weight files that other frameworks release, as NumPy arrays: Detectron, Detectron2, PyTorch, and `.npz`.

They are read by `pickles`, which runs nothing of what is in them. PyTorch is not needed.
"""

import contextlib
import functools
import math
import os
import pickle
import tokenize
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retinanet_keras.errors import UserError, first_line
from retinanet_keras.storage import archives
from retinanet_keras.weights import pickles, stand_ins

EXPECTED = "a .pkl of Detectron or Detectron2, a .pth or .pt of PyTorch, or an .npz"
WRAPPERS = ("blobs", "model", "state_dict")  # of Detectron; Detectron2 and torchvision; PyTorch's training examples
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of PyTorch's format before 1.6; its version is the second
LEGACY_VERSION = 1001
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What NumPy raises for headers that are damaged: it gives them to Python's tokenizer and parser.
HEADER_DAMAGE = (
    *archives.DAMAGE, tokenize.TokenError, IndexError, MemoryError, RecursionError, SyntaxError, TypeError,
)  # fmt: skip
# What Python's unpickler raises for instructions that are damaged; they are read out of a zip archive, perhaps.
PICKLE_DAMAGE = (*archives.DAMAGE, pickle.UnpicklingError, AttributeError, IndexError, TypeError)


class Damaged(Exception):
    """What is wrong with the bytes of a file."""


@contextlib.contextmanager
def _damage(*errors):
    """Errors of a library that reads what may be damaged as `Damaged`."""
    try:
        yield
    except errors as error:
        raise Damaged(f"{type(error).__name__}: {first_line(error)}") from error


def read(path: str | os.PathLike) -> dict[str, npt.NDArray]:
    """Read the weights in a file: dict of name -> array, in the file's order.

    The format is recognized by content. `{"blobs": ...}`, `{"model": ...}` and `{"state_dict": ...}` are unwrapped,
    entries beside the weights are ignored, and so are Detectron's `*_momentum` and DataParallel's "module.".
    Arrays have the file's dtype in native byte order, but bfloat16 becomes float32; they are read-only, since they lie
    on what was read, without a copy where they can.

    Raises:
        UserError: If the file cannot be read, is not such a file, holds more than arrays and plain containers, holds no
            weights, or would take much more memory than it has bytes.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected {EXPECTED}. Name the file in it.")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} is not there; expected {EXPECTED}. Check the path, or download the file.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be opened ({error}); expected {EXPECTED}.") from None
    with file:
        try:
            _check_head(file)
            size = os.fstat(file.fileno()).st_size
            content, fetch = _read_zip(file) if file.read(2) == b"PK" else _read_pickles(file, size)
            weights = _weights(content)
            _check_size(weights, size)
            return {name: _array(value, fetch) for name, value in weights.items()}
        except (stand_ins.Refused, archives.Refused) as error:
            raise UserError(f"{path} {error}") from None
        except Damaged as error:
            raise UserError(
                f"{path} cannot be read ({error!s:.200}); expected {EXPECTED}. It is damaged or cut short: compare its "
                "size with the published one, and download it again."
            ) from error


def _check_head(file):
    """Refuse, in words, what is often found in place of weights; the file is left at its start."""
    head = file.read(64)
    file.seek(0)
    if not head:
        raise stand_ins.Refused("is empty. Download it again.")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise stand_ins.Refused(
            f"is a web page (HTML or XML), not {EXPECTED}: the download failed or needs a login. Open it in a browser "
            "to see what it says, and download the file itself."
        )
    if head.startswith(b"version https://git-lfs"):
        raise stand_ins.Refused("is a Git LFS pointer, not the file itself. Run `git lfs pull` where it came from.")
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        raise stand_ins.Refused(f"is compressed; expected {EXPECTED}. Unpack it first.")
    # Pickles begin with a protocol mark, or before protocol 2 with a dict, a list or a global.
    if not head.startswith((b"PK", b"\x80", b"(", b"}", b"]", b"c")):
        raise stand_ins.Refused(f"is not {EXPECTED}: it begins with {head[:8]!r}.")


# Files: each reader gives the unpickled content and a function (key, bytes) -> (bytes of that storage, byte order).


def _read_zip(file):
    """An `.npz`, or PyTorch's format since 1.6: NAME/data.pkl, and each storage in NAME/data/KEY."""
    with _damage(*archives.DAMAGE):
        archive = archives.opened(file)
    names = archive.namelist()
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        if not names or any(name.endswith(".npy") for name in names):
            return {name.removesuffix(".npy"): _read_npy(archive, name) for name in names}, None
        members = _some([ascii(name)[1:-1][:60] for name in names])
        raise stand_ins.Refused(f"is a zip archive of {members}, not {EXPECTED}. If the weights are in it, unpack it.")
    (root,) = roots
    if f"{root}/constants.pkl" in names:
        raise stand_ins.Refused(
            "is a TorchScript program, not weights. In PyTorch: torch.save(model.state_dict(), FILE)."
        )
    order = "<"
    if f"{root}/byteorder" in names:
        with _damage(*archives.DAMAGE):
            stated = archive.read(f"{root}/byteorder")
        order = {b"little": "<", b"big": ">"}.get(stated)
        if order is None:
            raise Damaged(f"the byte order is {stated[:20]!r}, not little or big")

    @functools.cache  # tensors may share a storage
    def fetch(key, nbytes):
        with _damage(KeyError):
            member = archive.getinfo(f"{root}/data/{key}")
        if member.file_size != nbytes:
            raise Damaged(f"storage {key} should have {nbytes} bytes, and has {member.file_size}")
        with _damage(*archives.DAMAGE):
            return archive.read(member), order

    size = archive.getinfo(f"{root}/data.pkl").file_size
    with _damage(*PICKLE_DAMAGE), archive.open(f"{root}/data.pkl") as pickled:
        return pickles.Unpickler(pickled, size, storages=True).load(), fetch


def _read_npy(archive, name):
    """An array of an `.npz`. NumPy's own reader takes the memory that the header asks for before there are numbers."""
    with _damage(*archives.DAMAGE):
        member = archive.open(name)
    with member:
        with _damage(*archives.DAMAGE):
            version = np.lib.format.read_magic(member)
        if version not in NPY_HEADERS:
            raise Damaged(f"{ascii(name):.60} has version {version} of NumPy's format")
        with _damage(*HEADER_DAMAGE):
            shape, column_major, dtype = NPY_HEADERS[version](member)
        if dtype.hasobject:
            raise stand_ins.Refused(stand_ins.OBJECTS)
        with _damage(*archives.DAMAGE):
            raw = member.read()
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise Damaged(f"{ascii(name):.60} has {len(raw)} bytes for an array of shape {shape} and dtype {dtype}")
    with _damage(TypeError, ValueError):
        return np.ndarray(shape, dtype, raw, order="F" if column_major else "C")


def _read_pickles(file, size):
    """One pickle of NumPy arrays, or PyTorch's older format.

    That is five pickles one after another (magic number, version, facts of the machine, content, keys of the storages)
    and then for each key the number of elements, int64, and the elements; always little-endian.
    """
    file.seek(0)
    content = _unpickled(pickles.Unpickler(file, size))
    if not isinstance(content, int) or content != LEGACY_MAGIC:
        return content, None
    version = _unpickled(pickles.Unpickler(file, size))
    if version != LEGACY_VERSION:
        raise stand_ins.Refused(
            f"has version {stand_ins.short(version)} of PyTorch's older format; expected {LEGACY_VERSION}."
        )
    _unpickled(pickles.Unpickler(file, size))
    unpickler = pickles.Unpickler(file, size, storages=True)
    content, keys, positions = _unpickled(unpickler), _unpickled(pickles.Unpickler(file, size)), {}
    if not isinstance(keys, (list, tuple)):
        raise Damaged("the keys of the storages are no list")
    for key in keys:
        stand_ins.check_key(key)
        if key not in unpickler.storages:
            raise Damaged(f"storage {key} is of no tensor")
        storage, stated = unpickler.storages[key], file.read(8)
        if len(stated) != 8 or int.from_bytes(stated, "little", signed=True) != storage.numel:
            raise Damaged(f"storage {key} does not begin with its number of elements, {storage.numel}")
        positions[key] = file.tell()
        file.seek(min(size, positions[key] + storage.numel * storage.dtype.itemsize))

    @functools.cache
    def fetch(key, nbytes):
        if key not in positions:
            raise Damaged(f"storage {key} is missing")
        present = size - positions[key]
        if nbytes > present:
            raise Damaged(f"storage {key} should have {nbytes} bytes, and has {present}")
        file.seek(positions[key])
        return file.read(nbytes), "<"

    return content, fetch


def _unpickled(unpickler):
    with _damage(*PICKLE_DAMAGE):
        return unpickler.load()


# Content


def _weights(content):
    """The dict of weights in what a file holds, without its wrapper, momentum and common prefix."""
    if isinstance(content, dict):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        content = content[wrapper] if wrapper else content
        if wrapper == "blobs":
            content = {key: value for key, value in content.items() if not str(key).endswith("_momentum")}
    if not isinstance(content, dict) or not content:
        what = "an empty dict" if isinstance(content, dict) else f"a {_kind(content)}"
        raise stand_ins.Refused(
            f"holds {what}; expected a dict of names and arrays. Take the file with the model's weights."
        )
    others = [
        f"{stand_ins.short(key)} ({_kind(value)})" for key, value in content.items() if not _is_weight(key, value)
    ]
    if others:
        raise stand_ins.Refused(
            f"holds entries that are no arrays of numbers: {_some(others)}; expected a dict of names and arrays. Save "
            "the weights alone: in PyTorch, torch.save(model.state_dict(), FILE)."
        )
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def _is_weight(key, value):
    dtype = value.dtype if isinstance(value, (np.ndarray, stand_ins.Array)) else None
    return isinstance(key, str) and (dtype is not None and dtype.kind in "biuf" or isinstance(value, stand_ins.Tensor))


def _check_size(weights, size):
    """Refuse many views of few numbers, each of which would become an array of its own."""
    total = sum(value.nbytes for value in weights.values())
    if total > archives.most(size):
        raise stand_ins.Refused(f"has {size} bytes, but weights of {total}; refused. Get the file from another source.")


def _kind(value):
    return "array" if isinstance(value, (np.ndarray, stand_ins.Array)) else type(value).__name__.strip("_")


def _some(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _array(value, fetch):
    """The array of a weight as a reader left it; read-only, in native byte order."""
    if isinstance(value, stand_ins.Tensor):
        storage = value.storage
        raw, order = fetch(storage.key, storage.numel * storage.dtype.itemsize)
        dtype = storage.dtype.newbyteorder(order)
        offset, strides = ((storage.first + value.offset) * dtype.itemsize, [s * dtype.itemsize for s in value.stride])
        if not math.prod(value.size):  # its strides and offset mean nothing
            offset, strides = 0, None
        # np.ndarray itself refuses strides that leave the buffer, as _rebuild_tensor has done before.
        with _damage(ValueError):
            array = np.ascontiguousarray(np.ndarray(value.size, dtype, raw, offset, strides)).reshape(value.size)
        if storage.kind == stand_ins.BFLOAT16:  # the upper half of a float32
            bits = np.array(array, np.uint32)
            bits <<= 16
            array = bits.view(np.float32)
    elif isinstance(value, stand_ins.Array):
        with _damage(ValueError):
            array = value.build()
    else:
        array = value
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array
