"""Checkpoints of a run: weights, optimizer state and step, the newest few kept."""

import numpy as np
import tensorflow as tf

from retinanet_keras.training.folder import RunError, RunFolder, build_model, load_config_of, load_weights


class Checkpoints:
    """Saves and restores a compiled model whose optimizer counts the steps."""

    def __init__(self, model, folder, keep):
        model.optimizer.build(model.trainable_variables)  # else its state would be skipped in restoring
        self.model = model
        self.checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        self.manager = tf.train.CheckpointManager(self.checkpoint, folder.checkpoints, keep, checkpoint_name="step")

    @property
    def step(self):
        """Steps the model has been trained for."""
        return int(self.model.optimizer.iterations.numpy())

    def restore(self):
        """Load the newest checkpoint, if there is one, and return the step."""
        newest = self.manager.latest_checkpoint
        if newest:
            try:
                self.checkpoint.restore(newest).assert_consumed()
            except (tf.errors.OpError, AssertionError, ValueError) as error:
                first = str(error).split("\n")[0]
                raise RunError(
                    f"The checkpoint {newest} cannot be read ({first}). It is damaged or of another model; remove it "
                    "to go on from an older one, or train into another folder with --workdir"
                ) from None
        return self.step

    def save(self):
        """Write a checkpoint of this step, unless it exists.

        Raises:
            RunError: where a weight is not finite, or the disk refuses; checkpoints already written are untouched.
        """
        newest = self.manager.latest_checkpoint
        if newest and newest.endswith(f"-{self.step}"):
            return
        for variable in self.model.trainable_variables:
            if not np.isfinite(variable.numpy()).all():
                raise RunError(
                    f"At step {self.step} the weights {variable.path} are not finite. Nothing was saved; the last good "
                    f"checkpoint is {newest or 'none'}. Lower train.learning_rate or set train.clip_norm"
                )
        try:
            self.manager.save(self.step, check_interval=False)
        except (tf.errors.OpError, OSError) as error:
            first = str(error).split("\n")[0]
            raise RunError(
                f"The checkpoint of step {self.step} could not be written ({first}). The last good one is "
                f"{newest or 'none'}. Free some space and run the same command again: training goes on from there"
            ) from None


def load_run(workdir, config=None):
    """The trained model of a run.

    Args:
        workdir: the run's folder.
        config: a Config in place of the run's own, differing in what does not change the model.

    Returns:
        (config, model): the model has the weights `eval.keep` asks for.

    Raises:
        RunError: where there is no run, or none with a checkpoint.
    """
    folder = RunFolder(workdir)
    config = config or load_config_of(folder)
    if not folder.categories_file.exists():
        raise RunError(f"{folder.path} has no categories.json: its training did not start. Run train.py again")
    model = build_model(config, folder.categories())
    if config.eval.keep == "best" and folder.best():
        load_weights(model, folder.best_weights)
        return config, model
    if not Checkpoints(model, folder, config.train.keep_checkpoints).restore():
        raise RunError(f"The run in {folder.path} has no checkpoint yet. Run train.py for it first")
    return config, model
