"""What the tests share."""

import copy
import fcntl
import pickle
import sys

import pytest

import retinanet_keras  # noqa: F401  (before TensorFlow, whose process it sets up)


def pytest_addoption(parser):
    parser.addoption("--run", help="folder of a trained run, whose model and images test_export_elsewhere.py takes")


@pytest.fixture(autouse=True, scope="module")
def forget_graphs():
    """What a file of tests has traced is let go after it: memory stays bounded."""
    yield
    import keras

    keras.backend.clear_session()


@pytest.fixture(autouse=True, scope="module")
def train_nothing(request):
    """A detector that is trained in a file marked `check` fails its test: `make check` has to stay quick."""
    model = sys.modules.get("retinanet_keras.model")
    if not model or not request.node.get_closest_marker("check"):
        yield
        return

    def train_step(*_):
        pytest.fail("This test trains a detector: move it to a file without the marker `check`.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.RetinaNet, "train_step", train_step)
        yield


@pytest.fixture(autouse=True)
def run_eagerly(request):
    """A test marked `eager` lets TensorFlow run functions as they are: tracing one takes seconds."""
    import keras

    marker = request.node.get_closest_marker("eager")
    if not marker or marker.args == (False,) or keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def five_convolutions(dtype=None, activation="relu"):
    """A Keras model of C1 to C5, with a fraction of the layers of a ResNet, which take long to trace."""
    import keras

    images = keras.Input((None, None, 3))
    x, levels = images, {}
    for level, channels in zip(range(1, 6), (8, 8, 8, 16, 32), strict=True):
        x = keras.layers.Conv2D(channels, 3, 2, "same", activation=activation, dtype=dtype, name=f"conv{level}")(x)
        levels[f"c{level}"] = x
    return keras.Model(images, levels)


OF_RESNETS = {"width", "norm", "freeze_at", "weights", "stride_in"}


@pytest.fixture(scope="session")
def small_model():
    """A function that builds a RetinaNet of some 30,000 weights, the same at every call with the same arguments.

    Its backbone is `five_convolutions`; where a setting of the ResNets is given, a ResNet-18 of some 100,000 weights.
    """
    import keras

    from retinanet_keras import RetinaNet

    def make(num_classes=3, backbone=None, *, seed=0, **settings):
        keras.utils.set_random_seed(seed)
        settings = {"fpn_channels": 16, "head_depth": 1, **settings}
        if backbone is None and not OF_RESNETS & set(settings):
            return RetinaNet(num_classes, five_convolutions(settings.get("dtype")), **settings)
        return RetinaNet(num_classes, backbone or "resnet18", **{"width": 8, "norm": "group", **settings})

    return make


TINY = {
    "data": {
        "source": "shapes", "train_split": "train", "val_split": "val",
        "short_side": 64, "max_side": 64, "keep_empty": True, "scale_jitter": [0.8, 1.2],
        "shapes": {"train_images": 10, "val_images": 3, "test_images": 2, "side": 96},
    },
    "model": {"backbone": "resnet18", "weights": None, "width": 8, "norm": "batch", "freeze_at": 0,
              "fpn_channels": 16, "head_depth": 1},
    "anchors": {"size": 2.0},
    "detection": {"score_threshold": 0.0},  # so short a training is sure of nothing
    "train": {"iterations": 6, "batch_size": 2, "optimizer": "adamw", "learning_rate": 0.001, "schedule": "cosine",
              "warmup": 2, "checkpoint_every": 2, "log_every": 2},
    "eval": {"every": 3, "pictures": 2, "keep": "best", "batch_size": 2},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_config():
    """A function that builds the Config of a run of seconds on the generated data in a folder, with changes."""
    from retinanet_keras.config import config_from_dict

    def make(data_dir, **sections):
        tree = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {*TINY, *sections}}
        tree["data"]["dir"] = str(data_dir)
        return config_from_dict(copy.deepcopy(tree))

    return make


@pytest.fixture(scope="session")
def made_once(request, tmp_path_factory):
    """A function of a name and a function of a folder: the folder, and what the first process to call it was returned.

    A run takes longer than most tests; the processes of one `pytest --numprocesses` share it.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if hasattr(request.config, "workerinput") else root  # of one of several processes

    def get(name, make):
        folder, result = root / "shared" / name, root / "shared" / f"{name}.pickle"
        folder.mkdir(parents=True, exist_ok=True)
        with open(root / "shared" / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process ends
            if not result.exists():
                result.write_bytes(pickle.dumps(make(folder)))
        return folder, pickle.loads(result.read_bytes())

    return get


@pytest.fixture(scope="session")
def data_dir(tiny_config, made_once):
    """Where the generated data of `tiny_config` is; not to be changed."""
    from retinanet_keras.data import dataset_formats

    def make(folder):
        dataset_formats.open_split(tiny_config(folder / "shapes").data, "train")

    return made_once("data", make)[0] / "shapes"


@pytest.fixture(scope="session")
def finished(tiny_config, data_dir, made_once):
    """A run from start to end: (its folder, the metrics it returned); not to be changed."""
    from retinanet_keras.training import run
    from retinanet_keras.training.run_folder import RunFolder

    folder, metrics = made_once("run", lambda folder: run.train(tiny_config(data_dir), folder / "whole"))
    return RunFolder(folder / "whole"), metrics


@pytest.fixture(scope="session")
def tiny_export(small_model, made_once):
    """The base path of a SavedModel that finds many things in 64-pixel canvases; not to be changed."""
    import numpy as np

    from retinanet_keras.config import config_from_dict
    from retinanet_keras.serving import export

    def make(folder):
        categories = [{"label": i, "id": 2 * i + 5, "name": name} for i, name in enumerate(("cat", "dog", "größe"))]
        model = small_model(prior=0.3, categories=categories, norm="group")
        rng = np.random.default_rng(0)
        for subnet in (model.class_subnet, model.box_subnet):  # from the initial sigma .01 all scores would be equal
            kernel = subnet.final.kernel
            kernel.assign(rng.normal(0, 0.2, kernel.shape))
        export.export_model(model, config_from_dict({"data": {"short_side": 64, "max_side": 96}}), folder)

    return made_once("served", make)[0]
