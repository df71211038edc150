"""The backbone: images to C3, C4 and C5, the last outputs of a ResNet's stages 3 to 5 (§4, Feature Pyramid Network).

One ResNet, a functional Keras model, serves every use. Its layers are named `stem`, `res2_0_conv1` ... `res5_2_conv3`,
the normalisation after a conv `..._norm`, the conv on the shortcut of a stage's first block `..._shortcut`.
"""

import math

import keras
import numpy as np
from keras import layers

from retinanet_keras.config import UserError

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
STRIDES = {"c3": 8, "c4": 16, "c5": 32}

# Pixels are normalised as (RGB - MEAN) / STD. MEAN is that of the MSRA weights the paper starts from; they expect no
# division, which `load_imagenet` folds into the stem.
MEAN = (123.68, 116.779, 103.939)
STD = (58.395, 57.12, 57.375)
EPSILON = 1.001e-5  # of batch normalisation: that of the MSRA weights as Keras carries them


def resnet(name="resnet50", *, width=64, norm="group"):
    """A ResNet without its classifier.

    Args:
        name: "resnet18", "resnet50", "resnet101" or "resnet152".
        width: channels of the stem; stage s has width * 2^(s-2) in its 3x3 convs, four times that at its output
            (resnet18: no such factor).
        norm: "frozen", batch normalisation that keeps its statistics, scales and shifts; "batch", trained;
            "group", group normalisation.

    Returns:
        a functional keras.Model from normalised images [B, H, W, 3], H and W multiples of 32, to a dict of
        c3 [B, H/8, W/8, .], c4 [B, H/16, W/16, .] and c5 [B, H/32, W/32, .].
    """
    if name not in DEPTHS:
        raise ValueError(f"backbone: expected one of {', '.join(DEPTHS)}, got {name!r}")
    if norm not in ("frozen", "batch", "group"):
        raise ValueError(f'norm: expected "frozen", "batch" or "group", got {norm!r}')
    block = _basic_block if name == "resnet18" else _bottleneck
    images = keras.Input((None, None, 3), name="images")
    x = _conv_norm(images, width, 7, 2, norm, "stem")
    x = layers.ReLU(name="stem_relu")(x)
    x = layers.ZeroPadding2D(1, name="pool_pad")(x)  # zeros are as good as -inf after a ReLU
    x = layers.MaxPooling2D(3, 2, name="pool")(x)
    outputs = {}
    for stage, blocks in enumerate(DEPTHS[name], start=2):
        for i in range(blocks):
            stride = 2 if i == 0 and stage > 2 else 1
            x = block(x, width * 2 ** (stage - 2), stride, i == 0, norm, f"res{stage}_{i}")
        if stage > 2:
            outputs[f"c{stage}"] = x
    return keras.Model(images, outputs, name=name)


def freeze(backbone, stages):
    """Stop training the first stages of a `resnet`: 0 none, 1 the stem, 2 also res2, ... 5 all. Detectron: 2."""
    frozen = ("stem", "res2", "res3", "res4", "res5")[:stages]
    for layer in backbone.layers:
        if layer.name.startswith(frozen):
            layer.trainable = False


def load_imagenet(backbone, source=None):
    """Copy ImageNet weights of `keras.applications` (the MSRA weights of §4.1) into a `resnet`.

    Args:
        backbone: a `resnet` of 50, 101 or 152 layers, width 64, norm "frozen" or "batch".
        source: a keras.applications ResNet of the same depth; None downloads it.
    """
    if source is None:
        makers = {"resnet50": "ResNet50", "resnet101": "ResNet101", "resnet152": "ResNet152"}
        if backbone.name not in makers:
            raise ValueError(f"ImageNet weights exist for {', '.join(makers)}, not for {backbone.name}")
        try:
            source = getattr(keras.applications, makers[backbone.name])(weights="imagenet", include_top=False)
        except Exception as error:  # Keras raises a bare Exception where a download fails
            raise UserError(
                f"The ImageNet weights of {backbone.name} could not be downloaded ({error}). Connect to the network "
                "once (they are kept in ~/.keras), or set model.weights to a file, or to null for random weights"
            ) from error
    _copy(source, "conv1_conv", "conv1_bn", backbone, "stem", scale=1.0 / np.array(STD), flip=True)
    for stage, blocks in enumerate(DEPTHS[backbone.name], start=2):
        for i in range(blocks):
            theirs, ours = f"conv{stage}_block{i + 1}", f"res{stage}_{i}"
            for number in (1, 2, 3):
                _copy(source, f"{theirs}_{number}_conv", f"{theirs}_{number}_bn", backbone, f"{ours}_conv{number}")
            if i == 0:
                _copy(source, f"{theirs}_0_conv", f"{theirs}_0_bn", backbone, f"{ours}_shortcut")


def _copy(source, conv, norm, backbone, name, scale=None, flip=False):
    """One convolution and its normalisation; keras.applications' conv bias goes into the moving mean."""
    kernel, bias = source.get_layer(conv).get_weights()
    gamma, beta, mean, variance = source.get_layer(norm).get_weights()
    if flip:  # trained on BGR, without division; the model gives RGB / STD
        kernel = kernel[:, :, ::-1] / scale[None, None, :, None]
    backbone.get_layer(name).set_weights([kernel])
    backbone.get_layer(f"{name}_norm").set_weights([gamma, beta, mean - bias, variance])


def _bottleneck(x, channels, stride, first, norm, name):
    """1x1, 3x3, 1x1 and a shortcut; the stride is in the first 1x1, as in the MSRA models."""
    shortcut = _conv_norm(x, 4 * channels, 1, stride, norm, f"{name}_shortcut") if first else x
    x = layers.ReLU(name=f"{name}_relu1")(_conv_norm(x, channels, 1, stride, norm, f"{name}_conv1"))
    x = layers.ReLU(name=f"{name}_relu2")(_conv_norm(x, channels, 3, 1, norm, f"{name}_conv2"))
    x = _conv_norm(x, 4 * channels, 1, 1, norm, f"{name}_conv3")
    return layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, shortcut]))


def _basic_block(x, channels, stride, first, norm, name):
    """Two 3x3 and a shortcut."""
    shortcut = _conv_norm(x, channels, 1, stride, norm, f"{name}_shortcut") if first and stride > 1 else x
    x = layers.ReLU(name=f"{name}_relu1")(_conv_norm(x, channels, 3, stride, norm, f"{name}_conv1"))
    x = _conv_norm(x, channels, 3, 1, norm, f"{name}_conv2")
    return layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, shortcut]))


def _conv_norm(x, channels, size, stride, norm, name):
    """A convolution without bias, padded alike on all sides, and its normalisation.

    TensorFlow's "same" pads a strided convolution at the right and bottom only, one pixel off from what released
    weights were trained with.
    """
    padding = "same"
    if stride > 1 and size == 1 and x.shape[-1] < 16:
        # The same by other means: oneDNN's gradient of this conv on CPUs writes past its buffer
        # (uxlfoundation/oneDNN#6035).
        x = layers.AveragePooling2D(1, stride, name=f"{name}_stride")(x)
        stride = 1
    if stride > 1 and size > 1:
        x = layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
        padding = "valid"
    x = layers.Conv2D(
        channels, size, stride, padding, use_bias=False, kernel_initializer=keras.initializers.HeNormal(), name=name
    )(x)
    if norm == "group":
        return layers.GroupNormalization(math.gcd(channels, min(32, channels // 2)), epsilon=1e-5, name=f"{name}_norm")(
            x
        )
    # The momentum of the ResNet authors: Keras's .99 has not settled by the end of a short training.
    return BatchNorm(momentum=0.9, epsilon=EPSILON, trainable=norm == "batch", name=f"{name}_norm")(x)


@keras.saving.register_keras_serializable("retinanet_keras")
class BatchNorm(layers.BatchNormalization):
    """Keras's batch normalisation over the last axis, by TensorFlow's fused kernel in training.

    The same values from one pass where Keras makes several: six times as fast on a CPU.
    """

    def call(self, inputs, training=None, mask=None):
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
