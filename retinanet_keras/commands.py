"""What the command lines share: errors without a traceback, and the commands that are more than one call."""

import logging
import os
import sys
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")


def run_command(main):
    """Run a command. What a user can mend is told in one line, with exit status 2; anything else is a traceback."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported: its start-up notes
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    from retinanet_keras.config import ConfigError
    from retinanet_keras.data.coco import DataError

    try:
        status = main()
    except (ConfigError, DataError) as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        from retinanet_keras.training.folder import RunError

        if not isinstance(error, RunError):
            raise
        _fail(error)
    sys.exit(status)


def _fail(error):
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def train(config, workdir=None, overrides=()):
    """`train.py`: the run of a configuration, by default in runs/ under the configuration's name."""
    from retinanet_keras.config import load_config

    settings = load_config(config, overrides)  # before TensorFlow is imported: a misspelt key should not take seconds
    from retinanet_keras.training import run

    return run.train(settings, workdir or Path("runs") / Path(config).stem)


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
    from retinanet_keras.config import load_config
    from retinanet_keras.data import sources
    from retinanet_keras.data.coco import Categories
    from retinanet_keras.results import evaluation
    from retinanet_keras.serving import detector
    from retinanet_keras.training import evaluator
    from retinanet_keras.training.checkpoints import load_run
    from retinanet_keras.training.folder import RunFolder

    workdir = Path(workdir or Path("runs") / Path(config).stem)
    folder = RunFolder(workdir)
    settings = load_config(folder.config_file if folder.config_file.exists() else config, overrides)
    split = split or settings.data.test_split or settings.data.val_split
    if results:
        metrics = evaluation.coco_metrics(sources.annotation_file(settings.data, split), results)
        print(evaluation.format_metrics(metrics))
        return metrics
    dataset = sources.open_split(settings.data, split)
    if export:
        detect, categories = detector.of_export(_saved_model(export))
        found = evaluator.detect_split_one_by_one(detect, dataset)
    else:
        model = _load_weights(weights, settings, dataset) if weights else load_run(workdir, settings)[1]
        categories = Categories.from_list(model.categories)
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
        model: folder of a run or of an export.
        images: files and folders.
        to: folder for the pictures.
        min_score: of the detections shown.

    Returns:
        0, or 1 where an image could not be read; the others are done all the same.
    """
    from retinanet_keras.data import sources
    from retinanet_keras.data.coco import Categories, DataError
    from retinanet_keras.results import draw
    from retinanet_keras.serving import detector
    from retinanet_keras.training.checkpoints import load_run
    from retinanet_keras.training.folder import RunFolder

    files = list(_image_files(images))
    if RunFolder(model).config_file.exists():
        config, net = load_run(model)
        find, categories = detector.of_model(net, config.data), Categories.from_list(net.categories)
    else:
        find, categories = detector.of_export(_saved_model(model))
    failed = 0
    print(f"{'image':<32} {'class':<16} {'score':>6} {'x1':>8} {'y1':>8} {'x2':>8} {'y2':>8}")
    for path, name in files:
        try:
            pixels = sources.read_image(path)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
            continue
        boxes, scores, labels = detector.detections_of(find, pixels)
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


def export(workdir, to):
    """`export`: the next version of a run's SavedModel under a base path."""
    from retinanet_keras.serving.export import export_model
    from retinanet_keras.training.checkpoints import load_run

    config, model = load_run(workdir)
    print(f"written to {export_model(model, config, to)}")
    return 0


def inspect(config, to, overrides):
    """`inspect`: 1 where the dataset has errors, else 0."""
    from retinanet_keras.config import load_config
    from retinanet_keras.data import inspection

    return int(bool(inspection.inspect(load_config(config, overrides), to)["errors"]))


def describe_config():
    """`config`: every setting with its default, meaning and source."""
    from retinanet_keras.config import describe

    for key, default, doc, source in describe():
        print(f"{key} = {default}\n    {doc} [{source}]")
    return 0


def _load_weights(path, settings, dataset):
    """A RetinaNet from a .keras file, or from a .weights.h5 file of the configuration's model."""
    import keras

    from retinanet_keras.data.coco import DataError
    from retinanet_keras.model import RetinaNet
    from retinanet_keras.training.folder import build_model

    if not Path(path).is_file():
        raise DataError(f"--weights: there is no file {path}")
    try:
        if Path(path).suffix == ".keras":
            model = keras.models.load_model(path)
        else:
            model = build_model(settings, dataset.categories)
            model.load_weights(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(f"--weights: {path} does not fit the configuration's model ({first})") from None
    if not isinstance(model, RetinaNet) or not model.categories:
        raise DataError(f"--weights: {path} is no RetinaNet with categories, but {type(model).__name__}")
    return model


def _saved_model(path):
    """The SavedModel of an export folder."""
    from retinanet_keras.data.coco import DataError
    from retinanet_keras.serving.export import find

    found = find(path)
    if not found:
        raise DataError(
            f"{path} is neither a run's folder (no config.json) nor an export (no saved_model.pb in it, nor in a "
            "numbered subfolder)"
        )
    return found


def _image_files(paths):
    """(path, name) of image files and of those in folders; the name of a file in a folder is relative to it."""
    from retinanet_keras.data.coco import DataError

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
