"""Loading of COCO's annotation JSON: images, boxes, and the map between labels and category ids.

Labels are 0..K-1 in increasing order of category id; `Categories` maps back. Boxes are converted here from COCO's
`x, y, width, height` to absolute `x1, y1, x2, y2` pixels, which all other code uses. The rules that the JSON has to
follow are in `coco_rules.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet_keras.data import coco_rules
from retinanet_keras.errors import DataError
from retinanet_keras.storage import disk, strict_json
from retinanet_keras.storage.printable import printable

logger = logging.getLogger("retinanet_keras")


@dataclass(frozen=True)
class Categories:
    """The categories of a dataset: label i has the category id `ids[i]` and the name `names[i]`."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def to_list(self) -> list[dict[str, Any]]:
        """Convert to the JSON-able list stored in run folders, checkpoints and exports; `from_list` is the inverse."""
        rows = enumerate(zip(self.ids, self.names, strict=True))
        return [{"label": label, "id": id_, "name": name} for label, (id_, name) in rows]

    @classmethod
    def from_list(cls, rows: Any) -> Categories:
        """Create the Categories from the result of `to_list`, in any order.

        Raises:
            DataError: the list is not of that form, or the labels are not 0..K-1.
        """
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


def _is_category(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), int) and not isinstance(row[key], bool) for key in ("label", "id"))
        and isinstance(row.get("name"), str)
    )


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """The images and boxes of a split in flat arrays: image i has the boxes `offsets[i]` up to `offsets[i + 1]`."""

    categories: Categories
    image_ids: npt.NDArray  # int64 [N]
    files: tuple[str, ...]  # N paths
    sizes: npt.NDArray  # int32 [N, 2], (height, width) according to the JSON
    offsets: npt.NDArray  # int64 [N + 1]
    boxes: npt.NDArray  # float32 [M, 4], x1, y1, x2, y2 in pixels, clipped to the image
    labels: npt.NDArray  # int32 [M], 0..K-1
    annotation_file: str
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> number of ignored annotations, crowds included
    spans: npt.NDArray | None = None  # int64 [N, 2], offset and number of bytes in the file; None: whole files
    labeled: bool = True  # whether the JSON has any annotations, even if not for these images
    max_pixels: int | None = None  # larger images are not decoded; None: no limit
    measures: str = ""  # a digest of what evaluation reads and training does not: areas and crowds

    def __len__(self) -> int:
        return len(self.image_ids)

    def name_of(self, i: int) -> str:
        """The name of image i for messages."""
        return self.files[i] if self.spans is None else f"image {self.image_ids[i]} in {self.files[i]}"

    def boxes_of(self, i: int) -> npt.NDArray:
        """The boxes of image i, float32 [n, 4], x1, y1, x2, y2 in pixels."""
        return self.boxes[self.offsets[i] : self.offsets[i + 1]]

    def labels_of(self, i: int) -> npt.NDArray:
        """The labels of the boxes of image i, int32 [n]."""
        return self.labels[self.offsets[i] : self.offsets[i + 1]]

    @property
    def max_boxes(self) -> int:
        """The largest number of boxes in an image, at least 1."""
        return max(1, int(np.diff(self.offsets).max(initial=0)))

    def subset(self, indices: Any) -> CocoDataset:
        """Select images, in the given order; `indices`: anything that indexes an array of length N."""
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


def with_spans(dataset: CocoDataset, files: Iterable[str], spans: npt.NDArray) -> CocoDataset:
    """The dataset with its images in other files.

    Args:
        dataset: CocoDataset.
        files: N paths.
        spans: int64 [N, 2]. Offset and number of bytes of each image in its file.
    """
    return dataclasses.replace(dataset, files=tuple(files), spans=spans)


def load(
    annotation_file: str | os.PathLike[str], image_dir: str | os.PathLike[str], *, keep_empty: bool = True
) -> CocoDataset:
    """Load COCO annotations. Crowds are ignored, and so are unusable boxes, with a warning; see `dropped`.

    Args:
        annotation_file: path of the JSON; `annotations` may be absent, as in test-dev's.
        image_dir: path of the folder that the `file_name`s are relative to. `unusable_files` checks whether the files
            exist.
        keep_empty: bool. Whether to keep images without usable boxes.

    Returns:
        a CocoDataset, images in the file's order.

    Raises:
        DataError: listing every error in the file.
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
        with_boxes = np.flatnonzero(np.diff(dataset.offsets))
        if not len(with_boxes):
            raise DataError(
                f"{annotation_file}: none of its {len(dataset)} images has a usable box, and images without boxes are "
                "skipped (data.keep_empty is false). Check the annotations, or name another split."
            )
        dataset = dataset.subset(with_boxes)
    return dataset


def read(annotation_file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the JSON object of an annotation file.

    Raises:
        DataError: the file is missing, cannot be read, or does not hold a JSON object.
    """
    path = Path(annotation_file)
    try:
        tree = strict_json.read(path, strict=False)  # strict takes seconds for COCO's files
    except FileNotFoundError:
        names = sorted(p.name for p in path.parent.glob("*.json"))
        near = difflib.get_close_matches(path.name, names, coco_rules.SHOWN, 0.4) or names[: coco_rules.SHOWN]
        raise DataError(
            f"The annotation file {path} does not exist; {path.parent} holds "
            f"{printable(', '.join(near)) or 'no .json file'}. "
            "Correct data.dir, data.annotations or the name of the split."
        ) from None
    except strict_json.JsonError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Check that the file is complete") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(tree, dict):
        raise DataError(
            f"{path} must hold a JSON object with `images`, `annotations` and `categories`, got {coco_rules.show(tree)}"
        )
    return tree


def examine(
    tree: dict[str, Any], annotation_file: str | os.PathLike[str], image_dir: str | os.PathLike[str]
) -> tuple[list[coco_rules.Finding], CocoDataset]:
    """Check a JSON object against every rule, and keep what is usable.

    Args:
        tree: dict. The JSON object of an annotation file.
        annotation_file: path of that file.
        image_dir: path of the image folder.

    Returns:
        a list of `coco_rules.Finding`, and the CocoDataset of every usable image and box.
    """
    findings, lists = coco_rules.check_lists(tree)
    if not os.path.isdir(image_dir):
        fix = "Correct data.dir or data.images."
        what = "image folder that does not exist"
        findings.append(coco_rules.Finding("image-folder", coco_rules.ERROR, 1, what, (str(image_dir),), fix))
    faults, category_ids, names = coco_rules.check_categories(lists["categories"])
    findings += faults
    faults, known_ids, image_ids, file_names, sizes = coco_rules.check_images(lists["images"])
    findings += faults
    faults, image, boxes, labels, dropped = coco_rules.check_annotations(
        lists["annotations"], known_ids, image_ids, sizes, category_ids
    )
    findings += faults
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


def unusable_files(dataset: CocoDataset) -> tuple[list[str], list[str]]:
    """List the paths in `dataset.files` that do not exist, and those that are no regular file, such as a named pipe.

    Lists each folder once, for speed with 118k files. A symbolic link counts as usable, whatever it points to.
    """
    present: set[str] = set()
    for folder in {os.path.dirname(path) for path in dataset.files}:
        with contextlib.suppress(OSError, ValueError), os.scandir(folder or ".") as entries:
            present.update(
                os.path.join(folder, entry.name)
                for entry in entries
                if entry.is_file(follow_symlinks=False) or entry.is_symlink()
            )
    unusable = [path for path in dataset.files if path not in present and not os.path.isfile(path)]
    exists = [os.path.exists(path) for path in unusable]
    missing = [path for path, there in zip(unusable, exists, strict=True) if not there]
    irregular = [path for path, there in zip(unusable, exists, strict=True) if there]
    return missing, irregular


def _measures(annotations: list[Any]) -> str:
    rows = [row for row in annotations if isinstance(row, dict)]
    return disk.digest([row.get("area") for row in rows], [row.get("iscrowd") for row in rows])


def _offsets(counts: npt.NDArray) -> npt.NDArray:
    """Cumulative sums from 0, int64 [n + 1], of counts [n]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
