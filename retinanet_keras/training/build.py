"""The model, the losses and the optimizer of a configuration."""

import warnings
from dataclasses import replace
from pathlib import Path

from retinanet_keras import losses, optimizers
from retinanet_keras.model import RetinaNet
from retinanet_keras.weights import imagenet


def resolve_pixel_mean(config):
    """The Config with the pixel mean that its file of weights expects, so that the run's own config.json has it."""
    weights = config.model.weights
    if weights in (None, "imagenet") or not Path(weights).is_file():
        return config
    try:
        mean = imagenet.pixel_mean(weights)
    except OSError:  # no such file as it should be; loading it says so
        return config
    return replace(config, model=replace(config.model, pixel_mean=mean)) if mean else config


def build_model(config, categories, weights=None):
    """The compiled RetinaNet of a configuration.

    Args:
        config: a Config.
        categories: Categories.
        weights: overrides `model.weights`; pass None where all weights will be loaded anyway.
    """
    model = config.model
    net = RetinaNet(
        len(categories), model.backbone, weights=weights, anchors=config.anchors, targets=config.targets,
        detection=config.detection, fpn_channels=model.fpn_channels, head_depth=model.head_depth, prior=model.prior,
        norm=model.norm, width=model.width, freeze_at=model.freeze_at, pixel_mean=model.pixel_mean,
        categories=categories.to_list(), dtype=config.train.precision,
    )  # fmt: skip
    loss = config.loss
    net.compile(
        optimizers.build(config.train), _classification_loss(loss), losses.SmoothL1Loss(loss.box_beta),
        box_weight=loss.box_weight, normalizer=loss.normalizer, mining=config.mining,
        jit_compile=config.train.jit_compile, check_finite=True,
    )  # fmt: skip
    return net


def _classification_loss(config):
    """The Keras loss of a LossConfig."""
    if config.kind == "cross_entropy":
        return losses.CrossEntropyLoss(config.alpha)
    if config.kind == "focal_star":
        return losses.FocalStarLoss(config.alpha, config.gamma, config.star_beta)
    if config.kind == "hinge":
        return losses.HingeLoss(config.alpha, config.hinge_threshold)
    return losses.FocalLoss(config.alpha, config.gamma)


def load_weights(model, path):
    """Load a .weights.h5 file, for inference: the optimizer's state in it, where there is any, is left alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        model.load_weights(path)
