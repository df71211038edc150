"""Export to an ONNX file with NMS in its graph, by tf2onnx."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet_keras.errors import OnnxError
from retinanet_keras.storage import disk

if TYPE_CHECKING:
    import tensorflow as tf

OPSET = 18
OUTPUTS = ("boxes", "scores", "labels", "category_ids", "num_detections")


def write(
    detect: Callable[[Any], dict[str, Any]], categories: list[dict[str, Any]] | None, path: str | os.PathLike[str]
) -> Path:
    """Write an ONNX model for any batch size, height and width.

    Args:
        detect: a function of `export.detect_function`, with `resize` of this module.
        categories: list of {"label", "id", "name"}, stored in the file's metadata, as the model has no output `names`.
        path: path of the file.

    Returns:
        the path.
    """
    try:
        import tf2onnx
    except ImportError as error:
        raise OnnxError(
            f"ONNX needs packages that are not installed ({error}). Install them: pip install tf2onnx onnx onnxruntime"
        ) from None
    import tensorflow as tf

    spec = [tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")]

    @tf.function(input_signature=spec, autograph=False)
    def numbers(images):
        outputs = detect(images)
        return {name: tf.identity(outputs[name], name=name) for name in OUTPUTS}

    model, _ = tf2onnx.convert.from_function(numbers, spec, opset=OPSET)
    entry = model.metadata_props.add()
    entry.key, entry.value = "categories", json.dumps(categories)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, model.SerializeToString())
    return path


def resize(images: Any, size: Any) -> tf.Tensor:
    """`augmentation.resize` by the arithmetic of TensorFlow's kernel; ONNX's Resize rounds some pixels differently."""
    import tensorflow as tf

    pixels = tf.cast(images, tf.float32)
    for axis in (2, 1):
        have, want = tf.shape(images)[axis], size[axis - 1]
        ratio = tf.cast(have, tf.float32) / tf.cast(want, tf.float32)
        source = (tf.cast(tf.range(want), tf.float32) + 0.5) * ratio - 0.5  # positions in the input
        low = tf.floor(source)
        before = tf.gather(pixels, tf.maximum(tf.cast(low, tf.int32), 0), axis=axis)
        after = tf.gather(pixels, tf.minimum(tf.cast(tf.math.ceil(source), tf.int32), have - 1), axis=axis)
        fraction = tf.reshape(source - low, [-1, 1] if axis == 2 else [-1, 1, 1])
        pixels = before + (after - before) * fraction
    return tf.cast(tf.round(pixels), tf.uint8)
