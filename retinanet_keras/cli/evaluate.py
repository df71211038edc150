"""Evaluate a run, weights, an export or a results file on a split; everything is checked first."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from retinanet_keras import errors
from retinanet_keras.config import Config, StrategyConfig, load_config
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


def evaluate(
    config: str | Path,
    workdir: str | Path | None = None,
    split: str | None = None,
    overrides: Sequence[str] = (),
    weights: str | Path | None = None,
    export: str | Path | None = None,
    results: str | Path | None = None,
) -> dict[str, Any] | None:
    """Evaluate a run, a weights file, a SavedModel, or results in COCO's format, on a split.

    Args:
        config: str or Path. Configuration file; where there is a run, its own is used instead.
        workdir: str, Path or None. Folder of the run; None for runs/ and the configuration's name.
        split: str or None. Name of the split; None for the configuration's `test_split`.
        overrides: sequence of str. As of `load_config`. All visible GPUs are used unless `strategy` is set here.
        weights: str, Path or None. A .keras or .weights.h5 file to evaluate in place of the run's weights.
        export: str, Path or None. A SavedModel to evaluate.
        results: str, Path or None. A results file to evaluate; needs no model, and its categories are those of the
            annotations.

    Returns:
        The metrics; None for a split without labels, for which a submission is written.

    Raises:
        UserError: naming what does not fit, before anything is done.
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
    # Only the run's weights write to the results of the run.
    out = folder.evaluation(f"{split}-{Path(given).name}" if given else split)
    artifacts.check(out)
    with callbacks.Signals() as signals:
        if results:
            return _evaluate_results(Path(results), settings, split, out)

        with_strategy = any(override.startswith("strategy.") for override in overrides)
        if with_strategy and settings.strategy.kind == "workers":
            raise RunError(
                'strategy.kind: expected "auto", "default" or "mirrored" in evaluation, got "workers", which is for '
                "training. Leave it out"
            )
        strategy = strategies.make(settings.strategy if with_strategy else StrategyConfig())
        with _locked(out):  # before the weights are read: a training may end in the meantime, and evaluate later ones
            # The model first: its errors should not come after the download of a dataset.
            detector_of, categories, state, known = _detector(strategy, folder, settings, split, weights, export)
            dataset = dataset_formats.open_split(settings.data, split)
            detect.check_categories(dataset, categories)
            inspection.check_files(dataset)
            about = {"model": Path(given or workdir).name, "weights": str(given or workdir)}
            depends_on = detect.depends_on(dataset, settings, *state)
            unfinished = Unfinished(out / "unfinished.jsonl", depends_on)
            speed: dict[str, Any] = {}
            signals.saved = lambda: (
                f"{unfinished.images} of {len(dataset)} images are done and saved. Run the same command again to resume"
            )
            if unfinished.batches:
                print(f"Resuming after {unfinished.images} of {len(dataset)} images", flush=True)
            records = artifacts.collect(detector_of(dataset, settings, unfinished=unfinished, speed=speed), dataset)
            milliseconds = detect.milliseconds(speed)
            metrics = artifacts.write(out, records, dataset, settings, split, about, milliseconds, known)
            unfinished.finish()
    if milliseconds:
        parts = (f"{name} {value:.1f}" for name, value in milliseconds.items() if name in detect.PARTS)
        print(f"milliseconds per image: {', '.join(parts)}")
    return _print_metrics(metrics, out)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Create the folder of an evaluation, and lock it against other processes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written ({error.strerror or error}). Change its permissions, or free some space"
        ) from None
    with disk.locked(out, "evaluating"):
        yield


def _evaluate_results(file: Path, settings: Config, split: str, out: Path) -> dict[str, Any] | None:
    """Evaluate a results file; where the images are available, the best and the worst are drawn."""
    annotations = dataset_formats.annotation_file(settings.data, split)
    if "annotations" not in coco.read(annotations):
        raise errors.DataError(
            f"{annotations} has no annotations to evaluate {file} with. Choose another --split, or submit the file to "
            "COCO's server, which has those of test-dev"
        )
    records = Records.from_json(file)
    metrics = coco_metrics.coco_metrics(annotations, records, library=settings.eval.library)
    try:
        dataset = dataset_formats.open_split(settings.data, split)
        inspection.check_files(dataset)
    except errors.DataError:
        dataset = None
    about = {"model": file.name, "results": str(file), "annotations": str(annotations)}
    with _locked(out):
        artifacts.write_scored(out, metrics, records, dataset, settings, split, about)
    return _print_metrics(metrics, out)


def _check_model(settings: Config, recorded: Config) -> None:
    """Raise a RunError where the settings would make another model than the run's."""
    differences = [
        f"{section}.{key} is {value!r} in the run, {new!r} in these settings"
        for section in ("model", "anchors")
        for key, value in vars(getattr(recorded, section)).items()
        if (new := getattr(getattr(settings, section), key)) != value
    ]
    if differences:
        raise RunError(
            f"The run's weights do not fit another model: {'; '.join(differences)}. Leave these settings out"
        )


def _check_overrides(overrides: Sequence[str], given: str, inside: bool) -> None:
    """Raise a UserError for an override that is fixed in the file to be evaluated; `inside`: the image size, too."""
    fixed: tuple[str, ...] = () if given.endswith(".weights.h5") else ("model.", "anchors.", "detection.")
    fixed += ("data.short_side", "data.max_side") if inside else ()
    for override in overrides:
        if override.startswith(fixed):
            raise UserError(f"--set {override}: this setting is fixed in {given}. Leave it out")


def _detector(
    strategy: tf.distribute.Strategy,
    folder: RunFolder,
    settings: Config,
    split: str,
    weights: str | Path | None,
    export: str | Path | None,
) -> tuple[Callable[..., Any], Categories, tuple[str, Any], dict[str, Any]]:
    """Load the model to be evaluated.

    Returns:
        A function of (dataset, config, ...) as `detect.detect_split`; Categories; (weights, model) as of
        `detect.depends_on`; the entries of metrics.json about a model, {"step", "weights", "settings"}.
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
    built = {name: value for name, value in model.get_config().items() if name != "name"}  # Keras numbers those
    about = known["weights"], {"model": str(built), "precision": model.compute_dtype}
    return functools.partial(detect.detect_split, model), Categories.from_list(model.categories), about, known


def _print_metrics(metrics: dict[str, Any] | None, out: Path) -> dict[str, Any] | None:
    if metrics:
        print(coco_metrics.format_metrics(metrics))
    print(f"\nwritten to {out}" + ("" if metrics else ": the .zip is for COCO's evaluation server"))
    return metrics
