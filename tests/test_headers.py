"""The size that encoded images declare is read without decoding, and what is too large never is."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from retinanet_keras.data import image_decoding, image_headers

WIDTH, HEIGHT = 301, 87
SAVED = {
    "jpeg": ("JPEG", {}), "progressive": ("JPEG", {"progressive": True}), "png": ("PNG", {}), "bmp": ("BMP", {}),
    "webp": ("WEBP", {}), "lossless": ("WEBP", {"lossless": True}), "extended": ("WEBP", {"exif": b"Exif\0\0MM"}),
    "gif": ("GIF", {}),
}  # fmt: skip


def encoded(kind, size=(HEIGHT, WIDTH), **settings):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), "uint8"))
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def animation(frames):
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30), "uint8")) for i in range(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pixels():
    return tf.function(image_headers.pixels, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)


@pytest.mark.parametrize("name", SAVED)
def test_the_declared_size_is_the_decoded_one(pixels, name):
    kind, settings = SAVED[name]
    assert pixels(encoded(kind, **settings)).numpy() == WIDTH * HEIGHT


def test_bottom_up_and_top_down_bitmaps(pixels):
    data = bytearray(encoded("BMP"))
    data[22:26] = struct.pack("<i", -HEIGHT)
    assert pixels(bytes(data)).numpy() == WIDTH * HEIGHT


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_all_frames_of_a_gif_count(pixels, frames):
    assert pixels(animation(frames)).numpy() == frames * 20 * 30


@pytest.mark.parametrize("data", [b"", b"G", b"GIF8", b"GIF89a", b"BM", b"\x89PNG", b"RIFF....WEBPVP8 ", b"nothing"])
def test_a_header_that_is_cut_off_is_small_or_an_error(pixels, data):
    assert pixels(data).numpy() <= 1


def test_a_giant_is_refused_by_its_header_alone():
    """Its 10 gigapixels would be 30 GB."""
    text = tf.TensorSpec([], tf.string)
    check = tf.function(lambda data: image_headers.checked(data, 1_000_000), input_signature=[text], autograph=False)
    giants = {
        "png": (encoded("PNG"), 16, ">II"), "bmp": (encoded("BMP"), 18, "<ii"), "gif": (animation(1), None, "<HH"),
        "extended": (encoded("WEBP", exif=b"Exif\0\0MM"), None, ""),
    }  # fmt: skip
    for name, (data, at, form) in giants.items():
        changed = bytearray(data)
        if name == "gif":
            at = data.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 30, 20)) + 5
            changed[at : at + 4] = struct.pack(form, 65535, 65535)
        elif name == "extended":
            changed[24:30] = b"\x9f\x86\x01" * 2  # 100,000 less 1
        else:
            changed[at : at + 8] = struct.pack(form, 100_000, 100_000)
        with pytest.raises(tf.errors.InvalidArgumentError, match="at most"):
            check(bytes(changed))
    jpeg = bytearray(encoded("JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most"):
        check(bytes(jpeg))
    assert check(encoded("PNG")).numpy() == encoded("PNG")


def test_a_gif_of_very_many_blocks_is_refused_soon():
    data = animation(1)
    start = data.index(b"\x2c\0\0\0\0") + 11  # after the frame's header and the size of its codes
    endless = data[:start] + b"\x01\x55" * 500_000 + b"\0\x3b"
    check = tf.function(image_headers.checked, autograph=False)  # op by op it would take minutes
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most"):
        check(endless, 10**6)


@pytest.mark.parametrize("data", [b"", b"nothing", b"\xff\x0a" + bytes(99), b"\0\0\0\x0cJXL \r\n\x87\n", b"II*\0"])
def test_other_formats_are_refused_before_they_are_decoded(data):
    """JPEG XL among them, which some TensorFlows decode."""
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected JPEG, PNG, GIF, BMP or WebP"):
        image_headers.checked(data, 10**6)


def test_the_limit_itself_passes():
    data = encoded("PNG")
    assert image_headers.checked(data, WIDTH * HEIGHT).numpy() == data
    with pytest.raises(tf.errors.InvalidArgumentError):
        image_headers.checked(data, WIDTH * HEIGHT - 1)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("channels", [3, 4])
def test_transparency_of_a_webp_is_dropped(channels, lossless):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, channels), "uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=lossless, exact=True)
    found = image_decoding.decode(image_headers.checked(buffer.getvalue(), 600)).numpy()
    expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGBA"))[..., :3]
    np.testing.assert_array_equal(found, expected)


def test_an_animated_webp_is_refused():
    images = [Image.fromarray(np.full((20, 30, 3), i, "uint8")) for i in (0, 99)]
    buffer = io.BytesIO()
    images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:])
    with pytest.raises(tf.errors.InvalidArgumentError, match="this one is animated"):
        image_decoding.decode(buffer.getvalue())
