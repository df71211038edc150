"""Milliseconds per image: Table 1e's time column, and Figure 2's trained models that are not in it.

One image at a time. Its pixels are random, and so are the weights of Table 1e's models: the time of the network depends
on neither. Post-processing gets as many candidates as it can (no score threshold), so its part is an upper bound.
"""

import dataclasses
import json
import platform
import statistics
import time

from retinanet_keras.config import config_from_dict
from retinanet_keras.experiments import paper, tables
from retinanet_keras.storage import disk

SHAPE = 3, 4  # height to width of the image timed, as most of COCO's
SCORE_THRESHOLD = 0.0  # of the models timed, on every level
ROUNDS = 5  # timed detections of each model


def measure(to, *, only=(), rounds=ROUNDS, shrink=1, smaller=None):
    """Write time.json: {"about": text, "rows": {row of Table 1e: median milliseconds of forward and post-processing}}.

    Args:
        to: folder of Table 1e, made where it does not exist.
        only: rows; empty: all.
        rounds: how often each row is timed.
        shrink: divisor of the images' sides; above 1 for a trial.
        smaller: settings of RetinaNet that make it smaller, for a trial.

    Returns:
        the content.
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
            detectors[name] = folding.compiled(model)  # as an export computes
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


def _papers():
    return paper.about("1e")["data"].split("; ")[1]


def without_threshold(config):
    """A Config with `SCORE_THRESHOLD`, for the model to time."""
    detection = dataclasses.replace(config.detection, score_threshold=SCORE_THRESHOLD, p7_threshold=None)
    return dataclasses.replace(config, detection=detection)


def call(detect, short_side, max_side):
    """A function that detects in one image of 4:3 and waits for the result.

    Args:
        detect: as `folding.compiled` gives it.
        short_side, max_side: of the image, as the settings of these names.
    """
    import numpy as np
    import tensorflow as tf

    from retinanet_keras.data import canvas

    height, width = canvas.resized(SHAPE, short_side, max_side)[0].numpy()
    pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    image, sizes = tf.constant(pixels), tf.constant([[height, width]], tf.float32)
    return lambda: detect(image, sizes)["scores"].numpy()


def medians(calls, rounds=ROUNDS):
    """{name: median milliseconds} of {name: function without arguments}.

    They are called in turn, again and again, so that what else the machine does meets all of them.
    """
    times = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, function in calls.items():
            start = time.perf_counter()
            function()
            if number:  # the first is tracing
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
