"""The pyramid and the subnets: initial values, sharing, the order of outputs, and NumPy's version of the same."""

import math

import keras
import numpy as np
import pytest
import reference
from keras import ops

from retinanet_keras.anchors import STRIDES, anchor_boxes
from retinanet_keras.pyramid import FeaturePyramid, LastLayer
from retinanet_keras.subnets import Subnet

pytestmark = pytest.mark.check


def built(layer, shapes):
    layer.build(shapes)
    return layer


def level(height, width, channels):
    return (None, height, width, channels)


def features(rng, height=64, width=96, channels=(5, 6, 7)):
    return {
        f"c{n}": rng.normal(size=(2, height // 2**n, width // 2**n, c)).astype("float32")
        for n, c in zip((3, 4, 5), channels, strict=True)
    }


@pytest.fixture
def pyramid():
    keras.utils.set_random_seed(0)
    return built(FeaturePyramid(4), {f"c{n}": (None, None, None, c) for n, c in ((3, 5), (4, 6), (5, 7))})


# Pyramid


def test_pyramid_shapes(pyramid):
    levels = pyramid(features(np.random.default_rng(0)))
    assert [tuple(x.shape) for x in levels] == [(2, 8, 12, 4), (2, 4, 6, 4), (2, 2, 3, 4), (2, 1, 2, 4), (2, 1, 1, 4)]


def test_pyramid_equals_numpy(pyramid):
    rng = np.random.default_rng(1)
    for variable in pyramid.trainable_variables:
        variable.assign(rng.normal(0, 0.5, variable.shape))
    given = features(rng)
    weights = {v.path.split("/", 1)[1]: ops.convert_to_numpy(v) for v in pyramid.trainable_variables}

    def conv(name, x, stride=1):
        return reference.conv(x, weights[f"{name}/kernel"], weights[f"{name}/bias"], stride)

    m5 = conv("lateral5", given["c5"])
    m4 = conv("lateral4", given["c4"]) + m5.repeat(2, axis=1).repeat(2, axis=2)
    m3 = conv("lateral3", given["c3"]) + m4.repeat(2, axis=1).repeat(2, axis=2)
    p6 = conv("p6", given["c5"], 2)  # §4: "a 3x3 stride-2 conv on C5"
    p7 = conv("p7", np.maximum(p6, 0), 2)  # "ReLU followed by a 3x3 stride-2 conv on P6"
    assert (p6 < 0).any()
    expected = [conv("output3", m3), conv("output4", m4), conv("output5", m5), p6, p7]
    for ours, theirs in zip(pyramid(given), expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(ours), theirs, atol=1e-4 * np.abs(theirs).max())


def test_the_last_layer_alone_is_p5_of_the_pyramid(pyramid):
    """With P5's weights, P5: nothing of C3, C4 and above is in it."""
    alone = built(LastLayer(4), {"c5": level(None, None, 7)})
    for ours, theirs in ((alone.lateral, pyramid.laterals["c5"]), (alone.output_, pyramid.outputs_["c5"])):
        ours.set_weights([np.random.default_rng(2).normal(size=w.shape) for w in ours.get_weights()])
        theirs.set_weights(ours.get_weights())
    given = features(np.random.default_rng(1))
    (found,) = alone(given)
    assert tuple(found.shape) == (2, 2, 3, 4)
    np.testing.assert_allclose(*(ops.convert_to_numpy(x) for x in (found, pyramid(given)[2])), rtol=1e-5)
    assert type(alone).from_config(alone.get_config()).channels == 4


def test_p6_from_p5():
    rng = np.random.default_rng(1)
    pyramid = built(FeaturePyramid(4, p6_source="p5"), {f"c{n}": (None, None, None, 4) for n in (3, 4, 5)})
    pyramid.p6.bias.assign(rng.normal(size=4))
    levels = [ops.convert_to_numpy(level) for level in pyramid(
        {f"c{n}": rng.normal(size=(1, 64 // 2**n, 64 // 2**n, 4)).astype("float32") for n in (3, 4, 5)}
    )]  # fmt: skip
    kernel, bias = (ops.convert_to_numpy(v) for v in (pyramid.p6.kernel, pyramid.p6.bias))
    np.testing.assert_allclose(levels[3], reference.conv(levels[2], kernel, bias, 2), atol=1e-5)
    with pytest.raises(ValueError, match='"c5" or "p5", got \'c4\''):
        FeaturePyramid(p6_source="c4")


def test_group_normalization_in_the_tower_equals_numpy():
    rng = np.random.default_rng(2)
    subnet = built(Subnet(1, 2, channels=64, depth=1, norm="group"), [(None, None, None, 64)])
    for variable in subnet.trainable_variables:
        variable.assign(rng.normal(0, 0.5, variable.shape))
    assert not subnet.tower[0].use_bias and len(subnet.trainable_variables) == 5
    x = rng.normal(size=(1, 3, 4, 64)).astype("float32")
    y = reference.conv(x, ops.convert_to_numpy(subnet.tower[0].kernel), 0).reshape(12, 32, 2)  # 32 groups
    y = (y - y.mean(axis=(0, 2), keepdims=True)) / np.sqrt(y.var(axis=(0, 2), keepdims=True) + 1e-5)
    gamma, beta = (ops.convert_to_numpy(v) for v in (subnet.norms[0].gamma, subnet.norms[0].beta))
    y = np.maximum(y.reshape(1, 3, 4, 64) * gamma + beta, 0)
    kernel, bias = (ops.convert_to_numpy(v) for v in (subnet.final.kernel, subnet.final.bias))
    expected = reference.conv(y, kernel, bias).reshape(1, 12, 2)
    np.testing.assert_allclose(ops.convert_to_numpy(subnet([x])), expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(ValueError, match="None or \"group\", got 'batch'"):
        Subnet(1, 1, norm="batch")


def test_pyramid_starts_from_xavier_without_bias():
    pyramid = built(FeaturePyramid(64), {f"c{n}": (None, None, None, 32 * n) for n in (3, 4, 5)})
    assert len(pyramid.trainable_variables) == 16
    for variable in pyramid.trainable_variables:
        values = ops.convert_to_numpy(variable)
        if variable.path.endswith("bias"):
            np.testing.assert_array_equal(values, 0)
        else:
            limit = math.sqrt(3 / np.prod(values.shape[:3]))
            assert 0.99 * limit < np.abs(values).max() <= limit
            assert values.std() == pytest.approx(limit / math.sqrt(3), rel=0.05)  # uniform


# Subnets: initial values


@pytest.mark.parametrize("prior", [None, 0.01, 0.2])
def test_subnet_starts_from_sigma_01_and_the_prior(prior):
    keras.utils.set_random_seed(0)
    subnet = built(Subnet(9, 20, channels=48, depth=4, prior=prior), [level(4, 4, 48)] * 5)
    layers = [*subnet.tower, subnet.final]
    assert len(layers) == 5 and len(subnet.trainable_variables) == 10
    for layer in layers:
        kernel = ops.convert_to_numpy(layer.kernel)
        assert kernel.shape[:2] == (3, 3)
        assert kernel.std() == pytest.approx(0.01, rel=0.03) and abs(kernel.mean()) < 3e-4
        assert np.abs(kernel).max() > 0.03  # Gaussian, neither uniform nor cut off
    for layer in subnet.tower:
        np.testing.assert_array_equal(ops.convert_to_numpy(layer.bias), 0)
        assert layer.activation is keras.activations.linear  # the subnet's own ReLU follows
    expected = 0 if prior is None else -math.log((1 - prior) / prior)
    np.testing.assert_allclose(ops.convert_to_numpy(subnet.final.bias), expected, rtol=1e-6)
    assert subnet.final.activation is keras.activations.linear
    if prior:
        np.testing.assert_allclose(ops.convert_to_numpy(ops.sigmoid(subnet.final.bias)), prior, rtol=1e-5)


def test_tower_convs_start_different():
    subnet = built(Subnet(1, 1, channels=8, depth=4), [level(4, 4, 8)])
    kernels = [ops.convert_to_numpy(conv.kernel) for conv in subnet.tower]
    assert all((kernels[i] != kernels[j]).any() for i in range(4) for j in range(i))


# Subnets: what they compute


def test_subnet_equals_numpy():
    rng = np.random.default_rng(2)
    subnet = built(Subnet(2, 3, channels=4, depth=2, prior=0.1), [level(None, None, 4)])
    for variable in subnet.trainable_variables:
        variable.assign(rng.normal(0, 0.5, variable.shape))
    levels = [rng.normal(size=(2, *size, 4)).astype("float32") for size in ((3, 4), (2, 2))]
    outputs = []
    for x in levels:
        for conv in subnet.tower:
            x = np.maximum(reference.conv(x, ops.convert_to_numpy(conv.kernel), ops.convert_to_numpy(conv.bias)), 0)
        x = reference.conv(x, ops.convert_to_numpy(subnet.final.kernel), ops.convert_to_numpy(subnet.final.bias))
        outputs.append(x.reshape(2, -1, 3))
    expected = np.concatenate(outputs, axis=1)
    assert expected.shape == (2, 2 * (12 + 4), 3)
    np.testing.assert_allclose(ops.convert_to_numpy(subnet(levels)), expected, atol=1e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_levels_share_their_weights(depth):
    subnet = Subnet(2, 3, channels=4, depth=depth)
    x = np.random.default_rng(3).normal(size=(1, 4, 4, 4)).astype("float32")
    output = ops.convert_to_numpy(subnet([x, x]))
    np.testing.assert_array_equal(output[:, :32], output[:, 32:])
    assert np.abs(output).max() > 0
    assert len(subnet.trainable_variables) == 2 * (depth + 1)


def test_output_order_is_the_anchors_order():
    """One lit position on one level lights the rows of the anchors around it, channel a * K + k in row a, value k."""
    height, width, per_cell, values = 64, 96, 9, 2
    subnet = built(Subnet(per_cell, values, channels=1, depth=0), [level(None, None, 1)])
    kernel = np.zeros((3, 3, 1, per_cell * values), "float32")
    kernel[1, 1, 0] = np.arange(1, per_cell * values + 1)
    subnet.final.kernel.assign(kernel)
    anchors = ops.convert_to_numpy(anchor_boxes(height, width))
    for lit, (row, column) in enumerate([(5, 7), (2, 5), (1, 0), (0, 1), (0, 0)]):
        levels = [np.zeros((1, -(-height // s), -(-width // s), 1), "float32") for s in STRIDES]
        levels[lit][0, row, column, 0] = 1
        output = ops.convert_to_numpy(subnet(levels))[0]
        assert output.shape == (len(anchors), values)
        rows = np.flatnonzero(output.any(axis=1))
        assert len(rows) == per_cell
        np.testing.assert_array_equal(output[rows].ravel(), np.arange(1, per_cell * values + 1))
        centers = (anchors[rows, :2] + anchors[rows, 2:]) / 2
        expected = np.tile([(column + 0.5) * STRIDES[lit], (row + 0.5) * STRIDES[lit]], (per_cell, 1))
        np.testing.assert_allclose(centers, expected, atol=1e-3)
        sides = anchors[rows, 2:] - anchors[rows, :2]
        np.testing.assert_allclose(sides.prod(axis=1).min(), (4 * STRIDES[lit]) ** 2, rtol=1e-5)


def test_outputs_are_float32_under_mixed_precision():
    for layer in (Subnet(1, 2, channels=4, depth=1, dtype="mixed_bfloat16"), Subnet(1, 2, channels=4, depth=1)):
        output = layer([np.zeros((1, 2, 2, 4), "float32")])
        assert keras.backend.standardize_dtype(output.dtype) == "float32"


# Serialization


@pytest.mark.parametrize("layer", [Subnet(9, 4, 16, 2, 0.05, name="s"), FeaturePyramid(12, name="f")])
def test_configs_rebuild_the_layer(layer):
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert type(again) is type(layer) and again.get_config() == layer.get_config()
