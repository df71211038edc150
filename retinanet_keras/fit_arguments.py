"""Check arguments of Keras's `compile` and `fit` that a RetinaNet takes in another form, or not at all."""

import inspect
from collections.abc import Callable
from typing import Any

from keras import ops

from retinanet_keras.tensors import Tensor

COCO_METRICS = "add the callback CocoMetrics (from retinanet_keras import CocoMetrics) to fit"
INSTEAD = {  # of arguments of `keras.Model.compile`
    "loss": "name classification_loss, box_loss, or both",
    "loss_weights": "give box_weight, the weight of the box loss; that of the classification loss is 1",
    "metrics": COCO_METRICS,
    "weighted_metrics": COCO_METRICS,
}


def check_compile(arguments: dict[str, Any]) -> None:
    """Remove from the arguments of `compile` those that a RetinaNet does not use.

    Raises:
        ValueError: If one of them is set; the message names what to use instead.
    """
    for name, instead in INSTEAD.items():
        value = arguments.pop(name, None)
        if value is not None and not (isinstance(value, (list, tuple, dict)) and not value):
            raise ValueError(f"{name}: expected None, got {value!r}. For a RetinaNet, {instead}")


def check_class_weight(method: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Reject the argument `class_weight` of a call of one of Keras's methods, given by position or by name.

    Raises:
        ValueError: If it is given; the message names what to use instead.
    """
    class_weight = inspect.signature(method).bind_partial(*args, **kwargs).arguments.get("class_weight")
    if class_weight is not None:
        raise ValueError(
            f"class_weight: expected None, got {class_weight!r}. For a RetinaNet, weight images by sample_weight, and "
            "objects against background by the alpha of classification_loss"
        )


def image_weights(sample_weight: Any, count: int | None = None) -> dict[str, Tensor] | None:
    """The weights of each image's losses.

    Args:
        sample_weight: tensor [B], dict of tensors labels [B] and boxes [B] among others, or None. Keras repeats a
            tensor of weights for every entry of the truth. None: no weights.
        count: int or None. Number of images in the batch, B; None: not known while the graph is traced.

    Returns:
        dict of float32 tensors labels [B], for the classification loss, and boxes [B], for the box loss; or None.

    Raises:
        ValueError: If `sample_weight` has another form or shape.
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
