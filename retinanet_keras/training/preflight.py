"""What the end of a run needs, checked before its first step."""

import importlib.util
import os
from importlib.metadata import PackageNotFoundError

from retinanet_keras.serving import card
from retinanet_keras.training import outputs
from retinanet_keras.training.folder import RunError


def check_names(categories, annotation_file):
    """A RunError where the name of one of the Categories cannot be written into an export."""
    for id_, name in zip(categories.ids, categories.names, strict=True):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise RunError(
                f"{annotation_file}: the name of category {id_}, {name!a}, has half of a surrogate pair in it, which "
                "no export can hold. Correct the name"
            ) from None


def check(model, config, folder, split):
    """A RunError where evaluation or export would fail at the end of the run.

    Args:
        model: RetinaNet.
        config: a Config.
        folder: a RunFolder.
        split: str. Name of the split evaluated at the end.
    """
    outputs.check(folder.evaluation(split))
    target = folder.export / "1"
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file, and the export writes a folder there. Remove or rename it")
    if folder.export.exists() and not os.access(folder.export, os.W_OK):
        raise RunError(f"{folder.export} cannot be written (no permission). Change its permissions")
    if config.eval.library != "pycocotools" and importlib.util.find_spec(config.eval.library) is None:
        raise RunError(
            f'eval.library: the package {config.eval.library} is not installed. Install it with "pip install '
            f'{config.eval.library}", or set eval.library=pycocotools'
        )
    try:
        card.describe(model, config)
    except PackageNotFoundError as error:
        raise RunError(
            f"The model card of the export names the version of {error.name}, which is not installed as a package. "
            "Install it with pip (this project: `pip install -e .` in its folder)"
        ) from None
