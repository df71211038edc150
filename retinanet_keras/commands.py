"""The commands that are more than one call."""

import json
import math
import sys
from pathlib import Path

import keras

from retinanet_keras.config import Config, load_config
from retinanet_keras.data import sources
from retinanet_keras.data.coco import Categories, DataError
from retinanet_keras.model import RetinaNet
from retinanet_keras.results import draw, evaluation
from retinanet_keras.serving import detector
from retinanet_keras.serving.export import export_model, find, search_function
from retinanet_keras.serving.onnx import write as write_onnx
from retinanet_keras.training import evaluator
from retinanet_keras.training import replay as replays
from retinanet_keras.training.checkpoints import load_run
from retinanet_keras.training.folder import RunError, RunFolder, build_model, load_weights

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")


def evaluate(config, workdir=None, split=None, overrides=(), weights=None, export=None, results=None):
    """`evaluate.py`: score a run, a file of weights, a SavedModel, or results in COCO's format, on a split.

    Args:
        config: path of the configuration; the run's own is used where there is a run.
        workdir: the run's folder; None: runs/ and the configuration's name.
        split: None: the configuration's `test_split`.
        weights: a .keras or .weights.h5 file to score in place of the run's.
        export: a SavedModel to score.
        results: a results file to score; needs no model, and takes its categories from the annotations.

    Returns:
        the metrics.
    """
    workdir = Path(workdir or Path("runs") / Path(config).stem)
    folder = RunFolder(workdir)
    if not (folder.config_file.exists() or weights or export or results):
        raise RunError(
            f"There is no run in {workdir}. Train it first: python train.py --config {config} --workdir {workdir}"
        )
    settings = load_config(folder.config_file if folder.config_file.exists() else config, overrides)
    split = split or settings.data.test_split or settings.data.val_split
    if results:
        metrics = evaluation.coco_metrics(sources.annotation_file(settings.data, split), results)
        print(evaluation.format_metrics(metrics))
        return metrics
    if export:
        search, categories = detector.of_export(_saved_model(export))
        dataset = sources.open_split(settings.data, split)
        found = evaluator.detect_split_one_by_one(search, dataset)
    else:
        model = _load_weights(weights, settings, split) if weights else load_run(workdir, settings)[1]
        categories = Categories.from_list(model.categories)
        dataset = sources.open_split(settings.data, split)
        found = evaluator.detect_split(model.detect, dataset, settings)
    evaluator.check_categories(dataset, categories)
    # Only the run's own weights write to the run's own results.
    out = folder.evaluation(f"{split}-{Path(export or weights).name}" if export or weights else split)
    metrics = evaluator.evaluate_to(out, found, dataset, settings.eval.pictures)
    print(f"{evaluation.format_metrics(metrics)}\n\nwritten to {out}")
    return metrics


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
    files = _unique(_image_files(images))
    if RunFolder(model).config_file.exists():
        config, net = load_run(model)
        search, categories = detector.of_model(net, config), Categories.from_list(net.categories)
    elif Path(model).suffix == ".keras":
        net = _load_model(model, "--model")
        search, categories = detector.of_model(net, Config()), Categories.from_list(net.categories)
    else:
        search, categories = detector.of_export(_saved_model(model))
    failed = 0
    print(f"{'image':<32} {'class':<16} {'score':>6} {'x1':>8} {'y1':>8} {'x2':>8} {'y2':>8}")
    for path, name in files:
        try:
            pixels = sources.read_image(path)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
            continue
        boxes, scores, labels = detector.detections_of(search, pixels)
        shown = scores >= min_score
        for box, score, label in zip(boxes[shown], scores[shown], labels[shown], strict=True):
            numbers = " ".join(f"{side:8.1f}" for side in box)
            print(f"{name[-32:]:<32} {categories.names[label][:16]:<16} {score:6.3f} {numbers}")
        if not shown.any():
            print(f"{name[-32:]:<32} nothing with a score of {min_score} or more")
        drawn = draw.draw_boxes(pixels, boxes[shown], labels[shown], categories.names, scores[shown])
        draw.save(Path(to) / f"{name}.png", drawn)
    print(f"{len(files) - failed} pictures in {to}")
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
    config, model = load_run(workdir) if workdir else (Config(), _load_model(weights, "--weights"))
    if to:
        metrics = _metrics(RunFolder(workdir), config.data) if workdir else None
        print(f"written to {export_model(model, config, to, precision=precision, metrics=metrics, run=bool(workdir))}")
    if onnx:
        print(f"written to {write_onnx(search_function(model, config, precision), model.categories, onnx)}")
    return 0


def _metrics(folder, data):
    """{split: metrics} of what a run's own weights have been scored on."""
    files = {split: folder.evaluation(split) / "metrics.json" for split in (data.test_split, data.val_split) if split}
    return {split: json.loads(file.read_text()) for split, file in files.items() if file.exists()}


def _load_weights(path, settings, split):
    """A RetinaNet from a .keras file, or from a .weights.h5 file of the configuration's model."""
    if Path(path).suffix == ".keras":
        return _load_model(path, "--weights")
    if not Path(path).is_file():
        raise DataError(f"--weights: there is no file {path}")
    model = build_model(settings, sources.open_split(settings.data, split).categories)
    try:
        load_weights(model, path)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(f"--weights: {path} does not fit the configuration's model ({first})") from None
    return model


def _load_model(path, option):
    """A RetinaNet with categories from a .keras file."""
    if not Path(path).is_file():
        raise DataError(f"{option}: there is no file {path}")
    try:
        model = keras.models.load_model(path)
    except (OSError, ValueError, TypeError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(f"{option}: {path} is no model that Keras can load ({first})") from None
    if not isinstance(model, RetinaNet) or not model.categories:
        raise DataError(f"{option}: {path} is no RetinaNet with categories, but {type(model).__name__}")
    return model


def _saved_model(path):
    """The SavedModel of an export folder."""
    found = find(path)
    if not found:
        raise DataError(
            f"{path} is neither a run's folder (no config.json) nor an export (no saved_model.pb in it, nor in a "
            "numbered subfolder)"
        )
    return found


def _unique(files):
    """The same (path, name) pairs, names that come again numbered: pictures must not replace each other."""
    seen, unique = {}, []
    for path, name in files:
        seen[name] = seen.get(name, 0) + 1
        unique.append((path, name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return unique


def _image_files(paths):
    """(path, name) of image files and of those in folders; the name of a file in a folder is relative to it."""
    for path in map(Path, paths):
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
            if not files:
                raise DataError(f"{path} holds no image files ({', '.join(IMAGE_SUFFIXES)})")
            yield from ((file, str(file.relative_to(path))) for file in files)
        elif path.exists():
            yield path, path.name
        else:
            raise DataError(f"There is no image {path}")


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
