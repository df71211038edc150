"""What happens between steps: counting, logs, checkpoints, and stopping where asked."""

import collections
import contextlib
import math
import os
import signal
import sys
import threading
import time

import keras
import tensorflow as tf
from tqdm import tqdm

from retinanet_keras.errors import Interrupted, RunError

LEAST_SCALE = 2.0**-10  # of a float16 loss; one that fell so far belongs to gradients that are not finite at any scale


class Count(keras.callbacks.Callback):
    """Tells the checkpoints of each step, and starts the metrics anew after each row of the log; listed first.

    All workers do, as resetting metrics takes all of them. A float16 step that the optimizer skips counts, too.
    """

    def __init__(self, checkpoints, every):
        super().__init__()
        self.checkpoints, self.every = checkpoints, every

    def on_train_batch_end(self, batch, logs=None):
        self.checkpoints.step += 1
        if self.checkpoints.step % self.every == 0:
            self.model.reset_metrics()
        optimizer = self.model.optimizer
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return
        if optimizer.dynamic_scale.numpy() < LEAST_SCALE:
            raise RunError(
                f"At step {self.checkpoints.step} gradients overflow float16 whatever the scale of the loss. The last "
                f'checkpoint is {self.checkpoints.newest or "none"}. Use train.precision "mixed_bfloat16", or lower '
                "train.learning_rate"
            )


class Log(keras.callbacks.Callback):
    """The progress bar, log.csv and TensorBoard; each row averages the steps since the one before, or since an
    evaluation or a start in between.

    The share of time in which a step waited for its images is that from asking for them to the moment the input
    pipeline had them ready, if that came later. The time left that the bar shows is estimated from steps alone: what
    comes before the first step is over, tracing included, does not count, nor does an evaluation.
    """

    def __init__(self, folder, config, checkpoints, replicas=1):
        super().__init__()
        self.folder, self.every, self.batch_size = folder, config.train.log_every, config.train.batch_size
        self.checkpoints, self.replicas, self.total = checkpoints, replicas, config.train.iterations
        self.bar = tqdm(
            total=self.total, initial=checkpoints.step, desc="Training", unit="step", dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]",
        )  # fmt: skip
        self.writer = tf.summary.create_file_writer(str(folder.tensorboard))
        self.produced = collections.deque()  # when each element of the input pipeline was ready; one a replica and step
        self.stopped = time.perf_counter()
        self._restart()

    def new_pipeline(self):
        """A function that the input pipeline of the next steps calls whenever an element is ready."""
        produced = self.produced = collections.deque()
        return lambda: produced.append(time.perf_counter())

    def on_train_begin(self, logs=None):
        self.tracing = True  # the first step has other reasons to take long
        self._restart()  # an evaluation came in between

    def on_train_batch_begin(self, batch, logs=None):
        self.asked = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        step = self.checkpoints.step
        now = time.perf_counter()
        ready = [self.produced.popleft() for _ in range(min(self.replicas, len(self.produced)))]
        if self.tracing:
            self.bar.start_t += now - self.stopped
            self.bar.last_print_t += now - self.stopped
            self.tracing = False
        else:
            self.waited += max(0.0, max(ready, default=0.0) - self.asked)
        norm = float(logs["gradient_norm"])
        self.norms += norm if math.isfinite(norm) else 0.0  # of a skipped float16 step it is not
        row = {name: float(logs[name]) for name in ("loss", "classification_loss", "box_loss", "positives")}
        row["learning_rate"] = float(self.model.optimizer.learning_rate)
        row["gradient_norm"] = self.norms / (step - self.start)
        row["images_per_second"] = (step - self.start) * self.batch_size / (now - self.since)
        row["data_wait"] = self.waited / (now - self.since)
        self.bar.set_postfix_str(
            f"class {row['classification_loss']:.3f}, box {row['box_loss']:.3f}, rate {row['learning_rate']:.2g}, "
            f"positives {row['positives']:.0f}, gradient {row['gradient_norm']:.2g}, "
            f"{row['images_per_second']:.1f} images/s, waiting {row['data_wait']:.0%}",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)
        if step % self.every == 0 or step == self.total:
            self.write({"step": step, **row})
            self._restart()

    def on_train_end(self, logs=None):
        self.stopped = time.perf_counter()

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

    def _restart(self):
        self.start, self.since, self.norms, self.waited = self.checkpoints.step, time.perf_counter(), 0.0, 0.0


class Save(keras.callbacks.Callback):
    """A checkpoint every so many steps, and one before leaving where a signal asks to; listed last."""

    def __init__(self, checkpoints, every, signals):
        super().__init__()
        self.checkpoints, self.every, self.signals = checkpoints, every, signals

    def on_train_batch_end(self, batch, logs=None):
        if self.signals.received or self.checkpoints.step % self.every == 0:
            self.checkpoints.save()
        self.leave_if_asked()

    def leave_if_asked(self):
        """To be called where the newest step is saved."""
        if self.signals.received:
            raise Interrupted(
                self.signals.received,
                f"saved at step {self.checkpoints.step}. Run the same command again: training goes on from there",
            )


class Signals:
    """SIGINT (Ctrl-C) and SIGTERM (a scheduler's): steps end first, anything else, and the second signal, at once.

    A context, in which `steps` is one for what ends first; `received` is the signal's number then. Python runs its
    handlers between two of its own instructions, and a read that hangs in TensorFlow never comes back to those: so a
    thread listens, too, and ends the process where GRACE seconds after the second signal it has not ended by itself.

    Attributes:
        saved: a function, replaced by whoever knows better, that says what is saved and what to do, as a sentence.
    """

    GRACE = 3.0

    def __init__(self):
        self.received, self.in_steps, self.before = None, False, {}
        self.saved = lambda: "what was written before is whole. Run the same command again: it goes on"

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows no others
            listened, self._told = os.pipe()
            os.set_blocking(self._told, False)
            self._over = threading.Event()
            threading.Thread(target=self._listen, args=(listened,), daemon=True).start()
            self._wakeup = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.before:
            signal.set_wakeup_fd(self._wakeup)
            self._over.set()
            os.close(self._told)

    @contextlib.contextmanager
    def steps(self):
        self.in_steps = True
        try:
            yield
        finally:
            self.in_steps = False

    def _handle(self, number, _):
        if self.received or not self.in_steps:
            raise Interrupted(number, self.saved())
        self.received = number

    def _listen(self, listened):
        """Read the numbers of signals, which Python's own part in C writes whatever the main thread does."""
        seen = 0
        while read := os.read(listened, 64):
            numbers = [number for number in read if number in (signal.SIGINT, signal.SIGTERM)]
            if not numbers:
                continue
            name = signal.Signals(numbers[-1]).name
            if not seen and self.in_steps:
                os.write(2, f"\n{name}: stopping after this step; again to stop at once\n".encode())
            seen += len(numbers)
            if seen > 1 and not self._over.wait(self.GRACE):
                os.write(2, f"\n{name}: {self.saved()}\n".encode())
                os._exit(128 + numbers[-1])
        os.close(listened)
