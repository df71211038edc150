"""Checkpoints of a run: weights, optimizer state and step, the newest few kept."""

import logging
import shutil

import numpy as np
import tensorflow as tf

from retinanet_keras.errors import RunError, first_line
from retinanet_keras.serving.detector import UNREADABLE
from retinanet_keras.storage import disk
from retinanet_keras.training import best
from retinanet_keras.training.build import build_model
from retinanet_keras.training.run_folder import RunFolder, load_config_of

logger = logging.getLogger("retinanet_keras")


class Checkpoints:
    """Saves and restores the weights, the optimizer's state and the step of a compiled model.

    `step`: steps trained for; the trainer counts it up. With float16 the optimizer leaves steps out that count here.
    """

    def __init__(self, model, folder, keep, writes=True, optimizer=True):
        """writes: False for a worker that restores what another one saves; optimizer: False to restore the weights."""
        if optimizer and not model.optimizer.built:  # its state would be skipped in restoring
            with model.distribute_strategy.scope():
                model.optimizer.build(model.trainable_variables)
        self.model, self.writes = model, writes
        self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
        # No metrics: saving those of several workers takes all of them, and one may be gone.
        weights = [variable.value for variable in model.weights]
        own = {"optimizer": model.optimizer} if optimizer else {}
        self.checkpoint = tf.train.Checkpoint(weights=weights, step=self._step, **own)
        self._whole = optimizer
        self._folder, self._keep, self._manager = folder, keep, None
        self.newest = None  # the path of the last checkpoint that was restored or saved

    @property
    def step(self):
        return int(self._step.numpy())

    @step.setter
    def step(self, value):
        self._step.assign(value)

    def clear_remains(self):
        """Remove what a kill in the middle of a checkpoint has left."""
        for path in self._folder.checkpoints.glob("step-*_temp*"):
            shutil.rmtree(path, ignore_errors=True)

    def restore(self):
        """Load the newest checkpoint that can be read, if there is any, and return the step.

        Raises:
            RunError: where there are checkpoints, but none can be read.
        """
        problems = []
        # Not TensorFlow's own list: it lacks one whose writing was killed at the very end, may be gone, or damaged.
        for step in reversed(self._folder.indexed_steps()):  # one whose data is missing is told, too
            path = self._path(step)
            try:
                status = self.checkpoint.restore(path)
                status.assert_consumed() if self._whole else status.assert_existing_objects_matched().expect_partial()
            except UNREADABLE as error:
                problems.append(f"{path} cannot be read ({first_line(error)})")
                continue
            for problem in problems:
                logger.warning("%s; going on from the checkpoint before it", problem)
            self.newest = path
            return self.step
        if problems:
            raise RunError(
                f"{'; '.join(problems)}: damaged, or of another model. Train into another folder with --workdir"
            )
        return self.step

    def saved(self):
        """What a process that ends now leaves, and what to do, as a sentence."""
        return (
            f"the last checkpoint is {self.newest or 'none'}. Run the same command again: training goes on from there"
        )

    def save(self):
        """Write a checkpoint of this step, unless it was restored from one or has been saved.

        Raises:
            RunError: where a weight is not finite, or the disk refuses; checkpoints already written are untouched.
        """
        newest = self.newest
        if not self.writes or (newest and newest.endswith(f"-{self.step}")):
            return
        for variable in self.model.trainable_variables:
            if not np.isfinite(variable.numpy()).all():
                raise RunError(
                    f"At step {self.step} the weights {variable.path} are not finite. Nothing was saved; the last good "
                    f"checkpoint is {newest or 'none'}. Lower train.learning_rate or set train.clip_norm"
                )
        try:
            self._manager = self._manager or self._new_manager()
            self.newest = self._manager.save(self.step, check_interval=False)
        except (tf.errors.OpError, OSError) as error:
            raise RunError(
                f"The checkpoint of step {self.step} could not be written ({first_line(error)}). The last good one is "
                f"{newest or 'none'}. Free some space and run the same command again: training goes on from there"
            ) from None

    def _new_manager(self):
        """TensorFlow's rotation of checkpoints; its list of them is written anew from those up to the one restored."""
        known = [step for step in self._folder.steps() if self.newest and step <= self.step]
        lines = [f'model_checkpoint_path: "step-{known[-1]}"'] if known else []
        lines += [f'all_model_checkpoint_paths: "step-{step}"' for step in known]
        # Times order them; one later than the last preserved makes a checkpoint one that may be deleted.
        lines += ["all_model_checkpoint_timestamps: 1.0" for _ in known] + ["last_preserved_timestamp: 0.0"]
        state = self._folder.checkpoints / "checkpoint"
        disk.write(state, "\n".join(lines) + "\n") if known else state.unlink(missing_ok=True)
        return tf.train.CheckpointManager(self.checkpoint, self._folder.checkpoints, self._keep, checkpoint_name="step")

    def _path(self, step):
        return str(self._folder.checkpoints / f"step-{step}")


def load_run(workdir, config=None):
    """The trained model of a run.

    Args:
        workdir: the run's folder.
        config: a Config in place of the run's own, differing in what does not change the model.

    Returns:
        (config, model): the model has the weights `eval.keep` asks for.

    Raises:
        RunError: as `load_trained`.
    """
    return load_trained(workdir, config)[:2]


def load_trained(workdir, config=None):
    """The trained model of a run, and the step that its weights are of. Arguments as for `load_run`.

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
    if config.eval.keep == "best" and (kept := best.load(folder, model)):
        return config, model, kept["step"]
    step = Checkpoints(model, folder, config.train.keep_checkpoints, optimizer=False).restore()
    if not step:
        raise RunError(f"The run in {folder.path} has no checkpoint yet. Run train.py for it first")
    return config, model, step
