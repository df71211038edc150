"""Released weight files: their values are read, in every layout, and nothing that they ask for is run.

`data/zip.pth` and `data/legacy.pth` are real files, made by PyTorch 2.13.0 with

    base = torch.arange(12.0)
    state = collections.OrderedDict(
        base=base,
        transposed=base.reshape(3, 4).t(),
        slice=base[4:8],
        half=torch.arange(3).half() / 2,
        bfloat16=torch.tensor([1.0, -0.5, 3.140625]).bfloat16(),
        count=torch.tensor(7),
        parameter=torch.nn.Parameter(torch.eye(2)),
        empty=torch.zeros(0, 3),
    )
    torch.save(state, "zip.pth")
    torch.save({"model": state, "epoch": 3}, "legacy.pth", _use_new_zipfile_serialization=False)

The other PyTorch files here are put together from the same parts by hand.
"""

import builtins
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet_keras.errors import UserError
from retinanet_keras.weights import reader

DATA = Path(__file__).parent / "data"
KERNEL = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture
def written(tmp_path):
    """A function that writes bytes, or the pickle of an object, to a file, and returns its path."""

    def write(content, name="weights.pkl", protocol=2):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path

    return write


def assert_same(arrays, expected):
    """The same names in the same order, with arrays of the same dtype, shape and values."""
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, expected[name], strict=True, err_msg=name)


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


# PyTorch


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_files_of_pytorch_have_their_values(name):
    base = np.arange(12, dtype=np.float32)
    expected = {
        "base": base,
        "transposed": base.reshape(3, 4).T,
        "slice": base[4:8],
        "half": np.float16([0, 0.5, 1]),
        "bfloat16": np.float32([1, -0.5, 3.140625]),
        "count": np.array(7),
        "parameter": np.eye(2, dtype=np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert_same(reader.read(DATA / name), expected)


class Raw:
    """Pickled by `TorchPickler` as a call of a global by name."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


def torch_pickle(value):
    """A pickle, protocol 2, of str, int, None, tuple, dict and Raw; Raw("storage", ...) is a persistent id."""
    if isinstance(value, Raw):
        if value.name == "storage":
            return torch_pickle(("storage", *value.arguments)) + b"Q"
        module, _, name = value.name.rpartition(".")
        reference = f"c{module}\n{name}\n".encode()
        return reference + torch_pickle(value.arguments) + b"R" if value.arguments else reference
    if isinstance(value, dict):
        return b"}(" + b"".join(torch_pickle(key) + torch_pickle(item) for key, item in value.items()) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(torch_pickle, value)) + b"t"
    if isinstance(value, str):
        return text(value)
    return pickle.dumps(value, 2)[2:-1]


def tensor(kind, numel, offset, size, stride, *, key="0", view=()):
    storage = Raw("storage", Raw(f"torch.{kind}"), key, "cpu", numel, *view)
    return Raw("torch._utils._rebuild_tensor_v2", storage, offset, size, stride, False, None)


def torch_zip(content, storages, *, order=b"little", root="archive"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + torch_pickle(content) + b".")
        archive.writestr(f"{root}/byteorder", order)
        for key, raw in storages.items():
            archive.writestr(f"{root}/data/{key}", raw)
    return file.getvalue()


def torch_legacy(content, storages, *, version=1001):
    """`storages`: key -> (number of elements as stated, bytes)."""
    head = [0x1950A86A20F9469CFC6C, version, {"little_endian": True}]
    parts = [pickle.dumps(part, 2) for part in head] + [b"\x80\x02" + torch_pickle(content) + b"."]
    parts.append(pickle.dumps(list(storages), 2))
    return b"".join(parts) + b"".join(struct.pack("<q", numel) + raw for numel, raw in storages.values())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("DoubleStorage", "f8"), ("FloatStorage", "f4"), ("HalfStorage", "f2"), ("LongStorage", "i8"),
     ("IntStorage", "i4"), ("ShortStorage", "i2"), ("CharStorage", "i1"), ("ByteStorage", "u1"),
     ("BoolStorage", "?")],
)  # fmt: skip
@pytest.mark.parametrize("order", ["little", "big"])
def test_every_type_and_byte_order_of_pytorch_is_read(written, kind, dtype, order):
    values = np.array([0, 1, 0, 1, 1]).astype(dtype) if dtype == "?" else np.array([0, 1, 100, 7, 3]).astype(dtype)
    raw = values.astype(values.dtype.newbyteorder(order)).tobytes()
    content = torch_zip({"w": tensor(kind, 5, 0, (5,), (1,))}, {"0": raw}, order=order.encode())
    assert_same(reader.read(written(content)), {"w": values})


def test_bfloat16_is_the_upper_half_of_float32(written):
    values = np.float32([0, -0.0, 1, -2.5, 3e38, 1e-40, np.inf, -np.inf]).view(np.uint32) & 0xFFFF0000
    raw = (values >> 16).astype("<u2").tobytes()
    read = reader.read(written(torch_zip({"w": tensor("BFloat16Storage", 8, 0, (2, 4), (4, 1))}, {"0": raw})))
    assert_same(read, {"w": values.view(np.float32).reshape(2, 4)})
    assert np.signbit(read["w"][0, 1])


@pytest.mark.parametrize("legacy", [False, True])
def test_views_share_a_storage_with_offsets_and_strides(written, legacy):
    base, rest = np.arange(20, dtype=np.float32), ((None,) if legacy else ())
    content = {
        "every_third": tensor("FloatStorage", 20, 1, (7,), (3,), view=rest),
        "transposed": tensor("FloatStorage", 20, 8, (4, 3), (1, 4), view=rest),
        "last": tensor("FloatStorage", 20, 19, (), (), view=rest),
        "none": tensor("FloatStorage", 20, 20, (2, 0), (1, 1), view=rest),
    }
    raw = base.tobytes()
    path = written(torch_legacy(content, {"0": (20, raw)}) if legacy else torch_zip(content, {"0": raw}))
    expected = {
        "every_third": base[1::3],
        "transposed": base[8:].reshape(3, 4).T,
        "last": np.array(base[19]),
        "none": np.zeros((2, 0), np.float32),
    }
    assert_same(reader.read(path), expected)


def test_views_of_storages_in_the_older_format_begin_where_they_say(written):
    content = {"w": tensor("IntStorage", 10, 1, (2,), (1,), view=(("view", 4, 3),))}
    raw = np.arange(10, dtype=np.int32).tobytes()
    assert_same(reader.read(written(torch_legacy(content, {"0": (10, raw)}))), {"w": np.int32([5, 6])})
    content = {"w": tensor("IntStorage", 10, 1, (3,), (1,), view=(("view", 4, 3),))}
    with pytest.raises(UserError, match="leaves its storage"):
        reader.read(written(torch_legacy(content, {"0": (10, raw)})))


def test_storages_outside_of_the_weights_are_not_read(written):
    """A training checkpoint: the momentum of the optimizer, whose storage is missing here, is as large as the model."""
    weight = tensor("FloatStorage", 2, 0, (2,), (1,))
    content = {"model": {"w": weight}, "optimizer": {"m": tensor("FloatStorage", 2, 0, (2,), (1,), key="1")}}
    path = written(torch_zip(content, {"0": np.float32([1, 2]).tobytes()}))
    assert_same(reader.read(path), {"w": np.float32([1, 2])})


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (13,), (1,)), (1, (12,), (1,)), (12, (1,), (1,)), (0, (3, 4), (5, 1)), (0, (2, 2), (2**62, 1)),
        (-1, (2,), (1,)), (0, (-2,), (1,)), (5, (2,), (-1,)), (0, (2, 2), (1,)), (0, (13,), (0,)), (0, 3, 1),
        (0, ("2",), (1,)), (2**80, (1,), (1,)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_leave_their_storage_are_refused(written, offset, size, stride, legacy):
    raw = np.zeros(12, np.float32).tobytes()
    content = {"w": tensor("FloatStorage", 12, offset, size, stride, view=(None,) if legacy else ())}
    path = written(torch_legacy(content, {"0": (12, raw)}) if legacy else torch_zip(content, {"0": raw}))
    with pytest.raises(UserError, match="damaged"):
        reader.read(path)


def float_file(stated, present, *, legacy):
    content = {"w": tensor("FloatStorage", stated, 0, (2,), (1,), view=(None,) if legacy else ())}
    raw = bytes(4 * present)
    return torch_legacy(content, {"0": (present, raw)}) if legacy else torch_zip(content, {"0": raw})


@pytest.mark.parametrize("present", [0, 3, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_storage_must_have_the_length_that_is_stated(written, present, legacy):
    reader.read(written(float_file(4, 4, legacy=legacy)))
    with pytest.raises(UserError, match="storage 0"):
        reader.read(written(float_file(4, present, legacy=legacy)))


def test_the_last_storage_of_the_older_format_must_be_whole(written):
    with pytest.raises(UserError, match="storage 0 should have 16 bytes, and has 15"):
        reader.read(written(float_file(4, 4, legacy=True)[:-1]))


def test_a_storage_has_one_type_and_its_views_lie_within(written):
    pair = {"a": tensor("FloatStorage", 4, 0, (2,), (1,)), "b": tensor("IntStorage", 4, 0, (2,), (1,))}
    with pytest.raises(UserError, match="two types"):
        reader.read(written(torch_zip(pair, {"0": bytes(16)})))
    view = {"w": tensor("FloatStorage", 4, 0, (1,), (1,), view=(("view", 2, 3),))}
    with pytest.raises(UserError, match="elements 2 to 5 of a storage of 4"):
        reader.read(written(torch_legacy(view, {"0": (4, bytes(16))})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch_legacy({}, {}, version=1000), "version 1000"),
        (torch_zip({"w": tensor("QInt8Storage", 2, 0, (2,), (1,))}, {}), r"torch\.QInt8Storage"),
        (torch_zip({"w": Raw("storage", "FloatStorage", "0", "cpu", 4)}, {}), r"'w' \(Storage\)"),
        (torch_zip({"w": Raw("storage", "Other", "0", "cpu", 4)}, {}), "'Other'"),
        (torch_zip({"w": Raw("torch._utils._rebuild_tensor_v2", "w", 0, (), ())}, {}), "without a storage"),
        (torch_zip(Raw("torchvision.models.detection.retinanet.RetinaNet", 1), {}), r"state_dict\(\)"),
    ],
)
def test_other_contents_of_pytorch_files_are_named(written, content, message):
    with pytest.raises(UserError, match=message):
        reader.read(written(content))


# Pickles of arrays


def python_2(arrays):
    """What cPickle of Python 2 and NumPy of its days write, protocol 2: byte strings, and `numpy.core`."""

    def string(raw):
        return b"T" + struct.pack("<i", len(raw)) + raw

    body = b"\x80\x02}U\x05blobs}("
    for name, array in arrays.items():
        code = array.dtype.str[1:].encode()
        body += b"U" + bytes([len(name)]) + name.encode()
        body += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        body += b"(K\x01(" + b"".join(b"J" + struct.pack("<i", side) for side in array.shape) + b"t"
        body += b"cnumpy\ndtype\n(" + string(code) + b"K\x00K\x01tR(K\x03" + string(array.dtype.str[:1].encode())
        body += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + string(array.tobytes()) + b"tb"
    return body + b"us."


def test_pickles_of_python_2_have_their_values(written):
    arrays = {
        "conv1_w": KERNEL,
        "every_byte": np.arange(256, dtype=np.uint8),
        "doubles": np.float64([np.pi, np.nan]),
        "big_endian": np.array([1, 2, 3], ">i4"),
    }
    read = reader.read(written(python_2(arrays)))
    assert_same(read, {**arrays, "big_endian": np.int32([1, 2, 3])})


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_python_3_have_their_values(written, protocol):
    arrays = OrderedDict(
        kernel=KERNEL,
        fortran=np.asfortranarray(KERNEL[0]),
        strided=KERNEL[:, ::2, 1:],
        empty=np.zeros((0, 2)),
        mask=np.array([True, False]),
        scalar=np.float32(2.5),
        big_endian=np.array([1.5, 2.5], ">f8"),
    )
    expected = {**arrays, "scalar": np.array(np.float32(2.5)), "big_endian": np.float64([1.5, 2.5])}
    read = reader.read(written(arrays, protocol=protocol))
    assert_same(read, expected)
    assert not any(array.flags.writeable for array in read.values())


def test_npz_has_its_values(tmp_path):
    arrays = {"module_w": KERNEL, "a/b": np.int64(3), "empty": np.zeros((2, 0))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "weights.npz", **arrays)
        (tmp_path / "weights.npz").rename(tmp_path / "weights.pth")  # the content decides, not the suffix
        assert_same(reader.read(tmp_path / "weights.pth"), {**arrays, "a/b": np.array(3)})


def test_the_layout_of_detectron_leaves_its_blobs_without_momentum(written):
    blobs = {"conv1_w": KERNEL, "conv1_w_momentum": KERNEL + 1, "fpn_6_b": KERNEL[0]}
    assert_same(reader.read(written({"cfg": "MODEL: {}\n", "blobs": blobs})), {"conv1_w": KERNEL, "fpn_6_b": KERNEL[0]})


@pytest.mark.parametrize(
    "content",
    [
        {"w": KERNEL, "b": KERNEL[0]},
        {"model": {"w": KERNEL, "b": KERNEL[0]}, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True},
        {"state_dict": OrderedDict(w=KERNEL, b=KERNEL[0]), "epoch": 12, "best": np.float64(0.3), "x": [(1, 2.5), None]},
        {"model": {"module.w": KERNEL, "module.b": KERNEL[0]}},
    ],
)
def test_wrappers_and_a_common_module_prefix_are_removed(written, content):
    assert_same(reader.read(written(content)), {"w": KERNEL, "b": KERNEL[0]})


def test_a_prefix_or_wrapper_that_is_a_name_stays(written):
    arrays = {"module.w": KERNEL, "model": KERNEL[0], "w_momentum": KERNEL[1]}
    assert_same(reader.read(written(arrays)), arrays)


# Nothing is run


class Call:
    """Pickled as `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(builtins.eval, f"open({marker!r}, 'w')"),
    "open": lambda marker: Call(open, marker, "w"),
    "getattr": lambda marker: Call(getattr, "", "join"),
    "numpy function": lambda marker: Call(np.save, marker, np.zeros(1)),
    "nested": lambda marker: {"model": {"w": KERNEL, "b": [({"deep": Call(os.system, f"touch {marker}")},)]}},
    "beside": lambda marker: {"blobs": {"w": KERNEL}, "cfg": Call(os.system, f"touch {marker}")},
    "in an array": lambda marker: {"w": np.array([Call(os.system, f"touch {marker}")], dtype=object)},
    "as a key": lambda marker: {Call(os.system, f"touch {marker}"): KERNEL},
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_calls_in_a_pickle_are_refused_and_not_made(written, tmp_path, attack, protocol):
    marker = tmp_path / "marker"
    content = pickle.dumps(ATTACKS[attack](str(marker)), protocol)
    in_torch = io.BytesIO()
    with zipfile.ZipFile(in_torch, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})) + content
    for layout in (content, in_torch.getvalue(), legacy):
        with pytest.raises(UserError, match="refused"):
            reader.read(written(layout))
        assert not marker.exists()
    if attack in ("os.system", "eval", "open", "nested"):  # the attack is one: Python's own pickle runs it
        pickle.loads(content)
        assert marker.exists()


def test_the_refused_global_is_named(written):
    with pytest.raises(UserError, match=rf"holds {os.system.__module__}\.system, which is not an array or a plain"):
        reader.read(written(Call(os.system, "true")))
    with pytest.raises(UserError, match=r"holds os\\nx\.sys\\x1b"):  # nothing that a terminal obeys
        reader.read(written(b"\x80\x04" + text("os\nx") + text("sys\x1b") + b"\x93."))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"ccollections\nOrderedDict\n}" + text("__call__") + b"K\x01sb.", "sets the state of a function"),
        (b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + b")s\x86b.", "sets the state of a function"),
        (b"cnumpy\nndarray\n}" + text("x") + b"K\x01sb.", "damaged"),
        (b"ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ, which no weights need; refused"),
        (b"cnumpy\nndarray\n(K\x04tR.", "damaged"),
        (b"\x82\x01.", "extension 1"),
        (b"ccopyreg\n_reconstructor\n.", r"copyreg\._reconstructor"),
        (b"ccopy_reg\n__newobj__\n.", r"copy_reg\.__newobj__"),
        (b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.", "__globals__"),
        (b"ccollections\nOrderedDict.fromkeys\n.", "fromkeys"),
        (b"c_codecs\nencode\n(" + text("aa") + text("hex") + b"tR.", "encoded as 'hex'"),
        (b"cnumpy\ndtype\n" + text("O8") + b"\x85R.", "Python objects"),
        (b"cnumpy\ndtype\n" + text("V8") + b"\x85R.", "'V8'"),
        (b"cnumpy\ndtype\n" + text("f4,O") + b"\x85R.", "'f4,O'"),
        (b"cnumpy\ndtype\n" + text("f4") + b"\x85R(K\x03" + text("<") + b"N" + text("a") + b"}tb.", "records"),
        (b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n" + text("f8") + b"\x85RC\x04abcd\x86R.", "has 4 bytes"),
        (b"Nr\xff\xff\xff\xff.", "NoneType"),  # a memo index of 4 G must not take memory
    ],
)
def test_tricks_on_the_admitted_globals_fail(written, body, message):
    with pytest.raises(UserError, match=message):
        reader.read(written(b"\x80\x04" + body))


def test_attributes_of_an_ordered_dict_are_dropped(written):
    body = b"\x80\x02ccollections\nOrderedDict\n)R" + text("w") + pickle.dumps(KERNEL, 2)[2:-1] + b"s"
    state = b"}" + text("items") + b"K\x01sb."
    assert_same(reader.read(written(body + state)), {"w": KERNEL})


# What is told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html><body>Quota exceeded</body></html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08\x00rest", "Unpack it"),
        (b"\x89HDF\r\n\x1a\n....", r"is not a \.pkl .* begins with b'\\x89HDF"),
        ([KERNEL], "holds a list; expected a dict"),
        ({}, "an empty dict"),
        ({"blobs": {"w_momentum": KERNEL}}, "an empty dict"),
        (OrderedDict(), "an empty dict"),
        ({"model": {"w": KERNEL, "depth": 50, "names": ["a"]}}, r"'depth' \(int\), 'names' \(list\)"),
        ({str(i): None for i in range(8)}, r"'4' \(NoneType\) and 3 more"),
        ({3: KERNEL}, r"3 \(array\)"),
        ({"w": np.array(["a", "b"])}, r"'w' \(array\)"),
        ({"w": np.zeros(2, complex)}, r"'w' \(array\)"),
        ({"w": np.zeros(2, [("a", "f4")])}, "'V4'"),
    ],
)
def test_what_is_no_weights_is_told_in_words(written, content, message):
    with pytest.raises(UserError, match=message) as caught:
        reader.read(written(content, "weights.pth"))
    assert "weights.pth" in str(caught.value)


def test_missing_files_folders_and_other_archives_are_told(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        reader.read(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="is a folder"):
        reader.read(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="zip archive of readme.txt"):
        reader.read(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/constants.pkl", b"")
    with pytest.raises(UserError, match="TorchScript"):
        reader.read(tmp_path / "script.pt")
    np.savez(tmp_path / "objects.npz", w=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="Python objects"):
        reader.read(tmp_path / "objects.npz")
    np.savez(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match="empty dict"):
        reader.read(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f4', 'fortran_order': False, 'shape': (4, }", "(((((", "'''", "  1\n 2\n", "-" * 9000 + "1",
     "{1: 2, 'a': 3}", "{'descr': ('<f4',), 'fortran_order': False, 'shape': (4,)}",
     "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4)}",
     "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}"],
)  # fmt: skip
def test_a_damaged_header_of_an_array_is_told_where_the_checksum_is_right(tmp_path, header):
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header))
        archive.writestr("w.npy", start + header.encode() + bytes(16))
    with pytest.raises(UserError, match="damaged or cut short") as caught:
        reader.read(tmp_path / "weights.npz")
    assert "\n" not in str(caught.value)


def test_members_that_a_damaged_directory_hides_are_missed(tmp_path):
    np.savez(tmp_path / "weights.npz", a=KERNEL, b=KERNEL)
    content = bytearray((tmp_path / "weights.npz").read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 32 : directory + 34] = b"\xff\xff"  # the length of the first member's comment
    (tmp_path / "weights.npz").write_bytes(content)
    with pytest.raises(UserError, match="the directory has 1 members of 2.* damaged"):
        reader.read(tmp_path / "weights.npz")


@pytest.mark.parametrize("function", ["_weights", "_check_size", "_array"])
@pytest.mark.parametrize("error", [AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError])
def test_an_error_of_the_reader_itself_is_not_told_as_damage(monkeypatch, function, error):
    def fail(*_):
        raise error("of the reader")

    monkeypatch.setattr(reader, function, fail)
    with pytest.raises(error, match="of the reader") as caught:
        reader.read(DATA / "zip.pth")
    assert caught.type is error  # a UserError is a ValueError, too


def test_files_are_read_without_keras_tensorflow_or_torch():
    code = (
        f"import sys; from retinanet_keras.weights import reader; reader.read({str(DATA / 'zip.pth')!r}); "
        "print({'keras', 'tensorflow', 'torch'} & set(sys.modules) or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DATA.parents[1])
    assert done.stdout.strip() == ""


# Damage

WHOLE = {
    "zip": (DATA / "zip.pth").read_bytes(),
    "legacy": (DATA / "legacy.pth").read_bytes(),
    "python 2": python_2({"conv1_w": KERNEL, "scale": np.float64([0.5])}),
    "python 3": pickle.dumps({"model": OrderedDict(w=KERNEL, b=np.float32(1))}, 4),
}


def assert_a_dict_or_an_error(path, content):
    path.write_bytes(content)
    try:
        arrays = reader.read(path)
    except UserError:
        return None
    assert all(isinstance(name, str) and type(array) is np.ndarray for name, array in arrays.items())
    return arrays


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_cut_short_anywhere_is_an_error(tmp_path, name):
    whole = WHOLE[name]
    for length in range(0, len(whole), 1 + len(whole) // 150):
        assert assert_a_dict_or_an_error(tmp_path / "cut", whole[:length]) is None, length
    assert assert_a_dict_or_an_error(tmp_path / "cut", whole)


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_a_dict(tmp_path_factory, name, data):
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    assert_a_dict_or_an_error(tmp_path_factory.getbasetemp() / "damaged", bytes(content))


@settings(max_examples=300, deadline=None)
@given(head=st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"(", b"}", b"PK\x03\x04"]), rest=st.binary(max_size=200))
def test_random_bytes_are_an_error_or_a_dict(tmp_path_factory, head, rest):
    assert_a_dict_or_an_error(tmp_path_factory.getbasetemp() / "random", head + rest)
