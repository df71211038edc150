"""Trained models from the files they lie in."""

from pathlib import Path

import keras

from retinanet_keras.data import dataset_formats
from retinanet_keras.errors import DataError, UserError
from retinanet_keras.model import RetinaNet
from retinanet_keras.serving.export import find
from retinanet_keras.training.build import build_model, load_weights
from retinanet_keras.weights import keras_files


def of_file(path, option):
    """A RetinaNet with categories from a .keras file. `option`: the argument that named it."""
    if not Path(path).is_file():
        raise DataError(f"{option}: there is no file {path}")
    try:
        keras_files.check(path)
        model = keras.models.load_model(path)
    except UserError as error:
        raise DataError(f"{option}: {error}") from error
    except (KeyError, OSError, TypeError, ValueError) as error:  # of Keras, for a configuration that it cannot build
        first = str(error).strip().split("\n")[0]
        raise DataError(f"{option}: {path} is no model that Keras can load ({first})") from None
    if not isinstance(model, RetinaNet) or not model.categories:
        raise DataError(f"{option}: {path} is no RetinaNet with categories, but {type(model).__name__}")
    return model


def of_weights(path, config, split, option):
    """The RetinaNet of a configuration, with a split's categories, and the weights of a .weights.h5 file."""
    if not Path(path).is_file():
        raise DataError(f"{option}: there is no file {path}")
    model = build_model(config, dataset_formats.open_split(config.data, split).categories)
    try:
        load_weights(model, path)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(f"{option}: {path} does not fit the configuration's model ({first})") from None
    return model


def saved_model(path):
    """The path of the SavedModel of an export folder."""
    found = find(path)
    if not found:
        raise DataError(
            f"{path} is neither a run's folder (no config.json) nor an export (no saved_model.pb in it, nor in a "
            "numbered subfolder)"
        )
    return found
