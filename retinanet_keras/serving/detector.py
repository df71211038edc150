"""Detection in image files, by an export or by a model in memory: the same graph either way."""

import numpy as np
import tensorflow as tf

from retinanet_keras.data.coco import Categories
from retinanet_keras.errors import DataError, first_line
from retinanet_keras.serving import model_card
from retinanet_keras.serving.export import CATEGORIES_FILE, signatures
from retinanet_keras.storage import strict_json

# What TensorFlow raises where stored variables are damaged, or of another model.
UNREADABLE = (tf.errors.OpError, AssertionError, ValueError, IndexError)


def of_model(model, config):
    """A detector of a RetinaNet and the Config of its image sizes.

    Returns:
        a function from uint8 images [B, H, W, 3] to the NumPy dict of `export.signatures`.
    """
    graph = signatures(model, config)[0]
    return lambda images: {name: value.numpy() for name, value in graph(images).items()}


def of_export(path):
    """A detector of a SavedModel.

    Returns:
        (a function as `of_model` gives, Categories).

    Raises:
        DataError: where it cannot be loaded, or was not exported by this package.
    """
    try:
        loaded = tf.saved_model.load(str(path))
        signature = loaded.signatures["serving_default"]
        categories = Categories.from_list(strict_json.read(path / CATEGORIES_FILE))
    except (OSError, KeyError, TypeError, *UNREADABLE) as error:
        raise DataError(f"{path} is no SavedModel of a RetinaNet exported here ({first_line(error)}). Export one with "
                        "`python -m retinanet_keras export --workdir RUN --to DIR`") from None  # fmt: skip
    told = f"{path / CATEGORIES_FILE} has {len(categories)} categories, expected"
    expected = model_card.num_classes(path) or max(1, len(categories))
    if len(categories) != expected:
        raise DataError(f"{told} {expected}, as many as the model has classes. Export it again")

    def detect(images):
        found = {name: value.numpy() for name, value in signature(images=tf.constant(images)).items()}
        if (highest := found["labels"].max(initial=-1)) >= len(categories):  # where the card does not tell
            raise DataError(f"{told} at least {highest + 1}: the model has found such a label. Export it again")
        return found

    detect.keep_alive = loaded  # a signature alone does not hold the variables
    return detect, categories


def detections_of(detect, image):
    """What a detector finds in one image.

    Args:
        detect: a detector.
        image: uint8 [H, W, 3].

    Returns:
        boxes float32 [n, 4], x1, y1, x2, y2 in the image's pixels, scores [n] falling, labels int [n].
    """
    found = detect(image[None])
    n = int(found["num_detections"][0])
    return tuple(np.asarray(found[name][0][:n]) for name in ("boxes", "scores", "labels"))
