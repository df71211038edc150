"""Image files read without TensorFlow, and pictures of the detections in them, each under the name of its image."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from retinanet_keras.config import MAX_PIXELS
from retinanet_keras.data.coco import DataError
from retinanet_keras.errors import UserError
from retinanet_keras.results import draw

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # what exports decode; readers of others fail in ways of their own
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for a damaged one


def read(path):
    """uint8 RGB [H, W, 3] of an image file; EXIF is ignored, as exports do.

    Raises:
        DataError: where the file cannot be read, is none of FORMATS, or has more than MAX_PIXELS by its header.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is another
            with Image.open(path, formats=FORMATS) as image:
                found = image.width * image.height
                if found <= MAX_PIXELS:
                    return np.asarray(image.convert("RGB"))
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from None
    raise DataError(
        f"{path} has {found:,} pixels by its header, more than the {MAX_PIXELS:,} that exports take by default. Make "
        "it smaller"
    )


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
