"""What happens between steps: the guard against non-finite losses, logs, checkpoints."""

import math
import sys
import time

import keras
import tensorflow as tf
from tqdm import tqdm

from retinanet_keras.training.folder import RunError


class Guard(keras.callbacks.Callback):
    """Stops at the first non-finite loss, before anything of it is saved.

    Args:
        ids_of_step: a function from a step, counted from 0, to its image ids.
        newest: a function giving the path of the last good checkpoint, or None.
    """

    def __init__(self, ids_of_step, newest):
        super().__init__()
        self.ids_of_step, self.newest = ids_of_step, newest

    def on_train_batch_end(self, batch, logs=None):
        if all(math.isfinite(logs[name]) for name in ("classification_loss", "box_loss")):
            return
        step = int(self.model.optimizer.iterations.numpy())
        ids = ", ".join(str(i) for i in self.ids_of_step(step - 1))
        raise RunError(
            f"The loss is not finite at step {step} (classification {logs['classification_loss']}, box "
            f"{logs['box_loss']}); its images have the ids {ids}. Nothing of this step was saved; the last good "
            f"checkpoint is {self.newest() or 'none'}. Look at these images with `python -m retinanet_keras inspect`, "
            "or lower train.learning_rate or set train.clip_norm"
        )


class Log(keras.callbacks.Callback):
    """The progress bar, log.csv and TensorBoard; each row averages the steps since the one before."""

    def __init__(self, folder, config, step):
        super().__init__()
        self.folder, self.every, self.batch_size = folder, config.train.log_every, config.train.batch_size
        self.total = config.train.iterations
        self.bar = tqdm(
            total=self.total, initial=step, desc="Training", unit="step", dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
        )  # fmt: skip
        self.writer = tf.summary.create_file_writer(str(folder.tensorboard))
        self._restart(step)

    def on_train_begin(self, logs=None):
        self._restart(self._step())  # an evaluation came in between

    def on_train_batch_end(self, batch, logs=None):
        step = self._step()
        seconds = time.perf_counter() - self.since
        row = {name: logs[name] for name in ("loss", "classification_loss", "box_loss", "positives")}
        row["learning_rate"] = float(self.model.optimizer.learning_rate)
        row["images_per_second"] = (step - self.start) * self.batch_size / seconds
        self.bar.set_postfix_str(
            f"class {row['classification_loss']:.3f}, box {row['box_loss']:.3f}, rate {row['learning_rate']:.2g}, "
            f"{row['images_per_second']:.1f} images/s",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)
        if step % self.every == 0 or step == self.total:
            self.write({"step": step, **row})
            self.model.reset_metrics()
            self._restart(step)

    def write(self, row):
        """One row to log.csv and TensorBoard."""
        self.folder.log(row)
        with self.writer.as_default(step=row["step"]):
            for name, value in row.items():
                if name != "step" and value is not None:
                    tf.summary.scalar(name, value)
        self.writer.flush()

    def picture(self, name, image, step):
        """An image, uint8 [H, W, 3], to TensorBoard."""
        with self.writer.as_default(step=step):
            tf.summary.image(name, image[None])
        self.writer.flush()

    def close(self):
        self.bar.close()
        self.writer.close()

    def _restart(self, step):
        self.start, self.since = step, time.perf_counter()

    def _step(self):
        return int(self.model.optimizer.iterations.numpy())


class Save(keras.callbacks.Callback):
    """A checkpoint every so many steps; listed after the Guard, which must see a step first."""

    def __init__(self, checkpoints, every):
        super().__init__()
        self.checkpoints, self.every = checkpoints, every

    def on_train_batch_end(self, batch, logs=None):
        if self.checkpoints.step % self.every == 0:
            self.checkpoints.save()
