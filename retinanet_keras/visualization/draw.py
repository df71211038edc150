"""Drawing of boxes on images, and contact sheets.

Images are uint8 RGB [H, W, 3]; boxes are absolute `x1, y1, x2, y2` in their pixels.
"""

from __future__ import annotations

import colorsys
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from retinanet_keras.storage import disk
from retinanet_keras.storage.printable import printable

# Okabe and Ito's colors, which people with any form of color blindness can tell apart; without black,
# because pictures have dark parts.
PALETTE = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
)
NO_CLASS = PALETTE[5]
CAPTION = (60, 60, 60)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
LONGEST = 80  # characters of a name shown in a tag
SEEN = 4 * LONGEST  # characters of a name that are read, including spaces
MOST_BYTES = 255  # of a file name, on most systems
PANEL_SIDES = (320, 1600)  # smallest and largest longer side of a panel of `side_by_side`, in pixels


def color(label: int) -> tuple[int, ...]:
    """The RGB color of a class: from the palette, then lighter, then darker, then hues a golden angle apart."""
    shade, index = divmod(int(label), len(PALETTE))
    if shade == 0:
        return PALETTE[index]
    if shade < 3:
        other = (255, 0)[shade - 1]
        return tuple(round(0.55 * c + 0.45 * other) for c in PALETTE[index])
    n = int(label) - 3 * len(PALETTE)
    red, green, blue = colorsys.hls_to_rgb(n * 0.618034 % 1, (0.35, 0.5, 0.65)[n % 3], 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: npt.ArrayLike,
    boxes: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    names: Sequence[str],
    scores: npt.ArrayLike | None = None,
    *,
    width: int | None = None,
) -> npt.NDArray:
    """Draw boxes on a copy of an image, with tags of name and score inside the image.

    Args:
        image: uint8 [H, W, 3].
        boxes: [N, 4]. Absolute x1, y1, x2, y2. Boxes are clipped to the image; boxes entirely outside, inverted or not
            finite are ignored.
        labels: [N] in 0..K-1, or None for boxes without a class. Rows with label -1 (padding) are ignored.
        names: K class names; a label without a name is shown as a number.
        scores: [N] or None.
        width: int. Width of the lines in pixels; None: in proportion to the image.

    Returns:
        uint8 [H, W, 3].
    """
    image = _checked(image)
    rows, columns = image.shape[:2]
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)  # [N, 4]
    count = len(boxes)
    labels = None if labels is None else np.asarray(labels).astype(np.int64).reshape(-1)  # [N]
    scores = None if scores is None else np.asarray(scores, np.float64).reshape(-1)  # [N]
    for what, values in (("labels", labels), ("scores", scores)):
        if values is not None and len(values) != count:
            raise ValueError(
                f"Expected as many {what} as boxes, got {len(values)} {what} and {count} boxes. Pass one for each box"
            )
    x1, y1, x2, y2 = boxes.T  # each [N]
    shown = np.isfinite(boxes).all(axis=1) & (x1 <= x2) & (y1 <= y2)
    shown &= (x1 < columns) & (y1 < rows) & (x2 > 0) & (y2 > 0)
    if labels is not None:
        shown &= labels >= 0
    order = np.flatnonzero(shown)
    if scores is not None:
        order = order[np.argsort(-scores[order], kind="stable")]

    scale = math.sqrt(rows * columns)
    width = max(1, round(scale / 220)) if width is None else width
    picture = Image.fromarray(image)
    canvas = ImageDraw.Draw(picture)
    outlines = {}
    for i in order[::-1]:  # the best detection on top
        left, top = max(math.floor(x1[i]) - width // 2, 0), max(math.floor(y1[i]) - width // 2, 0)
        right = min(math.ceil(x2[i]) - 1 + width // 2, columns - 1)  # the last pixel that is covered
        bottom = min(math.ceil(y2[i]) - 1 + width // 2, rows - 1)
        outlines[i] = left, top, max(right, left), max(bottom, top)
        canvas.rectangle(outlines[i], outline=NO_CLASS if labels is None else color(labels[i]), width=width)

    font = _font(max(9, scale / 42))
    taken = np.zeros((0, 4))  # tags so far, [T, 4]
    for i in order:
        words = [] if labels is None else [names[labels[i]] if labels[i] < len(names) else labels[i]]
        words += [] if scores is None else [f"{scores[i]:.2f}"]
        tag = _tag_size(canvas, font, words, columns, rows)
        if tag is None:
            continue
        text, tag_width, tag_height = tag
        position = _tag_position(outlines[i], tag_width, tag_height, columns, rows, taken)
        taken = np.concatenate([taken, [position]])
        fill = NO_CLASS if labels is None else color(labels[i])
        canvas.rectangle((position[0], position[1], position[2] - 1, position[3] - 1), fill=fill)
        center = (position[0] + position[2]) / 2, (position[1] + position[3]) / 2
        canvas.text(center, text, font=font, fill=_readable_on(fill), anchor="mm")
    return np.asarray(picture).copy()


def side_by_side(
    image: npt.ArrayLike,
    truth: tuple[npt.ArrayLike, npt.ArrayLike] | None,
    detections: Sequence[npt.ArrayLike],
    names: Sequence[str],
    *,
    min_score: float = 0.3,
) -> npt.NDArray:
    """Draw ground truth at the left and detections at the right, with captions; large images shrink, tiny ones grow.

    Args:
        image: uint8 [H, W, 3].
        truth: (boxes [M, 4], labels [M]), or None to draw only the detections.
        detections: (boxes [N, 4], scores [N], labels [N]).
        names: K class names.
        min_score: float. Detections with a lower score are not drawn.

    Returns:
        uint8 [panel height + caption, panels and gap, 3].
    """
    image = _checked(image)
    longer = max(image.shape[:2])
    factor = min(max(longer, PANEL_SIDES[0]), PANEL_SIDES[1]) / longer
    rows, columns = (max(1, round(side * factor)) for side in image.shape[:2])
    stretch = np.array([columns / image.shape[1], rows / image.shape[0]] * 2)
    if factor != 1:
        how = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS  # single pixels stay recognizable
        image = np.asarray(Image.fromarray(image).resize((columns, rows), how))

    boxes, scores, labels = (np.asarray(values) for values in detections)
    shown = (labels.reshape(-1) >= 0) & (scores.reshape(-1) >= min_score)
    boxes, scores, labels = boxes.reshape(-1, 4)[shown], scores.reshape(-1)[shown], labels.reshape(-1)[shown]
    panels: list[tuple] = [(f"detections: {len(boxes)} of score {min_score:g} or more", boxes, labels, scores)]
    if truth is not None:
        boxes, labels = np.asarray(truth[0]).reshape(-1, 4), np.asarray(truth[1]).reshape(-1)
        panels.insert(0, (f"ground truth: {np.count_nonzero(labels >= 0)}", boxes, labels, None))

    size = max(12, math.sqrt(rows * columns) / 36)
    strip, gap = round(1.8 * size), round(0.7 * size)
    sheet = Image.new("RGB", (len(panels) * (columns + gap) - gap, rows + strip), WHITE)
    canvas = ImageDraw.Draw(sheet)
    for n, (caption, boxes, labels, scores) in enumerate(panels):
        left = n * (columns + gap)
        font = _font(size)
        font = _font(max(1, min(size, size * (columns - 4) / canvas.textlength(caption, font))))
        canvas.text((left + 2, strip / 2), caption, font=font, fill=CAPTION, anchor="lm")
        sheet.paste(Image.fromarray(draw_boxes(image, boxes * stretch, labels, names, scores)), (left, strip))
    return np.asarray(sheet).copy()


def grid(
    images: Sequence[npt.ArrayLike], columns: int | None = None, cell: tuple[int, int] | None = None
) -> npt.NDArray:
    """Draw a contact sheet on white; each image is scaled to fit its cell and keeps its aspect ratio.

    Args:
        images: list of uint8 [H, W, 3] of any sizes, at least one.
        columns: int. Images per row; None: such that the sheet is close to 4:3.
        cell: (height, width) of a cell in pixels; None: the images' median width, at least 200 and at most 640, and
            their median aspect ratio.

    Returns:
        uint8 [rows * (height + gap) + gap, columns * (width + gap) + gap, 3], with a gap of 8 pixels.
    """
    images, gap = [_checked(image) for image in images], 8
    if not images:
        raise ValueError("A contact sheet needs at least one image, got none. Pass a list of images")
    if cell is None:
        width = round(np.clip(np.median([i.shape[1] for i in images]), 200, 640))
        aspect = np.clip(np.median([i.shape[0] / i.shape[1] for i in images]), 0.25, 4)
        cell = round(width * aspect), width
    height, width = cell
    if columns is None:
        columns = min(len(images), max(1, round(math.sqrt(len(images) * 4 / 3 * height / width))))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), WHITE)
    for n, image in enumerate(images):
        factor = min(height / image.shape[0], width / image.shape[1])
        size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
        row, column = divmod(n, columns)
        left = gap + column * (width + gap) + (width - size[0]) // 2
        top = gap + row * (height + gap) + (height - size[1]) // 2
        sheet.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (left, top))
    return np.asarray(sheet).copy()


def save(path: str | os.PathLike[str], image: npt.ArrayLike) -> None:
    """Write an image atomically as PNG or JPEG, depending on the path's suffix, and create its folder.

    Args:
        path: path of the file. A file name that is too long for file systems, as an image's name with a further suffix
            may be, is shortened.
        image: uint8 [H, W, 3].
    """
    path = Path(path)
    jpeg: dict[str, Any] = {"format": "JPEG", "quality": 92}
    options = {".png": {"format": "PNG"}, ".jpg": jpeg, ".jpeg": jpeg}.get(path.suffix.lower())
    if options is None:
        raise ValueError(f"Expected a path that ends in .png, .jpg or .jpeg, got {path}. Change the suffix")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(_checked(image))
    with disk.replacing(_short(path)) as partial:
        picture.save(partial, **options)


def _short(path: Path) -> Path:
    """The path with a file name of at most MOST_BYTES; shortened names end in a checksum, so that they differ."""
    name = os.fsencode(path.name)
    if len(name) <= MOST_BYTES:
        return path
    end = f"-{zlib.crc32(name):08x}{path.suffix}"
    return path.with_name(name[: MOST_BYTES - len(end)].decode("utf-8", "ignore") + end)


def _checked(image: npt.ArrayLike) -> npt.NDArray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"Expected an image as uint8 [H, W, 3] (RGB, 0 to 255), got {image.dtype} {list(image.shape)}. "
            "Convert it with image.clip(0, 255).astype('uint8')"
        )
    return image


def _tag_size(
    canvas: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, words: Sequence[Any], columns: int, rows: int
) -> tuple[str, int, int] | None:
    """(text, width, height) of a tag, shortened until it fits the image; None if the image is too small."""
    words = [printable(" ".join(str(word)[:SEEN].split()), LONGEST) for word in words]
    shorter = [" ".join(words)]
    if len(words) == 2:
        name, score = words
        shorter += [f"{name[:n]}… {score}" for n in range(len(name) - 1, 0, -1)] + [score]
    elif words:
        shorter += [words[0][:n] + "…" for n in range(len(words[0]) - 1, 0, -1)]
    pad = max(1, round(font.size / 5))
    ascent, descent = font.getmetrics()
    height = ascent + descent + pad // 2
    if height > rows / 6:  # tags would hide the objects
        return None
    for text in filter(None, shorter):
        width = math.ceil(canvas.textlength(text, font)) + 2 * pad
        if width <= columns:
            return text, width, height
    return None


def _tag_position(
    outline: tuple[int, int, int, int], width: int, height: int, columns: int, rows: int, taken: npt.NDArray
) -> tuple[int, ...]:
    """The position of a tag, (x1, y1, x2, y2): at a corner of its box, in the image, apart from other tags if possible.

    Args:
        outline: (left, top, right, bottom). The box in pixels, both ends included.
        width, height: int. Size of the tag in pixels.
        columns, rows: int. Size of the image in pixels.
        taken: [T, 4]. The tags drawn so far.
    """
    left, top, right, bottom = outline
    corners = [
        (left, top - height),  # above
        (right + 1 - width, top - height),
        (left, bottom + 1),  # below
        (right + 1 - width, bottom + 1),
        (left, top),  # inside
        (left, bottom + 1 - height),
        (right + 1 - width, bottom + 1 - height),
    ]
    best, least = np.zeros([4]), math.inf
    for x, y in corners:
        inside = min(max(x, 0), columns - width), min(max(y, 0), rows - height)
        tag = np.array([*inside, inside[0] + width, inside[1] + height])
        overlap = np.maximum(np.minimum(tag[2:], taken[:, 2:]) - np.maximum(tag[:2], taken[:, :2]), 0)  # [T, 2]
        hidden = overlap.prod(axis=1).sum()
        if hidden < least:
            best, least = tag, hidden
    return tuple(int(v) for v in best)


def _font(size: float) -> ImageFont.FreeTypeFont:
    """The font DejaVu Sans of matplotlib: Pillow's built-in font has only ASCII letters."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def _readable_on(rgb: tuple[int, ...]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return BLACK if luminance > 0.179 else WHITE  # the luminance at which both have the same contrast
