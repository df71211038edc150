"""Check of the image files: missing or unreadable files, and sizes that differ from the JSON."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from retinanet_keras import errors
from retinanet_keras.data import coco, coco_rules, image_decoding
from retinanet_keras.data.coco_rules import ERROR, NOTE, WARNING
from retinanet_keras.data.image_formats import DAMAGE, IMAGE_FORMATS

EXIF_ORIENTATION = 0x0112
MISSING, SIXTEEN_BIT = "missing", "16-bit"
CONVERTED = (
    ("L", "grayscale images", "They get three equal channels."),
    ("CMYK", "CMYK images", "They are converted to RGB without a color profile."),
    (SIXTEEN_BIT, "images of 16 bits", "Only the upper 8 bits are used."),
)


@dataclass(frozen=True)
class ImageFile:
    """Properties of an image file."""

    mode: str  # as Pillow names it (RGB, L, CMYK, ...), or MISSING, SIXTEEN_BIT, "unknown"
    rotated: bool = False  # EXIF specifies another orientation
    size: tuple[int, int] | None = None  # height and width as decoded; None if that failed
    problem: str = ""  # why it cannot be decoded


def examine_image(dataset: coco.CocoDataset, i: int) -> ImageFile:
    """Read the header of image i with Pillow, which gives more details, and decode the image as in training."""
    if not os.path.exists(dataset.files[i]):
        return ImageFile(MISSING)
    mode, rotated = "unknown", False
    with contextlib.suppress(*DAMAGE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(image_decoding.encoded_image(dataset, i)), formats=IMAGE_FORMATS) as image:
            layout = str(image.tile[0][3]) if image.tile else ""  # such as RGB;16B, which becomes mode RGB
            mode = SIXTEEN_BIT if "16" in layout or image.mode.startswith("I") else image.mode
            if (
                dataset.max_pixels is None or math.prod(image.size) <= dataset.max_pixels
            ):  # reading EXIF of a PNG decodes it
                rotated = image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1)
    try:
        return ImageFile(mode, rotated, image_decoding.image_of(dataset, i).shape[:2])
    except errors.DataError as error:
        return ImageFile(mode, rotated, None, str(error))


def check(dataset: coco.CocoDataset, title: str) -> tuple[list[coco_rules.Finding], npt.NDArray, dict[str, Any]]:
    """Decode every image, on all cores, with a progress bar.

    Args:
        dataset: CocoDataset.
        title: str. Title of the progress bar.

    Returns:
        findings; the indices of the usable images, int64 [n]; and a dict of counts for a report.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examined = pool.map(functools.partial(examine_image, dataset), range(len(dataset)))
        files = list(tqdm(examined, title, len(dataset), unit="image", leave=False))
    paths, annotated = [dataset.name_of(i) for i in range(len(dataset))], dataset.sizes
    sizes = np.array([file.size or (0, 0) for file in files], np.int64).reshape(-1, 2)  # [N, 2]
    modes = np.array([file.mode for file in files], object)
    rotated = np.array([file.rotated for file in files], bool)
    unreadable = np.array([bool(file.problem) for file in files], bool)
    differ = (sizes != annotated).any(axis=1) & (modes != MISSING) & ~unreadable

    findings = missing([path for path, mode in zip(paths, modes, strict=True) if mode == MISSING])
    findings += coco_rules.find(
        "image-unreadable",
        ERROR,
        unreadable,
        lambda i: files[i].problem,
        "image files that cannot be decoded",
        "Download them again, or convert them to JPEG or PNG.",
    )
    exif = " Some of them have an EXIF rotation, which is ignored." if (differ & rotated).any() else ""
    findings += coco_rules.find(
        "image-size-differs",
        ERROR,
        differ,
        lambda i: f"{paths[i]} is {sizes[i, 1]}x{sizes[i, 0]}, the JSON says {annotated[i, 1]}x{annotated[i, 0]}",
        "images whose width x height differs from the JSON",
        f"Their boxes may be misplaced: use the files that were annotated, and enter their sizes in the JSON.{exif}",
    )
    findings += coco_rules.find(
        "exif-rotated",
        WARNING,
        rotated,
        lambda i: paths[i],
        "images with an EXIF rotation",
        "It is ignored everywhere: boxes must refer to the pixels as stored. Preferably store the images upright.",
    )
    for mode, what, effect in CONVERTED:
        findings += coco_rules.find(f"mode-{mode.lower()}", NOTE, modes == mode, lambda i: paths[i], what, effect)
    usable = np.flatnonzero((modes != MISSING) & ~unreadable & ~differ)
    return findings, usable, {"image_modes": dict(Counter(modes.tolist())), "exif_rotated": int(rotated.sum())}


def findings_of(dataset: coco.CocoDataset) -> list[coco_rules.Finding]:
    """Faults that can be detected without opening a file: missing or not regular files, and too large images."""
    absent, irregular = coco.unusable_files(dataset)
    findings = missing(absent) + coco_rules.find(
        "file-not-regular",
        ERROR,
        np.ones([len(irregular)], bool),
        lambda i: irregular[i],
        "images that are not regular files",
        "Replace folders, named pipes and devices by image files.",
    )
    if dataset.max_pixels is None:
        return findings
    pixels = dataset.sizes.astype(np.int64).prod(axis=1)
    return findings + coco_rules.find(
        "image-too-large",
        ERROR,
        pixels > dataset.max_pixels,
        lambda i: f"{dataset.name_of(i)} has {pixels[i]:,}",
        f"images of more than data.max_pixels, {dataset.max_pixels:,}",
        "Make them smaller, or raise the limit: decoding needs 3 bytes per pixel, 9 for a progressive JPEG.",
    )


def missing(paths: Sequence[str]) -> list[coco_rules.Finding]:
    """Report files that do not exist, if there are any."""
    return coco_rules.find(
        "file-missing",
        ERROR,
        np.ones([len(paths)], bool),
        lambda i: paths[i],
        "image files that do not exist",
        "Correct data.dir or data.images, the folder that file_name is relative to.",
    )
