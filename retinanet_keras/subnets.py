"""§4, Classification Subnet and Box Regression Subnet: one fully convolutional tower each, shared by all levels."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import layers, ops

from retinanet_keras.tensors import Tensor


@keras.saving.register_keras_serializable("retinanet_keras")
class Subnet(layers.Layer):
    """3x3 convolutions with ReLU, then a 3x3 convolution to `per_cell` x `values` channels.

    All convolutions start from a Gaussian of sigma .01 and a bias of 0.

    Args:
        per_cell: int. Anchors at each position.
        values: int. Values for each anchor: K in the classification subnet, 4 in the box regression subnet.
        channels: int. Channels of the tower.
        depth: int. Convolutions in the tower, before the last.
        prior: float or None. The bias of the last convolution starts from -log((1 - prior) / prior), so that every
            anchor starts as foreground with that probability (§4.1, Initialization); None: from 0.
        norm: str or None. None as the paper's; "group", group normalization in place of the tower's biases
            (torchvision's second version).

    Call arguments:
        levels: list of tensors [B, H_l, W_l, C].

    Returns:
        float32 tensor [B, A, values], A = sum of H_l x W_l x per_cell in the anchors' order.
    """

    def __init__(
        self,
        per_cell: int,
        values: int,
        channels: int = 256,
        depth: int = 4,
        prior: float | None = None,
        norm: str | None = None,
        **kwargs: Any,
    ) -> None:
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

    def build(self, shapes: Sequence[Any]) -> None:
        shape = tuple(shapes[0])
        for conv in self.tower:
            conv.build(shape)
            shape = (*shape[:-1], self.channels)
        for norm in self.norms:
            norm.build(shape)
        self.final.build(shape)
        self.built = True

    def call(self, levels: Sequence[Tensor]) -> Tensor:
        outputs = []
        for x in levels:
            for i, conv in enumerate(self.tower):
                x = conv(x)
                x = ops.relu(self.norms[i](x) if self.norms else x)
            x = self.final(x)
            outputs.append(ops.reshape(x, (ops.shape(x)[0], -1, self.values)))  # [B, A_l, values]
        return ops.cast(ops.concatenate(outputs, axis=1), "float32")

    def get_config(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("per_cell", "values", "channels", "depth", "prior", "norm")}
        return {**super().get_config(), **settings}


def _conv(channels: int, name: str, bias: float = 0.0, **kwargs: Any) -> layers.Conv2D:
    """A 3x3 convolution with new initializers: Keras draws equal values from one shared instance."""
    return layers.Conv2D(
        channels,
        3,
        padding="same",
        name=name,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        bias_initializer=keras.initializers.Constant(bias),
        **kwargs,
    )
