"""`evaluate.py`: what is to be scored, on which images, and where the results go. All is checked before it begins."""

import contextlib
import functools
from pathlib import Path

from retinanet_keras import errors
from retinanet_keras.config import StrategyConfig, load_config
from retinanet_keras.data import coco, dataset_formats
from retinanet_keras.data.coco import Categories
from retinanet_keras.dataset_check import inspection
from retinanet_keras.errors import RunError, UserError
from retinanet_keras.evaluation import artifacts, coco_metrics, detect
from retinanet_keras.evaluation.identity import identity
from retinanet_keras.evaluation.results import Records
from retinanet_keras.evaluation.unfinished import Unfinished
from retinanet_keras.serving import detector
from retinanet_keras.storage import disk
from retinanet_keras.training import callbacks, loading, strategies
from retinanet_keras.training.resume import load_trained
from retinanet_keras.training.run_folder import RunFolder, load_config_of


def evaluate(config, workdir=None, split=None, overrides=(), weights=None, export=None, results=None):
    """Score a run, a file of weights, a SavedModel, or results in COCO's format, on a split.

    Args:
        config: path of the configuration; the run's own is used where there is a run.
        workdir: the run's folder; None: runs/ and the configuration's name.
        split: None: the configuration's `test_split`.
        overrides: as of `load_config`; all visible GPUs are used, or as `strategy` says here.
        weights: a .keras or .weights.h5 file to score in place of the run's.
        export: a SavedModel to score.
        results: a results file to score; needs no model, and takes its categories from the annotations.

    Returns:
        the metrics; None for a split without labels, of which a submission is written.

    Raises:
        UserError: naming what does not fit; nothing has been done then.
    """
    workdir = Path(workdir or Path("runs") / Path(config).stem)
    folder = RunFolder(workdir)
    of_run = not (weights or export or results)
    if of_run and not folder.config_file.exists():
        raise RunError(
            f"There is no run in {workdir}. Train it first: python train.py --config {config} --workdir {workdir}"
        )
    settings = load_config(folder.config_file if folder.config_file.exists() else config, overrides)
    if of_run:
        _check_model(settings, load_config_of(folder))
    given = export or weights or results
    if given:
        _check_overrides(overrides, str(given), inside=not weights)
    split = split or settings.data.test_split or settings.data.val_split
    # Only the run's own weights write to the run's own results.
    out = folder.evaluation(f"{split}-{Path(given).name}" if given else split)
    artifacts.check(out)
    with callbacks.Signals() as signals:
        if results:
            return _of_results(Path(results), settings, split, out)

        asked = any(override.startswith("strategy.") for override in overrides)
        if asked and settings.strategy.kind == "workers":
            raise RunError(
                'strategy.kind: "workers" train together; expected "auto", "default" or "mirrored" to evaluate'
            )
        strategy = strategies.make(settings.strategy if asked else StrategyConfig())
        with _alone(out):  # before the weights are read: a training may end in the meantime, and evaluate later ones
            # The model first: what is wrong with it should not be heard of after the download of a dataset.
            detector_of, categories, state, known = _detector(strategy, folder, settings, split, weights, export)
            dataset = dataset_formats.open_split(settings.data, split)
            detect.check_categories(dataset, categories)
            inspection.check_files(dataset)
            about = {"model": Path(given or workdir).name, "weights": str(given or workdir)}
            depends_on = detect.depends_on(dataset, settings, *state)
            unfinished, speed = Unfinished(out / "unfinished.jsonl", depends_on), {}
            signals.saved = lambda: (
                f"{unfinished.images} of {len(dataset)} images are kept. Run the same command again: it goes on"
            )
            if unfinished.batches:
                print(f"Going on after {unfinished.images} of {len(dataset)} images", flush=True)
            records = artifacts.collect(detector_of(dataset, settings, unfinished=unfinished, speed=speed), dataset)
            milliseconds = detect.milliseconds(speed)
            metrics = artifacts.write(out, records, dataset, settings, split, about, milliseconds, known)
            unfinished.finish()
    if milliseconds:
        parts = (f"{name} {value:.1f}" for name, value in milliseconds.items() if name in detect.PARTS)
        print(f"milliseconds an image: {', '.join(parts)}")
    return _told(metrics, out)


@contextlib.contextmanager
def _alone(out):
    """Make the folder of an evaluation, and keep others out of it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror or error})") from None
    with disk.locked(out, "evaluating"):
        yield


def _of_results(file, settings, split, out):
    """Score a results file; where the images are there, the best and the worst are drawn."""
    annotations = dataset_formats.annotation_file(settings.data, split)
    if "annotations" not in coco.read(annotations):
        raise errors.DataError(
            f"{annotations} has no annotations to score {file} by: COCO's server has those of test-dev"
        )
    records = Records.from_json(file)
    metrics = coco_metrics.coco_metrics(annotations, records, library=settings.eval.library)
    try:
        dataset = dataset_formats.open_split(settings.data, split)
        inspection.check_files(dataset)
    except errors.DataError:
        dataset = None
    about = {"model": file.name, "results": str(file), "annotations": str(annotations)}
    with _alone(out):
        artifacts.write_scored(out, metrics, records, dataset, settings, split, about)
    return _told(metrics, out)


def _check_model(settings, own):
    """A RunError where a configuration asks for another model than the run's own has."""
    differences = [
        f"{section}.{key} is {value!r} in the run, {new!r} is asked for"
        for section in ("model", "anchors")
        for key, value in vars(getattr(own, section)).items()
        if (new := getattr(getattr(settings, section), key)) != value
    ]
    if differences:
        raise RunError(
            f"The run's weights do not fit another model: {'; '.join(differences)}. Leave these settings out"
        )


def _check_overrides(overrides, given, inside):
    """A UserError where a setting is given that what is to be scored has in it; `inside`: the images' size, too."""
    fixed = () if given.endswith(".weights.h5") else ("model.", "anchors.", "detection.")
    fixed += ("data.short_side", "data.max_side") if inside else ()
    for override in overrides:
        if override.startswith(fixed):
            raise UserError(f"--set {override}: {given} was made with settings of its own, and takes none of these")


def _detector(strategy, folder, settings, split, weights, export):
    """What finds objects, and what it is.

    Returns:
        a function of (dataset, config, ...) as `detect.detect_split`; Categories; (weights, model) as of
        `detect.depends_on`; what metrics.json says of a model, {"step", "weights", "settings"}.
    """
    if export:
        path = loading.saved_model(export)
        detect_images, categories = detector.of_export(path)
        files = (path / "saved_model.pb", *sorted(path.glob("variables/*")))
        state = " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
        return functools.partial(detect.detect_split_by_export, detect_images), categories, (state, str(path)), {}
    step = None
    with strategy.scope():
        if not weights:
            _, model, step = load_trained(folder.path, settings)
        elif Path(weights).suffix == ".keras":
            model = loading.of_file(weights, "--weights")
        else:
            model = loading.of_weights(weights, settings, split, "--weights")
    known = {"step": step, **identity(model, settings, split)}
    built = {name: value for name, value in model.get_config().items() if name != "name"}  # Keras counts those
    about = known["weights"], {"model": str(built), "precision": model.compute_dtype}
    return functools.partial(detect.detect_split, model), Categories.from_list(model.categories), about, known


def _told(metrics, out):
    if metrics:
        print(coco_metrics.format_metrics(metrics))
    print(f"\nwritten to {out}" + ("" if metrics else ": the .zip is what COCO's server takes"))
    return metrics
