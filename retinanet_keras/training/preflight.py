"""Check, before the first step, what the end of a run needs."""

from __future__ import annotations

import importlib.util
import os

from retinanet_keras.config import Config
from retinanet_keras.errors import RunError
from retinanet_keras.evaluation import artifacts
from retinanet_keras.training.run_folder import RunFolder


def check(config: Config, folder: RunFolder, split: str) -> None:
    """Raise a RunError where evaluation or export would fail at the end of the run.

    Args:
        config: Config. Settings of the run.
        folder: RunFolder. Folder of the run.
        split: str. Name of the split evaluated at the end.
    """
    artifacts.check(folder.evaluation(split))
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
