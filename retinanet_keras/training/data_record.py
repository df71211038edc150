"""Detect changes of a dataset between starts of a run, by digests in data.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Any

from retinanet_keras.errors import RunError
from retinanet_keras.storage import disk, strict_json
from retinanet_keras.training.run_folder import RunFolder

logger = logging.getLogger("retinanet_keras")
UNUSABLE = "unusable"  # key of data.json: images could not be read, and the user was told to replace them


def check(folder: RunFolder, data: dict[str, Any], splits: Collection[str]) -> None:
    """Compare the datasets of a run with those that it started with, and write data.json.

    Args:
        folder: RunFolder, prepared.
        data: dict. Fingerprint (`fingerprint.fingerprint`) by name of split.
        splits: names of the splits that must not change: those of training and validation.

    Raises:
        RunError: where a run would resume with other data.
    """
    old = recorded(folder) if folder.started() else {}
    changed, harmless = _changes(old, {split: data[split] for split in splits})
    if changed and old.get(UNUSABLE) and all(_same(old, data, split, "annotations") for split in splits):
        changed, harmless = [], changed + harmless  # the last start ended with a request for other files
    if changed:
        raise RunError(
            f"{folder.path}: {'; '.join(changed)}. Resuming would mix the two. Restore the dataset as it was, or "
            "train into another folder with --workdir"
        )
    if harmless:
        logger.warning("%s: %s; training continues with them", folder.path, "; ".join(harmless))
    with folder.writing():
        disk.write(folder.data_file, json.dumps(data, indent=1) + "\n")


def recorded(folder: RunFolder) -> dict[str, Any]:
    """Read the record of a run's data, empty where there is none; a damaged one is set aside."""
    if not folder.data_file.exists():
        return {}
    try:
        tree = strict_json.read(folder.data_file)
    except strict_json.JsonError:
        tree = None
    if isinstance(tree, dict) and all(isinstance(value, dict) for key, value in tree.items() if key != UNUSABLE):
        return tree
    logger.warning(
        "%s is damaged, so changes of the dataset since the run started cannot be detected. It is kept as %s",
        folder.data_file,
        disk.set_aside(folder.data_file),
    )
    return {}


def allow_other_files(folder: RunFolder) -> None:
    """Record that the user was told to replace image files, which may have other sizes at the next start."""
    if data := recorded(folder):
        disk.write(folder.data_file, json.dumps({**data, UNUSABLE: True}, indent=1) + "\n")


def _changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(changes that cannot be mixed, changes that may be harmless); a split without a record has none."""
    mixed, harmless = [], []
    for split in new:
        if not _same(old, new, split, "annotations"):
            mixed.append(f"the annotations of {split} are not those that the run started with")
        elif not _same(old, new, split, "sizes"):
            mixed.append(f"the sizes in bytes of image files of {split} are not those at the start of the run")
        elif not _same(old, new, split, "times"):
            harmless.append(f"image files of {split} have other modification times, as copies have")
    return mixed, harmless


def _same(old: dict[str, Any], new: dict[str, Any], split: str, key: str) -> bool:
    return old.get(split, new[split]).get(key) == new[split][key]
