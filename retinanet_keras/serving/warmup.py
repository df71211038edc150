"""Warm-up requests, which TF Serving runs when it loads a model so that no client waits for the first ones."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

FILE = "tf_serving_warmup_requests"  # in assets.extra: TF Serving's name
SHAPES = ((3, 4), (4, 3))  # height to width, the most common ones of photographs


def write(path: str | os.PathLike[str], name: str = "retinanet") -> None:
    """Write a TFRecord of PredictionLog: a landscape and a portrait image for both signatures.

    The images are small: the model resizes them to the size it computes with, which is what has to be warmed up.

    Args:
        path: path of the file.
        name: str. Name of the model, which TF Serving replaces with its own.
    """
    with tf.io.TFRecordWriter(str(path)) as file:
        for signature, inputs in requests():
            file.write(_log(name, signature, inputs).SerializeToString())


def requests() -> list[tuple[str, dict[str, npt.NDArray]]]:
    """The (signature, {input name: array}) of each request."""
    requests_ = []
    for shape in SHAPES:
        height, width = (32 * side for side in shape)
        across: npt.NDArray
        down: npt.NDArray
        across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        image = np.stack([across, down, 255 - across], axis=-1).astype("uint8")
        requests_.append(("serving_default", {"images": image[None]}))
        requests_.append(("serving_bytes", {"image_bytes": np.array([tf.io.encode_jpeg(image).numpy()], object)}))
    return requests_


def _log(name: str, signature: str, inputs: dict[str, npt.NDArray]) -> Any:
    from tensorflow_serving.apis import prediction_log_pb2

    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return log
