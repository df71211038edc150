"""Digests of a dataset, by which a run or an evaluation tells that it has changed."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from retinanet_keras.storage import disk

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
        "sizes": disk.digest(rows[:, 0]),
        "times": disk.digest(rows[:, 1]),
    }


def of_annotations(dataset):
    """A digest of the categories, images and annotations of a CocoDataset."""
    contents = (dataset.offsets, dataset.boxes, dataset.labels) if dataset.spans is None else (dataset.spans,)
    names = [os.path.basename(file) for file in dataset.files]
    return disk.digest(
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
