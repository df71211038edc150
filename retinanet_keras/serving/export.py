"""A model as a SavedModel that takes images as they are: resize, anchors, decoding and NMS are in the graph."""

import contextlib
import json
import logging
import os
import re
import shutil
import types
from pathlib import Path

import keras
import tensorflow as tf

from retinanet_keras import detections, folding
from retinanet_keras.data import augmentation, canvas, image_decoding, image_headers
from retinanet_keras.data.coco import Categories
from retinanet_keras.serving import model_card, warmup
from retinanet_keras.storage import disk

logger = logging.getLogger("retinanet_keras")
CATEGORIES_FILE = model_card.EXTRA / "categories.json"
LARGEST = 2**63 - 1  # of a version in TF Serving


def export_model(model, config, folder, version=None, *, precision=None, metrics=None, run=True):
    """Write a SavedModel with the signatures `serving_default` and `serving_bytes`.

    Beside the graph lie, in `assets.extra`, the categories, a model card, and TF Serving's warm-up requests.

    Args:
        model: a RetinaNet with `categories`.
        config: a Config, for the size images are resized to, and `serving`.
        folder: the base path for TF Serving.
        version: its subfolder. What is there is replaced in one step, unless it is whole and what would be written;
            files in it that no export wrote are kept. None: the next number, and nothing is ever replaced.
        precision: of convolutions, "float32" or "bfloat16"; None: the model's own.
        metrics: {split: metrics}, for the card, which shows those of these weights and settings; None: not measured.
        run: whether `config` is also that of the training, which the card then shows.

    Returns:
        the path of the SavedModel.
    """
    if tf.as_dtype(precision or model.compute_dtype) == tf.bfloat16 and (ratio := folding.bfloat16_time()) > 1.1:
        logger.warning(
            "A matrix product in bfloat16 takes %.1f times as long as in float32 on this machine, which has just timed "
            "both: here the export will be slower than one in float32. It is right for a machine whose processor "
            "computes bfloat16 itself (avx512_bf16 or amx_bf16 in /proc/cpuinfo, or a GPU)", ratio,
        )  # fmt: skip
    folder = Path(folder)
    disk.check_folder(folder if version is None else folder / str(version), "The export's folder")
    described = model_card.describe(model, config, precision, metrics, run)
    if version is not None and model_card.is_of(folder / str(version), described):
        disk.clear_remains(folder / str(version))
        return folder / str(version)
    images, image_bytes = signatures(model, config, precision)
    archive = keras.export.ExportArchive()  # without `track`, which would store every weight twice
    archive.add_endpoint("serving_default", images)
    archive.add_endpoint("serving_bytes", image_bytes)
    with _version(folder, version) as place:
        partial = place.path
        archive.write_out(str(partial), verbose=False)
        (partial / model_card.EXTRA).mkdir(exist_ok=True)
        disk.write(partial / CATEGORIES_FILE, json.dumps(model.categories, indent=1) + "\n")
        warmup.write(partial / model_card.EXTRA / warmup.FILE)
        model_card.write(partial, described)
    return place.path


@contextlib.contextmanager
def _version(folder, version):
    """An object whose `path` is a folder to be filled within the block, and afterwards the version's place."""
    if version is None:
        with disk.new_folder(lambda: folder / str(max(_numbers(folder), default=0) + 1)) as place:
            yield place
        return
    there = folder / str(version)
    with disk.replacing_folder(there) as partial:
        place = types.SimpleNamespace(path=partial)
        yield place
        for name in model_card.others(there):
            if not os.path.lexists(partial / name):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(there / name, partial / name, follow_symlinks=False)
    place.path = there


def signatures(model, config, precision=None):
    """The functions behind the two signatures, of the weights that the model has now.

    Args:
        model: a RetinaNet with `categories`.
        config: a Config.
        precision: as for `export_model`.

    Returns:
        (images, image_bytes), tf.functions: from uint8 [B, H, W, 3] and from encoded strings [B] to a dict of boxes
        [B, D, 4], x1, y1, x2, y2 in pixels of the image given, scores [B, D], labels, category_ids and names [B, D],
        and num_detections [B]. Rows past num_detections: box 0, score 0, label and category id -1, name "".
    """
    max_pixels = config.serving.max_pixels
    search = search_function(model, config, precision)
    spec = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")
    # Saving traces a tf.function again, but not a concrete one: both signatures call the same, which has the weights.
    graph = tf.function(search, input_signature=[spec], autograph=False).get_concrete_function()
    graph.keep_alive = search  # a graph alone does not hold its variables

    @tf.function(input_signature=[spec], autograph=False)
    def images(images):
        return graph(images)

    def one(encoded):
        found = graph(image_decoding.decode(image_headers.checked(encoded, max_pixels))[None])
        return {name: value[0] for name, value in found.items()}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")], autograph=False)
    def image_bytes(image_bytes):
        """Each image on its own canvas, so that what is found in it does not depend on its neighbors."""
        d = model.detection.max_detections
        spec = {
            "boxes": tf.TensorSpec([d, 4], tf.float32), "scores": tf.TensorSpec([d], tf.float32),
            "labels": tf.TensorSpec([d], tf.int32), "category_ids": tf.TensorSpec([d], tf.int64),
            "names": tf.TensorSpec([d], tf.string), "num_detections": tf.TensorSpec([], tf.int32),
        }  # fmt: skip
        return tf.map_fn(one, image_bytes, fn_output_signature=spec, parallel_iterations=1)

    return images, image_bytes


def search_function(model, config, precision=None, resize=augmentation.resize):
    """The function within `signatures`, for one graph: images [B, H, W, 3] to the dict that is described there."""
    data = config.data
    categories = Categories.from_list(model.categories)
    ids, names = [*categories.ids, -1], [name.encode("utf-8", "replace") for name in (*categories.names, "")]
    detect = folding.detect_function(model, precision)

    def search(images):
        pixels, size, scale = canvas.fit(images, data.short_side, data.max_side, resize=resize)
        found = detect(pixels, tf.tile(size[None], [tf.shape(images)[0], 1]))
        row = tf.where(found["labels"] >= 0, found["labels"], len(categories))  # the last is for "nothing"
        return {
            "boxes": canvas.to_original(found["boxes"], scale, tf.shape(images)[1:3]),
            "scores": found["scores"],
            "labels": found["labels"],
            "category_ids": tf.gather(tf.constant(ids, tf.int64), row),
            "names": tf.gather(tf.constant(names), row),
            "num_detections": found["count"],
        }

    return detections.for_any_batch(search)


def versions(folder):
    """The version numbers in a base path, in order."""
    found = (number for number, name in _numbers(folder).items() if str(number) == name)
    return sorted(number for number in found if Path(folder, str(number), "saved_model.pb").exists())


def _numbers(folder):
    """{number: name} of whatever has a number as its name in a folder, as TF Serving reads them: ASCII digits."""
    names = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    numbers = {int(name): name for name in sorted(names) if re.fullmatch("[0-9]{1,19}", name)}
    return {number: name for number, name in numbers.items() if number < LARGEST}


def find(path):
    """The SavedModel at a path: the path itself, or the newest version below it; None where there is neither."""
    path = Path(path)
    if (path / "saved_model.pb").exists():
        return path
    found = versions(path)
    return path / str(found[-1]) if found else None
