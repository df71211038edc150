"""§4, Classification Subnet and Box Regression Subnet: one fully convolutional tower each, shared by all levels."""

import math

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("retinanet_keras")
class Subnet(layers.Layer):
    """3x3 convs with ReLU, then a 3x3 conv to `per_cell` x `values` channels.

    All convs start from a Gaussian of sigma .01; their bias from 0, or, where `prior` is given, that of the last from
    -log((1 - prior) / prior), so that every anchor starts as foreground with that probability (§4.1, Initialization).
    `norm`: None as the paper's, or "group", group normalization in place of the tower's biases (torchvision's second).

    Call: list of levels [B, H_l, W_l, C] -> float32 [B, A, values], A = sum of H_l x W_l x per_cell in the anchors'
    order.
    """

    def __init__(self, per_cell, values, channels=256, depth=4, prior=None, norm=None, **kwargs):
        super().__init__(**kwargs)
        if norm not in (None, "group"):
            raise ValueError(f'norm: expected None or "group", got {norm!r}')
        self.norm = norm
        self.per_cell, self.values, self.channels, self.depth, self.prior = per_cell, values, channels, depth, prior
        bias = 0.0 if prior is None else -math.log((1 - prior) / prior)
        self.tower = [_conv(channels, f"conv{i}", use_bias=norm is None) for i in range(depth)]
        groups = math.gcd(channels, 32)
        self.norms = [
            layers.GroupNormalization(groups, epsilon=1e-5, name=f"norm{i}") for i in range(depth if norm else 0)
        ]
        self.final = _conv(per_cell * values, "final", bias=bias)

    def build(self, shapes):
        shape = tuple(shapes[0])
        for conv in self.tower:
            conv.build(shape)
            shape = (*shape[:-1], self.channels)
        for norm in self.norms:
            norm.build(shape)
        self.final.build(shape)
        self.built = True

    def call(self, levels):
        outputs = []
        for x in levels:
            for i, conv in enumerate(self.tower):
                x = conv(x)
                x = ops.relu(self.norms[i](x) if self.norms else x)
            x = self.final(x)
            outputs.append(ops.reshape(x, (ops.shape(x)[0], -1, self.values)))  # [B, A_l, values]
        return ops.cast(ops.concatenate(outputs, axis=1), "float32")

    def get_config(self):
        settings = {name: getattr(self, name) for name in ("per_cell", "values", "channels", "depth", "prior", "norm")}
        return {**super().get_config(), **settings}


def _conv(channels, name, bias=0.0, **kwargs):
    """A conv with initializers of its own: Keras draws equal values from one shared instance."""
    return layers.Conv2D(
        channels, 3, padding="same", name=name,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        bias_initializer=keras.initializers.Constant(bias), **kwargs,
    )  # fmt: skip
