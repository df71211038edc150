"""Training steps whose loss was not finite: save one to a file, and replay it image by image."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from retinanet_keras import train_step
from retinanet_keras.config import Config, config_from_dict
from retinanet_keras.data.coco import Categories
from retinanet_keras.errors import RunError
from retinanet_keras.model import RetinaNet
from retinanet_keras.storage import disk, strict_json
from retinanet_keras.training.build import build_model


def save(path: Path, model: RetinaNet, config: Config, categories: Categories, step: int, batch: tuple) -> None:
    """Write a failed step: the configuration, all weights before the step, and its images and boxes.

    Args:
        path: Path. The .npz file to write.
        model: RetinaNet, as before the step.
        config: Config. Settings of the run.
        categories: Categories. Those of the dataset.
        step: int. Number of the step, counted from 1.
        batch: (images uint8 [B, H, W, 3], dict of boxes, labels, image_id) of the step, NumPy or tensors.
    """
    images, truth = batch
    scale = float(model.optimizer.scale_loss(1.0))
    about = {"step": step, "config": config.to_dict(), "categories": categories.to_list(), "loss_scale": scale}
    weights = {f"weight{i}": np.asarray(variable) for i, variable in enumerate(model.weights)}
    truth = {name: np.asarray(truth[name]) for name in ("boxes", "labels", "image_id")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(path) as partial:
        np.savez(partial, about=json.dumps(about), images=np.asarray(images), **truth, **weights)


def replay(path: str | Path) -> Iterator[dict[str, Any]]:
    """Compute a failed step again, as a whole and then one image at a time.

    Args:
        path: str or Path. File written by `save`.

    Yields:
        A dict for all images (image_id "all"), then for each: image_id, boxes (their number), positives,
        classification and box (the losses, each over its own divisor), gradient_norm, and not_finite, the variables
        whose gradient is not.

    Raises:
        RunError: where the file cannot be read.
    """
    try:
        with np.load(path) as file:
            about = strict_json.parse(str(file["about"]))
            arrays = {name: file[name] for name in file.files if name != "about"}
        config, categories = config_from_dict(about["config"]), Categories.from_list(about["categories"])
        model = build_model(config, categories)
        for i, variable in enumerate(model.weights):
            variable.assign(arrays[f"weight{i}"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f"{path} cannot be read ({error}); expected a file that train.py wrote to the run's folder `failed`"
        ) from None
    model.optimizer.build(model.trainable_variables)
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        model.optimizer.dynamic_scale.assign(about["loss_scale"])
    gradients_of = train_step.gradient_function(model, config.train.jit_compile)
    ids = arrays["image_id"].tolist()
    for image_id, rows in [("all", slice(None)), *((ids[i], slice(i, i + 1)) for i in range(len(ids)))]:
        images, boxes, labels = (arrays[name][rows] for name in ("images", "boxes", "labels"))
        terms, gradients = gradients_of(images, boxes, labels)
        norms = [float(np.linalg.norm(gradient)) for gradient in gradients]
        yield {
            "image_id": image_id,
            "boxes": int((labels >= 0).sum()),
            "positives": int(terms.positives),
            "classification": float(terms.classification / terms.divisor),
            "box": float(terms.box / terms.divisor),
            "gradient_norm": float(np.linalg.norm(norms)) / about["loss_scale"],
            "not_finite": [
                v.path for v, norm in zip(model.trainable_variables, norms, strict=True) if not np.isfinite(norm)
            ],
        }
