"""The weight files that other frameworks release, as NumPy arrays: Detectron, Detectron2, PyTorch, and `.npz`.

They are read by `pickles`, which runs nothing of what is in them. PyTorch is not needed.
"""

import functools
import math
import zipfile
from pathlib import Path

import numpy as np

from retinanet_keras.errors import UserError
from retinanet_keras.released import pickles

EXPECTED = "a .pkl of Detectron or Detectron2, a .pth or .pt of PyTorch, or an .npz"
WRAPPERS = ("blobs", "model", "state_dict")  # of Detectron; Detectron2 and torchvision; PyTorch's training examples
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of PyTorch's format before 1.6; its version is the second
LEGACY_VERSION = 1001


def read(path):
    """The weights in a file: dict of name -> array, in the file's order.

    The format is recognised by content. `{"blobs": ...}`, `{"model": ...}` and `{"state_dict": ...}` are unwrapped,
    what stands beside the weights is left out, and so are Detectron's `*_momentum` and DataParallel's "module.".
    Arrays have the file's dtype in native byte order, but bfloat16 becomes float32; they are read-only, since they lie
    on what was read, without a copy where they can.

    Raises:
        UserError: where the file cannot be read, is no such file, holds more than arrays and plain containers, or
            holds no weights.
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
            content, fetch = _read_zip(file) if file.read(2) == b"PK" else _read_pickles(file)
            return {name: _array(value, fetch) for name, value in _weights(content).items()}
        except pickles.Refused as error:
            raise UserError(f"{path} {error}") from None
        except Exception as error:  # damaged bytes can fail anywhere in the pickle and zip modules
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}: {error}); expected {EXPECTED}. It is damaged or cut "
                "short: compare its size with the published one, and download it again."
            ) from error


def _check_head(file):
    """Refuse, in words, what is often found in place of weights; the file is left at its start."""
    head = file.read(64)
    file.seek(0)
    if not head:
        raise pickles.Refused("is empty. Download it again.")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise pickles.Refused(
            f"is a web page (HTML or XML), not {EXPECTED}: the download failed or needs a login. Open it in a browser "
            "to see what it says, and download the file itself."
        )
    if head.startswith(b"version https://git-lfs"):
        raise pickles.Refused("is a Git LFS pointer, not the file itself. Run `git lfs pull` where it came from.")
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        raise pickles.Refused(f"is compressed; expected {EXPECTED}. Unpack it first.")
    # Pickles begin with a protocol mark, or before protocol 2 with a dict, a list or a global.
    if not head.startswith((b"PK", b"\x80", b"(", b"}", b"]", b"c")):
        raise pickles.Refused(f"is not {EXPECTED}: it begins with {head[:8]!r}.")


# Files: each reader gives the unpickled content and a function (key, bytes) -> (bytes of that storage, byte order).


def _read_zip(file):
    """An `.npz`, or PyTorch's format since 1.6: NAME/data.pkl, and each storage in NAME/data/KEY."""
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        if not names or any(name.endswith(".npy") for name in names):
            return _read_npz(file), None
        raise pickles.Refused(
            f"is a zip archive of {_some(names)}, not {EXPECTED}. If the weights are in it, unpack it."
        )
    (root,) = roots
    if f"{root}/constants.pkl" in names:
        raise pickles.Refused(
            "is a TorchScript program, not weights. In PyTorch: torch.save(model.state_dict(), FILE)."
        )
    order = "<"
    if f"{root}/byteorder" in names:
        order = {b"little": "<", b"big": ">"}[archive.read(f"{root}/byteorder")]

    @functools.cache  # tensors may share a storage
    def fetch(key, nbytes):
        member = archive.getinfo(f"{root}/data/{key}")
        if member.file_size != nbytes:
            raise ValueError(f"storage {key} should have {nbytes} bytes, and has {member.file_size}")
        return archive.read(member), order

    with archive.open(f"{root}/data.pkl") as pickled:
        return pickles.Unpickler(pickled, storages=True).load(), fetch


def _read_npz(file):
    file.seek(0)
    try:
        return dict(np.load(file, allow_pickle=False))
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise pickles.Refused(pickles.OBJECTS) from None
        raise


def _read_pickles(file):
    """One pickle of NumPy arrays, or PyTorch's older format.

    That is five pickles one after another (magic number, version, facts of the machine, content, keys of the storages)
    and then for each key the number of elements, int64, and the elements; always little-endian.
    """
    file.seek(0)
    content = pickles.Unpickler(file).load()
    if not isinstance(content, int) or content != LEGACY_MAGIC:
        return content, None
    version = pickles.Unpickler(file).load()
    if version != LEGACY_VERSION:
        raise pickles.Refused(f"has version {version!r} of PyTorch's older format; expected {LEGACY_VERSION}.")
    pickles.Unpickler(file).load()
    unpickler = pickles.Unpickler(file, storages=True)
    content = unpickler.load()
    positions = {}
    for key in pickles.Unpickler(file).load():
        storage, stated = unpickler.storages[key], file.read(8)
        if len(stated) != 8 or int.from_bytes(stated, "little", signed=True) != storage.numel:
            raise ValueError(f"storage {key} does not begin with its number of elements, {storage.numel}")
        positions[key] = file.tell()
        file.seek(storage.numel * storage.dtype.itemsize, 1)

    @functools.cache
    def fetch(key, nbytes):
        file.seek(positions[key])
        raw = file.read(nbytes)
        if len(raw) != nbytes:
            raise ValueError(f"storage {key} should have {nbytes} bytes, and has {len(raw)}")
        return raw, "<"

    return content, fetch


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
        raise pickles.Refused(
            f"holds {what}; expected a dict of names and arrays. Take the file with the model's weights."
        )
    others = [f"{key!r} ({_kind(value)})" for key, value in content.items() if not _is_weight(key, value)]
    if others:
        raise pickles.Refused(
            f"holds entries that are no arrays of numbers: {_some(others)}; expected a dict of names and arrays. Save "
            "the weights alone: in PyTorch, torch.save(model.state_dict(), FILE)."
        )
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def _is_weight(key, value):
    if isinstance(value, pickles.Array):
        value = value.array
    numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    return isinstance(key, str) and (numbers or isinstance(value, pickles.Tensor))


def _kind(value):
    return "array" if isinstance(value, (np.ndarray, pickles.Array)) else type(value).__name__.strip("_")


def _some(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _array(value, fetch):
    """The array of a weight as a reader left it; read-only, in native byte order."""
    if isinstance(value, pickles.Tensor):
        storage = value.storage
        raw, order = fetch(storage.key, storage.numel * storage.dtype.itemsize)
        dtype = storage.dtype.newbyteorder(order)
        offset, strides = ((storage.first + value.offset) * dtype.itemsize, [s * dtype.itemsize for s in value.stride])
        if not math.prod(value.size):  # its strides and offset mean nothing
            offset, strides = 0, None
        # np.ndarray itself refuses strides that leave the buffer, as _rebuild_tensor has done before.
        array = np.ascontiguousarray(np.ndarray(value.size, dtype, raw, offset, strides)).reshape(value.size)
        if storage.kind == pickles.BFLOAT16:  # the upper half of a float32
            bits = np.array(array, np.uint32)
            bits <<= 16
            array = bits.view(np.float32)
    else:
        array = value.array if isinstance(value, pickles.Array) else value
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array
