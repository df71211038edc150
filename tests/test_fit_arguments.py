"""Arguments of Keras's compile and fit that a RetinaNet refuses, and what it says to do instead."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from retinanet_keras import fit_arguments

pytestmark = pytest.mark.eager

IMAGES = np.zeros((3, 64, 64, 3), "uint8")
TRUTH = {"boxes": np.tile(np.float32([8, 8, 50, 40]), (3, 1, 1)), "labels": np.zeros((3, 1), "int32")}
WEIGHTS = np.float32([0.5, 2.0, 0.25])


@pytest.mark.parametrize("name, value, instead", [
    ("loss", "mse", "name classification_loss, box_loss, or both"),
    ("loss", {"logits": keras.losses.BinaryCrossentropy()}, "name classification_loss, box_loss, or both"),
    ("loss_weights", [1.0, 2.0], "give box_weight"),
    ("loss_weights", np.ones(2), "give box_weight"),
    ("metrics", ["accuracy"], "add the callback CocoMetrics"),
    ("weighted_metrics", [keras.metrics.MeanSquaredError()], "add the callback CocoMetrics"),
])  # fmt: skip
def test_what_compile_cannot_honor_is_refused(small_model, name, value, instead):
    model = small_model()
    with pytest.raises(ValueError, match=f"^{name}: expected None, got .*{instead}"):
        model.compile("sgd", **{name: value})
    model.compile("sgd", **{name: None})
    assert model.compiled


def test_unknown_arguments_of_compile(small_model):
    with pytest.raises(TypeError, match="normaliser"):
        small_model().compile("sgd", normaliser="image")


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        return IMAGES, TRUTH


def test_class_weight_is_refused(small_model):
    model = small_model()
    model.compile("sgd")
    for train in (
        lambda **given: model.fit(IMAGES, TRUTH, **given),
        lambda **given: model.fit(Batches(), **given),
        lambda **given: model.fit(tf.data.Dataset.from_tensors((IMAGES, TRUTH)), **given),
        lambda **given: model.train_on_batch(IMAGES, TRUTH, **given),
    ):
        with pytest.raises(ValueError, match="class_weight: expected None, got {0: 2.0}.*sample_weight"):
            train(class_weight={0: 2.0})
    for train in (
        lambda: model.train_on_batch(IMAGES, TRUTH, None, {0: 2.0}),
        lambda: model.fit(IMAGES, TRUTH, 3, 1, 0, None, 0.0, None, True, {0: 2.0}),
    ):
        with pytest.raises(ValueError, match="class_weight: expected None, got {0: 2.0}"):
            train()


@pytest.mark.parametrize("given", [
    WEIGHTS[:, None], np.ones((3, 2), "float32"), {"labels": WEIGHTS}, {"labels": WEIGHTS, "boxes": TRUTH["boxes"]},
    {"labels": WEIGHTS, "boxes": None}, WEIGHTS[:1], WEIGHTS[0],
])  # fmt: skip
def test_weights_that_are_not_of_images_are_refused(given):
    with pytest.raises(ValueError, match="sample_weight: expected one weight for each image.* for 3 images"):
        fit_arguments.image_weights(given, 3)


def test_every_way_to_train_refuses_weights_that_are_not_of_images(small_model):
    model = small_model()
    model.compile("sgd", run_eagerly=True)
    for run in (
        lambda: model.train_on_batch(IMAGES, TRUTH, WEIGHTS[:1]),
        lambda: model.test_on_batch(IMAGES, TRUTH, WEIGHTS[:1]),
        lambda: model.fit(tf.data.Dataset.from_tensors((IMAGES, TRUTH, WEIGHTS[:, None])), verbose=0),
    ):
        with pytest.raises(ValueError, match="sample_weight: expected one weight for each image"):
            run()
