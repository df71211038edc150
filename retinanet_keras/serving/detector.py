"""Detection in images of any size, by an export or by a model in memory, with the same graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from retinanet_keras.data.coco import Categories
from retinanet_keras.errors import DataError, first_line
from retinanet_keras.serving import model_card
from retinanet_keras.serving.export import CATEGORIES_FILE, signatures
from retinanet_keras.storage import strict_json

if TYPE_CHECKING:
    from retinanet_keras.config import Config
    from retinanet_keras.model import RetinaNet

Detect = Callable[[npt.NDArray], dict[str, npt.NDArray]]
# What TensorFlow raises when stored variables are damaged or belong to another model.
UNREADABLE = (tf.errors.OpError, AssertionError, ValueError, IndexError)


def of_model(model: RetinaNet, config: Config) -> Detect:
    """The detector of a model in memory.

    Args:
        model: RetinaNet with `categories`.
        config: Config, for the size that images are resized to.

    Returns:
        a function from uint8 images [B, H, W, 3] to the NumPy dict of `export.signatures`.
    """
    graph = signatures(model, config)[0]
    return lambda images: {name: value.numpy() for name, value in graph(images).items()}


def of_export(path: Path) -> tuple[Detect, Categories]:
    """The detector of a SavedModel, and its categories.

    Args:
        path: path of the SavedModel.

    Returns:
        (a function as `of_model` returns, Categories).

    Raises:
        DataError: if it cannot be loaded, or was not exported by this package.
    """
    try:
        loaded = tf.saved_model.load(str(path))
        signature = loaded.signatures["serving_default"]
        categories = Categories.from_list(strict_json.read(path / CATEGORIES_FILE))
    except (OSError, KeyError, TypeError, *UNREADABLE) as error:
        raise DataError(
            f"{path} is not a SavedModel of a RetinaNet exported by this package ({first_line(error)}). Export one "
            "with `python -m retinanet_keras export --workdir RUN --to DIR`"
        ) from None
    mismatch = f"{path / CATEGORIES_FILE} has {len(categories)} categories, expected"
    expected = model_card.num_classes(path) or max(1, len(categories))
    if len(categories) != expected:
        raise DataError(f"{mismatch} {expected}, as many as the model has classes. Export it again")

    def detect(images, *, keep_alive: Any = loaded):  # a signature alone does not keep its variables alive
        outputs = {name: value.numpy() for name, value in signature(images=tf.constant(images)).items()}
        if (highest := outputs["labels"].max(initial=-1)) >= len(categories):  # if the card has no number of classes
            raise DataError(f"{mismatch} at least {highest + 1}: the model detected label {highest}. Export it again")
        return outputs

    return detect, categories


def detections_of(detect: Detect, image: npt.NDArray) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """The boxes, scores and labels that a detector returns for one image.

    Args:
        detect: a function as `of_model` returns.
        image: uint8 [H, W, 3].

    Returns:
        (boxes float32 [n, 4], x1, y1, x2, y2 in pixels of the image; scores [n], falling; labels int [n]).
    """
    outputs = detect(image[None])
    n = int(outputs["num_detections"][0])
    boxes, scores, labels = (np.asarray(outputs[name][0][:n]) for name in ("boxes", "scores", "labels"))
    return boxes, scores, labels
