"""The backbone: shapes, padding, freezing, and keras.applications as a second implementation."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from retinanet_keras import backbone as backbones
from retinanet_keras.config import UserError


@pytest.mark.parametrize("name, channels", [("resnet18", (16, 32, 64)), ("resnet50", (64, 128, 256))])
@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_shapes(name, channels, norm):
    model = backbones.resnet(name, width=8, norm=norm)
    features = model(np.zeros((2, 64, 96, 3), "float32"))
    assert {key: tuple(value.shape) for key, value in features.items()} == {
        "c3": (2, 8, 12, channels[0]), "c4": (2, 4, 6, channels[1]), "c5": (2, 2, 3, channels[2])
    }  # fmt: skip


@pytest.mark.parametrize("name, convs", [("resnet18", 17), ("resnet50", 49), ("resnet101", 100), ("resnet152", 151)])
def test_depth(name, convs):
    """The name counts the convolutions and the classifier, not the shortcuts."""
    model = backbones.resnet(name, width=8)
    found = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert sum(not layer.name.endswith("_shortcut") for layer in found) == convs
    assert sum(layer.name.endswith("_shortcut") for layer in found) == (3 if name == "resnet18" else 4)


def test_strides_are_in_the_first_1x1():
    model = backbones.resnet("resnet50", width=8)
    for stage, stride in ((2, 1), (3, 2), (4, 2), (5, 2)):
        strides = [
            model.get_layer(f"res{stage}_0_{conv}").strides[0] for conv in ("conv1", "conv2", "conv3", "shortcut")
        ]
        assert strides == [stride, 1, 1, stride]
        assert model.get_layer(f"res{stage}_1_conv1").strides == (1, 1)


def test_every_conv_draws_its_own_weights():
    keras.utils.set_random_seed(0)
    model = backbones.resnet("resnet50", width=8)
    kernels = [layer.kernel for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    heads = [tuple(ops.convert_to_numpy(k).ravel()[:8]) for k in kernels]
    assert len(set(heads)) == len(heads)
    for kernel in kernels:  # He et al.: sigma^2 = 2 / fan_in
        values = ops.convert_to_numpy(kernel)
        if values.size > 10_000:
            assert values.std() == pytest.approx((2 / np.prod(values.shape[:3])) ** 0.5, rel=0.05)


def test_strided_convolutions_are_padded_alike_on_both_sides():
    """A picture mirrored gives mirrored features, of odd sizes; TensorFlow's "same" would not."""
    model = backbones.resnet("resnet18", width=8, norm="frozen")
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            kernel = ops.convert_to_numpy(layer.kernel)
            layer.kernel.assign((kernel + kernel[:, ::-1]) / 2)
    image = np.random.default_rng(0).normal(size=(1, 65, 65, 3)).astype("float32")
    plain, mirrored = model(image), model(image[:, :, ::-1])
    for name, feature in plain.items():
        feature = ops.convert_to_numpy(feature)
        np.testing.assert_allclose(ops.convert_to_numpy(mirrored[name])[:, :, ::-1], feature, atol=1e-4 * feature.max())


def test_the_gradient_of_narrow_strided_convolutions_is_right():
    """Below 16 channels oneDNN's own gradient of a strided 1x1 conv is not; it crashes, or spoils other memory."""
    model = backbones.resnet("resnet18", width=8, norm="frozen")
    block = keras.Model(model.get_layer("res2_1_out").output, model.get_layer("res3_0_shortcut").output)
    conv = model.get_layer("res3_0_shortcut")
    x = tf.constant(np.random.default_rng(0).normal(size=(3, 16, 16, 8)), tf.float32)
    expected = np.einsum("bhwc,cd->bhwd", x[:, ::2, ::2], conv.kernel[0, 0])
    for _ in range(3):
        with tf.GradientTape() as tape:
            y = block(x)
            loss = tf.reduce_sum(y * y) / 2
        np.testing.assert_allclose(y, expected, atol=1e-5)
        slope = np.einsum("bhwc,bhwd->cd", x[:, ::2, ::2], expected)
        np.testing.assert_allclose(tape.gradient(loss, conv.kernel.value)[0, 0], slope, rtol=1e-3, atol=1e-2)


# Freezing


@pytest.mark.parametrize("stages", range(6))
def test_freeze(stages):
    model = backbones.resnet("resnet18", width=8, norm="group")
    backbones.freeze(model, stages)
    trained = {variable.path.split("/")[-2].split("_")[0] for variable in model.trainable_variables}
    assert trained == set(("stem", "res2", "res3", "res4", "res5")[stages:])


def test_frozen_statistics_do_not_train_and_do_not_move():
    frozen, trained = (backbones.resnet("resnet18", width=8, norm=norm) for norm in ("frozen", "batch"))
    assert not [v.path for v in frozen.trainable_variables if not v.path.endswith("kernel")]
    assert [v.path for v in trained.trainable_variables if v.path.endswith("gamma")]
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    for model, moves in ((frozen, False), (trained, True)):
        before = [ops.convert_to_numpy(v) for v in model.non_trainable_variables if "moving" in v.path]
        model(image, training=True)
        after = [ops.convert_to_numpy(v) for v in model.non_trainable_variables if "moving" in v.path]
        assert before and any((a != b).any() for a, b in zip(before, after, strict=True)) == moves


# keras.applications


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
    backbones.load_imagenet(model, application)
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


# Errors


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="resnet18, resnet50, resnet101, resnet152, got 'resnet34'"):
        backbones.resnet("resnet34")
    with pytest.raises(ValueError, match='"frozen", "batch" or "group", got \'layer\''):
        backbones.resnet(norm="layer")
    with pytest.raises(ValueError, match="not for resnet18"):
        backbones.load_imagenet(backbones.resnet("resnet18", width=8))


def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(**_):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "ResNet50", fail)
    with pytest.raises(UserError, match="model.weights"):
        backbones.load_imagenet(backbones.resnet("resnet50", width=8, norm="frozen"))
