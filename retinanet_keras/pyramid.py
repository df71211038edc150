"""§4, Feature Pyramid Network Backbone: C3, C4 and C5 to P3 ... P7; and, for the ablation of §5.1, C5 alone."""

from typing import Any

import keras
from keras import layers

from retinanet_keras.tensors import Tensor


@keras.saving.register_keras_serializable("retinanet_keras")
class FeaturePyramid(layers.Layer):
    """Top-down pathway with lateral connections for P3 to P5; P6 from C5 and P7 from ReLU(P6), both of stride 2.

    Args:
        channels: int. Channels of every level.
        p6_source: str. "c5" as the paper's; "p5" for weights trained so (torchvision's first version).

    Call arguments:
        features: dict of tensors c3 [B, H/8, W/8, .], c4 [B, H/16, W/16, .] and c5 [B, H/32, W/32, .], H and W
            multiples of 32.

    Returns:
        list of tensors p3 ... p7, each [B, ceil(H/2^l), ceil(W/2^l), channels].
    """

    def __init__(self, channels: int = 256, p6_source: str = "c5", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if p6_source not in ("c5", "p5"):
            raise ValueError(f'p6_source: expected "c5" or "p5", got {p6_source!r}')
        self.channels, self.p6_source = channels, p6_source
        self.laterals = {f"c{n}": _conv(channels, 1, f"lateral{n}") for n in (3, 4, 5)}
        self.outputs_ = {f"c{n}": _conv(channels, 3, f"output{n}") for n in (3, 4, 5)}
        self.pad = layers.ZeroPadding2D(1)
        self.p6 = _conv(channels, 3, "p6", stride=2)
        self.p7 = _conv(channels, 3, "p7", stride=2)
        self.upsample = layers.UpSampling2D(2, interpolation="nearest")

    def build(self, shapes: dict[str, Any]) -> None:
        for name in ("c3", "c4", "c5"):
            self.laterals[name].build(shapes[name])
            self.outputs_[name].build((None, None, None, self.channels))
        self.p6.build(shapes["c5"] if self.p6_source == "c5" else (None, None, None, self.channels))
        self.p7.build((None, None, None, self.channels))
        self.built = True

    def call(self, features: dict[str, Tensor]) -> list[Tensor]:
        merged = {"c5": self.laterals["c5"](features["c5"])}
        for name, above in (("c4", "c5"), ("c3", "c4")):
            merged[name] = self.laterals[name](features[name]) + self.upsample(merged[above])
        levels = [self.outputs_[name](merged[name]) for name in ("c3", "c4", "c5")]
        p6 = self.p6(self.pad(features["c5"] if self.p6_source == "c5" else levels[-1]))
        p7 = self.p7(self.pad(keras.ops.relu(p6)))
        return [*levels, p6, p7]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "channels": self.channels, "p6_source": self.p6_source}


@keras.saving.register_keras_serializable("retinanet_keras")
class LastLayer(layers.Layer):
    """P5's two convolutions alone, for the experiment "using features from only the final ResNet layer" (§4).

    The paper says no more about that experiment; the rest is this project's choice: the subnets see this one level, and
    its positions have the anchors of all levels (`anchors.levels`).

    Args:
        channels: int. Channels of the level.

    Call arguments:
        features: dict of tensors, as for `FeaturePyramid`.

    Returns:
        list of one tensor [B, H/32, W/32, channels].
    """

    def __init__(self, channels: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels
        self.lateral, self.output_ = _conv(channels, 1, "lateral5"), _conv(channels, 3, "output5")

    def build(self, shapes: dict[str, Any]) -> None:
        self.lateral.build(shapes["c5"])
        self.output_.build((None, None, None, self.channels))
        self.built = True

    def call(self, features: dict[str, Tensor]) -> list[Tensor]:
        return [self.output_(self.lateral(features["c5"]))]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "channels": self.channels}


def _conv(channels: int, size: int, name: str, stride: int = 1) -> layers.Conv2D:
    """Detectron's Xavier fill, not in the paper: uniform within sqrt(3 / fan_in), and zero bias.

    Stride 2 goes with explicit padding: TensorFlow's "same" pads it on one side only.
    """
    fill = keras.initializers.VarianceScaling(scale=1.0, mode="fan_in", distribution="uniform")
    padding = "same" if stride == 1 else "valid"
    return layers.Conv2D(channels, size, stride, padding, kernel_initializer=fill, name=name)
