"""Detection in image files, by an export or by a model in memory: the same graph either way."""

import numpy as np
import tensorflow as tf

from retinanet_keras import strict_json
from retinanet_keras.data.coco import Categories, DataError
from retinanet_keras.serving.export import CATEGORIES_FILE, signatures


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
    except (OSError, KeyError, TypeError, ValueError, tf.errors.OpError) as error:
        first = str(error).split("\n")[0]
        raise DataError(f"{path} is no SavedModel of a RetinaNet exported here ({first}). Export one with "
                        "`python -m retinanet_keras export --workdir RUN --to DIR`") from None  # fmt: skip

    def detect(images):
        found = signature(images=tf.constant(images))
        return {name: value.numpy() for name, value in found.items()}

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
