"""A generated detection set: textured, rotated, overlapping shapes over clutter, as JPEG files and COCO JSON.

Each class has an outline, a texture and a range of hues; distractors have outlines of no class, any of the textures and
any hue. An image depends on the seed, its split and its index only. The numbers here are this project's choices.
"""

import colorsys
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from retinanet_keras.config import ShapesConfig
from retinanet_keras.errors import DataError
from retinanet_keras.storage import disk, strict_json

TEXTURE_OF = {"disk": "dots", "triangle": "stripes", "square": "checks", "star": "gradient", "ring": "noise"}
NAMES = tuple(TEXTURE_OF)
TEXTURES = (*TEXTURE_OF.values(), "plain")
DISTRACTORS = ("crescent", "blob", "arc", "zigzag", "letter", "segment")
HUE_RANGE = 0.35  # of the distance between the hues of two classes, to either side
SPLITS = ("train", "val", "test")
VERSION = 1  # of the pictures: another one makes a folder that was generated before unfit
STAMP = "shapes.json"
ASPECTS = (0.7, 0.8, 0.9, 1.0)  # shorter over longer side of an image
TEXTURE = 120  # largest difference between the two colors of a texture, of 255
EMPTY_EVERY = 10  # every tenth image has distractors alone
LEAST_INSIDE = 0.6  # of an object's box
MOST_COVERED = 0.4  # of an object's box, by all that lies over it
SAMPLES = 3  # per pixel and axis, in drawing outlines
LETTERS = (
    ((-0.5, -1), (-0.5, 1), (0.6, 1)),  # L
    ((-0.7, -1), (0.7, -1), (-0.7, 1), (0.7, 1)),  # Z
    ((-0.7, 1), (-0.7, -1), (0.7, 1), (0.7, -1)),  # N
    ((0.6, -1), (-0.6, -1), (-0.6, 0), (0.4, 0), (-0.6, 0), (-0.6, 1), (0.6, 1)),  # E
    ((-0.7, 1), (-0.7, -1), (0, 0.3), (0.7, -1), (0.7, 1)),  # M
    ((-0.6, 1), (-0.6, 0), (0.6, 0), (0.6, 1), (0.6, -1), (0.6, 0), (-0.6, 0), (-0.6, -1)),  # H
)


def generate(directory, config):
    """Write the dataset, once: `images/`, `annotations/instances_{train,val,test}.json` and a stamp of the settings.

    A box's `area` in the JSON is its width times its height.

    Args:
        directory: to write; its parents are made.
        config: a ShapesConfig.

    Raises:
        DataError: where the folder exists with anything but these settings' dataset. It is left as it is.
    """
    directory = Path(directory)
    stamp = {"version": VERSION, **_plain(config)}
    if _is_done(directory, stamp):
        return
    with disk.folder_beside(directory) as partial:
        (partial / "images").mkdir()
        (partial / "annotations").mkdir()
        counts = [config.train_images, config.val_images, config.test_images]
        with tqdm(total=sum(counts), desc=f"Drawing {directory}", unit="image") as bar:
            for split, count in zip(SPLITS, counts, strict=True):
                _write_split(partial, split, count, config, bar)
        (partial / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
        try:
            partial.replace(directory)
        except OSError:  # another process was first
            if not _is_done(directory, stamp):
                raise


def _plain(config):
    """A ShapesConfig as JSON gives it back."""
    return json.loads(json.dumps(asdict(config)))


def _is_done(directory, stamp):
    """Whether the folder holds this dataset; a DataError where it holds anything else."""
    advice = "Choose another folder with data.dir, or remove this one."
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise DataError(f"{directory} is a file, and the generated dataset needs a folder. {advice}")
    if not any(directory.iterdir()):
        return False
    try:
        there = {**_plain(ShapesConfig()), **strict_json.read(directory / STAMP)}  # it may be older than a key
        changed = [f"{key} {there.get(key)} there, {new} here" for key, new in stamp.items() if there.get(key) != new]
    except (OSError, ValueError, TypeError):
        raise DataError(f"{directory} holds other files than a generated dataset. {advice}") from None
    if changed:
        raise DataError(f"{directory} was generated with other settings: {'; '.join(changed)}. {advice}")
    return True


def _write_split(directory, split, count, config, bar):
    images, annotations = [], []
    for i in range(count):
        pixels, boxes, labels = render(
            config.seed, split, i, config.side, objects=config.objects, size=config.size, clutter=config.clutter
        )
        name = f"{split}_{i:06d}.jpg"
        Image.fromarray(pixels).save(directory / "images" / name, quality=90)
        images.append({"id": i + 1, "file_name": name, "width": pixels.shape[1], "height": pixels.shape[0]})
        for (x1, y1, x2, y2), label in zip(boxes.round(2).tolist(), labels.tolist(), strict=True):
            box = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
            annotations.append({
                "id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1, "bbox": box,
                "area": round(box[2] * box[3], 2), "iscrowd": 0,
            })  # fmt: skip
        bar.update()
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(NAMES)]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (directory / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))


def render(
    seed, split, index, side, *,
    objects=ShapesConfig.objects, size=ShapesConfig.size, clutter=ShapesConfig.clutter,
):  # fmt: skip
    """One image, the same for the same arguments.

    Args:
        seed, side, objects, size, clutter: of a ShapesConfig; lengths are log-uniform within `size`, those of
            distractors 0.6 times that.
        split, index: which image.

    Returns:
        uint8 [H, W, 3]; boxes float64 [N, 4], x1, y1, x2, y2 in pixels, tight around each outline where nothing lies
        over it and clipped to the image; labels int64 [N] into NAMES.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    height, width = side, round(side * rng.choice(ASPECTS))
    if rng.random() < 0.5:
        height, width = width, height
    pixels = _background(rng, height, width)
    empty = index % EMPTY_EVERY == EMPTY_EVERY - 1
    kinds = [] if empty else list(rng.choice(NAMES, rng.integers(1, objects + 1)))
    kinds += list(rng.choice(DISTRACTORS, rng.integers(1, clutter + 1)))
    lengths = side * np.exp(rng.uniform(*np.log(size), len(kinds)))  # [n] pixels
    lengths[[kind in DISTRACTORS for kind in kinds]] *= 0.6
    boxes, labels, covered = np.zeros([0, 4]), [], np.zeros([0])
    for i in np.argsort(-lengths):  # the small ones find room on and between the large
        length = float(lengths[i])  # a NumPy scalar would turn float32 arrays into float64
        contours, stroke = _outline(rng, kinds[i])
        contours = _sized(contours, stroke, length, rng.uniform(0, 2 * np.pi))
        place = _place(rng, contours[0], stroke * length, height, width, boxes, covered)
        if place is None:
            continue
        shift, box, covered = place
        if kinds[i] in NAMES:
            texture = TEXTURE_OF[kinds[i]]
            hue = (NAMES.index(kinds[i]) + rng.uniform(-HUE_RANGE, HUE_RANGE)) / len(NAMES)
        else:
            texture, hue = rng.choice(TEXTURES), rng.random()
        _paint(rng, pixels, [contour + shift for contour in contours], stroke * length, box, length, texture, hue)
        if kinds[i] in NAMES:
            boxes, covered = np.concatenate([boxes, box[None]]), np.append(covered, 0.0)
            labels.append(NAMES.index(kinds[i]))
    contrast, grain = rng.uniform(0.8, 1.1), rng.uniform(0, 24)
    pixels *= contrast
    pixels += (rng.random([height, width, 1], np.float32) - 0.5) * grain + 128 * (1 - contrast)
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8), boxes, np.array(labels, np.int64)


def _outline(rng, kind):
    """Contours [[V, 2], ...] of a shape in units of any size, the second one a hole; and, for shapes that are strokes,
    their width over the shape's longer side, else 0."""
    if kind == "disk":
        return [_circle(64)], 0
    if kind == "ring":
        return [_circle(64), _circle(64) * rng.uniform(0.45, 0.7)], 0
    if kind == "square":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])], 0
    if kind == "triangle":
        return [np.array([[0, -rng.uniform(1.3, 2.0)], [1, 0], [-1, 0]])], 0
    if kind == "star":
        radii = np.tile([1, rng.uniform(0.38, 0.5)], 5)
        return [_circle(10) * radii[:, None]], 0
    if kind == "crescent":
        inner = np.linspace(np.pi, 0, 24)
        low = rng.uniform(0.3, 0.6)
        lower = np.stack([np.cos(inner), low * np.sin(inner)], axis=1)
        return [np.concatenate([_circle(48)[:25], lower[1:-1]])], 0
    if kind == "blob":
        angles, waves = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.arange(2, 5)
        bumps = np.sin(np.outer(angles, waves) + rng.uniform(0, 2 * np.pi, 3)) @ rng.uniform(0.15, 0.3, 3)
        return [_circle(48) * (1 + bumps)[:, None]], 0
    if kind == "arc":
        return [_circle(64)[: rng.integers(14, 40)]], rng.uniform(0.06, 0.16)
    if kind == "zigzag":
        n = rng.integers(4, 7)
        y = np.where(np.arange(n) % 2, 0.4, -0.4)
        return [np.stack([np.linspace(-1, 1, n), y], axis=1)], rng.uniform(0.06, 0.1)
    if kind == "letter":
        return [np.array(LETTERS[rng.integers(len(LETTERS))])], rng.uniform(0.1, 0.18)
    return [np.array([[-1.0, 0.0], [1.0, 0.0]])], rng.uniform(0.05, 0.12)


def _circle(n):
    angles = np.arange(n) * 2 * np.pi / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rotation(angle):
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _sized(contours, stroke, length, angle):
    """Contours rotated, centered on their box and scaled until the box, stroke included, is `length` pixels long."""
    contours = [contour @ _rotation(angle) for contour in contours]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    scale = length * (1 - stroke) / (high - low).max()
    return [(contour - (low + high) / 2) * scale for contour in contours]


def _place(rng, contour, stroke, height, width, boxes, covered):
    """Where the shape lies mostly in the image and hides no other: its shift [2], box [4] and the new `covered`.

    None where none of 30 random places will do.
    """
    limit = np.array([width, height, width, height])
    low, high = contour.min(axis=0) - stroke / 2, contour.max(axis=0) + stroke / 2
    slack = (high - low) * (0.3 if rng.random() < 0.25 else 0.0)  # a quarter may reach beyond the border
    shifts = rng.uniform(*np.sort([-low - slack, limit[:2] - high + slack], axis=0), [30, 2])  # [T, 2]
    places = np.clip(np.concatenate([low + shifts, high + shifts], axis=1), 0, limit)  # [T, 4]
    inside = (places[:, 2:] - places[:, :2]).prod(axis=1) >= LEAST_INSIDE * (high - low).prod()  # [T]
    corner = np.minimum(boxes[:, 2:], places[:, None, 2:]) - np.maximum(boxes[:, :2], places[:, None, :2])  # [T, N, 2]
    shared = np.maximum(corner, 0).prod(axis=2) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)  # [T, N]
    good = np.flatnonzero(inside & (covered + shared <= MOST_COVERED).all(axis=1))
    return (shifts[good[0]], places[good[0]], covered + shared[good[0]]) if len(good) else None


def _paint(rng, pixels, contours, stroke, box, length, texture, hue):
    """Draw one shape into pixels, float32 [H, W, 3], in place."""
    x1, y1 = np.floor(box[:2]).astype(int)
    x2, y2 = np.ceil(box[2:]).astype(int)
    mask = Image.new("L", ((x2 - x1) * SAMPLES, (y2 - y1) * SAMPLES))
    pen = ImageDraw.Draw(mask)
    paths = [[tuple(p) for p in np.rint((c - [x1, y1]) * SAMPLES - 0.5).astype(int).tolist()] for c in contours]
    if stroke:
        pen.line(paths[0], fill=255, width=max(1, round(stroke * SAMPLES)), joint="curve")
    else:
        for path, fill in zip(paths, (255, 0), strict=False):
            pen.polygon(path, fill=fill)
    alpha = np.asarray(mask.reduce(SAMPLES), np.float32)[..., None] / 255  # [h, w, 1]
    patch = pixels[y1:y2, x1:x2]
    under = patch[::3, ::3].mean(axis=(0, 1))
    first = _color(rng, hue, under)
    second = first + np.clip(_color(rng, hue, under) - first, -TEXTURE, TEXTURE)
    center = (contours[0].min(axis=0) + contours[0].max(axis=0)) / 2
    blend = _blend(rng, texture, np.arange(x1, x2) - center[0], np.arange(y1, y2) - center[1], length)  # [h, w]
    color = blend[..., None] * (second - first)  # [h, w, 3]
    color += first
    color -= patch
    color *= alpha
    patch += color


def _color(rng, hue, under):
    """An RGB color of a hue (0..1, around the circle), float32 [3], that stands out from the color under it."""
    for _ in range(12):
        saturation, value = rng.uniform(0.45, 1), rng.uniform(0.3, 1)
        color = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32) * 255
        if np.abs(color - under).sum() > 170:
            break
    return color


def _blend(rng, kind, x, y, length):
    """Share of the second color, float32 [h, w] in 0..1; x [w] and y [h] are pixels from the shape's center."""
    x, y = x[None].astype(np.float32), y[:, None].astype(np.float32)
    if kind == "plain":
        return np.zeros([y.size, x.size], np.float32)
    if kind == "noise":
        cells = rng.integers(0, 256, [7, 7], np.uint8)
        return np.asarray(Image.fromarray(cells).resize((x.size, y.size), Image.Resampling.BICUBIC), np.float32) / 255
    angle = rng.uniform(0, np.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = x * cos + y * sin, y * cos - x * sin  # [h, w]
    if kind == "gradient":
        return np.clip(u / length + 0.5, 0, 1)
    period = max(4.0, length * rng.uniform(0.1, 0.3))
    u, v = 2 * math.pi / period * u, 2 * math.pi / period * v
    if kind == "stripes":
        wave = np.sin(u)
    elif kind == "dots":
        wave = np.cos(u) + np.cos(v) - 0.7
    else:
        wave = np.sin(u) * np.sin(v)
    return np.clip(0.5 + wave * period / 6, 0, 1)  # edges about a pixel wide


def _background(rng, height, width):
    """float32 [H, W, 3]: a gradient, smooth noise, and thin lines and curves."""
    cells = 24
    ends = [colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.35), rng.uniform(0.25, 0.95)) for _ in range(2)]
    first, second = np.array(ends) * 255
    angle = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-0.5, 0.5, cells)
    mix = np.clip(0.5 + x * np.cos(angle) + (x * np.sin(angle))[:, None], 0, 1)[..., None]  # [24, 24, 1]
    coarse = Image.fromarray(rng.integers(0, 256, [6, 6, 3], np.uint8)).resize((cells, cells), Image.Resampling.BICUBIC)
    fine = rng.uniform(-128, 128, [cells, cells, 1]) + rng.uniform(-50, 50, [cells, cells, 3])
    image = first + mix * (second - first)  # [24, 24, 3]
    image += (np.asarray(coarse, float) - 128) * rng.uniform(0.05, 0.2) + fine * rng.uniform(0.03, 0.12)
    image = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    image = image.resize((2 * width, 2 * height), Image.Resampling.NEAREST)  # lines are drawn on four samples a pixel
    pen = ImageDraw.Draw(image)
    t = np.linspace(0, 1, 16)[:, None]
    for _ in range(rng.integers(3, 11)):
        a, b, c = rng.uniform(-0.1, 1.1, [3, 2]) * [2 * width, 2 * height]
        curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c if rng.random() < 0.6 else np.stack([a, b])
        color = tuple(int(v * 255) for v in colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.6), rng.random()))
        pen.line([tuple(p) for p in curve.tolist()], fill=color, width=int(rng.integers(1, 4)))
    return np.asarray(image.reduce(2), np.float32).copy()
