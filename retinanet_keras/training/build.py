"""The model, the losses and the optimizer of a configuration."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from retinanet_keras import losses, optimizers
from retinanet_keras.config import Config, LossConfig
from retinanet_keras.data.coco import Categories
from retinanet_keras.model import RetinaNet
from retinanet_keras.weights import imagenet


def resolve_pixel_mean(config: Config) -> Config:
    """Return the Config with the pixel mean that its weights file expects, so that the run's config.json has it."""
    weights = config.model.weights
    if weights in (None, "imagenet") or not Path(weights).is_file():
        return config
    try:
        mean = imagenet.pixel_mean(weights)
    except OSError:  # not such a file; loading it reports that
        return config
    return replace(config, model=replace(config.model, pixel_mean=mean)) if mean else config


def build_network(
    config: Config, num_classes: int, weights: str | None = None, categories: list[dict[str, Any]] | None = None
) -> RetinaNet:
    """Build the RetinaNet of a configuration without compiling it.

    Args:
        config: Config. Its `model.weights` is not used.
        num_classes: int. Number of object classes.
        weights: str or None. Backbone weights, as `model.weights`.
        categories: list of dicts, or None. As `Categories.to_list` gives them.
    """
    model = config.model
    return RetinaNet(
        num_classes,
        model.backbone,
        weights=weights,
        anchors=config.anchors,
        targets=config.targets,
        detection=config.detection,
        fpn_channels=model.fpn_channels,
        head_depth=model.head_depth,
        prior=model.prior,
        norm=model.norm,
        width=model.width,
        freeze_at=model.freeze_at,
        pixel_mean=model.pixel_mean,
        categories=categories,
        dtype=config.train.precision,
    )


def build_model(config: Config, categories: Categories, weights: str | None = None) -> RetinaNet:
    """Build and compile the RetinaNet of a configuration.

    Args:
        config: Config. Its `model.weights` is not used.
        categories: Categories. Those of the dataset.
        weights: str or None. Backbone weights, as `model.weights`; None where all weights are loaded afterwards.
    """
    net = build_network(config, len(categories), weights, categories.to_list())
    loss = config.loss
    net.compile(
        optimizers.build(config.train),
        _classification_loss(loss),
        losses.SmoothL1Loss(loss.box_beta),
        box_weight=loss.box_weight,
        normalizer=loss.normalizer,
        mining=config.mining,
        jit_compile=config.train.jit_compile,
        check_finite=True,
    )
    return net


def _classification_loss(config: LossConfig) -> keras.losses.Loss:
    if config.kind == "cross_entropy":
        return losses.CrossEntropyLoss(config.alpha)
    if config.kind == "focal_star":
        return losses.FocalStarLoss(config.alpha, config.gamma, config.star_beta)
    if config.kind == "hinge":
        return losses.HingeLoss(config.alpha, config.hinge_threshold)
    return losses.FocalLoss(config.alpha, config.gamma)


def load_weights(model: keras.Model, path: str | Path) -> None:
    """Load a .weights.h5 file for inference, ignoring the optimizer's state in it, if any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        model.load_weights(path)
