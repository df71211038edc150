"""Whether a dataset is still the one that it was: digests of annotations and image files, kept in data.json."""

import json
import logging

from retinanet_keras.errors import RunError
from retinanet_keras.storage import disk, strict_json

logger = logging.getLogger("retinanet_keras")
UNUSABLE = "unusable"  # key of data.json: images could not be read, and the user has been asked to repair them


def check(folder, data, mixed):
    """Compare the datasets of a run with those that it began with, and write data.json.

    Args:
        folder: a RunFolder, prepared.
        data: {split: its `fingerprint`}.
        mixed: the splits of which there are results already: what is trained and validated on.

    Raises:
        RunError: where a run that has begun would go on with other data.
    """
    old = recorded(folder) if folder.started() else {}
    changed, harmless = _changes(old, {split: data[split] for split in mixed})
    if changed and old.get(UNUSABLE) and all(_same(old, data, split, "annotations") for split in mixed):
        changed, harmless = [], changed + harmless  # the last start ended by asking for other files
    if changed:
        raise RunError(
            f"{folder.path}: {'; '.join(changed)}. Going on would mix the two. Put the dataset back as it was, or "
            "train into another folder with --workdir"
        )
    if harmless:
        logger.warning("%s: %s; training goes on with them", folder.path, "; ".join(harmless))
    with folder.writing():
        disk.write(folder.data_file, json.dumps(data, indent=1) + "\n")


def recorded(folder):
    """The record of a run's data, empty where there is none; a damaged one is set aside."""
    if not folder.data_file.exists():
        return {}
    try:
        tree = strict_json.read(folder.data_file)
    except strict_json.JsonError:
        tree = None
    if isinstance(tree, dict) and all(isinstance(value, dict) for key, value in tree.items() if key != UNUSABLE):
        return tree
    logger.warning(
        "%s is damaged: whether the dataset has changed since the run began is not known. It is kept as %s",
        folder.data_file, disk.set_aside(folder.data_file),
    )  # fmt: skip
    return {}


def allow_other_files(folder):
    """Note that a run ended by asking for image files to be repaired: at the next start they may have other sizes."""
    if data := recorded(folder):
        disk.write(folder.data_file, json.dumps({**data, UNUSABLE: True}, indent=1) + "\n")


def _changes(old, new):
    """How datasets differ: (what cannot be mixed, what may be harmless). A split that was not recorded is no change."""
    mixed, harmless = [], []
    for split in new:
        if not _same(old, new, split, "annotations"):
            mixed.append(f"the annotations of {split} are not those that the run began with")
        elif not _same(old, new, split, "sizes"):
            mixed.append(f"image files of {split} are not as many bytes as when the run began")
        elif not _same(old, new, split, "times"):
            harmless.append(f"image files of {split} have other modification times, as copies have")
    return mixed, harmless


def _same(old, new, split, key):
    return old.get(split, new[split]).get(key) == new[split][key]
