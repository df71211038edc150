"""Commands of `retinanet-keras` that take more than one call: detect, export, replay."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retinanet_keras.config import Config, DataConfig
from retinanet_keras.data import image_decoding
from retinanet_keras.data.coco import Categories
from retinanet_keras.data.listing import image_files
from retinanet_keras.errors import DataError
from retinanet_keras.serving import detector, model_card, pictures
from retinanet_keras.serving import onnx as onnx_file
from retinanet_keras.serving.export import detect_function, export_model
from retinanet_keras.storage import disk, strict_json
from retinanet_keras.storage.printable import printable
from retinanet_keras.training import data_record, loading
from retinanet_keras.training import failures as replays
from retinanet_keras.training.resume import load_run, load_trained
from retinanet_keras.training.run_folder import RunFolder
from retinanet_keras.visualization import text_table

logger = logging.getLogger("retinanet_keras")


def detect(model: str, images: Sequence[str], to: str | Path, min_score: float) -> int:
    """Run `detect`: print a table of the detections in image files and folders, and draw them.

    Args:
        model: str. Folder of a run or of an export, or a .keras file.
        images: sequence of str. Image files and folders.
        to: str or Path. Folder for the pictures.
        min_score: float. Minimum score of the detections shown.

    Returns:
        0, or 1 where an image could not be read; the others are processed all the same.
    """
    disk.check_folder(to, "--to")
    files, max_pixels = image_files(images), Config().data.max_pixels
    if RunFolder(model).config_file.exists():
        config, net = load_run(model)
        max_pixels = config.data.max_pixels
        detect_images, categories = detector.of_model(net, config), Categories.from_list(net.categories)
    elif Path(model).suffix == ".keras":
        net = loading.of_file(model, "--model")
        detect_images, categories = detector.of_model(net, Config()), Categories.from_list(net.categories)
    else:
        path = loading.saved_model(model)
        detect_images, categories = detector.of_export(path)
        max_pixels = model_card.max_pixels(path) or max_pixels
    failed = 0
    print(text_table.HEADER)
    for path, name in files:
        try:
            pixels = image_decoding.read_image(path, max_pixels)
        except DataError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            failed += 1
            continue
        boxes, scores, labels = detector.detections_of(detect_images, pixels)
        shown = scores >= min_score
        names = [categories.names[label] for label in labels]
        print(*text_table.rows(name, boxes, scores, names, min_score), sep="\n")
        pictures.write(to, name, pixels, boxes[shown], labels[shown], categories.names, scores[shown])
    done = len(files) - failed
    print(f"{done} picture{'s' if done != 1 else ''} in {printable(to)}")
    return int(failed > 0)


def export(
    to: str | Path | None,
    workdir: str | Path | None = None,
    weights: str | Path | None = None,
    precision: str | None = None,
    onnx: str | Path | None = None,
) -> int:
    """Run `export`: write the next version of the SavedModel of a run, or of a .keras file, under a base path.

    Images are resized as in the run's configuration; for a file, as in the paper (shorter side 800).

    Args:
        to: str, Path or None. The base path; None for no SavedModel.
        workdir: str, Path or None. Folder of the run.
        weights: str, Path or None. The .keras file, where there is no run.
        precision: str or None. Precision of convolutions, "float32" or "bfloat16"; None for the model's.
        onnx: str, Path or None. ONNX file to write as well.

    Returns:
        0.
    """
    if to:
        disk.check_folder(to, "--to")
    if onnx:
        disk.check_file(onnx, "--onnx")
    step = None
    if workdir:
        config, model, step = load_trained(workdir)
    else:
        config, model = Config(), loading.of_file(weights or "", "--weights")
    if to:
        metrics = _metrics(RunFolder(workdir), config.data, step) if workdir and step is not None else None
        print(f"written to {export_model(model, config, to, precision=precision, metrics=metrics, run=bool(workdir))}")
    if onnx:
        detect_images = detect_function(model, config, precision, onnx_file.resize)
        print(f"written to {onnx_file.write(detect_images, model.categories, onnx)}")
    return 0


def _metrics(folder: RunFolder, data: DataConfig, step: int) -> dict[str, dict[str, Any]]:
    """{split: metrics} of a run's weights at a step, on the data that it started with, for the model card."""
    by_split, recorded = {}, data_record.recorded(folder)
    for split in filter(None, (data.test_split, data.val_split)):
        file = folder.evaluation(split) / "metrics.json"
        try:
            metrics = strict_json.read(file)
        except FileNotFoundError:
            continue
        except (strict_json.JsonError, OSError) as error:
            logger.warning("%s cannot be read (%s), so the model card does not include it", file, error)
            continue
        if not isinstance(metrics, dict) or metrics.get("step") != step:
            continue
        if metrics.get("dataset") == recorded.get(split, {}).get("annotations", ""):
            by_split[split] = metrics
    return by_split


def replay(path: str | Path) -> int:
    """Run `replay`: print losses and gradients of each image of a failed training step.

    Args:
        path: str or Path. The file written by training.

    Returns:
        1 where the loss or a gradient is not finite again, else 0.
    """
    print(f"{'image':>12}  boxes  positives  class loss    box loss  gradient norm")
    failed = False
    for row in replays.replay(path):
        failed |= bool(row["not_finite"]) or not math.isfinite(row["classification"] + row["box"])
        print(
            f"{row['image_id']:>12}  {row['boxes']:>5}  {row['positives']:>9}  {row['classification']:>10.4g}  "
            f"{row['box']:>10.4g}  {row['gradient_norm']:>13.4g}"
        )
        if row["not_finite"]:
            shown = ", ".join(row["not_finite"][:3])
            print(f"{'':>12}  not finite: the gradients of {len(row['not_finite'])} variables ({shown}, ...)")
    return int(failed)
