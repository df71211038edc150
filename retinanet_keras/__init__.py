"""RetinaNet, from "Focal Loss for Dense Object Detection" (Lin et al., ICCV 2017), in Keras 3 on TensorFlow."""

import importlib

from retinanet_keras import runtime

runtime.set_up()

__version__ = "0.1.0"

_HOMES = {"RetinaNet": "model", "load_config": "config", "AnchorConfig": "config", "CocoMetrics": "evaluation.callback"}
__all__ = sorted(_HOMES)


def __getattr__(name):
    """Import on first use: reading a configuration or a results file should not wait for TensorFlow."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"retinanet_keras.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'retinanet_keras' has no attribute {name!r}")
