"""TensorFlow Datasets: any detection dataset with `image` and `objects{bbox, label}`.

The dataset is indexed once: the position of each encoded image in its TFRecord file, and the boxes, which are written
as a COCO annotation file. From then on an image is a range of bytes in a file, which can be read in any order, and all
code for COCO files works for these datasets, too.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from retinanet_keras.config import DataConfig
from retinanet_keras.data import coco, coco_splits
from retinanet_keras.data.image_formats import DAMAGE, IMAGE_FORMATS
from retinanet_keras.errors import DataError, first_line
from retinanet_keras.storage import disk

logger = logging.getLogger("retinanet_keras")

# COCO's category ids, 80 of 1 to 90, in the order of TFDS's labels.
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
# For each of COCO's splits, the TFDS splits that hold its images.
POOLS = {
    "coco/2017": {"train2017": "train", "val2017": "validation", "test-dev2017": "test", "test2017": "test"},
    "coco/2014": {"train2017": "train+validation", "val2017": "validation", "test-dev2017": "test2015"},
}
# Framing of a TFRecord: length and its checksum before the data, the data's checksum after it.
HEADER, FOOTER = 12, 4


def open_split(config: DataConfig, split: str, *, keep_empty: bool = True) -> coco.CocoDataset:
    """Load the images and boxes of a split; the dataset is downloaded and prepared if it is not there.

    Args:
        config: DataConfig.
        split: str. A TFDS split such as "train" or "train[:90%]"; for COCO also the paper's and COCO's names.
        keep_empty: bool. Whether to keep images without boxes.

    Returns:
        a coco.CocoDataset whose `files` are TFRecord files, with the `spans` of the images in them.

    Raises:
        DataError: the dataset or the split cannot be used.
    """
    annotation_file, index, to_skip = _prepare(config, split)
    dataset = coco.load(annotation_file, config.dir, keep_empty=keep_empty)
    # Sorted by id, so that a training continues unchanged when the official file replaces the derived one.
    dataset = dataset.subset([i for i in np.argsort(dataset.image_ids) if dataset.image_ids[i] not in to_skip])
    order = np.argsort(index["image_ids"])
    position = np.searchsorted(index["image_ids"], dataset.image_ids, sorter=order)
    position = order[np.minimum(position, len(order) - 1)]  # [N]
    absent = dataset.image_ids[index["image_ids"][position] != dataset.image_ids]
    if len(absent):
        raise DataError(
            f"{annotation_file} lists {len(dataset)} images, of which the TFDS dataset {config.name} lacks "
            f"{len(absent)} in {split}, such as {absent[0]}. Use both from the same release"
        )
    if keep_empty and len(dataset) + len(to_skip) < len(order) and dataset.labeled:
        logger.warning(
            "%s lists %d of the %d images in %s of %s", annotation_file, len(dataset), len(order), split, config.name
        )
    files = [str(index["files"][i]) for i in index["file_of"][position]]
    return coco.with_spans(dataset, files, index["spans"][position])


def annotation_file(config: DataConfig, split: str) -> Path:
    """The annotation file of a split: the official JSON if it exists, else the one derived from the examples."""
    official = _official(config, split)
    return official if official and official.is_file() else _prepare(config, split)[0]


def _official(config: DataConfig, split: str) -> Path | None:
    """The path of the official annotations of one of COCO's splits; None for other splits and datasets."""
    name = coco_splits.OFFICIAL.get(split, split)
    return (
        coco_splits.annotation_file(config, name)
        if name in coco_splits.NAMES and config.name.startswith("coco")
        else None
    )


def _prepare(config: DataConfig, split: str) -> tuple[Path, dict[str, Any], Any]:
    """(annotation file, index of images that include those of the file, ids of the file's images to skip)."""
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
            f"{split} of {config.name}: COCO's own file is needed to select its images from {pool}; it is expected at "
            f"{official}. Download it"
        )
    return derived, index, ()


def _builder(config: DataConfig) -> Any:
    """The TFDS builder of `config.name`, downloaded and prepared in `config.dir`."""
    import tensorflow_datasets as tfds  # slow to import

    try:
        builder = tfds.builder(config.name, data_dir=config.dir)
    except Exception as error:  # of many kinds
        known = difflib.get_close_matches(config.name.split("/")[0], tfds.list_builders(), 3, 0.5)
        raise DataError(
            f"data.name: {config.name} is not a dataset that TensorFlow Datasets can load ({first_line(error)}). "
            f"Similar names: {', '.join(known) or 'none'}"
        ) from None
    features = builder.info.features
    objects: Any = getattr(features["objects"], "feature", ()) if {"image", "objects"} <= set(features) else ()
    if not ({"bbox", "label"} <= set(objects) and hasattr(objects["label"], "names")):
        raise DataError(
            f"data.name: expected a detection dataset with `image` and `objects` of `bbox` and `label` (a ClassLabel); "
            f"{config.name} has {', '.join(features)}"
        )
    if not builder.is_prepared():
        _download(builder, config)
    if builder.info.file_format.value != "tfrecord":
        raise DataError(
            f"{builder.data_dir}: expected TFRecord files, the default of TensorFlow Datasets; this dataset was "
            f"prepared as {builder.info.file_format.value}. Prepare it again in another data.dir"
        )
    return builder


def _download(builder: Any, config: DataConfig) -> None:
    print(f"Downloading and preparing {builder.info.full_name} in {config.dir} (once)", flush=True)
    try:
        builder.download_and_prepare()
    except Exception as error:  # of many kinds
        raise DataError(
            f"{config.name} is not in {config.dir}, and could not be downloaded and prepared there: "
            f"{type(error).__name__}: {first_line(error)}. This needs the network, and "
            f"{builder.info.download_size} for the download and {builder.info.dataset_size} for the dataset on disk. "
            "Copy a prepared dataset into data.dir, or use COCO's own files with data.source=coco"
        ) from error


def _index(builder: Any, config: DataConfig, pool: str) -> tuple[dict[str, Any], Path]:
    """The positions of the images of TFDS splits and the annotation file of their boxes; cached beside the dataset.

    Returns:
        (dict of image_ids [N], files, file_of [N], the index of each image's file, and spans [N, 2]; the annotation
        file).
    """
    parts: list[Any] = []
    for split in pool.split("+"):
        try:
            parts += builder.info.splits[split].file_instructions
        except (KeyError, ValueError, AssertionError) as error:
            raise DataError(
                f"{config.name} has no split {split} ({first_line(error)}). Use one of {', '.join(builder.info.splits)}"
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
        index = _read_examples(builder, parts, derived)
        with disk.replacing(saved) as partial:
            np.savez(partial, state=state, **index)
        return {**index, "files": [home / name for name in index["files"]]}, derived
    raise DataError(
        f"Neither {builder.data_dir} nor {_cache(builder)} is writable, for the index of the images. Make one writable"
    )


def _cache(builder: Any) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "retinanet_keras" / builder.info.full_name


def _read_examples(builder: Any, parts: Sequence[Any], derived: Path) -> dict[str, Any]:
    """Read every example once, write the annotation file, and return the dict of `_index`."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    names = features["objects"]["label"].names
    category_ids = COCO_IDS if builder.info.name == "coco" and len(names) == 80 else range(1, len(names) + 1)
    has_ids = "image/id" in features and np.issubdtype(features["image/id"].np_dtype, np.integer)
    files = list(dict.fromkeys(Path(part.filename).name for part in parts))
    images: list[dict[str, Any]] = []
    file_of, spans = [], []

    def annotations() -> Iterator[dict[str, Any]]:
        number = 0
        total = sum(part.examples_in_shard for part in parts)
        with tqdm(total=total, desc="Indexing", unit="image", leave=False) as bar:
            for part in parts:
                for start, record in _records(part):
                    bar.update()
                    example = features.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})
                    encoded = example["image"]
                    image_id = int(example["image/id"]) if has_ids else len(images) + 1
                    file_name = example.get("image/filename", b"").decode("utf-8", "backslashreplace") or str(image_id)
                    try:
                        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:  # reads the header
                            width, height = image.size
                    except DAMAGE as error:
                        raise DataError(
                            f"{part.filename}: image {image_id} ({file_name}) cannot be read: {first_line(error)}. "
                            "Prepare the dataset again"
                        ) from None
                    images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
                    file_of.append(files.index(Path(part.filename).name))
                    spans.append((start + record.index(encoded), len(encoded)))
                    for annotation in _annotations_of(example["objects"], height, width, category_ids):
                        number += 1
                        yield {"id": number, "image_id": image_id, **annotation}

    categories = [{"id": id_, "name": name} for id_, name in zip(category_ids, names, strict=True)]
    coco_splits.write(derived, images, annotations(), categories)
    return {
        "image_ids": np.array([image["id"] for image in images], np.int64),
        "files": np.array(files),
        "file_of": np.array(file_of, np.int64),
        "spans": np.array(spans, np.int64).reshape(-1, 2),
    }


def _records(part: Any) -> Iterator[tuple[int, bytes]]:
    """The TFRecords of a FileInstruction, as (offset of the data in the file, the data)."""
    last = part.skip + part.take if part.take >= 0 else None
    start = HEADER
    for number, record in enumerate(tf.data.TFRecordDataset(str(part.filename)).as_numpy_iterator()):
        if number == last:
            return
        if number >= part.skip:
            yield start, record
        start += len(record) + FOOTER + HEADER


def _annotations_of(
    objects: dict[str, Any], height: int, width: int, category_ids: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The objects of one example as COCO annotations, without `id` and `image_id`.

    TFDS stores corners as float32 fractions of the image's sides. Rounding to a thousandth of a pixel restores what the
    dataset's authors wrote with up to three decimals. Areas are those of TFDS, whole numbers, if it has any.
    """
    corners: npt.NDArray = np.asarray(objects["bbox"], np.float64).reshape(-1, 4) * (height, width, height, width)
    for number, (y1, x1, y2, x2) in enumerate(np.round(corners, 3).tolist()):
        if objects["label"][number] < 0:  # TFDS's "unknown"
            continue
        box = [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)]
        crowd = any(bool(objects[key][number]) for key in ("is_crowd", "is_difficult") if key in objects)
        yield {
            "category_id": category_ids[int(objects["label"][number])],
            "bbox": box,
            "area": int(objects["area"][number]) if "area" in objects else box[2] * box[3],
            "iscrowd": int(crowd),
        }
