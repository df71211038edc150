"""§4.1: the backbone's pre-trained weights, from `keras.applications` or from a file, and the pixels they expect."""

from collections.abc import Sequence
from os import PathLike

import h5py
import keras
import numpy as np
import numpy.typing as npt

from retinanet_keras import backbone as backbones
from retinanet_keras.backbone import MEAN, STD
from retinanet_keras.errors import UserError
from retinanet_keras.weights import keras_files

PIXEL_MEAN = "pixel_mean"  # attribute of weight files


def load(
    backbone: keras.Model, weights: str | PathLike, std: Sequence[float] = STD
) -> tuple[float, float, float] | None:
    """Load weights into a `resnet`.

    Args:
        backbone: keras.Model. A `resnet`.
        weights: str or path. "imagenet", or a .weights.h5 file.
        std: tuple of 3 floats, RGB. What the model divides pixels by.

    Returns:
        The pixel mean, RGB, that the weights were trained with, or None if the file does not contain it.

    Raises:
        UserError: If the weights cannot be downloaded or read, or do not fit.
    """
    if weights == "imagenet":
        load_imagenet(backbone, std=std)
        return MEAN
    try:
        keras_files.check(weights)
        backbone.load_weights(weights)
        return pixel_mean(weights)
    except UserError as error:
        raise UserError(f"weights: {error}") from None
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"weights: {weights} cannot be loaded into a {backbone.name} ({first})") from None


def pixel_mean(path: str | PathLike) -> tuple[float, float, float] | None:
    """The pixel mean, RGB, that a file of `save` holds, or None.

    Raises:
        UserError: If it is not three numbers.
        OSError: If this is not an HDF5 file.
    """
    with h5py.File(path) as file:
        try:
            mean = file.attrs.get(PIXEL_MEAN)
            if mean is None:
                return None
            red, green, blue = (float(value) for value in mean)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged: its attribute {PIXEL_MEAN} is not a color. Convert or download it again"
            ) from error
    return red, green, blue


def save(backbone: keras.Model, path: str | PathLike, pixel_mean: Sequence[float]) -> None:
    """Write weights and the pixel mean that they expect to one file for `load`."""
    with keras_files.replacing(path) as partial:
        backbone.save_weights(partial)
        with h5py.File(partial, "a") as file:
            file.attrs[PIXEL_MEAN] = pixel_mean


def load_imagenet(backbone: keras.Model, source: keras.Model | None = None, std: Sequence[float] = STD) -> None:
    """Copy ImageNet weights of `keras.applications` (the MSRA weights of §4.1) into a `resnet`.

    Args:
        backbone: keras.Model. A `resnet` of 50, 101 or 152 layers, width 64, norm "frozen" or "batch".
        source: keras.Model or None. A ResNet of keras.applications of the same depth; None: it is downloaded.
        std: tuple of 3 floats, RGB. What the model divides pixels by.
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
    _copy(source, "conv1_conv", "conv1_bn", backbone, "stem", scale=1.0 / np.array(std), flip=True)
    for stage, blocks in enumerate(backbones.DEPTHS[backbone.name], start=2):
        for i in range(blocks):
            theirs, ours = f"conv{stage}_block{i + 1}", f"res{stage}_{i}"
            for number in (1, 2, 3):
                _copy(source, f"{theirs}_{number}_conv", f"{theirs}_{number}_bn", backbone, f"{ours}_conv{number}")
            if i == 0:
                _copy(source, f"{theirs}_0_conv", f"{theirs}_0_bn", backbone, f"{ours}_shortcut")


def _copy(
    source: keras.Model,
    conv: str,
    norm: str,
    backbone: keras.Model,
    name: str,
    scale: npt.NDArray | None = None,
    flip: bool = False,
) -> None:
    """One convolution and its normalization; keras.applications' conv bias goes into the moving mean."""
    kernel, bias = source.get_layer(conv).get_weights()
    gamma, beta, mean, variance = source.get_layer(norm).get_weights()
    if flip and scale is not None:  # trained on BGR, without division; the model gives RGB / STD
        kernel = kernel[:, :, ::-1] / scale[None, None, :, None]
    backbone.get_layer(name).set_weights([kernel])
    backbone.get_layer(f"{name}_norm").set_weights([gamma, beta, mean - bias, variance])
