"""§5: the paper's splits by name, as COCO files have them.

`trainval35k` and `minival` are train2017 and val2017, image for image (Detectron's documents); the files of 2014 serve
as well, minival picked from val2014 by val2017's ids. What is put together from several files is written once, as an
annotation file of its own.
"""

import json
import os
from pathlib import Path

from retinanet_keras.data import coco
from retinanet_keras.errors import DataError
from retinanet_keras.storage import disk

OFFICIAL = {"trainval35k": "train2017", "minival": "val2017", "test-dev": "test-dev2017"}
NAMES = ("train2017", "val2017", "test-dev2017", "test2017")
DERIVED = "retinanet_keras"  # folder in `data.dir` of the annotation files made here


def resolve(config, split):
    """The annotation file and the image folder of a split of COCO files.

    A file that `config.annotations` names for the split itself comes first; then the paper's and COCO's own names.

    Args:
        config: a DataConfig.
        split: such as "train", "minival", "val2017" or "test-dev".

    Returns:
        (annotation file, folder that its file names are relative to), paths. They may not exist, where nothing does.

    Raises:
        DataError: where the paper's split cannot be put together from the files there are, saying what was looked for.
    """
    own = own_file(config, split)
    name = OFFICIAL.get(split, split)
    if own.is_file() or name not in NAMES:
        return own, _image_folder(config, split, name)
    folder = image_folder(name)
    file = annotation_file(config, name)
    if file.is_file() and (images := _find(config, folder)):
        return file, images
    if name in ("train2017", "val2017") and _find(config, "val2014"):
        return _from_2014(config, name), Path(config.dir)
    raise DataError(
        f"{split}: expected {own}, or COCO's {file} with the images in {Path(config.dir) / folder}"
        f"{'' if name.startswith('test') else ', or the files of 2014'}. data.dir says where to look"
    )


def own_file(config, split):
    """Where `data.annotations` puts a split's annotations."""
    return Path(config.dir) / config.annotations.format(split=split)


def annotation_file(config, name):
    """Where a split of COCO's has its annotations, or, for the unlabeled tests, its list of images."""
    file = own_file(config, name)
    return file.with_name(f"image_info_{name}.json") if name.startswith("test") else file


def image_folder(name):
    """The name of the folder with the images of a split of COCO's."""
    return name.replace("test-dev", "test")


def write(path, images, annotations, categories, made_of=()):
    """Write an annotation file, whole or not at all; without any annotation it has no list of them, as test-dev's.

    Args:
        images, categories: lists of COCO's entries; they may grow while annotations come.
        annotations: an iterable of them, written as they come.
        made_of: JSON-able, kept in the file.
    """
    with disk.replacing_text(path) as file:
        between = '{"annotations": ['
        for annotation in annotations:
            file.write(f"{between}\n{json.dumps(annotation)}")
            between = ","
        file.write("],\n" if between == "," else "{")
        file.write(f'"images": {json.dumps(images)},\n"categories": {json.dumps(categories)},\n')
        file.write(f'"made_of": {json.dumps(made_of)}}}\n')


def _image_folder(config, split, name):
    """Where `data.images` puts a split's images; of COCO's splits a folder of their own name goes before that."""
    place = Path(config.dir) / config.images.format(split=split)
    official = _find(config, image_folder(name)) if name in NAMES else None
    return official or (place if place.is_dir() else _find(config, split) or place)


def _find(config, folder):
    """The folder of this name among the images, or None."""
    root = Path(config.dir)
    places = [root / config.images / folder, root / folder]
    if "{split}" in config.images:
        places.insert(0, root / config.images.format(split=folder))
    return next((place for place in places if place.is_dir()), None)


def lists_of(file, *keys):
    """The JSON object of one of COCO's files; a DataError where it lacks a list, or an entry what joining needs."""
    tree = coco.read(file)
    for key in keys:
        needed = {"images": ("id", "file_name"), "annotations": ("image_id",)}.get(key, ())
        rows = tree.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= set(needed) for row in rows):
            parts = f", each with {' and '.join(needed)}" if needed else ""
            raise DataError(f"{file}: expected a list of objects under {key!r}{parts}. Fetch the file again")
    return tree


def _from_2014(config, name):
    """The annotation file of train2017 or val2017 put together from those of 2014, newer than all of them."""
    files = {year: own_file(config, year) for year in ("train2014", "val2014")}
    detectron, official = own_file(config, "minival2014"), own_file(config, "val2017")
    ids_file = detectron if detectron.is_file() and not official.is_file() else official
    needed = [files["val2014"], ids_file, *([files["train2014"]] if name == "train2017" else [])]
    missing = [str(file) for file in needed if not file.is_file()]
    if missing:
        raise DataError(
            f"{name} from COCO's files of 2014 needs {', '.join(map(str, needed))}; there is no {', '.join(missing)}. "
            f"The ids of minival are those in {official.name} (or in Detectron's {detectron.name})"
        )
    folders = {year: _find(config, year) for year in files}
    target = Path(config.dir) / DERIVED / f"instances_{name}_of_2014.json"
    made_of = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in needed]
    made_of += [str(folder) for folder in folders.values()]
    if target.is_file() and coco.read(target).get("made_of") == made_of:
        return target

    minival = {image["id"] for image in lists_of(ids_file, "images")["images"]}
    images, annotations, categories = [], [], []
    for year in ["val2014"] if name == "val2017" else ["train2014", "val2014"]:
        folder, tree = folders[year], lists_of(files[year], "images", "annotations", "categories")
        if folder is None:
            raise DataError(f"{name} from COCO's files of 2014: there is no folder {Path(config.dir) / year}")
        kept = {i["id"] for i in tree["images"] if year == "train2014" or (i["id"] in minival) == (name == "val2017")}
        prefix = os.path.relpath(folder, config.dir)
        images += [{**i, "file_name": os.path.join(prefix, i["file_name"])} for i in tree["images"] if i["id"] in kept]
        annotations += [
            {key: value for key, value in a.items() if key != "segmentation"}
            for a in tree["annotations"]
            if a["image_id"] in kept
        ]
        categories = tree["categories"]
    absent = len(minival - {image["id"] for image in images}) if name == "val2017" else 0
    if absent:
        raise DataError(f"{files['val2014']} lacks {absent} of the {len(minival)} images of {ids_file}")
    write(target, images, annotations, categories, made_of)
    return target
