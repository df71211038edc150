"""§5: the paper's splits of COCO by name.

`trainval35k` and `minival` hold the same images as train2017 and val2017 (Detectron's documentation). The files of 2014
can be used as well; minival is then selected from val2014 by the ids of val2017. A split combined from several files is
written once, as an annotation file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retinanet_keras.config import DataConfig
from retinanet_keras.data import coco
from retinanet_keras.errors import DataError
from retinanet_keras.storage import disk

OFFICIAL = {"trainval35k": "train2017", "minival": "val2017", "test-dev": "test-dev2017"}
NAMES = ("train2017", "val2017", "test-dev2017", "test2017")
DERIVED = "retinanet_keras"  # folder in `data.dir` of the annotation files written here


def resolve(config: DataConfig, split: str) -> tuple[Path, Path]:
    """Locate the annotation file and the image folder of a split.

    The file that `config.annotations` names for the split comes first, then the paper's and COCO's names.

    Args:
        config: DataConfig.
        split: str. Such as "train", "minival", "val2017" or "test-dev".

    Returns:
        (annotation file, folder that its file names are relative to), paths. They may not exist.

    Raises:
        DataError: one of COCO's splits is neither there nor can be combined from the existing files.
    """
    file = configured_file(config, split)
    name = OFFICIAL.get(split, split)
    if file.is_file() or name not in NAMES:
        return file, _image_folder(config, split, name)
    folder = image_folder(name)
    official = annotation_file(config, name)
    if official.is_file() and (images := _existing_folder(config, folder)):
        return official, images
    if name in ("train2017", "val2017") and _existing_folder(config, "val2014"):
        return _from_2014(config, name), Path(config.dir)
    raise DataError(
        f"{split}: expected {file}, or COCO's {official} with the images in {Path(config.dir) / folder}"
        f"{'' if name.startswith('test') else ', or the files of 2014'}. Add the files, or correct data.dir"
    )


def configured_file(config: DataConfig, split: str) -> Path:
    """The annotation file of a split according to `data.annotations`."""
    return Path(config.dir) / config.annotations.format(split=split)


def annotation_file(config: DataConfig, name: str) -> Path:
    """The annotation file of one of COCO's splits; for the unlabeled test splits, the list of images."""
    file = configured_file(config, name)
    return file.with_name(f"image_info_{name}.json") if name.startswith("test") else file


def image_folder(name: str) -> str:
    """The name of the image folder of one of COCO's splits."""
    return name.replace("test-dev", "test")


def write(
    path: Path,
    images: list[dict[str, Any]],
    annotations: Iterable[dict[str, Any]],
    categories: list[dict[str, Any]],
    made_of: Any = (),
) -> None:
    """Write an annotation file atomically; if there are no annotations it has no list of them, as for test-dev.

    Args:
        path: path of the file.
        images, categories: lists of COCO's entries; they may grow while `annotations` is iterated.
        annotations: iterable of COCO's entries, written one by one.
        made_of: JSON-able. Stored in the file.
    """
    with disk.replacing_text(path) as file:
        between = '{"annotations": ['
        for annotation in annotations:
            file.write(f"{between}\n{json.dumps(annotation)}")
            between = ","
        file.write("],\n" if between == "," else "{")
        file.write(f'"images": {json.dumps(images)},\n"categories": {json.dumps(categories)},\n')
        file.write(f'"made_of": {json.dumps(made_of)}}}\n')


def _image_folder(config: DataConfig, split: str, name: str) -> Path:
    """The image folder according to `data.images`; for COCO's splits, a folder named after the split comes first."""
    configured = Path(config.dir) / config.images.format(split=split)
    official = _existing_folder(config, image_folder(name)) if name in NAMES else None
    return official or (configured if configured.is_dir() else _existing_folder(config, split) or configured)


def _existing_folder(config: DataConfig, folder: str) -> Path | None:
    """The image folder of this name, or None if there is none."""
    root = Path(config.dir)
    candidates = [root / config.images / folder, root / folder]
    if "{split}" in config.images:
        candidates.insert(0, root / config.images.format(split=folder))
    return next((path for path in candidates if path.is_dir()), None)


def lists_of(file: Path, *keys: str) -> dict[str, Any]:
    """Read the JSON object of one of COCO's files.

    Raises:
        DataError: one of the lists `keys` is missing, or its entries lack the keys needed to combine files.
    """
    tree = coco.read(file)
    for key in keys:
        needed = {"images": ("id", "file_name"), "annotations": ("image_id",)}.get(key, ())
        rows = tree.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= set(needed) for row in rows):
            with_keys = f", each with {' and '.join(needed)}" if needed else ""
            raise DataError(f"{file}: expected a list of objects under {key!r}{with_keys}. Download the file again")
    return tree


def _from_2014(config: DataConfig, name: str) -> Path:
    """The annotation file of train2017 or val2017 combined from those of 2014; rewritten when one of them changes."""
    files = {year: configured_file(config, year) for year in ("train2014", "val2014")}
    detectron, official = configured_file(config, "minival2014"), configured_file(config, "val2017")
    ids_file = detectron if detectron.is_file() and not official.is_file() else official
    needed = [files["val2014"], ids_file, *([files["train2014"]] if name == "train2017" else [])]
    missing = [str(file) for file in needed if not file.is_file()]
    if missing:
        raise DataError(
            f"{name} from COCO's files of 2014 needs {', '.join(map(str, needed))}; missing: {', '.join(missing)}. "
            f"Add what is missing. The ids of minival are those in {official.name} (or in Detectron's {detectron.name})"
        )
    folders = {year: _existing_folder(config, year) for year in files}
    target = Path(config.dir) / DERIVED / f"instances_{name}_of_2014.json"
    made_of: list[Any] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in needed]
    made_of += [str(folder) for folder in folders.values()]
    if target.is_file() and coco.read(target).get("made_of") == made_of:
        return target

    minival = {image["id"] for image in lists_of(ids_file, "images")["images"]}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: list[dict[str, Any]] = []
    for year in ["val2014"] if name == "val2017" else ["train2014", "val2014"]:
        folder, tree = folders[year], lists_of(files[year], "images", "annotations", "categories")
        if folder is None:
            raise DataError(
                f"{name} from COCO's files of 2014 needs the folder {Path(config.dir) / year}, which does not exist. "
                "Add its images"
            )
        selected = {
            i["id"] for i in tree["images"] if year == "train2014" or (i["id"] in minival) == (name == "val2017")
        }
        prefix = os.path.relpath(folder, config.dir)
        images += [
            {**i, "file_name": os.path.join(prefix, i["file_name"])} for i in tree["images"] if i["id"] in selected
        ]
        annotations += [
            {key: value for key, value in a.items() if key != "segmentation"}
            for a in tree["annotations"]
            if a["image_id"] in selected
        ]
        categories = tree["categories"]
    absent = len(minival - {image["id"] for image in images}) if name == "val2017" else 0
    if absent:
        raise DataError(
            f"{files['val2014']} lacks {absent} of the {len(minival)} images of {ids_file}. Download it again"
        )
    write(target, images, annotations, categories, made_of)
    return target
