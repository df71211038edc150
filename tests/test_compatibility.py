"""A run, an export and a .keras file that version 0.1.0 wrote load, and detect what they detected then.

`data/version_0.1.0.tar.xz` also has the images and what that version detected in them.
"""

import tarfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from retinanet_keras import optimizers
from retinanet_keras.training.resume import Checkpoints, load_run
from retinanet_keras.training.run_folder import RunFolder

pytestmark = pytest.mark.eager


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of the files, dict of arrays)."""
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(Path(__file__).parent / "data/version_0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    with np.load(folder / "expected.npz") as file:
        return folder, dict(file)


def assert_detections(detections, expected, kind):
    """The same, within the rounding of another processor's kernels: nearly equal scores may change places."""
    for name in detections:
        if name in ("boxes", "scores"):
            continue
        assert np.asarray(detections[name]).shape == expected[f"{kind}_{name}"].shape, name
    n = "num_detections" if kind == "export" else "count"
    np.testing.assert_array_equal(detections[n], expected[f"{kind}_{n}"])
    for image in range(len(expected["images"])):
        rows = []
        for values in (detections, {name: expected[f"{kind}_{name}"] for name in ("boxes", "scores", "labels")}):
            row = np.concatenate(
                [np.asarray(values[name])[image].reshape(100, -1) for name in ("labels", "scores", "boxes")], axis=1
            )
            rows.append(row[np.lexsort(np.round(row[:, ::-1], 2).T)])
        np.testing.assert_allclose(rows[0][:, :2], rows[1][:, :2], atol=1e-4)
        np.testing.assert_allclose(rows[0][:, 2:], rows[1][:, 2:], atol=0.01)


def test_a_run(saved):
    folder, expected = saved
    _, model = load_run(folder / "run")
    assert_detections(model.detect(expected["images"]), expected, "run")
    checkpoints = Checkpoints(model, RunFolder(folder / "run"), 1)  # with the optimizer's state
    assert checkpoints.restore() == 4


def test_an_export(saved):
    folder, expected = saved
    signature = tf.saved_model.load(str(folder / "run/export/1")).signatures["serving_default"]
    assert_detections(signature(images=tf.constant(expected["images"])), expected, "export")


def test_a_keras_file(saved):
    """Its next step has the same loss, too."""
    folder, expected = saved
    model = keras.models.load_model(folder / "model.keras")
    assert_detections(model.detect(expected["images"]), expected, "keras")
    assert type(model.optimizer) is optimizers.CoupledSGD and model.optimizer.iterations == 3
    truth = {name: expected[f"truth_{name}"] for name in ("boxes", "labels")}
    loss = model.train_on_batch(expected["images"], truth, return_dict=True)["loss"]
    assert loss == pytest.approx(float(expected["next_loss"]), rel=1e-4)
