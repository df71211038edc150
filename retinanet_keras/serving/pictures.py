"""Image files read without TensorFlow, and pictures of the detections in them, each under the name of its image."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from retinanet_keras.config import MAX_PIXELS
from retinanet_keras.data.image_formats import DAMAGE, IMAGE_FORMATS
from retinanet_keras.errors import DataError, UserError
from retinanet_keras.visualization import draw


def read(path):
    """uint8 RGB [H, W, 3] of an image file; EXIF is ignored, as exports do.

    Raises:
        DataError: where the file cannot be read, is none of IMAGE_FORMATS, or has more than MAX_PIXELS by its header.
    """
    try:
        with _opened(path) as image:
            found = image.width * image.height
            if found <= MAX_PIXELS:
                return np.asarray(image.convert("RGB"))
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from None
    raise DataError(
        f"{path} has {found:,} pixels by its header, more than the {MAX_PIXELS:,} that exports take by default. Make "
        "it smaller"
    )


def size_of(encoded):
    """(height, width) of an encoded image by its header; infinite where that does not tell what exports decode."""
    try:
        with _opened(io.BytesIO(encoded)) as image:
            if not (image.format == "GIF" and image.is_animated):  # it is not of the frames
                return image.size[::-1]
    except DAMAGE:
        pass  # the server says what is wrong with it
    return np.inf, np.inf


@contextlib.contextmanager
def _opened(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is another
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            yield image


def write(to, name, pixels, boxes, labels, names, scores):
    """Draw detections and write the picture.

    Args:
        to: path of a folder.
        name: str. The image's name, as `listing.image_files` gives it.
        pixels, boxes, labels, names, scores: as for `draw.draw_boxes`.

    Raises:
        UserError: where there is a file in the place of one of its folders, or the reverse.
    """
    path = Path(to, f"{name}.png")
    try:
        draw.save(path, draw.draw_boxes(pixels, boxes, labels, names, scores))
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"{path} cannot be written: {error.filename} is {'a folder' if path.is_dir() else 'not a folder'}. Move it "
            "away, or name another folder with --to"
        ) from None
