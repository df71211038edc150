"""The backbone: images to C3, C4 and C5, the last outputs of a ResNet's stages 3 to 5 (§4, Feature Pyramid Network).

One ResNet, a functional Keras model, serves every use of its kind. Its layers are named `stem`, `res2_0_conv1` ...
`res5_2_conv3`, the normalization after a conv `..._norm`, the conv on the shortcut of a stage's first block
`..._shortcut`. Other Keras models become backbones by `of_keras_model`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import layers, ops

from retinanet_keras.tensors import Tensor

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnext101_32x8d": (3, 4, 23, 3),  # Table 2's ResNeXt-101-FPN
}
GROUPS = 32  # of ResNeXt's 3x3 convs
STRIDES = {"c3": 8, "c4": 16, "c5": 32}

# Pixels are normalized as (RGB - MEAN) / STD. MEAN is that of the MSRA weights the paper starts from; they expect no
# division, which `load_imagenet` folds into the stem.
MEAN = (123.68, 116.779, 103.939)
STD = (58.395, 57.12, 57.375)
EPSILON = 1.001e-5  # of batch normalization: that of the MSRA weights as Keras carries them


def resnet(
    name: str = "resnet50",
    *,
    width: int = 64,
    norm: str = "group",
    stride_in: str | None = None,
    epsilon: float = EPSILON,
) -> keras.Model:
    """A ResNet without its classifier.

    Args:
        name: str. "resnet18", "resnet50", "resnet101", "resnet152" or "resnext101_32x8d".
        width: int. Channels of the stem; stage s has width * 2^(s-2) in its 3x3 convs, four times that at its output
            (resnet18: no such factor; resnext: four times that in both).
        norm: str. "frozen", batch normalization that is not trained at all; "batch", batch normalization that is
            trained; "group", group normalization.
        stride_in: str or None. "1x1" or "3x3", the convolution of a stage's first block that has the stride (resnet18:
            always its first); None: "1x1" as in the MSRA models, for resnext "3x3".
        epsilon: float. Epsilon of batch normalization.

    Returns:
        A functional keras.Model from normalized images [B, H, W, 3], H and W multiples of 32, to a dict of
        c3 [B, H/8, W/8, .], c4 [B, H/16, W/16, .] and c5 [B, H/32, W/32, .].
    """
    if name not in DEPTHS:
        raise ValueError(f"backbone: expected one of {', '.join(DEPTHS)}, got {name!r}")
    if norm not in ("frozen", "batch", "group"):
        raise ValueError(f'norm: expected "frozen", "batch" or "group", got {norm!r}')
    if stride_in not in (None, "1x1", "3x3"):
        raise ValueError(f'stride_in: expected "1x1", "3x3" or None, got {stride_in!r}')
    grouped = name.startswith("resnext")
    conv = functools.partial(_conv_norm, norm=norm, epsilon=epsilon)
    if name == "resnet18":
        block = functools.partial(_basic_block, conv)
    else:
        first = (stride_in or ("3x3" if grouped else "1x1")) == "1x1"
        block = functools.partial(_bottleneck, conv, stride_first=first, groups=GROUPS if grouped else 1)
    images = keras.Input((None, None, 3), name="images")
    x = conv(images, width, 7, 2, "stem")
    x = layers.ReLU(name="stem_relu")(x)
    x = layers.ZeroPadding2D(1, name="pool_pad")(x)  # zeros are as good as -inf after a ReLU
    x = layers.MaxPooling2D(3, 2, name="pool")(x)
    outputs = {}
    for stage, blocks in enumerate(DEPTHS[name], start=2):
        for i in range(blocks):
            stride = 2 if i == 0 and stage > 2 else 1
            x = block(x, width * 2 ** (stage - 2), stride, i == 0, f"res{stage}_{i}")
        if stage > 2:
            outputs[f"c{stage}"] = x
    return keras.Model(images, outputs, name=name)


def freeze(backbone: keras.Model, stages: int) -> None:
    """Freeze the first stages of a `resnet`: 0 none, 1 the stem, 2 also res2, ... 5 all. Detectron: 2."""
    frozen = ("stem", "res2", "res3", "res4", "res5")[:stages]
    for layer in backbone.layers:
        if layer.name.startswith(frozen):
            layer.trainable = False


def of_keras_model(model: keras.Model) -> keras.Model:
    """Turn a Keras model into a backbone: images to C3, C4 and C5.

    Args:
        model: keras.Model. A functional model of images [B, H, W, 3] with `pyramid_outputs` (KerasHub) or
            `pyramid_level_inputs` (KerasCV), or whose outputs are a dict of c3, c4 and c5.

    Returns:
        A keras.Model with the same layers and weights, to a dict of c3, c4 and c5 with strides of 8, 16 and 32.

    Raises:
        ValueError: If the model has no such outputs, or if they have other strides.
    """
    pyramid = getattr(model, "pyramid_outputs", None)
    if pyramid is None and hasattr(model, "pyramid_level_inputs"):
        pyramid = {level: model.get_layer(name).output for level, name in model.pyramid_level_inputs.items()}
    if pyramid is None:
        pyramid = model.output if isinstance(model.output, dict) else {}
    outputs = {f"c{n}": pyramid.get(f"c{n}", pyramid.get(f"P{n}")) for n in (3, 4, 5)}
    if any(output is None for output in outputs.values()):
        raise ValueError(
            "backbone: expected a Keras model with outputs c3, c4 and c5 (a dict), `pyramid_outputs` (KerasHub) or "
            f"`pyramid_level_inputs` (KerasCV) of P3, P4 and P5; {model.name} has {sorted(pyramid) or 'none of them'}"
        )
    inputs = model.input
    if isinstance(inputs, dict) and len(inputs) == 1:
        (inputs,) = inputs.values()
    backbone = keras.Model(inputs, outputs, name=model.name)
    side = 256
    shapes = backbone.compute_output_shape((1, side, side, 3))
    strides = {name: side // shape[1] for name, shape in shapes.items()}
    if strides != STRIDES:
        raise ValueError(f"backbone: expected strides {STRIDES}, {model.name} has {strides}")
    return backbone


def _bottleneck(
    conv: Callable[..., Tensor],
    x: Tensor,
    channels: int,
    stride: int,
    first: bool,
    name: str,
    *,
    stride_first: bool,
    groups: int,
) -> Tensor:
    """1x1, 3x3, 1x1 convolutions and a shortcut; a grouped 3x3 and the 1x1 before it have four times the channels."""
    inner = channels * (1 if groups == 1 else 4)
    shortcut = conv(x, 4 * channels, 1, stride, f"{name}_shortcut") if first else x
    x = conv(x, inner, 1, stride if stride_first else 1, f"{name}_conv1")
    x = layers.ReLU(name=f"{name}_relu1")(x)
    x = conv(x, inner, 3, 1 if stride_first else stride, f"{name}_conv2", groups=groups)
    x = layers.ReLU(name=f"{name}_relu2")(x)
    x = conv(x, 4 * channels, 1, 1, f"{name}_conv3")
    return layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, shortcut]))


def _basic_block(conv: Callable[..., Tensor], x: Tensor, channels: int, stride: int, first: bool, name: str) -> Tensor:
    """Two 3x3 convolutions and a shortcut."""
    shortcut = conv(x, channels, 1, stride, f"{name}_shortcut") if first and stride > 1 else x
    x = layers.ReLU(name=f"{name}_relu1")(conv(x, channels, 3, stride, f"{name}_conv1"))
    x = conv(x, channels, 3, 1, f"{name}_conv2")
    return layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, shortcut]))


def _conv_norm(
    x: Tensor, channels: int, size: int, stride: int, name: str, *, norm: str, epsilon: float, groups: int = 1
) -> Tensor:
    """A convolution without bias, padded equally on all sides, and its normalization.

    TensorFlow's "same" pads a strided convolution at the right and bottom only, one pixel off from what released
    weights were trained with.
    """
    padding = "same"
    if stride > 1 and size == 1 and x.shape[-1] < 16:
        # The same values another way: oneDNN's gradient of this conv on CPUs writes past its buffer
        # (uxlfoundation/oneDNN#6035).
        x = layers.AveragePooling2D(1, stride, name=f"{name}_stride")(x)
        stride = 1
    if stride > 1 and size > 1:
        x = layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
        padding = "valid"
    kind = layers.Conv2D if groups == 1 else GroupedConv2D
    x = kind(
        channels,
        size,
        stride,
        padding,
        groups=groups,
        use_bias=False,
        kernel_initializer=keras.initializers.HeNormal(),
        name=name,
    )(x)
    if norm == "group":
        groups = math.gcd(channels, min(32, channels // 2))
        return layers.GroupNormalization(groups, epsilon=1e-5, name=f"{name}_norm")(x)
    # The momentum of the ResNet authors: Keras's .99 has not converged by the end of a short training.
    return BatchNorm(momentum=0.9, epsilon=epsilon, trainable=norm == "batch", name=f"{name}_norm")(x)


@keras.saving.register_keras_serializable("retinanet_keras")
class GroupedConv2D(layers.Conv2D):
    """Keras's grouped convolution without bias, at a usable speed: the same weights and values.

    Keras compiles it with XLA on TensorFlow, whose gradient for CPUs takes a hundred times as long as TensorFlow's own
    kernel. Within XLA on a CPU (`split`; on JAX always), and where TensorFlow has no such kernel, there is one
    convolution for each group.
    """

    split = False

    def call(self, inputs: Tensor) -> Tensor:
        backend = keras.backend.backend()
        if backend == "jax":
            import jax

            split = jax.default_backend() == "cpu"
        else:
            split = self.split or (backend == "tensorflow" and not _grouped_gradients_exist(self.compute_dtype))
        if split:
            parts = zip(
                ops.split(inputs, self.groups, axis=-1), ops.split(self.kernel, self.groups, axis=-1), strict=True
            )
            return ops.concatenate([ops.conv(x, k, self.strides, self.padding) for x, k in parts], axis=-1)
        if backend != "tensorflow":
            return super().call(inputs)
        import tensorflow as tf

        return tf.nn.conv2d(inputs, ops.convert_to_tensor(self.kernel), self.strides, self.padding.upper())


_grouped: dict[str, bool] = {}


def _grouped_gradients_exist(dtype: str) -> bool:
    """Whether TensorFlow has gradients of grouped convolutions here: on CPUs only some of oneDNN's kernels do."""
    import tensorflow as tf

    if dtype not in _grouped:
        shape, kernel_shape = (1, 3, 3, 4), (3, 3, 2, 4)
        with tf.init_scope():  # run now, although a graph is being traced
            if not tf.executing_eagerly():  # within a graph of TensorFlow 1 nothing can be run
                return False
            x, kernel, same = (
                tf.ones(shape, dtype),
                tf.ones(kernel_shape, dtype),
                {"strides": [1] * 4, "padding": "SAME"},
            )
            try:
                tf.raw_ops.Conv2DBackpropInput(input_sizes=shape, filter=kernel, out_backprop=x, **same)
                tf.raw_ops.Conv2DBackpropFilter(input=x, filter_sizes=kernel_shape, out_backprop=x, **same)
                _grouped[dtype] = True
            except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
                _grouped[dtype] = False
    return _grouped[dtype]


def split_groups(backbone: keras.Model) -> None:
    """Split the grouped convolutions of a backbone by group, which is fast within XLA on a CPU."""
    for layer in backbone.layers:
        if isinstance(layer, GroupedConv2D):
            layer.split = True


@keras.saving.register_keras_serializable("retinanet_keras")
class BatchNorm(layers.BatchNormalization):
    """Keras's batch normalization over the last axis, by TensorFlow's fused kernel in training.

    The same values from one pass where Keras makes several: six times as fast on a CPU.
    """

    def call(self, inputs: Tensor, training: bool | None = None, mask: Any = None) -> Tensor:
        if not (training and self.trainable and keras.backend.backend() == "tensorflow"):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma.value, self.beta.value, epsilon=self.epsilon, is_training=True
        )
        count = tf.cast(tf.size(inputs) / tf.size(mean), variance.dtype)
        variance *= (count - 1.0) / count  # the kernel's is the unbiased estimate, Keras keeps the biased one
        for average, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            average.assign(average * self.momentum + new * (1.0 - self.momentum))
        return outputs
