"""Train, evaluate and export: the whole of a run, in the order in which it happens."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from retinanet_keras import errors
from retinanet_keras.config import Config
from retinanet_keras.data import dataset_formats, fingerprint
from retinanet_keras.data.coco import CocoDataset
from retinanet_keras.dataset_check import inspection
from retinanet_keras.evaluation import artifacts, coco_metrics, detect
from retinanet_keras.evaluation.callback import CocoMetrics
from retinanet_keras.evaluation.identity import identity
from retinanet_keras.evaluation.results import Records
from retinanet_keras.model import RetinaNet
from retinanet_keras.serving.export import export_model
from retinanet_keras.storage import disk
from retinanet_keras.training import best, callbacks, data_record, preflight, strategies
from retinanet_keras.training.batches import Stream, explain_errors
from retinanet_keras.training.build import build_model, resolve_pixel_mean
from retinanet_keras.training.resume import Checkpoints
from retinanet_keras.training.run_folder import RunFolder
from retinanet_keras.visualization import draw, training_curves

logger = logging.getLogger("retinanet_keras")


@dataclass(frozen=True)
class Splits:
    """The datasets of a run; `test` is `val` where the configuration names no other."""

    train: CocoDataset
    val: CocoDataset
    test: CocoDataset


@dataclass(frozen=True)
class Run:
    """What all parts of a run share."""

    config: Config
    folder: RunFolder
    splits: Splits
    model: RetinaNet
    checkpoints: Checkpoints
    signals: callbacks.Signals

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the folder."""
        return strategies.is_chief(self.model.distribute_strategy)


def train(config: Config, workdir: str | Path) -> dict[str, Any] | None:
    """Train the run in a folder, or resume it; then evaluate, export, and print the output paths.

    Args:
        config: Config. Settings of the run.
        workdir: str or Path. Folder of the run, shared by all workers; created if it does not exist.

    Returns:
        The metrics on the last split evaluated; None for a worker other than the first.

    Raises:
        UserError, Interrupted: saying what is saved, and what to do.
    """
    start = time.perf_counter()
    strategy = strategies.make(config.strategy, config.train.batch_size)
    strategies.check_norm(strategy, config.model.norm)
    with callbacks.Signals() as signals, contextlib.ExitStack() as locks:
        # Data
        config, folder = resolve_pixel_mean(config), RunFolder(workdir)
        with strategies.chief_first(strategy):
            splits = _open_splits(config)
            if strategies.is_chief(strategy):
                folder.prepare()
                locks.enter_context(disk.locked(folder.path, "training"))
                _record_settings(folder, config, splits)
                _print_plan(config, workdir, splits.train, strategy)
        # Model, losses and optimizer, from the newest checkpoint where there is one
        keras.utils.set_random_seed(config.train.seed)
        with strategy.scope():
            model = build_model(config, splits.train.categories, config.model.weights)
        checkpoints = Checkpoints(model, folder, config.train.keep_checkpoints, writes=strategies.is_chief(strategy))
        run = Run(config, folder, splits, model, checkpoints, signals)
        _restore(run)
        # Steps, and an evaluation after every `eval.every` of them
        _fit(run)
        # Evaluation and export
        metrics = _finish(run, start) if run.is_chief else None
        strategies.wait(strategy)
        return metrics


def _fit(run: Run) -> None:
    """Train from the model's step to the last, evaluating in between. Each `model.fit` ends with an evaluation."""
    config, checkpoints, strategy = run.config, run.checkpoints, run.model.distribute_strategy
    every, total = config.eval.every, config.train.iterations
    stream = Stream(run.splits.train, config)
    validation = CocoMetrics(run.splits.val, config)
    count = callbacks.Count(checkpoints, config.train.log_every)
    save = callbacks.Save(checkpoints, config.train.checkpoint_every, run.signals)
    replicas = strategy.num_replicas_in_sync // strategies.workers(strategy)
    log = callbacks.Log(run.folder, config, checkpoints, replicas) if run.is_chief else None
    try:
        if log and _misses_evaluation(run):
            _validate(run, log, validation, checkpoints.step)
        while (step := checkpoints.step) < total:
            stop = min(total, (step // every + 1) * every if every else total)
            batches = functools.partial(stream.batches, step, log.new_pipeline() if log else None)
            with run.signals.steps(), explain_errors(stream, checkpoints, run.signals):
                run.model.fit(
                    strategies.feed(strategy, batches),
                    steps_per_epoch=stop - step,
                    shuffle=False,
                    verbose=0,
                    callbacks=[count, *([log] if log else []), save],
                )
                checkpoints.save()
                save.leave_if_asked()
            if every and log:
                _validate(run, log, validation, stop)
    finally:
        if log:
            log.close()
        stream.report()


def _misses_evaluation(run: Run) -> bool:
    """Whether the run was stopped before, or during, the evaluation due at its step."""
    step, every = run.checkpoints.step, run.config.eval.every
    due = every and step and (step % every == 0 or step == run.config.train.iterations)
    return bool(due) and not any(row["step"] == step and "AP" in row for row in run.folder.log_rows())


def _validate(run: Run, log: callbacks.Log, validation: CocoMetrics, step: int) -> None:
    """Log AP on the validation split; save the weights if they are the best so far."""
    config = run.config
    metrics = validation.evaluate(run.model)
    if metrics["AP"] is not None:
        log.bar.write(f"step {step}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f} on {config.data.val_split}")
        if config.eval.keep == "best":
            best.keep(run.folder, run.model, step, metrics["AP"])
    log.write({"step": step, "AP": metrics["AP"], "AP50": metrics["AP50"]})  # last: marks the evaluation as complete
    records = cast(Records, validation.records)  # those of the evaluation above
    drawn = artifacts.comparisons(run.splits.val, records, min(4, config.eval.pictures))
    pictures = [picture for _, picture in drawn]
    if pictures:
        log.picture("detections", draw.grid(pictures, columns=2), step)


def _finish(run: Run, start: float) -> dict[str, Any] | None:
    """Evaluate the trained model, export it, and print a summary; the metrics."""
    config, split = run.config, run.config.data.test_split or run.config.data.val_split
    step = _load_chosen_weights(run)
    metrics = _evaluate(run, split, step)
    training_curves.training_curves(run.folder.log_rows(), run.folder.curves_file)
    measured = {split: metrics} if metrics else None
    export_dir = export_model(run.model, config, run.folder.export, version=1, metrics=measured)
    if metrics:
        print(f"\n{coco_metrics.format_metrics(metrics)}\n")
    _print_summary(run.folder, split, export_dir, start)
    return metrics


def _load_chosen_weights(run: Run) -> int:
    """Load the weights that `eval.keep` asks for; the step that they are from."""
    if run.config.eval.keep == "best" and (record := best.load(run.folder, run.model)):
        print(f"The best weights are those of step {record['step']}, AP {record['AP']:.3f}")
        return record["step"]
    return run.config.train.iterations


def _evaluate(run: Run, split: str, step: int) -> dict[str, Any] | None:
    """Write the results of the last split; the metrics, None where it has no labels."""
    config, folder, dataset = run.config, run.folder.evaluation(split), run.splits.test
    speed: dict[str, Any] = {}
    records = artifacts.collect(detect.detect_split(run.model, dataset, config, speed=speed), dataset)
    about = {"model": run.folder.path.name, "weights": str(run.folder.path)}
    known = {"step": step, **identity(run.model, config, split)}
    folder.mkdir(parents=True, exist_ok=True)
    with disk.locked(folder, "the end of a training", waiting=lambda holder: print(f"{folder}: waiting for {holder}")):
        return artifacts.write(folder, records, dataset, config, split, about, detect.milliseconds(speed), known)


def _open_splits(config: Config) -> Splits:
    """Open and check the datasets."""
    data = config.data
    train_set = dataset_formats.open_split(data, data.train_split, keep_empty=data.keep_empty)
    val_set = dataset_formats.open_split(data, data.val_split)
    test_split = data.test_split or data.val_split
    test_set = val_set if test_split == data.val_split else dataset_formats.open_split(data, test_split)
    if config.eval.every and not val_set.labeled:
        raise errors.DataError(
            f"{val_set.annotation_file} has no annotations, so AP cannot be measured on "
            f"data.val_split={data.val_split} during training. Name another split, or set eval.every=0"
        )
    for other in (val_set, test_set):
        detect.check_categories(other, train_set.categories)
        inspection.check_files(other)
    inspection.check_before_training(train_set, config)
    return Splits(train_set, val_set, test_set)


def _record_settings(folder: RunFolder, config: Config, splits: Splits) -> None:
    """Write the settings and the data of a new run, or check that they are those of the run in the folder."""
    data = config.data
    by_name = {
        data.train_split: splits.train,
        data.val_split: splits.val,
        data.test_split or data.val_split: splits.test,
    }
    fingerprints = {name: fingerprint.fingerprint(dataset) for name, dataset in by_name.items()}
    used_in_training = (data.train_split, data.val_split)
    folder.start(config, splits.train.categories, lambda: data_record.check(folder, fingerprints, used_in_training))


def _restore(run: Run) -> None:
    """Load the newest checkpoint, if there is one, and prepare the folder for the steps after it."""
    config, folder, checkpoints = run.config, run.folder, run.checkpoints
    if config.model.weights is None and config.model.norm == "frozen":
        logger.warning('model.norm is "frozen" but the weights are random: the backbone will hardly learn')
    run.signals.saved = checkpoints.saved
    step = checkpoints.restore()
    strategies.check_same(run.model.distribute_strategy, step)
    if run.is_chief:
        preflight.check(config, folder, config.data.test_split or config.data.val_split)
        checkpoints.clear_remains()
        folder.cut_log(step)
        best.repair(folder)
        if step:
            print(f"Resuming from step {step} of {config.train.iterations}")


def _print_plan(config: Config, workdir: str | Path, train_set: CocoDataset, strategy: tf.distribute.Strategy) -> None:
    """Print what is about to be trained, on what, and at which learning rate."""
    train, replicas = config.train, strategy.num_replicas_in_sync
    classes = len(train_set.categories)
    print(f"Training {config.model.backbone} on {len(train_set)} images of {classes} classes in {workdir}")
    if replicas > 1:
        print(f"{replicas} replicas with {train.batch_size // replicas} images each")
    if train.reference_batch is not None and train.scaled_rate != train.learning_rate:
        factor = train.reference_batch / train.batch_size
        drops = [round(step * factor) for step in train.drops]
        also = f" train.drops={json.dumps(drops, separators=(',', ':'))}" if train.schedule == "step" else ""
        print(
            f"Learning rate {train.scaled_rate:.4g} = {train.learning_rate:.4g} x {train.batch_size} / "
            f"{train.reference_batch} images per step (linear scaling rule; train.reference_batch=null turns it off). "
            f"For as many epochs as with {train.reference_batch} images per step, set "
            f"train.iterations={round(train.iterations * factor)}{also}"
        )


def _print_summary(folder: RunFolder, split: str, export_dir: Path, start: float) -> None:
    """Print the output paths, the time, the speed and the peak memory."""
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024) / 1024
    results = folder.evaluation(split)
    paths = {
        "metrics": results / "metrics.json",
        "report": results / "report.html",
        "results": results / "results.json",
        "pictures": results / "pictures" / "grid.png",
        "training curves": folder.curves_file,
        "log": folder.log_file,
        "TensorBoard": folder.tensorboard,
        "checkpoints": folder.checkpoints,
        "SavedModel": export_dir,
        "submission": next(results.glob("*.zip"), results / "none"),
    }
    for name, path in paths.items():
        if path.exists():
            print(f"{name:>16}  {path}")
    speeds = [row["images_per_second"] for row in folder.log_rows() if "images_per_second" in row]
    print(f"{'time':>16}  {seconds // 60:.0f} min {seconds % 60:.0f} s since the last start")
    print(f"{'speed':>16}  {np.median(speeds):.1f} images/s in training, median")
    print(f"{'peak memory':>16}  {peak:.1f} GB")
