"""What metrics belong to: a digest of the weights, and the settings that change the numbers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from retinanet_keras.storage import disk

if TYPE_CHECKING:
    from retinanet_keras.config import Config
    from retinanet_keras.model import RetinaNet


def identity(model: RetinaNet, config: Config, split: str | None = None) -> dict[str, Any]:
    """What two evaluations must share for their metrics to be interchangeable; stored in metrics.json.

    Args:
        model: RetinaNet.
        config: Config, for the size to which images are resized.
        split: str. Name of the evaluated split; None leaves it out of the settings.

    Returns:
        {"weights": `disk.digest` of the model's weights, in Keras' order; "settings": {"data.short_side",
        "data.max_side", "detection.*", "precision", "split"}, JSON-able}.
    """
    settings = {"data.short_side": config.data.short_side, "data.max_side": config.data.max_side}
    settings |= {f"detection.{key}": value for key, value in dataclasses.asdict(model.detection).items()}
    settings |= {"precision": model.compute_dtype} | ({"split": split} if split else {})
    weights = disk.digest(*(np.asarray(variable.numpy()) for variable in model.weights))
    return {"weights": weights, "settings": settings}
