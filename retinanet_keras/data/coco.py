"""COCO's annotation JSON: images, boxes, and the map between labels and category ids.

Labels are 0..K-1 in increasing order of category id; `Categories` maps back. Boxes become absolute `x1, y1, x2, y2`
pixels here: COCO's `x, y, width, height` ends at this boundary. What the JSON must hold is in `rules`.
"""

import contextlib
import dataclasses
import difflib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retinanet_keras.data import coco_rules
from retinanet_keras.errors import DataError
from retinanet_keras.storage import disk, strict_json
from retinanet_keras.storage.printable import printable

logger = logging.getLogger("retinanet_keras")


@dataclass(frozen=True)
class Categories:
    """Label i has the category id `ids[i]` and the name `names[i]`."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self):
        return len(self.ids)

    def to_list(self):
        """JSON-able, as run folders, checkpoints and exports keep it; `from_list` is the inverse."""
        rows = enumerate(zip(self.ids, self.names, strict=True))
        return [{"label": label, "id": id_, "name": name} for label, (id_, name) in rows]

    @classmethod
    def from_list(cls, rows):
        """The Categories whose `to_list` gives `rows`, in any order."""
        if not isinstance(rows, (list, tuple)) or not all(map(_is_category, rows)):
            raise DataError(
                f"Expected categories as a list of objects with whole numbers as label and id, and a name; got "
                f"{coco_rules.show(rows)}."
            )
        rows = sorted(rows, key=lambda row: row["label"])
        labels = [row["label"] for row in rows]
        if labels != list(range(len(rows))):
            raise DataError(f"Expected the labels 0 to {len(rows) - 1} once each, got {coco_rules.show(labels)}.")
        return cls(tuple(row["id"] for row in rows), tuple(row["name"] for row in rows))


def _is_category(row):
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), int) and not isinstance(row[key], bool) for key in ("label", "id"))
        and isinstance(row.get("name"), str)
    )


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """Images and boxes in flat arrays: the boxes of image i are the rows `offsets[i]` up to `offsets[i + 1]`."""

    categories: Categories
    image_ids: np.ndarray  # int64 [N]
    files: tuple[str, ...]  # N paths
    sizes: np.ndarray  # int32 [N, 2], (height, width) as the JSON has them
    offsets: np.ndarray  # int64 [N + 1]
    boxes: np.ndarray  # float32 [M, 4], x1, y1, x2, y2 in pixels, clipped to the image
    labels: np.ndarray  # int32 [M], 0..K-1
    annotation_file: str
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> annotations of the file ignored, crowds included
    spans: np.ndarray | None = None  # int64 [N, 2], first byte and number of bytes in the file; None: whole files
    labeled: bool = True  # whether the JSON has annotations at all, be it none for these images
    max_pixels: int | None = None  # of an image that is decoded; None: any
    measures: str = ""  # a digest of what scoring reads of the file and training does not: areas and crowds

    def __len__(self):
        return len(self.image_ids)

    def name_of(self, i):
        """What to call image i in a message."""
        return self.files[i] if self.spans is None else f"image {self.image_ids[i]} in {self.files[i]}"

    def boxes_of(self, i):
        """float32 [n, 4], x1, y1, x2, y2 in pixels of image i."""
        return self.boxes[self.offsets[i] : self.offsets[i + 1]]

    def labels_of(self, i):
        """int32 [n]."""
        return self.labels[self.offsets[i] : self.offsets[i + 1]]

    @property
    def max_boxes(self):
        """The largest number of boxes of one image, at least 1."""
        return max(1, int(np.diff(self.offsets).max(initial=0)))

    def subset(self, indices):
        """The dataset of these images, in this order. `indices`: whatever indexes an array of length N."""
        indices = np.arange(len(self))[indices]  # [n]
        counts = np.diff(self.offsets)[indices]  # [n]
        offsets = _offsets(counts)  # [n + 1]
        rows = np.repeat(self.offsets[indices] - offsets[:-1], counts) + np.arange(offsets[-1])  # [m]
        return dataclasses.replace(
            self,
            image_ids=self.image_ids[indices],
            files=tuple(self.files[i] for i in indices),
            sizes=self.sizes[indices],
            offsets=offsets,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            spans=None if self.spans is None else self.spans[indices],
        )


def with_spans(dataset, files, spans):
    """The dataset with its images in other files: `files`, N paths, and int64 [N, 2] as `spans`."""
    return dataclasses.replace(dataset, files=tuple(files), spans=spans)


def load(annotation_file, image_dir, *, keep_empty=True):
    """Read COCO annotations. Crowds are ignored, and so are unusable boxes, with a warning; see `dropped`.

    Args:
        annotation_file: the JSON; `annotations` may be absent, as in test-dev's.
        image_dir: the folder of the `file_name`s. `unusable_files` tells whether the files exist.
        keep_empty: keep the images that have no boxes left.

    Returns:
        a CocoDataset, images in the file's order.

    Raises:
        DataError: listing everything that is wrong with the file.
    """
    findings, dataset = examine(read(annotation_file), annotation_file, image_dir)
    errors = [f"\n- {finding}" for finding in findings if finding.level == coco_rules.ERROR]
    if errors:
        raise DataError(f"{annotation_file} cannot be used:{''.join(errors)}")
    warnings = [f"{w.count} {w.what}, such as {w.examples[0]}" for w in findings if w.level == coco_rules.WARNING]
    if warnings:
        logger.warning(
            "%s: ignored %s. Run `python -m retinanet_keras inspect` for more.", annotation_file, "; ".join(warnings)
        )
    if not keep_empty:
        filled = np.flatnonzero(np.diff(dataset.offsets))
        if not len(filled):
            raise DataError(
                f"{annotation_file}: none of its {len(dataset)} images has a usable box, and images without boxes are "
                "skipped (data.keep_empty is false). Check the annotations, or name another split."
            )
        dataset = dataset.subset(filled)
    return dataset


def read(annotation_file):
    """The JSON object of an annotation file, or a DataError."""
    path = Path(annotation_file)
    try:
        tree = strict_json.read(path, strict=False)  # which for COCO's files would take seconds
    except FileNotFoundError:
        names = sorted(p.name for p in path.parent.glob("*.json"))
        near = difflib.get_close_matches(path.name, names, coco_rules.SHOWN, 0.4) or names[: coco_rules.SHOWN]
        raise DataError(
            f"No annotations at {path}; {path.parent} holds {printable(', '.join(near)) or 'no .json file'}. "
            "data.dir, data.annotations and the names of the splits say where to look."
        ) from None
    except strict_json.JsonError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Was it written to the end?") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(tree, dict):
        raise DataError(
            f"{path} must hold a JSON object with `images`, `annotations` and `categories`, got {coco_rules.show(tree)}"
        )
    return tree


def examine(tree, annotation_file, image_dir):
    """Check a JSON object against every rule, and keep what is usable.

    Returns:
        a list of `coco_rules.Finding`, and the CocoDataset of every usable image and box.
    """
    findings, lists = coco_rules.check_lists(tree)
    if not os.path.isdir(image_dir):
        fix = "data.dir and data.images say where the images are."
        what = "image folder that does not exist"
        findings.append(coco_rules.Finding("image-folder", coco_rules.ERROR, 1, what, (str(image_dir),), fix))
    found, category_ids, names = coco_rules.check_categories(lists["categories"])
    findings += found
    found, known_ids, image_ids, file_names, sizes = coco_rules.check_images(lists["images"])
    findings += found
    found, image, boxes, labels, dropped = coco_rules.check_annotations(
        lists["annotations"], known_ids, image_ids, sizes, category_ids
    )
    findings += found
    dataset = CocoDataset(
        categories=Categories(tuple(category_ids.tolist()), names),
        image_ids=image_ids,
        files=tuple(os.path.join(image_dir, name) for name in file_names),
        sizes=sizes,
        offsets=_offsets(np.bincount(image, minlength=len(image_ids))),
        boxes=boxes,
        labels=labels,
        annotation_file=str(annotation_file),
        dropped=dropped,
        labeled="annotations" in tree,
        measures=_measures(lists["annotations"]),
    )
    return findings, dataset


def unusable_files(dataset):
    """The paths in `dataset.files` that do not exist, and those that are no regular file, such as a named pipe.

    Lists each folder once, which 118k files need, and takes symbolic links as they are.
    """
    present = set()
    for folder in {os.path.dirname(path) for path in dataset.files}:
        with contextlib.suppress(OSError, ValueError), os.scandir(folder or ".") as entries:
            present.update(
                os.path.join(folder, entry.name)
                for entry in entries
                if entry.is_file(follow_symlinks=False) or entry.is_symlink()
            )
    left = [path for path in dataset.files if path not in present and not os.path.isfile(path)]
    there = [os.path.exists(path) for path in left]
    missing, irregular = ([path for path, is_there in zip(left, there, strict=True) if is_there == wanted]
                          for wanted in (False, True))  # fmt: skip
    return missing, irregular


def _measures(annotations):
    rows = [row for row in annotations if isinstance(row, dict)]
    return disk.digest([row.get("area") for row in rows], [row.get("iscrowd") for row in rows])


def _offsets(counts):
    """int64 [n + 1] from counts [n]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
