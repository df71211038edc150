"""docs/finetune.ipynb, cell by cell, on a few small images."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from retinanet_keras.config import ShapesConfig
from retinanet_keras.data import shapes

NOTEBOOK = json.loads((Path(__file__).parents[1] / "docs" / "finetune.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_committed_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


@pytest.fixture(scope="module")
def executed(small_model, tmp_path_factory):
    """Its names at its end, and the weights before training; started from a detector of 3 classes."""
    folder = tmp_path_factory.mktemp("notebook")
    shapes.generate(folder / "data", ShapesConfig(train_images=6, val_images=3, test_images=1, side=96))
    small_model(3).save(folder / "start.keras")
    names, started = {}, {}
    for cell in CODE:
        exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names.update(
                DATA=str(folder / "data"), START=str(folder / "start.keras"), SIDE=192, BATCH=2, STEPS=2, EPOCHS=2,
                OUT=str(folder / "out"),
            )  # fmt: skip
        if "model" in names and not started:
            started = {variable.path: variable.numpy() for variable in names["model"].weights}
    return names, started


@pytest.mark.slow
def test_the_model_takes_over_what_does_not_depend_on_the_classes(executed):
    names, started = executed
    source, classes = names["source"], len(names["names"])
    assert (source.num_classes, classes) == (3, 5)
    theirs = {variable.path: variable.numpy() for variable in source.weights}
    assert started.keys() == theirs.keys()
    for path, value in started.items():
        if "class_subnet/final" in path:
            assert value.shape[-1] == 9 * classes
        else:
            np.testing.assert_array_equal(value, theirs[path], err_msg=path)


@pytest.mark.slow
def test_it_trains_and_measures(executed):
    names, started = executed
    history = names["history"].history
    assert len(history["loss"]) == len(history["val_AP"]) == 2 and np.isfinite(history["loss"]).all()
    now = {variable.path: variable.numpy() for variable in names["model"].weights}
    assert any((now[path] != value).any() for path, value in started.items())
    assert Path(names["best"]).exists()


@pytest.mark.slow
def test_it_saves_and_exports_what_it_has(executed):
    names, _ = executed
    again = keras.models.load_model(Path(names["OUT"]) / "finetuned.keras")
    assert [row["name"] for row in again.categories] == list(names["names"])
    for mine, loaded in zip(names["model"].weights, again.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), loaded.numpy())
    for name, value in names["same"].items():
        np.testing.assert_array_equal(value, names["detections"][name])
    n = int(names["answer"]["num_detections"][0])
    assert n == names["count"]
    np.testing.assert_allclose(names["answer"]["scores"][0, :n], names["scores"], atol=1e-5)
    assert (Path(names["exported"]) / "saved_model.pb").exists()
