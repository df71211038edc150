"""Milliseconds per image, for the time column of Table 1e and for the trained models of Figure 2.

Images are timed one at a time. Pixels are random, and so are the weights of Table 1e's models: the time of the network
depends on neither. Post-processing gets as many candidates as possible (no score threshold), so its time is an upper
bound.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retinanet_keras.config import Config, config_from_dict
from retinanet_keras.experiments import paper, tables
from retinanet_keras.storage import disk

SHAPE = 3, 4  # height to width of the timed image, as of most in COCO
SCORE_THRESHOLD = 0.0  # of the timed models, on every level
ROUNDS = 5  # timed detections of each model


def measure(
    to: Path,
    *,
    only: Sequence[str] = (),
    rounds: int = ROUNDS,
    shrink: int = 1,
    smaller: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Time the models of Table 1e, and write time.json.

    Args:
        to: Path. Folder of Table 1e, created if it does not exist.
        only: sequence of str. Rows to time; empty for all.
        rounds: int. Number of times that each row is timed.
        shrink: int. Divisor of the images' sides; above 1 for a trial.
        smaller: dict or None. Arguments of RetinaNet that make it smaller, for a trial.

    Returns:
        The content of the file: {"about": text, "rows": {row of Table 1e: median milliseconds of forward pass and
        post-processing}}.
    """
    import tensorflow as tf

    from retinanet_keras import folding
    from retinanet_keras.model import RetinaNet

    detectors, calls = {}, {}
    for row in tables.rows("1e", "paper", only):
        config = without_threshold(config_from_dict(tables.tree("1e", row, "paper")))
        name = config.model.backbone
        if name not in detectors:
            model = RetinaNet(80, name, norm="frozen", detection=config.detection, **smaller or {})
            detectors[name] = folding.compiled(model)  # as in an export
        sides = {key: getattr(config.data, key) // shrink for key in ("short_side", "max_side")}
        calls[row.name] = call(detectors[name], **sides)
    times = medians(calls, rounds)
    devices = tf.config.list_physical_devices("GPU")
    device = tf.config.experimental.get_device_details(devices[0])["device_name"] if devices else platform.machine()
    about = f"median of {rounds}, one image of 4:3, {device}, TensorFlow {tf.__version__}; the paper's: {_papers()}"
    content = {"about": about, "rows": times}
    with disk.replacing_text(to / "time.json") as file:
        file.write(json.dumps(content, indent=1) + "\n")
    return content


def _papers() -> str:
    """The hardware of the paper's times."""
    return paper.about("1e")["data"].split("; ")[1]


def without_threshold(config: Config) -> Config:
    """Return the Config with `SCORE_THRESHOLD`, for the model to time."""
    detection = dataclasses.replace(config.detection, score_threshold=SCORE_THRESHOLD, p7_threshold=None)
    return dataclasses.replace(config, detection=detection)


def call(detect: Callable[..., Any], short_side: int, max_side: int) -> Callable[[], Any]:
    """Return a function that detects in one image of 4:3 and waits for the result.

    Args:
        detect: function returned by `folding.compiled`.
        short_side: int. Shorter side of the image, as `data.short_side`.
        max_side: int. Maximum of its longer side, as `data.max_side`.
    """
    import numpy as np
    import tensorflow as tf

    from retinanet_keras.data import canvas

    height, width = canvas.resized(SHAPE, short_side, max_side)[0].numpy()
    pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    image, sizes = tf.constant(pixels), tf.constant([[height, width]], tf.float32)
    return lambda: detect(image, sizes)["scores"].numpy()


def medians(calls: Mapping[Any, Callable[[], Any]], rounds: int = ROUNDS) -> dict[Any, float]:
    """Return {name: median milliseconds} of {name: function without arguments}.

    They are called in turn in each round, so that other load on the machine affects all of them.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, function in calls.items():
            start = time.perf_counter()
            function()
            if number:  # the first is tracing
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
