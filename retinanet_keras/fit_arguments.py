"""Arguments of Keras's `compile` and `fit` that a RetinaNet takes in its own form, or refuses."""

import inspect

from keras import ops

COCO_METRICS = "add the callback CocoMetrics (from retinanet_keras import CocoMetrics) to fit"
INSTEAD = {  # of arguments of `keras.Model.compile`
    "loss": "name classification_loss, box_loss, or both",
    "loss_weights": "give box_weight, the weight of the box loss; that of the classification loss is 1",
    "metrics": COCO_METRICS,
    "weighted_metrics": COCO_METRICS,
}


def check_compile(arguments):
    """Remove from a dict of arguments those that a RetinaNet has no use for.

    Raises:
        ValueError: where one of them is set, naming what to use instead.
    """
    for name, instead in INSTEAD.items():
        value = arguments.pop(name, None)
        if value is not None and not (isinstance(value, (list, tuple, dict)) and not value):
            raise ValueError(f"{name}: expected None, got {value!r}. For a RetinaNet, {instead}")


def check_class_weight(method, args, kwargs):
    """Refuse the argument `class_weight` of a call of one of Keras's methods, by place or by name.

    Raises:
        ValueError: where it is given, naming what to use instead.
    """
    class_weight = inspect.signature(method).bind_partial(*args, **kwargs).arguments.get("class_weight")
    if class_weight is not None:
        raise ValueError(
            f"class_weight: expected None, got {class_weight!r}. For a RetinaNet, weight images by sample_weight, and "
            "objects against background by the alpha of classification_loss"
        )


def image_weights(sample_weight, count=None):
    """The weights of each image's losses.

    Args:
        count: int. B, the images of the batch; None: not known while a graph is made.
        sample_weight: [B], or a dict of labels [B] and boxes [B] among others: Keras repeats an array of weights for
            every array of the truth. None: no weights.

    Returns:
        dict of labels, for the classification loss, and boxes, for the box loss, float32 [B] each; or None.

    Raises:
        ValueError: where it is neither.
    """
    if sample_weight is None:
        return None
    if not isinstance(sample_weight, dict):
        sample_weight = {"labels": sample_weight, "boxes": sample_weight}
    weights = {name: ops.cast(sample_weight[name], "float32") for name in ("labels", "boxes")
               if sample_weight.get(name) is not None}  # fmt: skip
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if len(shapes) < 2 or any(len(shape) != 1 or None not in (*shape, count) and shape[0] != count
                              for shape in shapes.values()):  # fmt: skip
        raise ValueError(
            "sample_weight: expected one weight for each image, shape [B], or a dict of such weights for labels and "
            f"boxes, got shapes {shapes} for {'a batch' if count is None else f'{count} images'}"
        )
    return weights
