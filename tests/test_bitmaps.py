"""BMP files of every depth, as Pillow decodes them, alone and within an export."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from retinanet_keras.data import image_decoding, image_headers
from retinanet_keras.serving import export

pytestmark = pytest.mark.eager

# Compiled once: op by op each image would take a tenth of a second.
decode = tf.function(image_decoding.decode, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
SIZES = [(13, 21), (1, 1), (5, 32), (8, 3)]  # height and width


def picture(height=13, width=21):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), "uint8"))


def saved(image):
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


def indexed(bits, height=13, width=21, used=None, *, old=False, top_down=False):
    """A BMP with a palette of random colors, and the pixels that it stands for."""
    rng = np.random.default_rng(bits)
    used = used or 2**bits
    colors = rng.integers(0, 256, (used, 3), "uint8")
    indices = rng.integers(0, used, (height, width), "uint8")
    stored = indices if top_down else indices[::-1]
    pixels = np.unpackbits(stored[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    packed = np.packbits(np.pad(pixels, [(0, 0), (0, -pixels.shape[1] % 32)]), axis=1).tobytes()
    entries = np.concatenate([colors[:, ::-1], np.full((used, 0 if old else 1), 7, "uint8")], axis=1).tobytes()
    if old:
        head = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        shape = width, -height if top_down else height
        head = struct.pack("<IiiHHIIiiII", 40, *shape, 1, bits, 0, 0, 2835, 2835, used, 0)
    start = 14 + len(head) + len(entries)
    return struct.pack("<2sIHHI", b"BM", start + len(packed), 0, 0, start) + head + entries + packed, colors[indices]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["1", "L", "P16", "P", "RGB", "RGBA"])
def test_what_pillow_writes_is_decoded_as_pillow_does(mode, size):
    image = picture(*size)
    image = image.quantize(16 if mode == "P16" else 200) if mode[0] == "P" else image.convert(mode)
    data = saved(image)
    np.testing.assert_array_equal(decode(data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [{}, {"old": True}, {"top_down": True}])
def test_every_depth_of_a_palette(bits, size, kind):
    data, expected = indexed(bits, *size, **kind)
    np.testing.assert_array_equal(decode(data), expected)
    assert image_headers.pixels(data).numpy() == size[0] * size[1]
    if bits != 2 and not (kind.get("old") and bits == 1):  # which Pillow does not read
        np.testing.assert_array_equal(Image.open(io.BytesIO(data)).convert("RGB"), expected)


def test_a_palette_may_be_short():
    data, expected = indexed(8, used=100)
    np.testing.assert_array_equal(decode(data), expected)
    beyond = data[:-1] + b"\xff"  # the padding of the top row
    np.testing.assert_array_equal(decode(beyond), expected)
    place = len(data) - 24  # the first pixel of the top row, which is stored last
    lacking = decode(data[:place] + b"\xff" + data[place + 1 :]).numpy()
    assert (lacking[0, 0] == 0).all() and (lacking[0, 1:] == expected[0, 1:]).all()


def changed(data, at, form, *values):
    data = bytearray(data)
    struct.pack_into(form, data, at, *values)
    return bytes(data)


FAULTS = {
    "run-length": (changed(indexed(8)[0], 30, "<I", 1), "not compressed"),
    "run-length 4": (changed(indexed(4)[0], 30, "<I", 2), "not compressed"),
    "16 bits": (changed(indexed(8)[0], 28, "<H", 16), "bits per pixel, this one has"),
    "other masks": (changed(saved(picture().convert("RGBA")), 30, "<I", 3), "not compressed"),
    "truncated": (indexed(8)[0][:-1], "truncated"),
    "a head alone": (indexed(8)[0][:30], "truncated"),
    "two letters": (b"BM", "bits per pixel"),
    "no width": (changed(indexed(8)[0], 18, "<i", 0), "truncated"),
    "negative width": (changed(indexed(8)[0], 18, "<i", -21), "truncated"),
    "no height": (changed(indexed(8)[0], 22, "<i", 0), "truncated"),
    "giant": (changed(indexed(8)[0], 18, "<ii", 2**31 - 1, -(2**31)), "truncated"),
    "pixels within the header": (changed(indexed(8)[0], 10, "<I", 20), "truncated"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_decoded_is_an_invalid_argument(name):
    data, words = FAULTS[name]
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        decode(data)


def test_masks_in_the_usual_order_are_read():
    image = picture().convert("RGBA")
    data = saved(image)
    masked = changed(data, 30, "<I", 3)[:54] + struct.pack("<III", 0xFF0000, 0xFF00, 0xFF) + data[54:]
    masked = changed(masked, 10, "<I", struct.unpack_from("<I", data, 10)[0] + 12)
    np.testing.assert_array_equal(decode(masked), np.asarray(image)[..., :3])


@pytest.mark.slow
def test_an_export_decodes_palettes_too(tiny_export):
    loaded = tf.saved_model.load(str(export.find(tiny_export)))
    colors = picture(60, 80).quantize(200)
    pixels = np.asarray(colors.convert("RGB"))
    by_bytes = loaded.signatures["serving_bytes"](image_bytes=tf.constant([saved(colors)]))
    by_pixels = loaded.signatures["serving_default"](images=tf.constant(pixels[None]))
    for name, value in by_pixels.items():
        np.testing.assert_array_equal(by_bytes[name], value)
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compressed"):
        loaded.signatures["serving_bytes"](image_bytes=tf.constant([FAULTS["run-length"][0]]))
