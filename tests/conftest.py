"""What the tests share."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported: its start-up notes

import pytest


@pytest.fixture(scope="session")
def small_model():
    """A function that builds a RetinaNet of some 100,000 weights, the same at every call with the same arguments."""
    import keras

    from retinanet_keras import RetinaNet

    def make(num_classes=3, backbone="resnet18", *, seed=0, **settings):
        keras.utils.set_random_seed(seed)
        return RetinaNet(
            num_classes, backbone, **{"width": 8, "fpn_channels": 16, "head_depth": 1, "norm": "group", **settings}
        )

    return make
