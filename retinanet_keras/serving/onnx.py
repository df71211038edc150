"""The images signature as an ONNX file, NMS inside, by tf2onnx."""

import json
from pathlib import Path

from retinanet_keras.errors import OnnxError
from retinanet_keras.storage import disk

OPSET = 18
OUTPUTS = ("boxes", "scores", "labels", "category_ids", "num_detections")


def write(search, categories, path):
    """Write an ONNX model of any batch, height and width.

    Args:
        search: of `export.search_function`, with `resize` of this module.
        categories: list of {"label", "id", "name"}, kept in the file's metadata: ONNX gets no `names`.
        path: of the file.

    Returns:
        the path.
    """
    try:
        import tf2onnx
    except ImportError as error:
        raise OnnxError(
            f"ONNX needs packages that are not installed ({error}): pip install tf2onnx onnx onnxruntime"
        ) from None
    import tensorflow as tf

    spec = [tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")]

    @tf.function(input_signature=spec, autograph=False)
    def numbers(images):
        found = search(images)
        return {name: tf.identity(found[name], name=name) for name in OUTPUTS}

    model, _ = tf2onnx.convert.from_function(numbers, spec, opset=OPSET)
    entry = model.metadata_props.add()
    entry.key, entry.value = "categories", json.dumps(categories)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, model.SerializeToString())
    return path


def resize(images, size):
    """`augmentation.resize` in the steps of TensorFlow's kernel: those of ONNX's Resize round other pixels up."""
    import tensorflow as tf

    pixels = tf.cast(images, tf.float32)
    for axis in (2, 1):
        have, want = tf.shape(images)[axis], size[axis - 1]
        ratio = tf.cast(have, tf.float32) / tf.cast(want, tf.float32)
        place = (tf.cast(tf.range(want), tf.float32) + 0.5) * ratio - 0.5
        low = tf.floor(place)
        before = tf.gather(pixels, tf.maximum(tf.cast(low, tf.int32), 0), axis=axis)
        after = tf.gather(pixels, tf.minimum(tf.cast(tf.math.ceil(place), tf.int32), have - 1), axis=axis)
        share = tf.reshape(place - low, [-1, 1] if axis == 2 else [-1, 1, 1])
        pixels = before + (after - before) * share
    return tf.cast(tf.round(pixels), tf.uint8)
