"""The run: data, model, training with checkpoints and evaluations, and at the end results, export and a summary."""

import logging
import resource
import sys
import time

import keras
import numpy as np
import tensorflow as tf

from retinanet_keras.data import inspection, pipeline, sources
from retinanet_keras.results import curves, draw, evaluation
from retinanet_keras.serving.export import export_model
from retinanet_keras.training import callbacks, evaluator
from retinanet_keras.training.checkpoints import Checkpoints
from retinanet_keras.training.folder import RunError, RunFolder, build_model, load_weights, settle

logger = logging.getLogger("retinanet_keras")


def train(config, workdir):
    """Train, or go on training, the run in a folder; then evaluate, export, and say what lies where.

    Args:
        config: a Config.
        workdir: the run's folder; made where it does not exist.

    Returns:
        the metrics on the last split evaluated.
    """
    began = time.perf_counter()
    config = settle(config)
    folder = RunFolder(workdir)
    train_set = sources.open_split(config.data, config.data.train_split, keep_empty=config.data.keep_empty)
    val_set = sources.open_split(config.data, config.data.val_split)
    test_split = config.data.test_split or config.data.val_split
    test_set = val_set if test_split == config.data.val_split else sources.open_split(config.data, test_split)
    for other in (val_set, test_set):
        evaluator.check_categories(other, train_set.categories)
        inspection.check_files(other)
    inspection.check_before_training(train_set, config)
    folder.start(config, train_set.categories)
    classes = len(train_set.categories)
    print(f"Training {config.model.backbone} on {len(train_set)} images of {classes} classes in {workdir}")

    keras.utils.set_random_seed(config.train.seed)
    with _strategy().scope():
        model = build_model(config, train_set.categories, config.model.weights)
    if config.model.weights is None and config.model.norm == "frozen":
        logger.warning('model.norm is "frozen" but the weights are random: the backbone will hardly learn')
    checkpoints = Checkpoints(model, folder, config.train.keep_checkpoints)
    step = checkpoints.restore()
    if step:
        print(f"Going on from step {step} of {config.train.iterations}")
    folder.cut_log(step)
    _fit(model, config, folder, checkpoints, train_set, val_set)

    if config.eval.keep == "best" and folder.best():
        load_weights(model, folder.best_weights)
        print("The best weights were those of step {step}, AP {AP:.3f}".format(**folder.best()))
    out = folder.evaluation(test_split)
    found = evaluator.detect_split(model.detect, test_set, config)
    metrics = evaluator.evaluate_to(out, found, test_set, config.eval.pictures)
    curves.training_curves(folder.log_rows(), folder.curves_file)
    export_dir = export_model(model, config, folder.export, version=1)
    print(f"\n{evaluation.format_metrics(metrics)}\n")
    _summarise(folder, out, export_dir, began)
    return metrics


def _fit(model, config, folder, checkpoints, train_set, val_set):
    """Train from the model's step to the last, evaluating in between. Each stretch is one `model.fit`."""
    batch_size, every = config.train.batch_size, config.eval.every
    order = pipeline.TrainingOrder(train_set.sizes, batch_size, config.train.seed)
    ids_of_step = lambda step: train_set.image_ids[order.batch(step)]  # noqa: E731
    log = callbacks.Log(folder, config, checkpoints.step)
    guard = callbacks.Guard(ids_of_step, lambda: checkpoints.newest)
    save = callbacks.Save(checkpoints, config.train.checkpoint_every)
    try:
        step = checkpoints.step
        due = every and step and (step % every == 0 or step == config.train.iterations)
        if due and not any(row["step"] == step and "AP" in row for row in folder.log_rows()):
            _validate(model, config, folder, log, val_set, step)  # the run was stopped before or in it
        while (step := checkpoints.step) < config.train.iterations:
            stop = min(config.train.iterations, (step // every + 1) * every if every else config.train.iterations)
            batches = pipeline.training_batches(
                train_set, config.data, batch_size=batch_size, seed=config.train.seed, start=step
            )
            try:
                model.fit(batches, steps_per_epoch=stop - step, callbacks=[guard, log, save], verbose=0, shuffle=False)
            except tf.errors.OpError as error:
                raise _explain(error, train_set, order, checkpoints) from None
            checkpoints.save()
            if every:
                _validate(model, config, folder, log, val_set, stop)
    finally:
        log.close()


def _validate(model, config, folder, log, val_set, step):
    """AP on the validation split, logged; the best weights kept."""
    metrics, results = evaluator.evaluate(evaluator.detect_split(model.detect, val_set, config, "Validating"), val_set)
    log.write({"step": step, "AP": metrics["AP"], "AP50": metrics["AP50"]})
    if metrics["AP"] is not None:
        log.bar.write(f"step {step}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f} on {config.data.val_split}")
        if config.eval.keep == "best":
            folder.keep_best(model, step, metrics["AP"])
    pictures = [picture for _, picture in evaluator.comparisons(val_set, results, min(4, config.eval.pictures))]
    if pictures:
        log.picture("detections", draw.grid(pictures, columns=2), step)


def _explain(error, dataset, order, checkpoints):
    """The input error of a step as one that names the files: those of the steps that were being prepared."""
    step = checkpoints.step
    upcoming = np.concatenate([order.batch(s) for s in range(step, step + 8)])
    problems = sources.unusable_images(dataset, upcoming)
    if not problems:
        return error
    return RunError(
        f"At step {step}: {'; '.join(problems[:5])}. The last checkpoint is "
        f"{checkpoints.newest or 'none'}. Mend or remove the file (`python -m retinanet_keras "
        "inspect` lists all such files), then run the same command again: training goes on from there"
    )


def _strategy():
    """All GPUs where there are several, else the default device."""
    several = len(tf.config.list_physical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


def _summarise(folder, out, export_dir, began):
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024) / 1024
    rows = {
        "metrics": out / "metrics.json", "results": out / "results.json", "pictures": out / "pictures" / "grid.png",
        "training curves": folder.curves_file, "log": folder.log_file, "TensorBoard": folder.tensorboard,
        "checkpoints": folder.checkpoints, "SavedModel": export_dir,
    }  # fmt: skip
    for name, path in rows.items():
        print(f"{name:>16}  {path}")
    speeds = [row["images_per_second"] for row in folder.log_rows() if "images_per_second" in row]
    print(f"{'time':>16}  {seconds // 60:.0f} min {seconds % 60:.0f} s, this start")
    print(f"{'speed':>16}  {np.median(speeds):.1f} images/s in training, median")
    print(f"{'peak memory':>16}  {peak:.1f} GB")
