"""Digests of a dataset, by which a run or an evaluation detects that the dataset has changed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from retinanet_keras.data.coco import CocoDataset
from retinanet_keras.storage import disk

THREADS = 16  # a network disk takes a while to return a file's size, but answers many requests at once


def fingerprint(dataset: CocoDataset) -> dict[str, str]:
    """Digests of a CocoDataset, independent of the folder that it is in.

    For TFDS, "annotations" covers the positions of the images in their files instead of the boxes: the boxes are in
    those files, too, or in the official annotations, which may replace them.

    Returns:
        {"annotations": the digest of `of_annotations`; "sizes": of the bytes in each image file; "times": of the
        modification times}, JSON-able.
    """
    files = list(dict.fromkeys(dataset.files))
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(_sizes_and_times, (files[i::THREADS] for i in range(THREADS)))
        known = {file: row for result in results for file, row in result.items()}
    rows = np.array([known[file] for file in files], np.int64).reshape(-1, 2)
    return {
        "annotations": of_annotations(dataset),
        "sizes": disk.digest(rows[:, 0]),
        "times": disk.digest(rows[:, 1]),
    }


def of_annotations(dataset: CocoDataset) -> str:
    """A digest of the categories, images and annotations of a CocoDataset."""
    contents = (dataset.offsets, dataset.boxes, dataset.labels) if dataset.spans is None else (dataset.spans,)
    names = [os.path.basename(file) for file in dataset.files]
    return disk.digest(
        dataset.categories.to_list(), names, dataset.image_ids, dataset.sizes, *contents, dataset.measures
    )


def _sizes_and_times(files: Iterable[str]) -> dict[str, tuple[int, int]]:
    """{file: (bytes, nanoseconds)}; (-1, -1) for a missing file, which is reported when it is read."""
    rows = {}
    for file in files:
        try:
            about = os.stat(file)
        except OSError:
            rows[file] = (-1, -1)
        else:
            rows[file] = (about.st_size, about.st_mtime_ns)
    return rows
