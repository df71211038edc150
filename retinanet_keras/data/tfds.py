"""TensorFlow Datasets: any detection set with `image` and `objects{bbox, label}`, its images read where they lie.

The dataset is indexed once: where each encoded image begins in its TFRecord file, and the boxes, which become an
annotation file in COCO's format. From then on an image is so many bytes of a file, read when it is its turn, in any
order, and all that is written for COCO files serves these sets too.
"""

import contextlib
import difflib
import io
import logging
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from retinanet_keras.data import coco, coco_splits
from retinanet_keras.data.image_formats import DAMAGE, IMAGE_FORMATS
from retinanet_keras.errors import DataError, first_line
from retinanet_keras.storage import disk

logger = logging.getLogger("retinanet_keras")

# COCO's category ids, 80 of 1 to 90, in the order of TFDS's labels.
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
# TFDS splits that hold the images of COCO's.
POOLS = {
    "coco/2017": {"train2017": "train", "val2017": "validation", "test-dev2017": "test", "test2017": "test"},
    "coco/2014": {"train2017": "train+validation", "val2017": "validation", "test-dev2017": "test2015"},
}
# Framing of a TFRecord: length and its checksum before the data, the data's checksum after it.
HEADER, FOOTER = 12, 4


def open_split(config, split, *, keep_empty=True):
    """The images and boxes of a split of a TFDS set, which is downloaded and prepared where it is not there.

    Args:
        config: a DataConfig.
        split: one of the set's own, such as "train" or "train[:90%]"; for COCO also the paper's and COCO's own names.

    Returns:
        a coco.CocoDataset whose `files` are TFRecord files, with the `spans` of the images in them.

    Raises:
        DataError: naming what is missing.
    """
    annotation_file, index, to_skip = _prepare(config, split)
    dataset = coco.load(annotation_file, config.dir, keep_empty=keep_empty)
    # In the order of ids: a training goes on as it was when the official file takes the place of the derived one.
    dataset = dataset.subset([i for i in np.argsort(dataset.image_ids) if dataset.image_ids[i] not in to_skip])
    order = np.argsort(index["image_ids"])
    place = np.searchsorted(index["image_ids"], dataset.image_ids, sorter=order)
    place = order[np.minimum(place, len(order) - 1)]  # [N]
    absent = dataset.image_ids[index["image_ids"][place] != dataset.image_ids]
    if len(absent):
        raise DataError(
            f"{annotation_file} lists {len(dataset)} images, of which the TFDS set {config.name} lacks {len(absent)} "
            f"in {split}, such as {absent[0]}. Are both of one release?"
        )
    if keep_empty and len(dataset) + len(to_skip) < len(order) and dataset.labeled:
        logger.warning("%s lists %d of the %d images in %s of %s", annotation_file, len(dataset), len(order), split,
                       config.name)  # fmt: skip
    files = [str(index["files"][i]) for i in index["file_of"][place]]
    return coco.with_spans(dataset, files, index["spans"][place])


def annotation_file(config, split):
    """The annotations of a split: the official JSON where it is given, else the one made of the set's examples."""
    official = _official(config, split)
    return official if official and official.is_file() else _prepare(config, split)[0]


def _official(config, split):
    """Where the official annotations of one of COCO's splits would be; None for other splits and sets."""
    name = coco_splits.OFFICIAL.get(split, split)
    return (
        coco_splits.annotation_file(config, name)
        if name in coco_splits.NAMES and config.name.startswith("coco")
        else None
    )


def _prepare(config, split):
    """(annotation file, index of the images among which its own are, ids of the file's images to skip)."""
    builder, name, official = _builder(config), coco_splits.OFFICIAL.get(split, split), _official(config, split)
    pools = POOLS.get(f"{builder.info.name}/{builder.builder_config.name if builder.builder_config else ''}", {})
    pool = pools.get(name, split)
    index, derived = _index(builder, config, pool)
    if official and official.is_file():
        return official, index, ()
    val2017 = coco_splits.annotation_file(config, "val2017")
    if pools is POOLS["coco/2014"] and name == "train2017" and val2017.is_file():
        return derived, index, {image["id"] for image in coco_splits.lists_of(val2017, "images")["images"]}
    if name in pools and (name.startswith("test") or pools is POOLS["coco/2014"]):
        raise DataError(
            f"{split} of {config.name}: which images of the set's {pool} belong to it is said by COCO's own file, "
            f"which is expected at {official}"
        )
    return derived, index, ()


def _builder(config):
    """The TFDS builder of `config.name`, prepared in `config.dir`."""
    import tensorflow_datasets as tfds  # slow to import

    try:
        builder = tfds.builder(config.name, data_dir=config.dir)
    except Exception as error:  # of many kinds
        known = difflib.get_close_matches(config.name.split("/")[0], tfds.list_builders(), 3, 0.5)
        raise DataError(
            f"data.name: {config.name} is not a set that TensorFlow Datasets can make ({first_line(error)}); "
            f"names like it: {', '.join(known) or 'none'}"
        ) from None
    features = builder.info.features
    objects = getattr(features["objects"], "feature", ()) if {"image", "objects"} <= set(features) else ()
    if not ({"bbox", "label"} <= set(objects) and hasattr(objects["label"], "names")):
        raise DataError(
            f"data.name: expected a detection set with `image` and `objects` of `bbox` and `label` (a ClassLabel); "
            f"{config.name} has {', '.join(features)}"
        )
    if not builder.is_prepared():
        _download(builder, config)
    if builder.info.file_format.value != "tfrecord":
        raise DataError(
            f"{builder.data_dir}: expected TFRecord files, the default of TensorFlow Datasets; this set was prepared "
            f"as {builder.info.file_format.value}. Prepare it again in another data.dir"
        )
    return builder


def _download(builder, config):
    print(f"Downloading and preparing {builder.info.full_name} in {config.dir} (once)", flush=True)
    try:
        builder.download_and_prepare()
    except Exception as error:  # of many kinds
        raise DataError(
            f"{config.name} is not in {config.dir}, and could not be downloaded and prepared there: "
            f"{type(error).__name__}: {first_line(error)}. It needs the network, and "
            f"{builder.info.download_size} for the download and {builder.info.dataset_size} for the set on the disk. "
            "Copy a prepared set into data.dir, or use COCO's own files with data.source=coco"
        ) from error


def _index(builder, config, pool):
    """Where the images of TFDS splits are, and the annotation file of their boxes; made once, kept beside the set.

    Returns:
        (dict of image_ids [N], files, file_of [N], the index of each image's file, spans [N, 2]; the annotation file).
    """
    parts = []
    for split in pool.split("+"):
        try:
            parts += builder.info.splits[split].file_instructions
        except (KeyError, ValueError, AssertionError) as error:
            raise DataError(
                f"{config.name} has no split {split}, but {', '.join(builder.info.splits)} ({first_line(error)})"
            ) from None
    home = Path(builder.data_dir)
    state = [f"{Path(p.filename).name}:{p.skip}:{p.take}:{os.path.getsize(p.filename)}" for p in parts]
    slug = "".join(c if c.isalnum() else "_" for c in pool) + f"-{zlib.crc32(pool.encode()):08x}"
    for folder in (home / coco_splits.DERIVED, _cache(builder)):
        derived, saved = folder / f"instances_{slug}.json", folder / f"{slug}.npz"
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(saved) as file:
            if file["state"].tolist() == state and derived.is_file():
                return {**file, "files": [home / name for name in file["files"]]}, derived
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                continue
        except OSError:
            continue
        index = _go_through(builder, parts, derived)
        with disk.replacing(saved) as partial:
            np.savez(partial, state=state, **index)
        return {**index, "files": [home / name for name in index["files"]]}, derived
    raise DataError(f"Neither {builder.data_dir} nor {_cache(builder)} can be written, for the index of the images")


def _cache(builder):
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "retinanet_keras" / builder.info.full_name


def _go_through(builder, parts, derived):
    """Read every example once: the index of `_index`, and the annotations, written to a file."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    names = features["objects"]["label"].names
    category_ids = COCO_IDS if builder.info.name == "coco" and len(names) == 80 else range(1, len(names) + 1)
    own_ids = "image/id" in features and np.issubdtype(features["image/id"].np_dtype, np.integer)
    files = list(dict.fromkeys(Path(part.filename).name for part in parts))
    images, where, spans = [], [], []

    def annotations():
        number = 0
        total = sum(part.examples_in_shard for part in parts)
        with tqdm(total=total, desc="Indexing", unit="image", leave=False) as bar:
            for part in parts:
                for start, record in _records(part):
                    bar.update()
                    example = features.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})
                    encoded = example["image"]
                    image_id = int(example["image/id"]) if own_ids else len(images) + 1
                    file_name = example.get("image/filename", b"").decode("utf-8", "backslashreplace") or str(image_id)
                    try:
                        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:  # reads the header
                            width, height = image.size
                    except DAMAGE as error:
                        raise DataError(
                            f"{part.filename}: image {image_id} ({file_name}) cannot be read: {first_line(error)}. "
                            "Prepare the set again"
                        ) from None
                    images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
                    where.append(files.index(Path(part.filename).name))
                    spans.append((start + record.index(encoded), len(encoded)))
                    for annotation in _annotations_of(example["objects"], height, width, category_ids):
                        number += 1
                        yield {"id": number, "image_id": image_id, **annotation}

    categories = [{"id": id_, "name": name} for id_, name in zip(category_ids, names, strict=True)]
    coco_splits.write(derived, images, annotations(), categories)
    return {
        "image_ids": np.array([image["id"] for image in images], np.int64), "files": np.array(files),
        "file_of": np.array(where, np.int64), "spans": np.array(spans, np.int64).reshape(-1, 2),
    }  # fmt: skip


def _records(part):
    """(where its data begins in the file, the data) of the TFRecords of a FileInstruction."""
    last = part.skip + part.take if part.take >= 0 else None
    start = HEADER
    for number, record in enumerate(tf.data.TFRecordDataset(str(part.filename)).as_numpy_iterator()):
        if number == last:
            return
        if number >= part.skip:
            yield start, record
        start += len(record) + FOOTER + HEADER


def _annotations_of(objects, height, width, category_ids):
    """COCO's annotations of one example's objects, but for `id` and `image_id`.

    TFDS keeps corners as float32 parts of the image's sides. A thousandth of a pixel, to which they are rounded, gives
    back what the set's authors wrote with up to three decimals. Areas are TFDS's, whole numbers, where it has any.
    """
    corners = np.asarray(objects["bbox"], np.float64).reshape(-1, 4) * (height, width, height, width)
    for number, (y1, x1, y2, x2) in enumerate(np.round(corners, 3).tolist()):
        if objects["label"][number] < 0:  # TFDS's "unknown"
            continue
        box = [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)]
        crowd = any(bool(objects[key][number]) for key in ("is_crowd", "is_difficult") if key in objects)
        yield {
            "category_id": category_ids[int(objects["label"][number])], "bbox": box,
            "area": int(objects["area"][number]) if "area" in objects else box[2] * box[3], "iscrowd": int(crowd),
        }  # fmt: skip
