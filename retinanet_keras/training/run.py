"""The run: data, model, training with checkpoints and evaluations, and at the end results, export and a summary."""

import contextlib
import functools
import json
import logging
import resource
import sys
import time

import keras
import numpy as np

from retinanet_keras import errors
from retinanet_keras.data import dataset_formats, fingerprint
from retinanet_keras.dataset_check import inspection
from retinanet_keras.evaluation import artifacts, coco_metrics, detect
from retinanet_keras.evaluation.callback import CocoMetrics
from retinanet_keras.evaluation.identity import identity
from retinanet_keras.serving.export import export_model
from retinanet_keras.storage import disk
from retinanet_keras.training import best, callbacks, data_record, preflight, strategies
from retinanet_keras.training.batches import Stream, explained
from retinanet_keras.training.build import build_model, resolve_pixel_mean
from retinanet_keras.training.resume import Checkpoints
from retinanet_keras.training.run_folder import RunFolder
from retinanet_keras.visualization import draw, training_curves

logger = logging.getLogger("retinanet_keras")


def train(config, workdir):
    """Train, or go on training, the run in a folder; then evaluate, export, and say what lies where.

    Args:
        config: a Config.
        workdir: the run's folder, which all workers share; made where it does not exist.

    Returns:
        the metrics on the last split evaluated; None for a worker that is not the first.

    Raises:
        UserError, Interrupted: saying what is saved, and what to do.
    """
    began = time.perf_counter()
    strategy = strategies.make(config.strategy, config.train.batch_size)
    strategies.check_norm(strategy, config.model.norm)
    chief = strategies.is_chief(strategy)
    with callbacks.Signals() as signals, contextlib.ExitStack() as held:
        config = resolve_pixel_mean(config)
        folder = RunFolder(workdir)
        with strategies.chief_first(strategy):
            train_set, val_set, test_set = _open_splits(config)
            if chief:
                folder.prepare()
                held.enter_context(disk.locked(folder.path, "training"))
                _start(folder, config, train_set, val_set, test_set)
                _say_plan(config, workdir, train_set, strategy)

        keras.utils.set_random_seed(config.train.seed)
        with strategy.scope():
            model = build_model(config, train_set.categories, config.model.weights)
        if config.model.weights is None and config.model.norm == "frozen":
            logger.warning('model.norm is "frozen" but the weights are random: the backbone will hardly learn')
        checkpoints = Checkpoints(model, folder, config.train.keep_checkpoints, writes=chief)
        signals.saved = checkpoints.saved
        step = checkpoints.restore()
        strategies.check_same(strategy, step)
        if chief:
            preflight.check(config, folder, config.data.test_split or config.data.val_split)
            checkpoints.clear_remains()
            folder.cut_log(step)
            best.mend(folder)
            if step:
                print(f"Going on from step {step} of {config.train.iterations}")
        _fit(model, config, folder, checkpoints, train_set, CocoMetrics(val_set, config), signals)
        metrics = _finish(model, config, folder, test_set, began) if chief else None
        strategies.wait(strategy)
        return metrics


def _start(folder, config, train_set, val_set, test_set):
    """Write what a run is of, or check that it is the one in the folder."""
    data, mixed = config.data, (config.data.train_split, config.data.val_split)
    sets = {data.train_split: train_set, data.val_split: val_set, data.test_split or data.val_split: test_set}
    known = {split: fingerprint.fingerprint(one) for split, one in sets.items()}
    folder.start(config, train_set.categories, lambda: data_record.check(folder, known, mixed))


def _open_splits(config):
    """The datasets of training, of validation and of the test, all checked."""
    data = config.data
    train_set = dataset_formats.open_split(data, data.train_split, keep_empty=data.keep_empty)
    val_set = dataset_formats.open_split(data, data.val_split)
    test_split = data.test_split or data.val_split
    test_set = val_set if test_split == data.val_split else dataset_formats.open_split(data, test_split)
    if config.eval.every and not val_set.labeled:
        raise errors.DataError(
            f"{val_set.annotation_file} has no annotations, so data.val_split={data.val_split} tells nothing of a "
            "training. Name another, or set eval.every=0"
        )
    for other in (val_set, test_set):
        detect.check_categories(other, train_set.categories)
        inspection.check_files(other)
    inspection.check_before_training(train_set, config)
    return train_set, val_set, test_set


def _say_plan(config, workdir, train_set, strategy):
    """What is about to be trained, on what, and at which rate."""
    train, replicas = config.train, strategy.num_replicas_in_sync
    classes = len(train_set.categories)
    print(f"Training {config.model.backbone} on {len(train_set)} images of {classes} classes in {workdir}")
    if replicas > 1:
        print(f"{replicas} replicas with {train.batch_size // replicas} images each")
    if train.scaled_rate != train.learning_rate:
        factor = train.reference_batch / train.batch_size
        drops = [round(step * factor) for step in train.drops]
        also = f" train.drops={json.dumps(drops, separators=(',', ':'))}" if train.schedule == "step" else ""
        print(
            f"Learning rate {train.scaled_rate:.4g} = {train.learning_rate:.4g} x {train.batch_size} / "
            f"{train.reference_batch} images a step (linear scaling rule; train.reference_batch=null turns it off). "
            f"As many epochs as with {train.reference_batch} images take "
            f"train.iterations={round(train.iterations * factor)}{also}"
        )


def _fit(model, config, folder, checkpoints, train_set, validation, signals):
    """Train from the model's step to the last, evaluating in between. Each stretch is one `model.fit`."""
    strategy, every = model.distribute_strategy, config.eval.every
    chief = strategies.is_chief(strategy)
    stream = Stream(train_set, config)
    count = callbacks.Count(checkpoints, config.train.log_every)
    save = callbacks.Save(checkpoints, config.train.checkpoint_every, signals)
    replicas = strategy.num_replicas_in_sync // strategies.workers(strategy)
    log = callbacks.Log(folder, config, checkpoints, replicas) if chief else None
    try:
        step = checkpoints.step
        due = every and step and (step % every == 0 or step == config.train.iterations)
        if due and log and not any(row["step"] == step and "AP" in row for row in folder.log_rows()):
            _validate(model, config, folder, log, validation, step)  # the run was stopped before or in it
        while (step := checkpoints.step) < config.train.iterations:
            stop = min(config.train.iterations, (step // every + 1) * every if every else config.train.iterations)
            batches = functools.partial(stream.batches, step, log.new_pipeline() if log else None)
            with signals.steps(), explained(stream, model, config, folder, checkpoints, signals):
                model.fit(
                    strategies.feed(strategy, batches), steps_per_epoch=stop - step, shuffle=False, verbose=0,
                    callbacks=[count, *([log] if log else []), save],
                )  # fmt: skip
                checkpoints.save()
                save.leave_if_asked()
            if every and log:
                _validate(model, config, folder, log, validation, stop)
    finally:
        if log:
            log.close()
        stream.report()


def _validate(model, config, folder, log, validation, step):
    """AP on the validation split, logged; the best weights kept."""
    metrics = validation.evaluate(model)
    if metrics["AP"] is not None:
        log.bar.write(f"step {step}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f} on {config.data.val_split}")
        if config.eval.keep == "best":
            best.keep(folder, model, step, metrics["AP"])
    log.write({"step": step, "AP": metrics["AP"], "AP50": metrics["AP50"]})  # last: it says that all was done
    drawn = artifacts.comparisons(validation.data, validation.records, min(4, config.eval.pictures))
    pictures = [picture for _, picture in drawn]
    if pictures:
        log.picture("detections", draw.grid(pictures, columns=2), step)


def _finish(model, config, folder, test_set, began):
    """Results, pictures, the export and a summary."""
    step = config.train.iterations
    if config.eval.keep == "best" and (kept := best.load(folder, model)):
        step = kept["step"]
        print(f"The best weights were those of step {step}, AP {kept['AP']:.3f}")
    split, speed = config.data.test_split or config.data.val_split, {}
    out = folder.evaluation(split)
    records = artifacts.collect(detect.detect_split(model, test_set, config, speed=speed), test_set)
    about = {"model": folder.path.name, "weights": str(folder.path)}
    known = {"step": step, **identity(model, config, split)}
    out.mkdir(parents=True, exist_ok=True)
    with disk.locked(out, "the end of a training", waiting=lambda holder: print(f"{out}: waiting for {holder}")):
        metrics = artifacts.write(out, records, test_set, config, split, about, detect.milliseconds(speed), known)
    training_curves.training_curves(folder.log_rows(), folder.curves_file)
    measured = {split: metrics} if metrics else None
    export_dir = export_model(model, config, folder.export, version=1, metrics=measured)
    if metrics:
        print(f"\n{coco_metrics.format_metrics(metrics)}\n")
    _summarize(folder, out, export_dir, began)
    return metrics


def _summarize(folder, out, export_dir, began):
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024) / 1024
    rows = {
        "metrics": out / "metrics.json", "report": out / "report.html", "results": out / "results.json",
        "pictures": out / "pictures" / "grid.png",
        "training curves": folder.curves_file, "log": folder.log_file, "TensorBoard": folder.tensorboard,
        "checkpoints": folder.checkpoints, "SavedModel": export_dir,
    }  # fmt: skip
    rows["submission"] = next(out.glob("*.zip"), out / "none")
    for name, path in rows.items():
        if path.exists():
            print(f"{name:>16}  {path}")
    speeds = [row["images_per_second"] for row in folder.log_rows() if "images_per_second" in row]
    print(f"{'time':>16}  {seconds // 60:.0f} min {seconds % 60:.0f} s, this start")
    print(f"{'speed':>16}  {np.median(speeds):.1f} images/s in training, median")
    print(f"{'peak memory':>16}  {peak:.1f} GB")
