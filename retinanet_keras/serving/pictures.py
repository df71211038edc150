"""Pictures of the detections in image files, each under the name of its image."""

from pathlib import Path

from retinanet_keras.errors import UserError
from retinanet_keras.results import draw


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
