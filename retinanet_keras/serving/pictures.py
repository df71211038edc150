"""Reading image files without TensorFlow, and writing pictures of the detections in them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from retinanet_keras.config import MAX_PIXELS
from retinanet_keras.data.image_formats import DAMAGE, IMAGE_FORMATS
from retinanet_keras.errors import DataError, UserError
from retinanet_keras.visualization import draw


def read(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Read an image file as uint8 RGB [H, W, 3]; EXIF rotation is ignored, as in exports.

    Raises:
        DataError: if the file cannot be read, is none of IMAGE_FORMATS, or has more than MAX_PIXELS by its header.
    """
    try:
        with _opened(path) as image:
            pixels = image.width * image.height
            if pixels <= MAX_PIXELS:
                return np.asarray(image.convert("RGB"))
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from None
    raise DataError(
        f"{path} has {pixels:,} pixels by its header, more than the {MAX_PIXELS:,} that exports take by default. Make "
        "it smaller"
    )


def size_of(encoded: bytes) -> tuple[float, float]:
    """(height, width) of an encoded image by its header; infinite if exports may decode another size."""
    try:
        with _opened(io.BytesIO(encoded)) as image:
            if not (image.format == "GIF" and image.is_animated):  # its header has not the size of the frames
                return image.height, image.width
    except DAMAGE:
        pass  # the server reports what is wrong with it
    return np.inf, np.inf


@contextlib.contextmanager
def _opened(file: str | os.PathLike[str] | BinaryIO) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is MAX_PIXELS
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            yield image


def write(
    to: str | os.PathLike[str],
    name: str,
    pixels: npt.NDArray,
    boxes: Any,
    labels: Any,
    names: Any,
    scores: Any,
) -> None:
    """Draw detections and write the picture, under the name of its image.

    Args:
        to: path of a folder.
        name: str. Name of the image, as of `listing.image_files`.
        pixels, boxes, labels, names, scores: as for `draw.draw_boxes`.

    Raises:
        UserError: if a file is where a folder is needed, or the reverse.
    """
    path = Path(to, f"{name}.png")
    try:
        draw.save(path, draw.draw_boxes(pixels, boxes, labels, names, scores))
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"{path} cannot be written: {error.filename} is {'a folder' if path.is_dir() else 'not a folder'}. Move it "
            "away, or name another folder with --to"
        ) from None
