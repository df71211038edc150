"""Export to a SavedModel that takes images of any size: resizing, anchors, decoding and NMS are in its graph."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from retinanet_keras import detections, folding
from retinanet_keras.data import augmentation, canvas, image_decoding, image_headers
from retinanet_keras.data.coco import Categories
from retinanet_keras.serving import model_card, warmup
from retinanet_keras.storage import disk

if TYPE_CHECKING:
    from retinanet_keras.config import Config
    from retinanet_keras.model import RetinaNet

logger = logging.getLogger("retinanet_keras")
CATEGORIES_FILE = model_card.EXTRA / "categories.json"
LARGEST = 2**63 - 1  # the largest version number in TF Serving


def export_model(
    model: RetinaNet,
    config: Config,
    folder: str | os.PathLike[str],
    version: int | None = None,
    *,
    precision: str | None = None,
    metrics: dict[str, dict[str, Any]] | None = None,
    run: bool = True,
) -> Path:
    """Write a SavedModel with the signatures `serving_default` and `serving_bytes`.

    The folder `assets.extra` gets the categories, a model card, and warm-up requests for TF Serving.

    Args:
        model: RetinaNet with `categories`.
        config: Config, for the size that images are resized to, and `serving`.
        folder: path. The base path for TF Serving.
        version: int. Its subfolder; an export there is replaced in one step, unless it is complete and identical to
            what would be written. Files in it that no export wrote are preserved. None: the next unused number.
        precision: "float32" or "bfloat16", that of convolutions. None: the model's own.
        metrics: {split: metrics} for the card, which shows those of these weights and settings. None: not measured.
        run: bool. Whether `config` is also that of the training; the card then shows it.

    Returns:
        the path of the SavedModel.
    """
    if tf.as_dtype(precision or model.compute_dtype) == tf.bfloat16 and (ratio := folding.bfloat16_time()) > 1.1:
        logger.warning(
            "A matrix product in bfloat16 takes %.1f times as long as in float32 on this machine (just measured), so "
            "the export will be slower here than one in float32. Use it on machines with hardware support for bfloat16 "
            "(avx512_bf16 or amx_bf16 in /proc/cpuinfo, or a GPU)",
            ratio,
        )
    folder = Path(folder)
    disk.check_folder(folder if version is None else folder / str(version), "The export's folder")
    described = model_card.describe(model, config, precision, metrics, run)
    if version is not None and model_card.is_of(folder / str(version), described):
        disk.clear_remains(folder / str(version))
        return folder / str(version)
    images, image_bytes = signatures(model, config, precision)
    archive = keras.export.ExportArchive()  # no `track`, which would store every weight twice
    archive.add_endpoint("serving_default", images)
    archive.add_endpoint("serving_bytes", image_bytes)
    with _version(folder, version) as written:
        partial = written.path
        archive.write_out(str(partial), verbose=False)
        (partial / model_card.EXTRA).mkdir(exist_ok=True)
        disk.write(partial / CATEGORIES_FILE, json.dumps(model.categories, indent=1) + "\n")
        warmup.write(partial / model_card.EXTRA / warmup.FILE)
        model_card.write(partial, described)
    return written.path


@contextlib.contextmanager
def _version(folder: Path, version: int | None) -> Iterator[Any]:
    """Yield an object whose `path` is a folder to fill within the block, and afterwards the path of the version."""
    if version is None:
        with disk.new_folder(lambda: folder / str(max(_numbers(folder), default=0) + 1)) as written:
            yield written
        return
    target = folder / str(version)
    with disk.replacing_folder(target) as partial:
        replaced = types.SimpleNamespace(path=partial)
        yield replaced
        for name in model_card.others(target):
            if not os.path.lexists(partial / name):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(target / name, partial / name, follow_symlinks=False)
    replaced.path = target


def signatures(
    model: RetinaNet, config: Config, precision: str | None = None
) -> tuple[Callable[..., dict[str, tf.Tensor]], Callable[..., dict[str, tf.Tensor]]]:
    """The functions behind the two signatures, with the current weights of the model.

    Args:
        model: RetinaNet with `categories`.
        config: Config.
        precision: as for `export_model`.

    Returns:
        (images, image_bytes), tf.functions: from uint8 [B, H, W, 3] and from encoded strings [B] to a dict of boxes
        [B, D, 4], x1, y1, x2, y2 in pixels of the given image, scores [B, D], labels, category_ids and names [B, D],
        and num_detections [B]. Rows past num_detections: box 0, score 0, label and category id -1, name "".
    """
    max_pixels = config.serving.max_pixels
    detect = detect_function(model, config, precision)
    spec = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")
    # Saving retraces a tf.function, but not a concrete one: both signatures call the same one, which has the weights.
    graph = tf.function(detect, input_signature=[spec], autograph=False).get_concrete_function()
    graph.keep_alive = detect  # a graph alone does not keep its variables alive

    @tf.function(input_signature=[spec], autograph=False)
    def images(images):
        return graph(images)

    def one(encoded):
        outputs = graph(image_decoding.decode(image_headers.checked(encoded, max_pixels))[None])
        return {name: value[0] for name, value in outputs.items()}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")], autograph=False)
    def image_bytes(image_bytes):
        """Detect in each image on its own canvas, so that its detections do not depend on the rest of the batch."""
        d = model.detection.max_detections
        spec = {
            "boxes": tf.TensorSpec([d, 4], tf.float32),
            "scores": tf.TensorSpec([d], tf.float32),
            "labels": tf.TensorSpec([d], tf.int32),
            "category_ids": tf.TensorSpec([d], tf.int64),
            "names": tf.TensorSpec([d], tf.string),
            "num_detections": tf.TensorSpec([], tf.int32),
        }
        return tf.map_fn(one, image_bytes, fn_output_signature=spec, parallel_iterations=1)

    return images, image_bytes


def detect_function(
    model: RetinaNet,
    config: Config,
    precision: str | None = None,
    resize: Callable[[Any, Any], tf.Tensor] = augmentation.resize,
) -> Callable[[Any], dict[str, tf.Tensor]]:
    """Detection in images of any size, as both `signatures` run it.

    Args:
        model, config, precision: as for `signatures`.
        resize: a function as `augmentation.resize`.

    Returns:
        a function for one graph: images uint8 [B, H, W, 3] to the dict described in `signatures`.
    """
    data = config.data
    categories = Categories.from_list(model.categories)
    ids, names = [*categories.ids, -1], [name.encode("utf-8", "replace") for name in (*categories.names, "")]
    detect_padded = folding.detect_function(model, precision)

    def detect(images):
        pixels, size, scale = canvas.fit(images, data.short_side, data.max_side, resize=resize)
        outputs = detect_padded(pixels, tf.tile(size[None], [tf.shape(images)[0], 1]))
        row = tf.where(outputs["labels"] >= 0, outputs["labels"], len(categories))  # the last row is for padding
        return {
            "boxes": canvas.to_original(outputs["boxes"], scale, tf.shape(images)[1:3]),
            "scores": outputs["scores"],
            "labels": outputs["labels"],
            "category_ids": tf.gather(tf.constant(ids, tf.int64), row),
            "names": tf.gather(tf.constant(names), row),
            "num_detections": outputs["count"],
        }

    return detections.for_any_batch(detect)


def versions(folder: str | os.PathLike[str]) -> list[int]:
    """The version numbers of the SavedModels in a base path, in order."""
    numbers = (number for number, name in _numbers(folder).items() if str(number) == name)
    return sorted(number for number in numbers if Path(folder, str(number), "saved_model.pb").exists())


def _numbers(folder: str | os.PathLike[str]) -> dict[int, str]:
    """{number: name} of the entries of a folder whose names are numbers, as TF Serving reads them: ASCII digits."""
    names = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    numbers = {int(name): name for name in sorted(names) if re.fullmatch("[0-9]{1,19}", name)}
    return {number: name for number, name in numbers.items() if number < LARGEST}


def find(path: str | os.PathLike[str]) -> Path | None:
    """The SavedModel at a path: the path itself, or the newest version below it; None if there is neither."""
    path = Path(path)
    if (path / "saved_model.pb").exists():
        return path
    numbers = versions(path)
    return path / str(numbers[-1]) if numbers else None
