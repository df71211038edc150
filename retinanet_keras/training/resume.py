"""Checkpoints of a run: weights, optimizer state and step, the newest few kept."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf

from retinanet_keras.config import Config
from retinanet_keras.errors import RunError, first_line
from retinanet_keras.model import RetinaNet
from retinanet_keras.serving.detector import UNREADABLE
from retinanet_keras.storage import disk
from retinanet_keras.training import best
from retinanet_keras.training.build import build_model
from retinanet_keras.training.run_folder import RunFolder, load_config_of

logger = logging.getLogger("retinanet_keras")


class Checkpoints:
    """Save and restore the weights, the optimizer's state and the step of a compiled model.

    Args:
        model: RetinaNet, compiled.
        folder: RunFolder. Where the checkpoints are.
        keep: int. Number of newest checkpoints kept.
        writes: bool. False for a worker that only restores the checkpoints of another one.
        optimizer: bool. Whether the optimizer's state is restored, too.

    Attributes:
        step: int. Steps trained; incremented by the trainer. Steps that the optimizer skips with float16 are included.
        newest: str or None. Path of the last checkpoint that was restored or saved.
    """

    def __init__(self, model: RetinaNet, folder: RunFolder, keep: int, writes: bool = True, optimizer: bool = True):
        if optimizer and not model.optimizer.built:  # its state would be skipped in restoring
            with model.distribute_strategy.scope():
                model.optimizer.build(model.trainable_variables)
        self.model, self.writes = model, writes
        self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
        # No metrics: saving those of several workers takes all of them, and one may be gone.
        weights = [variable.value for variable in model.weights]
        slots = {"optimizer": model.optimizer} if optimizer else {}
        self.checkpoint = tf.train.Checkpoint(weights=weights, step=self._step, **slots)
        self._with_optimizer = optimizer
        self.folder, self._keep = folder, keep
        self._manager: tf.train.CheckpointManager | None = None
        self.newest: str | None = None

    @property
    def step(self) -> int:
        return int(self._step.numpy())

    @step.setter
    def step(self, value: int) -> None:
        self._step.assign(value)

    def clear_remains(self) -> None:
        """Remove the temporary files of checkpoints whose writing was killed."""
        for path in self.folder.checkpoints.glob("step-*_temp*"):
            shutil.rmtree(path, ignore_errors=True)

    def restore(self) -> int:
        """Load the newest checkpoint that can be read, if there is any, and return the step.

        Raises:
            RunError: where there are checkpoints, but none can be read.
        """
        problems = []
        # Not TensorFlow's list: it lacks a checkpoint killed at the very end of its writing, or is missing or damaged.
        for step in reversed(self.folder.indexed_steps()):  # a checkpoint whose data is missing is reported, too
            path = self._path(step)
            try:
                status = self.checkpoint.restore(path)
                if self._with_optimizer:
                    status.assert_consumed()
                else:
                    status.assert_existing_objects_matched().expect_partial()
            except UNREADABLE as error:
                problems.append(f"{path} cannot be read ({first_line(error)})")
                continue
            for problem in problems:
                logger.warning("%s; resuming from the checkpoint before it", problem)
            self.newest = path
            return self.step
        if problems:
            raise RunError(
                f"{'; '.join(problems)}: they are damaged, or belong to another model. Train into another folder with "
                "--workdir"
            )
        return self.step

    def saved(self) -> str:
        """Return, as a sentence, what is saved if the process ends now, and what to do."""
        return f"the last checkpoint is {self.newest or 'none'}. Run the same command again to resume from there"

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one already.

        Raises:
            RunError: where a weight is not finite, or writing fails; checkpoints already written are untouched.
        """
        newest = self.newest
        if not self.writes or (newest and newest.endswith(f"-{self.step}")):
            return
        for variable in self.model.trainable_variables:
            if not np.isfinite(variable.numpy()).all():
                raise RunError(
                    f"At step {self.step} the weights {variable.path} are not finite. Nothing was saved; the last "
                    f"checkpoint is {newest or 'none'}. Lower train.learning_rate or set train.clip_norm"
                )
        try:
            self._manager = self._manager or self._new_manager()
            self.newest = self._manager.save(self.step, check_interval=False)
        except (tf.errors.OpError, OSError) as error:
            raise RunError(
                f"The checkpoint of step {self.step} could not be written ({first_line(error)}). The last one is "
                f"{newest or 'none'}. Free some space and run the same command again to resume from there"
            ) from None

    def _new_manager(self) -> tf.train.CheckpointManager:
        """Make TensorFlow's rotation of checkpoints, its list rewritten with those up to the one restored."""
        known = [step for step in self.folder.steps() if self.newest and step <= self.step]
        lines = [f'model_checkpoint_path: "step-{known[-1]}"'] if known else []
        lines += [f'all_model_checkpoint_paths: "step-{step}"' for step in known]
        # Checkpoints are ordered by timestamp; those later than the last preserved one may be deleted.
        lines += ["all_model_checkpoint_timestamps: 1.0" for _ in known] + ["last_preserved_timestamp: 0.0"]
        state = self.folder.checkpoints / "checkpoint"
        disk.write(state, "\n".join(lines) + "\n") if known else state.unlink(missing_ok=True)
        return tf.train.CheckpointManager(self.checkpoint, self.folder.checkpoints, self._keep, checkpoint_name="step")

    def _path(self, step: int) -> str:
        return str(self.folder.checkpoints / f"step-{step}")


def load_run(workdir: str | Path, config: Config | None = None) -> tuple[Config, RetinaNet]:
    """Load the trained model of a run.

    Args:
        workdir: str or Path. Folder of the run.
        config: Config or None. Replaces the run's own; must not change the model.

    Returns:
        (config, model): the model has the weights selected by `eval.keep`.

    Raises:
        RunError: as `load_trained`.
    """
    return load_trained(workdir, config)[:2]


def load_trained(workdir: str | Path, config: Config | None = None) -> tuple[Config, RetinaNet, int]:
    """Load the trained model of a run, and the step that its weights are from. Arguments as for `load_run`.

    Returns:
        (config, model, step).

    Raises:
        RunError: where there is no run, or none with a checkpoint.
    """
    folder = RunFolder(workdir)
    config = config or load_config_of(folder)
    if not folder.categories_file.exists():
        raise RunError(f"{folder.path} has no categories.json: its training did not start. Run train.py again")
    model = build_model(config, folder.categories())
    if config.eval.keep == "best" and (record := best.load(folder, model)):
        return config, model, record["step"]
    step = Checkpoints(model, folder, config.train.keep_checkpoints, optimizer=False).restore()
    if not step:
        raise RunError(f"The run in {folder.path} has no checkpoint yet. Run train.py for it first")
    return config, model, step
