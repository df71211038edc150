"""The best weights of a run so far, and best.json, which says which step they are from."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import keras

from retinanet_keras.errors import RunError, UserError, first_line
from retinanet_keras.storage import disk, strict_json
from retinanet_keras.training.build import load_weights
from retinanet_keras.training.run_folder import RunFolder
from retinanet_keras.weights import keras_files

logger = logging.getLogger("retinanet_keras")


def read(folder: RunFolder) -> dict[str, Any] | None:
    """Read {"step", "AP", "digest" of the weights file} of the best evaluation; None if there is none.

    Raises:
        RunError: where best.json is damaged.
    """
    if not folder.best_file.exists():
        return None
    try:
        best = strict_json.read(folder.best_file)
        if type(best["step"]) is int and type(best["AP"]) in (int, float) and math.isfinite(best["AP"]):
            return best
        problem = "step and AP are expected as numbers"
    except strict_json.JsonError as error:
        problem = str(error)
    except (TypeError, KeyError):
        problem = "step and AP are missing"
    raise RunError(
        f"{folder.best_file} cannot be read: {problem}. Run train.py again with the settings of the run to rewrite it "
        "from log.csv"
    )


def keep(folder: RunFolder, model: keras.Model, step: int, ap: float) -> None:
    """Save the weights if they are the best so far. A kill between the two writes costs one evaluation."""
    best = read(folder)
    if best is None or ap > best["AP"]:
        with disk.replacing(folder.best_weights) as partial:
            model.save_weights(partial)
        _write(folder, step, ap)


def load(folder: RunFolder, model: keras.Model) -> dict[str, Any] | None:
    """Load the best weights into a model; the result of `read`, None where nothing has been evaluated yet.

    Raises:
        RunError: where best.json or the weights are damaged.
    """
    best = read(folder)
    if best is None:
        return None
    advice = "Use the last checkpoint instead with --set eval.keep=last, or train the run again"
    try:
        fits = best.get("digest") in (None, disk.digest(folder.best_weights.read_bytes()))
        if fits:
            load_weights(model, folder.best_weights)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.best_weights} cannot be read ({first_line(error)}). {advice}") from None
    if not fits:
        raise RunError(
            f"{folder.best_weights} is damaged, or is not the file that {folder.best_file} describes. {advice}"
        )
    return best


def repair(folder: RunFolder) -> None:
    """Check best.json and the weights that it describes before training resumes, and repair them.

    A damaged best.json is rewritten from the log. Where that is not possible, or the weights are damaged, missing or
    different, both are set aside, and the next evaluation is the best.
    """
    try:
        best = read(folder)
    except RunError:
        best = {}
    if best is None:
        return
    intact = _is_intact(folder, best.get("digest"))
    rows = [row for row in folder.log_rows() if "AP" in row]
    if best and intact:
        return
    if intact and rows:
        aside = disk.set_aside(folder.best_file)
        row = max(rows, key=lambda row: row["AP"])  # the first of equals, as in `keep`
        _write(folder, int(row["step"]), row["AP"])
        logger.warning("%s is damaged. It is kept as %s; a new one is written from log.csv", folder.best_file, aside)
        return
    asides = []
    for path in (folder.best_weights, folder.best_file):  # in this order a kill between them is detected
        if path.exists():
            asides.append(str(disk.set_aside(path)))
            path.unlink()
    logger.warning(
        "%s or %s is damaged or missing, or a kill came between writing the two. What is there is kept as %s; the next "
        "evaluation will be the best so far, and without one the last weights are used",
        folder.best_weights,
        folder.best_file.name,
        " and ".join(asides),
    )


def _is_intact(folder: RunFolder, digest: str | None) -> bool:
    """Whether the weights file exists, is undamaged, and has the digest, if one is given."""
    try:
        keras_files.check(folder.best_weights)
        return digest in (None, disk.digest(folder.best_weights.read_bytes()))
    except (OSError, UserError):
        return False


def _write(folder: RunFolder, step: int, ap: float) -> None:
    digest = disk.digest(folder.best_weights.read_bytes())
    disk.write(folder.best_file, json.dumps({"step": step, "AP": ap, "digest": digest}) + "\n")
