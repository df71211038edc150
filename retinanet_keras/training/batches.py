"""Training batches of a run, and what goes wrong with them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from retinanet_keras.config import Config
from retinanet_keras.data import image_decoding, training_batches
from retinanet_keras.data.buckets import TrainingOrder
from retinanet_keras.data.coco import CocoDataset
from retinanet_keras.errors import Interrupted, RunError
from retinanet_keras.train_step import NOT_FINITE
from retinanet_keras.training import data_record, failures, strategies
from retinanet_keras.training.callbacks import Signals
from retinanet_keras.training.resume import Checkpoints

logger = logging.getLogger("retinanet_keras")
AHEAD = 8  # steps whose images may be in preparation while one runs


class Stream:
    """The training images of a run, a pure function of the step; and the files that were skipped.

    Args:
        dataset: CocoDataset. The training split.
        config: Config. Settings of the run.
    """

    def __init__(self, dataset: CocoDataset, config: Config):
        self.dataset, self.config = dataset, config
        _, bucket = training_batches.training_canvases(dataset.sizes, config.data)
        self.order = TrainingOrder(bucket, config.train.batch_size, config.train.seed)
        self.skipped: dict[str, str] = {}  # file -> reason

    def batches(
        self, start: int, produced: Callable[[], None] | None, share: tuple[int, int], parts: int
    ) -> tf.data.Dataset:
        """Return the batches from a step on; arguments as for `training_batches.training_batches`."""
        train = self.config.train
        return training_batches.training_batches(
            self.dataset,
            self.config.data,
            batch_size=train.batch_size,
            seed=train.seed,
            start=start,
            share=share,
            parts=parts,
            produced=produced,
            skipped=self._skip,
        )

    def batch(self, step: int) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """Return (images, truth) of a whole step, counted from 0."""
        return next(iter(self.batches(step, None, (0, 1), 1)))

    def report(self) -> None:
        """Log how many files were skipped."""
        if self.skipped:
            logger.warning(
                "%d unreadable images were skipped in training (data.bad_images): %s%s",
                len(self.skipped),
                ", ".join(list(self.skipped)[:5]),
                ", ..." if len(self.skipped) > 5 else "",
            )

    def _skip(self, index: int, message: str) -> None:
        file = self.dataset.name_of(index)
        if file not in self.skipped:
            logger.warning("skipped in training: %s: %s", file, message)
        self.skipped[file] = message


@contextlib.contextmanager
def explain_errors(stream: Stream, checkpoints: Checkpoints, signals: Signals) -> Iterator[None]:
    """Turn TensorFlow's errors in a step into a RunError that names the step, the images and the last checkpoint.

    Args:
        stream: Stream. The images of the steps.
        checkpoints: Checkpoints. Those of the model that is trained, at the step that it is at.
        signals: Signals. Those of this process.

    Raises:
        RunError: where a value is not finite, an image cannot be read, or another worker was lost.
        Interrupted: where another worker was lost after this one had received a signal.
    """
    try:
        yield
    except tf.errors.OpError as error:
        step, newest = checkpoints.step, checkpoints.newest or "none"
        strategy = checkpoints.model.distribute_strategy
        if NOT_FINITE in str(error):
            raise _not_finite(stream, checkpoints) from None
        if strategy.cluster_resolver and _is_loss_of_a_worker(error):
            if signals.received:  # the other workers have received it, too
                raise Interrupted(signals.received, "the other workers ended first. Start all of them again") from None
            raise RunError(
                f"Another worker was lost at step {step} ({_cause(error)}). The last checkpoint is {newest}. Start all "
                "workers again with the same command to resume from there"
            ) from None
        upcoming = np.concatenate([stream.order.batch(s) for s in range(step, step + AHEAD)])
        problems = image_decoding.unusable_images(stream.dataset, upcoming)
        if not problems:
            raise
        if strategies.is_chief(strategy):
            with contextlib.suppress(OSError):  # a full disk must not hide the error reported below
                data_record.allow_other_files(checkpoints.folder)
        or_skip = ", or skip such files with data.bad_images=skip" if stream.config.data.bad_images == "stop" else ""
        raise RunError(
            f"At step {step}: {'; '.join(problems[:5])}. The last checkpoint is {newest}. Replace the file with an "
            f"intact one (`python -m retinanet_keras inspect` lists all such files){or_skip}; then run the same "
            "command again to resume from there"
        ) from None


def _not_finite(stream: Stream, checkpoints: Checkpoints) -> RunError:
    """The error of a step whose update was not applied, with the file for `replay` written."""
    step, folder, model = checkpoints.step + 1, checkpoints.folder, checkpoints.model
    batch = stream.batch(step - 1)
    ids = ", ".join(str(i) for i in batch[1]["image_id"].numpy())
    path = folder.failed / f"step-{step}.npz"
    try:
        if strategies.is_chief(model.distribute_strategy):
            failures.save(path, model, stream.config, stream.dataset.categories, step, batch)
        replay = f"`python -m retinanet_keras replay {path}` computes it again, image by image"
    except OSError as error:
        replay = f"{path}, to compute it again, could not be written ({error.strerror or error})"
    return RunError(
        f"The loss or its gradient is not finite in step {step}, on the images with the ids {ids}; {replay}. The "
        f"step did not change the weights; the last checkpoint is {checkpoints.newest or 'none'}. Look at these images "
        "with `python -m retinanet_keras inspect`, or lower train.learning_rate or set train.clip_norm and run the "
        "command again"
    )


def _cause(error: Any) -> str:
    """The cause of an error of TensorFlow, without the place that Keras puts before it."""
    places = ("Graph exec", "Detected", "File ")
    lines = [line.strip() for line in error.message.split("\n")]
    lines = [line for line in lines if line and not line.startswith(places)]
    return lines[0].split("}} ")[-1].split(" [[")[0].strip() if lines else type(error).__name__


def _is_loss_of_a_worker(error: Exception) -> bool:
    return isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)) or (
        "ollective" in str(error)
    )
