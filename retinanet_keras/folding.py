"""A faster graph of a RetinaNet's detection, with batch normalization folded into convs; values as `RetinaNet.detect`.

- Batch normalization is folded: its scale into the kernel of the preceding conv, its shift into that conv's bias.
  TensorFlow then fuses a conv, its bias and the ReLU after it into one kernel.
- The kernels of most of the work are constants, which oneDNN converts to its own layout once. With variables it uses
  another algorithm for single images, which without AVX-512 takes up to three times as long. The late kernels, with
  many weights and little work each, stay variables: a constant takes many times its size in memory, and time to load.
- Convs do their own padding, levels are never concatenated, and the sigmoid is computed only for selected logits.

The model itself is not modified and can be trained further.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from retinanet_keras import anchors, detections
from retinanet_keras.tensors import round_up

CONSTANTS = 9_000_000  # weights of the backbone: those of a ResNet-50 before res5


def detect_function(model: keras.Model, precision: str | None = None) -> Callable[[Any, Any], dict[str, tf.Tensor]]:
    """`RetinaNet._detect_in_graph` with the current weights of a model.

    Args:
        model: keras.Model. A backbone passed to it as a Keras model is used unchanged, without folding.
        precision: "float32" or "bfloat16", that of convolutions. None: the model's own.

    Returns:
        A function for one graph: images [B, H, W, 3] of 0..255 and sizes [B, 2], height and width before padding, to
        the dict of `RetinaNet.detect`.
    """
    network, decode = halves(model, precision)
    return lambda images, sizes: decode(network(images, sizes), images, sizes)


def bfloat16_time(side: int = 1024, turns: int = 5) -> float:
    """The time of a bfloat16 matrix product on this machine relative to a float32 one; above 1 is slower."""
    seconds = []
    for dtype in (tf.float32, tf.bfloat16):
        a = tf.ones((side, side), dtype)
        taken = []
        for _ in range(turns):
            start = time.perf_counter()
            tf.matmul(a, a).numpy()
            taken.append(time.perf_counter() - start)
        seconds.append(min(taken))
    return seconds[1] / seconds[0]


def halves(
    model: keras.Model, precision: str | None = None
) -> tuple[Callable[[Any, Any], dict[str, Any]], Callable[[Any, Any, Any], dict[str, tf.Tensor]]]:
    """`detect_function` as two functions: `network(images, sizes)`, and `decode(its outputs, images, sizes)`."""
    dtype = tf.as_dtype(precision or model.compute_dtype)
    backbone, pyramid = _backbone(model, dtype), _pyramid(model.pyramid, dtype)
    class_subnet, box_subnet = (_subnet(subnet, dtype) for subnet in (model.class_subnet, model.box_subnet))
    settings = dataclasses.asdict(model.detection)
    multiple = settings.pop("pad_multiple")

    def network(images, sizes):
        x = model.normalize(images, multiple, tf.cast(sizes, tf.float32))
        levels = pyramid(backbone(tf.cast(x, dtype)))
        return {"logits": class_subnet(levels), "deltas": box_subnet(levels)}

    def decode(outputs, images, sizes):
        sizes = tf.cast(sizes, tf.float32)
        height, width = (round_up(side, multiple) for side in tf.unstack(tf.shape(images)[1:3]))
        boxes = anchors.anchors_by_level(height, width, model.anchors)
        return detections.decode_levels(
            outputs["logits"], outputs["deltas"], boxes, sizes[:, 0], sizes[:, 1], **settings
        )

    return network, decode


def compiled(model: keras.Model, precision: str | None = None) -> Callable[[Any, Any], dict[str, tf.Tensor]]:
    """`detect_function` as a compiled function of uint8 images and sizes, called as `RetinaNet.detect`."""
    spec = [tf.TensorSpec([None, None, None, 3], tf.uint8), tf.TensorSpec([None, 2], tf.float32)]
    graph = tf.function(detect_function(model, precision), input_signature=spec, autograph=False)
    return lambda images, sizes: graph(images, tf.cast(sizes, tf.float32))


def _backbone(model: keras.Model, dtype: tf.DType) -> Callable[[Any], dict[str, tf.Tensor]]:
    """A function from normalized images [B, H, W, 3] to a dict of c3, c4 and c5."""
    net = model.backbone
    if not model.builtin_backbone:
        return lambda x: {name: tf.cast(c, dtype) for name, c in net(x, training=False).items()}
    norms = {id(layer.input): layer for layer in net.layers if isinstance(layer, keras.layers.BatchNormalization)}
    convs, weights = {}, 0
    for layer in net.layers:  # from the input on: those with the most work for each weight come first
        if isinstance(layer, keras.layers.Conv2D):
            weights += layer.count_params()
            convs[layer.name] = _Conv(layer, dtype, norms.get(id(layer.output)), constant=weights <= CONSTANTS)

    def run(layer, inputs):
        if layer.name in convs:
            return convs[layer.name](*inputs)
        if isinstance(layer, (keras.layers.BatchNormalization, keras.layers.ZeroPadding2D)):
            return inputs[0]  # done by the conv before, or by the conv or pooling after it
        if isinstance(layer, keras.layers.ReLU):
            return tf.nn.relu(inputs[0])
        if isinstance(layer, keras.layers.Add):
            return inputs[0] + inputs[1]
        if isinstance(layer, keras.layers.MaxPooling2D):
            return tf.nn.max_pool2d(inputs[0], layer.pool_size, layer.strides, _explicit(layer.pool_size[0]))
        return tf.cast(layer(*inputs), dtype)  # group normalization, striding of thin layers

    def forward(x):
        values = {id(net.input): x}
        for layer in net.layers[1:]:  # inputs first
            inputs = layer.input if isinstance(layer.input, list) else [layer.input]
            values[id(layer.output)] = run(layer, [values[id(tensor)] for tensor in inputs])
        return {name: values[id(tensor)] for name, tensor in net.output.items()}

    return forward


def _pyramid(pyramid: Any, dtype: tf.DType) -> Callable[[dict[str, tf.Tensor]], list[tf.Tensor]]:
    """A function from c3, c4 and c5 to p3 ... p7, as `FeaturePyramid`."""
    laterals = {name: _Conv(layer, dtype, constant=True) for name, layer in pyramid.laterals.items()}
    outputs = {name: _Conv(layer, dtype, constant=True) for name, layer in pyramid.outputs_.items()}
    to_p6, to_p7 = _Conv(pyramid.p6, dtype), _Conv(pyramid.p7, dtype)

    def doubled(x):
        return tf.raw_ops.ResizeNearestNeighbor(images=x, size=2 * tf.shape(x)[1:3])

    def forward(features):
        merged = {"c5": laterals["c5"](features["c5"])}
        for name, above in (("c4", "c5"), ("c3", "c4")):
            merged[name] = laterals[name](features[name]) + doubled(merged[above])
        levels = [outputs[name](merged[name]) for name in ("c3", "c4", "c5")]
        p6 = to_p6(features["c5"] if pyramid.p6_source == "c5" else levels[-1])
        return [*levels, p6, to_p7(tf.nn.relu(p6))]

    return forward


def _subnet(subnet: Any, dtype: tf.DType) -> Callable[[list[tf.Tensor]], list[tf.Tensor]]:
    """A function from p3 ... p7 to a list of float32 [B, A_l, values], as `Subnet`."""
    tower = [_Conv(layer, dtype, constant=True) for layer in subnet.tower]
    final = _Conv(subnet.final, dtype, constant=True)

    def forward(levels):
        outputs = []
        for x in levels:
            for i, conv in enumerate(tower):
                x = conv(x)
                x = tf.nn.relu(tf.cast(subnet.norms[i](x), dtype) if subnet.norms else x)
            x = tf.reshape(final(x), (tf.shape(x)[0], -1, subnet.values))
            outputs.append(tf.cast(x, tf.float32))
        return outputs

    return forward


class _Conv:
    """A conv with its own copy of the weights, the batch normalization after it folded in."""

    def __init__(self, layer: Any, dtype: tf.DType, norm: Any = None, constant: bool = False) -> None:
        kernel = layer.kernel.numpy().astype("float64")
        bias = layer.bias.numpy() if layer.use_bias else None
        if norm is not None:
            scale = norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy().astype("float64") + norm.epsilon)
            kernel, bias = kernel * scale, norm.beta.numpy() - norm.moving_mean.numpy() * scale
        weights = [None if w is None else w.astype(dtype.as_numpy_dtype) for w in (kernel, bias)]
        if not constant:
            weights = [None if w is None else tf.Variable(w, trainable=False) for w in weights]
        self.weights, self.constant, self.graph = weights, constant, None
        self.strides, self.grouped = layer.strides, layer.groups > 1
        self.padding = _explicit(layer.kernel_size[0]) if layer.strides != (1, 1) else "SAME"

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        kernel, bias = self._constants() if self.constant else self.weights
        x = tf.nn.conv2d(x, kernel, self.strides, self.padding)
        if bias is None:
            return x
        if self.grouped:  # a fused conv and bias supports groups only in oneDNN
            return x - (-bias)
        return tf.nn.bias_add(x, bias)

    def _constants(self) -> list[tf.Tensor | None]:
        """The weights as constants, created once in each graph, however many levels use them."""
        graph = tf.compat.v1.get_default_graph()
        if graph is not self.graph:
            self.graph, self.tensors = graph, [None if w is None else tf.constant(w) for w in self.weights]
        return self.tensors


def _explicit(size: int) -> list[list[int]] | str:
    """Symmetric padding, which TensorFlow's "SAME" is not with a stride."""
    side = [(size - 1) // 2] * 2
    return [[0, 0], side, side, [0, 0]] if size > 1 else "VALID"
