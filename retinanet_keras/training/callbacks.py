"""Callbacks of training: step count, log, checkpoints, and a clean stop on a signal."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tqdm import tqdm

from retinanet_keras.config import Config
from retinanet_keras.errors import Interrupted, RunError
from retinanet_keras.training.resume import Checkpoints
from retinanet_keras.training.run_folder import RunFolder

LEAST_SCALE = 2.0**-10  # of a float16 loss; where it falls this low, gradients are not finite at any scale


class Count(keras.callbacks.Callback):
    """Count steps, and reset the metrics after each row of the log; listed first.

    Every worker needs it, as resetting metrics involves all of them. A float16 step that the optimizer skips counts.

    Args:
        checkpoints: Checkpoints. Its `step` is incremented.
        every: int. Steps averaged in one row of the log.
    """

    def __init__(self, checkpoints: Checkpoints, every: int):
        super().__init__()
        self.checkpoints, self.every = checkpoints, every

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.checkpoints.step += 1
        if self.checkpoints.step % self.every == 0:
            self.model.reset_metrics()
        optimizer = self.model.optimizer
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return
        if optimizer.dynamic_scale.numpy() < LEAST_SCALE:
            raise RunError(
                f"At step {self.checkpoints.step} gradients overflow float16 at any scale of the loss. The last "
                f'checkpoint is {self.checkpoints.newest or "none"}. Use train.precision "mixed_bfloat16", or lower '
                "train.learning_rate"
            )


class Log(keras.callbacks.Callback):
    """Write the progress bar, log.csv and TensorBoard.

    Each row averages the steps since the previous row, or since an evaluation or a start in between. `data_wait` is
    the fraction of time that steps waited for their images: from the request to the moment the input pipeline had them
    ready, if that came later. The remaining time in the bar is estimated from steps alone: tracing, everything else
    before the end of the first step, and evaluations do not count.

    Args:
        folder: RunFolder. Where the log is written.
        config: Config. Settings of the run.
        checkpoints: Checkpoints. Their `step` is the one logged.
        replicas: int. Replicas of this process.
    """

    def __init__(self, folder: RunFolder, config: Config, checkpoints: Checkpoints, replicas: int = 1):
        super().__init__()
        self.folder, self.every, self.batch_size = folder, config.train.log_every, config.train.batch_size
        self.checkpoints, self.replicas, self.total = checkpoints, replicas, config.train.iterations
        self.bar = tqdm(
            total=self.total,
            initial=checkpoints.step,
            desc="Training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]",
        )
        self.writer = tf.summary.create_file_writer(str(folder.tensorboard))
        # When each element of the input pipeline was ready; one per replica and step
        self.produced: collections.deque[float] = collections.deque()
        self.stopped = time.perf_counter()
        self._restart()

    def new_pipeline(self) -> Callable[[], None]:
        """Return a function for the input pipeline of the next steps to call whenever an element is ready."""
        produced = self.produced = collections.deque()
        return lambda: produced.append(time.perf_counter())

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.tracing = True  # the first step takes longer, for other reasons
        self._restart()  # an evaluation came in between

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.requested = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self.checkpoints.step
        now = time.perf_counter()
        ready = [self.produced.popleft() for _ in range(min(self.replicas, len(self.produced)))]
        if self.tracing:
            self.bar.start_t += now - self.stopped
            self.bar.last_print_t += now - self.stopped
            self.tracing = False
        else:
            self.waited += max(0.0, max(ready, default=0.0) - self.requested)
        norm = float(logs["gradient_norm"])
        self.norms += norm if math.isfinite(norm) else 0.0  # it is not in a skipped float16 step
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

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.stopped = time.perf_counter()

    def write(self, row: dict[str, Any]) -> None:
        """Write one row to log.csv and TensorBoard."""
        self.folder.log(row)
        with self.writer.as_default(step=row["step"]):
            for name, value in row.items():
                if name != "step" and value is not None:
                    tf.summary.scalar(name, value)
        self.writer.flush()

    def picture(self, name: str, image: npt.NDArray[np.uint8], step: int) -> None:
        """Write an image, uint8 [H, W, 3], to TensorBoard."""
        with self.writer.as_default(step=step):
            tf.summary.image(name, image[None])
        self.writer.flush()

    def close(self) -> None:
        self.bar.close()
        self.writer.close()

    def _restart(self) -> None:
        self.start, self.since, self.norms, self.waited = self.checkpoints.step, time.perf_counter(), 0.0, 0.0


class Save(keras.callbacks.Callback):
    """Save a checkpoint every so many steps, and one before a signal ends the run; listed last.

    Args:
        checkpoints: Checkpoints. Where to save.
        every: int. Steps between checkpoints.
        signals: Signals. Those of this process.
    """

    def __init__(self, checkpoints: Checkpoints, every: int, signals: Signals):
        super().__init__()
        self.checkpoints, self.every, self.signals = checkpoints, every, signals

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self.signals.received or self.checkpoints.step % self.every == 0:
            self.checkpoints.save()
        self.leave_if_asked()

    def leave_if_asked(self) -> None:
        """End the run if a signal was received. To be called where the newest step is saved."""
        if self.signals.received:
            raise Interrupted(
                self.signals.received,
                f"saved at step {self.checkpoints.step}. Run the same command again to resume from there",
            )


class Signals:
    """A context in which SIGINT (Ctrl-C) and SIGTERM (from a scheduler) end the process cleanly.

    Within `steps`, the first signal lets the current step end and sets `received`. Anywhere else, and for the second
    signal, the process ends at once. Python runs signal handlers between two of its own instructions, which a read
    that hangs in TensorFlow never returns to. So a thread listens, too, and ends the process if it has not ended by
    itself GRACE seconds after the second signal.

    Attributes:
        received: int or None. Number of the signal received within `steps`.
        saved: function without arguments that returns, as a sentence, what is saved and what to do. To be replaced
            where more is known.
    """

    GRACE = 3.0

    def __init__(self) -> None:
        self.received: int | None = None
        self.in_steps = False
        self.before: dict[int, Any] = {}  # signal number -> handler
        self.saved: Callable[[], str] = lambda: (
            "files already written are complete. Run the same command again to continue"
        )

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            listened, self._told = os.pipe()
            os.set_blocking(self._told, False)
            self._over = threading.Event()
            threading.Thread(target=self._listen, args=(listened,), daemon=True).start()
            self._wakeup = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.before:
            signal.set_wakeup_fd(self._wakeup)
            self._over.set()
            os.close(self._told)

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """A context for steps, which end before the process does."""
        self.in_steps = True
        try:
            yield
        finally:
            self.in_steps = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received or not self.in_steps:
            raise Interrupted(number, self.saved())
        self.received = number

    def _listen(self, listened: int) -> None:
        """Read the numbers of signals, which Python's C code writes to a pipe whatever the main thread does."""
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
