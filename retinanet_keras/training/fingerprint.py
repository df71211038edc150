"""Whether a dataset is still the one that it was: digests of annotations and image files, kept in data.json."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from retinanet_keras import storage, strict_json
from retinanet_keras.training.folder import RunError

logger = logging.getLogger("retinanet_keras")
UNUSABLE = "unusable"  # key of data.json: images could not be read, and the user has been asked to repair them
THREADS = 16  # on a network disk a file's size takes a while to come, and many can be asked for at once


def fingerprint(dataset):
    """Digests of a CocoDataset, the same wherever its folder lies.

    Of a TFDS set the annotations are where each image lies in its files: the boxes are in those files, too, or in the
    official annotations, which may take the place of them.

    Returns:
        {"annotations": `of_annotations`; "sizes": bytes of each image file; "times": when each was
        changed}, JSON-able.
    """
    files = list(dict.fromkeys(dataset.files))
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(_sizes_and_times, (files[i::THREADS] for i in range(THREADS)))
        known = {file: row for part in parts for file, row in part.items()}
    rows = np.array([known[file] for file in files], np.int64).reshape(-1, 2)
    return {
        "annotations": of_annotations(dataset),
        "sizes": storage.digest(rows[:, 0]),
        "times": storage.digest(rows[:, 1]),
    }


def of_annotations(dataset):
    """A digest of the categories, images and annotations of a CocoDataset."""
    contents = (dataset.offsets, dataset.boxes, dataset.labels) if dataset.spans is None else (dataset.spans,)
    names = [os.path.basename(file) for file in dataset.files]
    return storage.digest(
        dataset.categories.to_list(), names, dataset.image_ids, dataset.sizes, *contents, dataset.measures
    )


def _sizes_and_times(files):
    """{file: (bytes, nanoseconds)}; -1 for a file that is not there, of which whoever reads it will tell."""
    rows = {}
    for file in files:
        try:
            about = os.stat(file)
        except OSError:
            rows[file] = (-1, -1)
        else:
            rows[file] = (about.st_size, about.st_mtime_ns)
    return rows


def check(folder, data, mixed):
    """Compare the datasets of a run with those that it began with, and write data.json.

    Args:
        folder: a RunFolder, prepared.
        data: {split: its `fingerprint`}.
        mixed: the splits of which there are results already: what is trained and validated on.

    Raises:
        RunError: where a run that has begun would go on with other data.
    """
    old = recorded(folder) if folder.started() else {}
    changed, harmless = _changes(old, {split: data[split] for split in mixed})
    if changed and old.get(UNUSABLE) and all(_same(old, data, split, "annotations") for split in mixed):
        changed, harmless = [], changed + harmless  # the last start ended by asking for other files
    if changed:
        raise RunError(
            f"{folder.path}: {'; '.join(changed)}. Going on would mix the two. Put the dataset back as it was, or "
            "train into another folder with --workdir"
        )
    if harmless:
        logger.warning("%s: %s; training goes on with them", folder.path, "; ".join(harmless))
    with folder.writing():
        storage.write(folder.data_file, json.dumps(data, indent=1) + "\n")


def recorded(folder):
    """The record of a run's data, empty where there is none; a damaged one is set aside."""
    if not folder.data_file.exists():
        return {}
    try:
        tree = strict_json.read(folder.data_file)
    except strict_json.JsonError:
        tree = None
    if isinstance(tree, dict) and all(isinstance(value, dict) for key, value in tree.items() if key != UNUSABLE):
        return tree
    logger.warning(
        "%s is damaged: whether the dataset has changed since the run began is not known. It is kept as %s",
        folder.data_file, storage.set_aside(folder.data_file),
    )  # fmt: skip
    return {}


def allow_other_files(folder):
    """Note that a run ended by asking for image files to be repaired: at the next start they may have other sizes."""
    if data := recorded(folder):
        storage.write(folder.data_file, json.dumps({**data, UNUSABLE: True}, indent=1) + "\n")


def _changes(old, new):
    """How datasets differ: (what cannot be mixed, what may be harmless). A split that was not recorded is no change."""
    mixed, harmless = [], []
    for split in new:
        if not _same(old, new, split, "annotations"):
            mixed.append(f"the annotations of {split} are not those that the run began with")
        elif not _same(old, new, split, "sizes"):
            mixed.append(f"image files of {split} are not as many bytes as when the run began")
        elif not _same(old, new, split, "times"):
            harmless.append(f"image files of {split} have other modification times, as copies have")
    return mixed, harmless


def _same(old, new, split, key):
    return old.get(split, new[split]).get(key) == new[split][key]
