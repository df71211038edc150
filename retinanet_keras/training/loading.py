"""Load trained models from files."""

from __future__ import annotations

from pathlib import Path

import keras

from retinanet_keras.config import Config
from retinanet_keras.data import dataset_formats
from retinanet_keras.errors import DataError, UserError
from retinanet_keras.model import RetinaNet
from retinanet_keras.serving.export import find
from retinanet_keras.training.build import build_model, load_weights
from retinanet_keras.weights import keras_files


def of_file(path: str | Path, option: str) -> RetinaNet:
    """Load a RetinaNet with categories from a .keras file.

    Args:
        path: str or Path. The file.
        option: str. The argument that named it, for error messages.
    """
    if not Path(path).is_file():
        raise DataError(f"{option}: there is no file {path}")
    try:
        keras_files.check(path)
        model = keras.models.load_model(path)
    except UserError as error:
        raise DataError(f"{option}: {error}") from error
    except (KeyError, OSError, TypeError, ValueError) as error:  # from Keras, for a configuration that it cannot build
        first = str(error).strip().split("\n")[0]
        raise DataError(f"{option}: {path} is not a model that Keras can load ({first})") from None
    if not isinstance(model, RetinaNet) or not model.categories:
        raise DataError(f"{option}: {path} is not a RetinaNet with categories, but {type(model).__name__}")
    return model


def of_weights(path: str | Path, config: Config, split: str, option: str) -> RetinaNet:
    """Build the RetinaNet of a configuration with the categories of a split, and load a .weights.h5 file.

    Args:
        path: str or Path. The file.
        config: Config. Settings of the model and of the dataset.
        split: str. Name of the split.
        option: str. The argument that named the file, for error messages.
    """
    if not Path(path).is_file():
        raise DataError(f"{option}: there is no file {path}")
    model = build_model(config, dataset_formats.open_split(config.data, split).categories)
    try:
        load_weights(model, path)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(f"{option}: {path} does not fit the configuration's model ({first})") from None
    return model


def saved_model(path: str | Path) -> Path:
    """Return the path of the SavedModel in an export folder."""
    version = find(path)
    if not version:
        raise DataError(
            f"{path} is neither a run's folder (no config.json) nor an export (no saved_model.pb in it or in a "
            "numbered subfolder)"
        )
    return version
