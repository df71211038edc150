"""The images of a run, step by step, and what goes wrong with them."""

import contextlib
import logging

import numpy as np
import tensorflow as tf

from retinanet_keras.data import image_decoding, training_batches
from retinanet_keras.data.buckets import TrainingOrder
from retinanet_keras.errors import Interrupted, RunError
from retinanet_keras.train_step import NOT_FINITE
from retinanet_keras.training import data_record, failures, strategies

logger = logging.getLogger("retinanet_keras")
AHEAD = 8  # steps whose images may be in preparation while one runs


class Stream:
    """The training images of a run, a pure function of the step; and the files that were skipped."""

    def __init__(self, dataset, config):
        self.dataset, self.config = dataset, config
        _, bucket = training_batches.training_canvases(dataset.sizes, config.data)
        self.order = TrainingOrder(bucket, config.train.batch_size, config.train.seed)
        self.skipped = {}  # file -> why

    def batches(self, start, produced, share, parts):
        """`training_batches.training_batches` from a step on."""
        train = self.config.train
        return training_batches.training_batches(
            self.dataset, self.config.data, batch_size=train.batch_size, seed=train.seed, start=start, share=share,
            parts=parts, produced=produced, skipped=self._skip,
        )  # fmt: skip

    def batch(self, step):
        """(images, truth) of the whole of a step, counted from 0."""
        return next(iter(self.batches(step, None, (0, 1), 1)))

    def report(self):
        """Log how many files were skipped."""
        if self.skipped:
            logger.warning(
                "%d unreadable images were skipped in training (data.bad_images): %s%s",
                len(self.skipped), ", ".join(list(self.skipped)[:5]), ", ..." if len(self.skipped) > 5 else "",
            )  # fmt: skip

    def _skip(self, index, message):
        file = self.dataset.name_of(index)
        if file not in self.skipped:
            logger.warning("skipped in training: %s: %s", file, message)
        self.skipped[file] = message


@contextlib.contextmanager
def explained(stream, model, config, folder, checkpoints, signals):
    """TensorFlow's errors in a step as a RunError that names step, images and what is saved."""
    try:
        yield
    except tf.errors.OpError as error:
        step, newest = checkpoints.step, checkpoints.newest or "none"
        if NOT_FINITE in str(error):
            raise _not_finite(stream, model, config, folder, step, newest) from None
        if model.distribute_strategy.cluster_resolver and _is_loss_of_a_worker(error):
            if signals.received:  # the others have had it, too
                raise Interrupted(signals.received, "the other workers ended first. Start all of them again") from None
            raise RunError(
                f"Another worker was lost at step {step} ({_cause(error)}). The last checkpoint is {newest}. Start all "
                "workers again with the same command: training goes on from there"
            ) from None
        upcoming = np.concatenate([stream.order.batch(s) for s in range(step, step + AHEAD)])
        problems = image_decoding.unusable_images(stream.dataset, upcoming)
        if not problems:
            raise
        if strategies.is_chief(model.distribute_strategy):
            with contextlib.suppress(OSError):  # a full disk is not what this is about
                data_record.allow_other_files(folder)
        or_skip = ", or skip such files with data.bad_images=skip" if config.data.bad_images == "stop" else ""
        raise RunError(
            f"At step {step}: {'; '.join(problems[:5])}. The last checkpoint is {newest}. Replace the file by a "
            f"whole one (`python -m retinanet_keras inspect` lists all such files){or_skip}; then run "
            "the same command again: training goes on from there"
        ) from None


def _not_finite(stream, model, config, folder, step, newest):
    """The error of a step that did not take place, with its file written."""
    batch = stream.batch(step)
    ids = ", ".join(str(i) for i in batch[1]["image_id"].numpy())
    path = folder.failed / f"step-{step + 1}.npz"
    try:
        if strategies.is_chief(model.distribute_strategy):
            failures.save(path, model, config, stream.dataset.categories, step + 1, batch)
        written = f"`python -m retinanet_keras replay {path}` computes it again, image by image"
    except OSError as error:
        written = f"{path}, to compute it again, could not be written ({error.strerror or error})"
    return RunError(
        f"The loss or its gradient is not finite in step {step + 1}, whose images have the ids {ids}; {written}. The "
        f"step has changed nothing; the last checkpoint is {newest}. Look at these images with `python -m "
        "retinanet_keras inspect`, or lower train.learning_rate or set train.clip_norm and run the command again"
    )


def _cause(error):
    """Keras puts the place before the cause."""
    places = ("Graph exec", "Detected", "File ")
    lines = [line.strip() for line in error.message.split("\n")]
    lines = [line for line in lines if line and not line.startswith(places)]
    return lines[0].split("}} ")[-1].split(" [[")[0].strip() if lines else type(error).__name__


def _is_loss_of_a_worker(error):
    return isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)) or (
        "ollective" in str(error)
    )
