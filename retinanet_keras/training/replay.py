"""A step that failed, in a file: what is needed to compute it again, and what each of its images gives."""

import json

import keras
import numpy as np

from retinanet_keras import train_step
from retinanet_keras.config import config_from_dict
from retinanet_keras.data.coco import Categories
from retinanet_keras.training.folder import RunError, build_model


def save(path, model, config, categories, step, batch):
    """Write the file, an .npz: the configuration, all weights before the step, and its images and boxes.

    Args:
        batch: (images uint8 [B, H, W, 3], dict of boxes, labels, image_id) of the step, NumPy or tensors.
    """
    images, truth = batch
    scale = float(model.optimizer.scale_loss(1.0))
    about = {"step": step, "config": config.to_dict(), "categories": categories.to_list(), "loss_scale": scale}
    weights = {f"weight{i}": np.asarray(variable) for i, variable in enumerate(model.weights)}
    truth = {name: np.asarray(truth[name]) for name in ("boxes", "labels", "image_id")}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, about=json.dumps(about), images=np.asarray(images), **truth, **weights)


def replay(path):
    """Compute the step again, one image at a time.

    Args:
        path: a file of `save`.

    Yields:
        a dict of each image: image_id, boxes (their number), positives, classification, box (the losses, each divided
        by the image's own divisor), gradient_norm, and not_finite, the variables whose gradient is not.

    Raises:
        RunError: where the file cannot be read.
    """
    try:
        with np.load(path) as file:
            about, arrays = json.loads(str(file["about"])), {name: file[name] for name in file.files if name != "about"}
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} is no file of a failed step ({error})") from None
    config, categories = config_from_dict(about["config"]), Categories.from_list(about["categories"])
    model = build_model(config, categories)
    for i, variable in enumerate(model.weights):
        variable.assign(arrays[f"weight{i}"])
    model.optimizer.build(model.trainable_variables)
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        model.optimizer.dynamic_scale.assign(about["loss_scale"])
    gradients_of = train_step.gradient_function(model, config.train.jit_compile)
    for i, image_id in enumerate(arrays["image_id"].tolist()):
        one = [arrays[name][i : i + 1] for name in ("images", "boxes", "labels")]
        (classification, box, divisor, positives, _), gradients = gradients_of(*one)
        norms = [float(np.linalg.norm(gradient)) for gradient in gradients]
        yield {
            "image_id": image_id, "boxes": int((one[2] >= 0).sum()), "positives": int(positives),
            "classification": float(classification / divisor), "box": float(box / divisor),
            "gradient_norm": float(np.linalg.norm(norms)) / about["loss_scale"],
            "not_finite": [
                v.path for v, norm in zip(model.trainable_variables, norms, strict=True) if not np.isfinite(norm)
            ],
        }  # fmt: skip
