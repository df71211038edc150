"""Pictures of the detections in image files, each under the name of its image."""

import hashlib
import os
from pathlib import Path

from retinanet_keras.errors import UserError
from retinanet_keras.results import draw

LONGEST = 255  # bytes in a file's name, of most file systems


def path_of(to, name):
    """The picture's path in the folder `to`: the image's name, shortened where .png would make it too long."""
    folder, _, base = name.rpartition("/")
    encoded = os.fsencode(base)
    if len(encoded) + len(".png") > LONGEST:
        short = encoded[: LONGEST - len(".png") - 17].decode("utf-8", "ignore")
        base = f"{short}-{hashlib.sha256(encoded).hexdigest()[:16]}"
    return Path(to, folder, f"{base}.png")


def write(to, name, pixels, boxes, labels, names, scores):
    """Draw detections and write the picture.

    Args:
        to: path of a folder.
        name: str. The image's name, as `listing.image_files` gives it.
        pixels, boxes, labels, names, scores: as for `draw.draw_boxes`.

    Raises:
        UserError: where there is a file in the place of one of its folders, or the reverse.
    """
    path = path_of(to, name)
    try:
        draw.save(path, draw.draw_boxes(pixels, boxes, labels, names, scores))
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"{path} cannot be written: {error.filename} is {'a folder' if path.is_dir() else 'not a folder'}. Move it "
            "away, or name another folder with --to"
        ) from None
