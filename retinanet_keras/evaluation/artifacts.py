"""Files written by an evaluation: results, metrics, pictures, a report; or a submission to COCO's server."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet_keras.config import Config
from retinanet_keras.data import fingerprint, image_decoding
from retinanet_keras.data.coco import CocoDataset
from retinanet_keras.errors import RunError
from retinanet_keras.evaluation import coco_metrics, report
from retinanet_keras.evaluation.results import ImageDetections, Records
from retinanet_keras.storage import disk
from retinanet_keras.storage.disk import check_place as check_folder
from retinanet_keras.visualization import draw

SHOWN_SCORE = 0.3  # detections below it are not drawn


def check(folder: Path) -> None:
    """Raise a RunError if an evaluation could not write its files.

    Args:
        folder: path of the evaluation's folder, as of `RunFolder.evaluation`.
    """
    check_folder(folder / "pictures")
    for name in ("results.json", "metrics.json", "report.html", "unfinished.jsonl", "pictures/grid.png", disk.LOCK):
        if (folder / name).is_dir():
            raise RunError(f"{folder / name} is a folder, and an evaluation writes a file there. Remove or rename it")
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise RunError(f"{there} cannot be written (no permission). Change its permissions, or use another --workdir")


def collect(detections: Iterable[ImageDetections], dataset: CocoDataset) -> Records:
    """The Records of a dataset's detections, as `detect.detect_split` yields them."""
    records = Records()
    for one in detections:
        records.append(one, dataset.categories)
    return records


def score(records: Records, dataset: CocoDataset, config: Config) -> dict[str, Any]:
    """The dict of `coco_metrics.coco_metrics` for a dataset's images."""
    return coco_metrics.coco_metrics(
        dataset.annotation_file, records, image_ids=dataset.image_ids.tolist(), library=config.eval.library
    )


def write(
    folder: Path,
    records: Records,
    dataset: CocoDataset,
    config: Config,
    split: str,
    about: Mapping[str, str],
    speed: Mapping[str, float] | None = None,
    identity: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Score detections and write all files of an evaluation.

    For a labeled dataset: results.json, metrics.json, report.html and pictures. Without labels: results.json, pictures
    and a zip file for COCO's server.

    Args:
        folder: path, created if it does not exist.
        records: Records.
        dataset: CocoDataset.
        config: Config.
        split: str. Name of the split, for the report.
        about: {"model": its name, ...: further lines of the report}.
        speed: dict. As of `detect.milliseconds`.
        identity: dict, JSON-able. The "step", "weights" and "settings" to add to the metrics, which always get
            "dataset", a digest of the annotations.

    Returns:
        the metrics; None if the dataset has no labels.

    Raises:
        RunError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        records.write(folder / "results.json")
        metrics = None
        if dataset.labeled:
            metrics = score(records, dataset, config) | (identity or {})
            metrics["dataset"] = fingerprint.of_annotations(dataset)
            about = {**about, "annotations": dataset.annotation_file}
            write_scored(folder, metrics, records, dataset, config, split, about, speed)
        else:
            _write_submission(folder, dataset, about)
        if config.eval.pictures:
            _draw_pictures(folder / "pictures", dataset, records, config.eval.pictures)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror or error})") from None
    return metrics


def write_scored(
    folder: Path,
    metrics: dict[str, Any],
    records: Records,
    dataset: CocoDataset | None,
    config: Config,
    split: str,
    about: Mapping[str, str],
    speed: Mapping[str, float] | None = None,
) -> None:
    """Write metrics.json and report.html.

    Args:
        folder: path of an existing folder.
        metrics: dict. As of `coco_metrics.coco_metrics`.
        dataset: CocoDataset. None if its images are not available; the report then has no pictures.
        records, config, split, about, speed: as for `write`.
    """
    best: list[tuple[str, npt.NDArray]] = []
    worst: list[tuple[str, npt.NDArray]] = []
    if dataset is not None:
        index_of = {int(image_id): i for i, image_id in enumerate(dataset.image_ids)}
        ranked = metrics["images"]
        for pictures, rows in ((best, ranked["best"]), (worst, ranked["worst"])):
            for row in rows:
                picture = _compare(dataset, records, index_of[row["image_id"]], ranked["min_score"])
                pictures.append((report.caption(row), picture))
    coco_metrics.write_metrics(folder / "metrics.json", metrics)
    about = {**about, "split": split, "scored by": config.eval.library}
    title = f"{about['model']} on {split}"
    report.write_report(folder / "report.html", metrics, title=title, about=about, speed=speed, best=best, worst=worst)


def comparisons(dataset: CocoDataset, records: Records, count: int) -> Iterator[tuple[int, npt.NDArray]]:
    """Yield (image id, uint8 image) of ground truth beside detections, for `count` images spread over the dataset."""
    count = min(count, len(dataset))
    for i in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)) if count else ():
        yield int(dataset.image_ids[i]), _compare(dataset, records, i, SHOWN_SCORE)


def _compare(dataset: CocoDataset, records: Records, i: int, min_score: float) -> npt.NDArray:
    detections = records.of_image(int(dataset.image_ids[i]), dataset.categories)
    truth = (dataset.boxes_of(i), dataset.labels_of(i)) if dataset.labeled else None
    image = image_decoding.image_of(dataset, i)
    return draw.side_by_side(image, truth, detections, dataset.categories.names, min_score=min_score)


def _draw_pictures(folder: Path, dataset: CocoDataset, records: Records, count: int) -> None:
    """Write the `comparisons`, one file each and all of them in grid.png."""
    pictures = []
    for image_id, picture in comparisons(dataset, records, count):
        draw.save(folder / f"{image_id}.jpg", picture)
        pictures.append(picture)
    draw.save(folder / "grid.png", draw.grid(pictures, columns=2))


def _write_submission(folder: Path, dataset: CocoDataset, about: Mapping[str, str]) -> None:
    """Write the zip file that COCO's server expects: detections_[testset]_[alg]_results.zip, a .json of that name."""
    testset = re.sub(r"^image_info_", "", Path(dataset.annotation_file).stem)
    algorithm = re.sub(r"[^A-Za-z0-9-]+", "-", about["model"]).strip("-") or "retinanet"
    name = f"detections_{testset}_{algorithm}_results"
    with disk.replacing(folder / f"{name}.zip") as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(folder / "results.json", f"{name}.json")
