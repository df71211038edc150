"""The backbone: shapes, padding, freezing, grouped convolutions, and Keras models of other libraries."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from retinanet_keras import RetinaNet
from retinanet_keras import backbone as backbones

pytestmark = pytest.mark.eager


@pytest.mark.parametrize("name, channels", [("resnet18", (16, 32, 64)), ("resnet50", (64, 128, 256))])
@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_shapes(name, channels, norm):
    model = backbones.resnet(name, width=8, norm=norm)
    features = model(np.zeros((2, 64, 96, 3), "float32"))
    assert {key: tuple(value.shape) for key, value in features.items()} == {
        "c3": (2, 8, 12, channels[0]), "c4": (2, 4, 6, channels[1]), "c5": (2, 2, 3, channels[2])
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, convs",
    [("resnet18", 17), ("resnet50", 49), ("resnet101", 100), pytest.param("resnet152", 151, marks=pytest.mark.slow)],
)
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


# Errors


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="resnet152, resnext101_32x8d, got 'resnet34'"):
        backbones.resnet("resnet34")
    with pytest.raises(ValueError, match='"frozen", "batch" or "group", got \'layer\''):
        backbones.resnet(norm="layer")
    with pytest.raises(ValueError, match='"1x1", "3x3" or None, got 3'):
        backbones.resnet(stride_in=3)


# Where the stride is, and ResNeXt


@pytest.mark.parametrize("name, stride_in, expected", [
    ("resnet50", None, {"conv1": 2, "conv2": 1}), ("resnet50", "1x1", {"conv1": 2, "conv2": 1}),
    ("resnet50", "3x3", {"conv1": 1, "conv2": 2}),
    pytest.param("resnext101_32x8d", None, {"conv1": 1, "conv2": 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_stride_is_in(name, stride_in, expected):
    model = backbones.resnet(name, stride_in=stride_in)
    for stage in (3, 4, 5):
        assert {conv: model.get_layer(f"res{stage}_0_{conv}").strides[0] for conv in expected} == expected
        assert model.get_layer(f"res{stage}_0_shortcut").strides[0] == 2


def test_resnext_has_its_papers_shape():
    """ResNeXt-101-32x8d: 88,791,336 weights with the classifier's 2048 x 1000 + 1000, without statistics."""
    model = backbones.resnet("resnext101_32x8d", norm="batch")
    assert sum(v.shape.num_elements() for v in model.trainable_variables) == 88_791_336 - 2_049_000
    assert tuple(model.get_layer("res2_0_conv2").kernel.shape) == (3, 3, 8, 256)
    assert tuple(model.get_layer("res5_2_conv2").kernel.shape) == (3, 3, 64, 2048)


@pytest.mark.eager(False)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("stride, padding", [(1, "same"), (2, "valid")])
def test_a_grouped_convolution_is_the_same_either_way(stride, padding, jit):
    """One kernel or one for each group: NumPy's values, and the same gradients."""
    rng, groups = np.random.default_rng(0), 8
    x = tf.constant(rng.normal(size=(2, 7, 9, 2 * groups)).astype("float32"))
    layer = backbones.GroupedConv2D(3 * groups, 3, stride, padding, groups=groups, use_bias=False)
    layer.build(x.shape)
    found = {}
    for layer.split in (False, True):

        @tf.function(jit_compile=jit)
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
                total = tf.reduce_sum(y**2)
            return y, *tape.gradient(total, [x, layer.kernel.value])

        found[layer.split] = [value.numpy() for value in step(x)]
    kernel = ops.convert_to_numpy(layer.kernel)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]) if padding == "same" else x.numpy()
    for group in range(groups):
        mine = slice(3 * group, 3 * group + 3)
        windows = np.lib.stride_tricks.sliding_window_view(padded[..., 2 * group : 2 * group + 2], (3, 3), (1, 2))
        expected = np.einsum("bhwcij,ijcd->bhwd", windows[:, ::stride, ::stride], kernel[..., mine])
        np.testing.assert_allclose(found[False][0][..., mine], expected, atol=1e-5)
    for whole, split in zip(found[False], found[True], strict=True):
        np.testing.assert_allclose(whole, split, atol=1e-5 * np.abs(split).max())
    # The derivative of sum(y^2) by the kernel, in NumPy, of the last group.
    by_kernel = 2 * np.einsum("bhwcij,bhwd->ijcd", windows[:, ::stride, ::stride], found[False][0][..., mine])
    np.testing.assert_allclose(found[False][2][..., mine], by_kernel, atol=1e-5 * np.abs(by_kernel).max())


@pytest.mark.eager(False)
def test_a_grouped_convolution_is_split_only_where_tensorflow_has_no_gradient_of_it():
    """Asked by trying it, also while a graph is traced."""
    x, kernel = tf.ones((1, 5, 5, 4)), tf.Variable(tf.ones((3, 3, 2, 4)))

    @tf.function
    def exists_in_a_graph():
        return tf.constant(backbones._grouped_gradients_exist("float32"))

    backbones._grouped.clear()
    with tf.Graph().as_default():
        assert not backbones._grouped_gradients_exist("float32")  # nothing can be tried there
    exists = bool(exists_in_a_graph())
    assert exists == backbones._grouped_gradients_exist("float32")
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(tf.nn.conv2d(x, kernel, 1, "SAME"))
    try:
        tape.gradient(y, kernel)
        differentiable = True
    except tf.errors.InvalidArgumentError:
        differentiable = False
    assert exists == differentiable


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_a_grouped_convolution_has_a_gradient_in_every_precision(dtype):
    """On a processor that does not compute the type oneDNN leaves it to a kernel without groups."""
    layer = backbones.GroupedConv2D(32, 3, 1, "same", groups=8, use_bias=False, dtype=dtype)
    x = tf.random.stateless_normal((1, 6, 6, 16), (0, 1))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(tf.cast(layer(x), "float32") ** 2)
    assert tf.reduce_all(tf.abs(tape.gradient(total, layer.kernel.value)) > 0)


@pytest.mark.eager(False)
@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_a_step_of_resnext(jit):
    """Its convolutions have 32 groups; every weight that is trained moves."""
    keras.utils.set_random_seed(0)
    model = RetinaNet(2, "resnext101_32x8d", width=16, norm="group", fpn_channels=16, head_depth=1)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=jit)
    kernels = [v for v in model.trainable_variables if v.path.endswith("conv2/kernel")]
    before = [v.numpy() for v in kernels]
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype("uint8")
    truth = {"boxes": np.float32([[[8, 8, 50, 40]]]), "labels": np.array([[1]])}
    assert np.isfinite(model.train_on_batch(images, truth)).all()
    assert len(kernels) == 33 and all((a != b.numpy()).any() for a, b in zip(before, kernels, strict=True))


def test_the_epsilon_is_that_of_every_norm():
    model = backbones.resnet("resnet18", width=8, norm="frozen", epsilon=0.25)
    assert {layer.epsilon for layer in model.layers if isinstance(layer, backbones.BatchNorm)} == {0.25}


# Backbones of other libraries


def pyramid_of(model):
    """The strides and channels a backbone has, and one forward pass of RetinaNet on it."""
    net = RetinaNet(3, model, fpn_channels=16, head_depth=1)
    features = net.backbone(np.zeros((1, 64, 96, 3), "float32"))
    assert {name: tuple(value.shape[1:3]) for name, value in features.items()} == {
        "c3": (8, 12), "c4": (4, 6), "c5": (2, 3)
    }  # fmt: skip
    return net


def of_keras_cv():
    import keras_cv

    return keras_cv.models.ResNetBackbone(
        stackwise_filters=[8, 16, 32, 64], stackwise_blocks=[1, 1, 1, 1], stackwise_strides=[1, 2, 2, 2],
        include_rescaling=False, block_type="block",
    )  # fmt: skip


def of_keras_hub():
    import keras_hub

    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64], input_conv_kernel_sizes=[7], stackwise_num_filters=[64, 16, 16, 16],
        stackwise_num_blocks=[1, 1, 1, 1], stackwise_num_strides=[1, 2, 2, 2], block_type="basic_block",
        use_pre_activation=False,
    )  # fmt: skip


def of_keras():
    images = keras.Input((None, None, 3))
    x, outputs = images, {}
    for level in range(1, 6):
        x = keras.layers.Conv2D(8, 3, 2, "same", activation="relu")(x)
        outputs[f"c{level}"] = x
    return keras.Model(images, outputs)


@pytest.mark.parametrize(
    "make",
    [pytest.param(of_keras_cv, marks=pytest.mark.slow), pytest.param(of_keras_hub, marks=pytest.mark.slow), of_keras],
)
def test_a_model_of_another_library_goes_in_as_it_is(make, tmp_path):
    keras.utils.set_random_seed(0)
    model = make()
    net = pyramid_of(model)
    before = ops.convert_to_numpy(model.trainable_variables[0])
    net.compile(keras.optimizers.SGD(0.01))
    truth = {"boxes": np.float32([[[8, 8, 50, 40]]]), "labels": np.array([[1]])}
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3)).astype("uint8")
    assert np.isfinite(net.fit(images, truth, verbose=0).history["loss"][0])
    assert (ops.convert_to_numpy(model.trainable_variables[0]) != before).any()  # the weights are the model's own

    net.save(tmp_path / "net.keras")
    again = keras.models.load_model(tmp_path / "net.keras")
    for name, value in net(images).items():
        np.testing.assert_allclose(again(images)[name], value, atol=1e-5)


def test_a_model_without_the_three_levels_is_refused():
    images = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(8, 3, 2, "same")(images)
    with pytest.raises(ValueError, match="c3, c4 and c5"):
        RetinaNet(3, keras.Model(images, x))
    with pytest.raises(ValueError, match="expected strides .* has {'c3': 2, 'c4': 2, 'c5': 2}"):
        RetinaNet(3, keras.Model(images, {"c3": x, "c4": x, "c5": x}))
    with pytest.raises(ValueError, match="freeze_at"):
        RetinaNet(3, of_keras(), freeze_at=2)
