"""The commands that are more than one call."""

import logging
import math
import sys
from pathlib import Path

from retinanet_keras.config import Config
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


def detect(model, images, to, min_score):
    """`detect`: a table of what is found in image files and folders, and pictures of it.

    Args:
        model: folder of a run or of an export, or a .keras file.
        images: files and folders.
        to: folder for the pictures.
        min_score: of the detections shown.

    Returns:
        0, or 1 where an image could not be read; the others are done all the same.
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


def export(to, workdir=None, weights=None, precision=None, onnx=None):
    """`export`: the next version of the SavedModel of a run, or of a .keras file, under a base path.

    Images are resized as the run's configuration says; for a file, as the paper says (shorter side 800).

    Args:
        to: the base path; None: no SavedModel.
        workdir: folder of the run.
        weights: the .keras file, where there is no run.
        precision: of convolutions, "float32" or "bfloat16"; None: the model's own.
        onnx: an ONNX file to write as well.
    """
    if to:
        disk.check_folder(to, "--to")
    if onnx:
        disk.check_file(onnx, "--onnx")
    step = None
    if workdir:
        config, model, step = load_trained(workdir)
    else:
        config, model = Config(), loading.of_file(weights, "--weights")
    if to:
        metrics = _metrics(RunFolder(workdir), config.data, step) if workdir else None
        print(f"written to {export_model(model, config, to, precision=precision, metrics=metrics, run=bool(workdir))}")
    if onnx:
        detect_images = detect_function(model, config, precision, onnx_file.resize)
        print(f"written to {onnx_file.write(detect_images, model.categories, onnx)}")
    return 0


def _metrics(folder, data, step):
    """{split: metrics} of a run at a step, on the data it began with; the model card takes those of its weights."""
    found, known = {}, data_record.recorded(folder)
    for split in filter(None, (data.test_split, data.val_split)):
        file = folder.evaluation(split) / "metrics.json"
        try:
            metrics = strict_json.read(file)
        except FileNotFoundError:
            continue
        except (strict_json.JsonError, OSError) as error:
            logger.warning("%s cannot be read (%s), so the model card goes without it", file, error)
            continue
        if not isinstance(metrics, dict) or metrics.get("step") != step:
            continue
        if metrics.get("dataset") == known.get(split, {}).get("annotations", ""):
            found[split] = metrics
    return found


def replay(path):
    """`replay`: what each image of a failed training step gives; the status is 1 where it is not finite again."""
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
