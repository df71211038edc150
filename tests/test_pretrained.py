"""Pre-trained backbones: keras.applications as a second implementation, and files."""

import keras
import numpy as np
import pytest
from keras import ops

from retinanet_keras import RetinaNet
from retinanet_keras import backbone as backbones
from retinanet_keras.errors import UserError
from retinanet_keras.weights import imagenet


@pytest.fixture(scope="module")
def application():
    """ResNet50 of keras.applications with random weights, statistics, and biases that are not zero."""
    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(weights=None, include_top=False)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.gamma.shape
            layer.set_weights([
                rng.uniform(0.5, 1.0, shape), rng.normal(0, 0.2, shape),
                rng.normal(0, 0.2, shape), rng.uniform(0.5, 2, shape),
            ])  # fmt: skip
        elif isinstance(layer, keras.layers.Conv2D):
            layer.bias.assign(rng.normal(0, 0.2, layer.bias.shape))
    return model


def test_equal_to_keras_applications(application):
    model = backbones.resnet("resnet50", norm="frozen")
    imagenet.load_imagenet(model, application)
    image = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3)).astype("float32")
    ours = model((image - np.float32(backbones.MEAN)) / np.float32(backbones.STD), training=False)
    layers = {"c3": "conv3_block4_out", "c4": "conv4_block6_out", "c5": "conv5_block3_out"}
    theirs = keras.Model(application.input, {k: application.get_layer(v).output for k, v in layers.items()})
    theirs = theirs(keras.applications.resnet.preprocess_input(image.copy()), training=False)
    for name in layers:
        expected = ops.convert_to_numpy(theirs[name])
        assert expected.std() > 0.01
        np.testing.assert_allclose(ours[name], expected, atol=1e-3 * expected.max())


def test_as_many_weights_as_keras_applications(application):
    ours = backbones.resnet("resnet50", norm="frozen")
    biases = sum(layer.bias.shape[0] for layer in application.layers if isinstance(layer, keras.layers.Conv2D))
    assert ours.count_params() == application.count_params() - biases


@pytest.mark.slow
def test_the_stem_takes_another_division_of_pixels(application):
    image = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3)).astype("float32") - np.float32(backbones.MEAN)
    outputs = []
    for std in (backbones.STD, (1.0, 1.0, 1.0)):
        model = backbones.resnet("resnet50", norm="frozen")
        imagenet.load_imagenet(model, application, std)
        outputs.append(ops.convert_to_numpy(model(image / np.float32(std))["c3"]))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-3 * outputs[0].max())


# Files


def test_a_file_brings_weights_and_pixel_mean(tmp_path):
    keras.utils.set_random_seed(0)
    source = backbones.resnet("resnet18", width=8, norm="frozen")
    imagenet.save(source, tmp_path / "a.weights.h5", (1.0, 2.0, 3.0))
    net = RetinaNet(2, "resnet18", width=8, weights=tmp_path / "a.weights.h5", fpn_channels=16, head_depth=1)
    assert net.pixel_mean == (1.0, 2.0, 3.0)
    for ours, theirs in zip(net.backbone.get_weights(), source.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    source.save_weights(tmp_path / "b.weights.h5")
    assert RetinaNet(2, "resnet18", width=8, weights=tmp_path / "b.weights.h5").pixel_mean == backbones.MEAN


# Errors


def test_no_imagenet_weights_for_resnet18():
    with pytest.raises(ValueError, match="not for resnet18"):
        imagenet.load_imagenet(backbones.resnet("resnet18", width=8))


def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(**_):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "ResNet50", fail)
    with pytest.raises(UserError, match="model.weights"):
        imagenet.load_imagenet(backbones.resnet("resnet50", width=8, norm="frozen"))
