"""A model as a SavedModel that takes images as they are: resize, anchors, decoding and NMS are in the graph."""

import json
import os
import shutil
from pathlib import Path

import keras
import tensorflow as tf

from retinanet_keras.data import pipeline, sources
from retinanet_keras.data.coco import Categories

CATEGORIES_FILE = Path("assets.extra") / "categories.json"  # a folder that TensorFlow leaves alone


def export_model(model, config, folder, version=None):
    """Write a SavedModel with the signatures `serving_default` and `serving_bytes`.

    Args:
        model: a RetinaNet with `categories`.
        config: a Config, for the size images are resized to.
        folder: the base path for TF Serving.
        version: its subfolder, replaced where it exists; None: the next free number.

    Returns:
        the path of the SavedModel.
    """
    folder = Path(folder)
    if version is None:
        version = max(versions(folder), default=0) + 1
    target, partial = folder / str(version), folder / f".{version}.partial"
    images, image_bytes = signatures(model, config.data)
    archive = keras.export.ExportArchive()  # without `track`, which would store every weight twice
    archive.add_endpoint("serving_default", images, [tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")])
    archive.add_endpoint("serving_bytes", image_bytes, [tf.TensorSpec([None], tf.string, name="image_bytes")])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    archive.write_out(str(partial), verbose=False)
    (partial / CATEGORIES_FILE).parent.mkdir()
    (partial / CATEGORIES_FILE).write_text(json.dumps(model.categories, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    return target


def signatures(model, data):
    """The functions behind the two signatures.

    Args:
        model: a RetinaNet with `categories`.
        data: a DataConfig.

    Returns:
        (images, image_bytes): from uint8 [B, H, W, 3] and from encoded strings [B] to a dict of boxes [B, D, 4],
        x1, y1, x2, y2 in pixels of the image given, scores [B, D], labels, category_ids and names [B, D], and
        num_detections [B]. Rows past num_detections: box 0, score 0, label and category id -1, name "".
    """
    categories = Categories.from_list(model.categories)
    ids, names = tf.constant([*categories.ids, -1], tf.int64), tf.constant([*categories.names, ""])

    def images(images):
        canvas, size, scale = pipeline.fit(images, data.short_side, data.max_side)
        found = model.detect_in_graph(canvas, tf.tile(size[None], [tf.shape(images)[0], 1]))
        row = tf.where(found["labels"] >= 0, found["labels"], len(categories))  # the last is for "nothing"
        return {
            "boxes": pipeline.to_original(found["boxes"], scale, tf.shape(images)[1:3]),
            "scores": found["scores"],
            "labels": found["labels"],
            "category_ids": tf.gather(ids, row),
            "names": tf.gather(names, row),
            "num_detections": found["count"],
        }

    def one(encoded):
        found = images(sources.decode(encoded)[None])
        return {name: value[0] for name, value in found.items()}

    def image_bytes(image_bytes):
        """Each image on its own canvas, so that what is found in it does not depend on its neighbours."""
        d = model.detection.max_detections
        spec = {
            "boxes": tf.TensorSpec([d, 4], tf.float32), "scores": tf.TensorSpec([d], tf.float32),
            "labels": tf.TensorSpec([d], tf.int32), "category_ids": tf.TensorSpec([d], tf.int64),
            "names": tf.TensorSpec([d], tf.string), "num_detections": tf.TensorSpec([], tf.int32),
        }  # fmt: skip
        return tf.map_fn(one, image_bytes, fn_output_signature=spec, parallel_iterations=1)

    return images, image_bytes


def versions(folder):
    """The version numbers in a base path, in order."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "saved_model.pb").exists())


def find(path):
    """The SavedModel at a path: the path itself, or the newest version below it; None where there is neither."""
    path = Path(path)
    if (path / "saved_model.pb").exists():
        return path
    found = versions(path)
    return path / str(found[-1]) if found else None
