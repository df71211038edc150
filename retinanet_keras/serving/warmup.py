"""Requests that TF Serving sends itself when it loads a model, so that no client waits for the first ones."""

import numpy as np
import tensorflow as tf

FILE = "tf_serving_warmup_requests"  # in assets.extra: TF Serving's name
SHAPES = ((3, 4), (4, 3))  # height to width, the commonest of photographs


def write(path, name="retinanet"):
    """A TFRecord of PredictionLog: for both signatures a landscape and a portrait image.

    They are small: the model resizes them to the size it computes with, which is what has to be warm.

    Args:
        path: of the file.
        name: of the model; TF Serving puts its own in its place.
    """
    with tf.io.TFRecordWriter(str(path)) as file:
        for signature, inputs in requests():
            file.write(_log(name, signature, inputs).SerializeToString())


def requests():
    """(signature, {input name: array}) of each request."""
    found = []
    for shape in SHAPES:
        height, width = (32 * side for side in shape)
        across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        image = np.stack([across, down, 255 - across], axis=-1).astype("uint8")
        found.append(("serving_default", {"images": image[None]}))
        found.append(("serving_bytes", {"image_bytes": np.array([tf.io.encode_jpeg(image).numpy()], object)}))
    return found


def _log(name, signature, inputs):
    from tensorflow_serving.apis import prediction_log_pb2

    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return log
