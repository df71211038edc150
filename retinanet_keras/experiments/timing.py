"""Table 1e's time column: the ten models, one image at a time, measured where this runs.

Weights are random and no image is needed: the time of the network depends on neither. Post-processing gets as many
candidates as it can (no score threshold), so its part is an upper bound.
"""

import dataclasses
import json
import platform
import statistics
import time

from retinanet_keras.config import config_from_dict
from retinanet_keras.experiments import paper, tables
from retinanet_keras.results import files

ASPECT = 4 / 3  # longer over shorter side of the image timed, as most of COCO's


def measure(to, *, only=(), rounds=5, shrink=1, smaller=None):
    """Write time.json: {"about": text, "rows": {row of Table 1e: median milliseconds of forward and post-processing}}.

    The rows are timed in turn, again and again, so that what else the machine does meets all of them.

    Args:
        to: folder of Table 1e, made where it does not exist.
        only: rows; empty: all.
        rounds: how often each row is timed.
        shrink: a divisor of the images' sides; above 1 for a trial.
        smaller: settings of RetinaNet that make it smaller, for a trial.

    Returns:
        the content.
    """
    import tensorflow as tf

    from retinanet_keras.model import RetinaNet
    from retinanet_keras.serving import inference

    detectors, calls = {}, {}
    for row in tables.rows("1e", "paper", only):
        config = config_from_dict(tables.tree("1e", row, "paper"))
        name = config.model.backbone
        if name not in detectors:
            detection = dataclasses.replace(config.detection, score_threshold=0.0)
            model = RetinaNet(80, name, norm="frozen", detection=detection, **smaller or {})
            detectors[name] = inference.compiled(model)  # as an export computes
        short = config.data.short_side // shrink
        calls[row.name] = _call(detectors[name], short, round(short * ASPECT))
    found = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:  # the first is tracing
                found[name].append(1000 * (time.perf_counter() - began))
    devices = tf.config.list_physical_devices("GPU")
    device = tf.config.experimental.get_device_details(devices[0])["device_name"] if devices else platform.machine()
    about = f"median of {rounds}, one image of 4:3, {device}, TensorFlow {tf.__version__}; the paper's: {_papers()}"
    content = {"about": about, "rows": {name: statistics.median(times) for name, times in found.items()}}
    with files.replacing(to / "time.json") as file:
        file.write(json.dumps(content, indent=1) + "\n")
    return content


def _papers():
    return paper.about("1e")["data"].split("; ")[1]


def _call(detect, height, width):
    """A function that detects in one image of this size and waits for the result."""
    import numpy as np
    import tensorflow as tf

    pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    image, sizes = tf.constant(pixels), tf.constant([[height, width]], tf.float32)
    return lambda: detect(image, sizes)["scores"].numpy()
