"""A run's folder: what is where in it, its configuration and log, and its trained model."""

import csv
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

from retinanet_keras import losses, optimizers, pretrained
from retinanet_keras.config import config_from_dict
from retinanet_keras.data.coco import Categories
from retinanet_keras.errors import UserError
from retinanet_keras.model import RetinaNet
from retinanet_keras.settings import ConfigError

# What may change from one start of a run to the next without making it another run.
FREE_TO_CHANGE = (
    "data.dir", "data.bad_images", "eval.", "serving.", "detection.", "strategy.", "train.iterations",
    "train.learning_rate", "train.drops", "train.clip_norm", "train.checkpoint_every", "train.keep_checkpoints",
    "train.log_every", "train.jit_compile",
)  # fmt: skip
LOG_COLUMNS = (
    "step", "loss", "classification_loss", "box_loss", "positives", "learning_rate", "gradient_norm",
    "images_per_second", "data_wait", "AP", "AP50",
)  # fmt: skip


class RunError(UserError):
    """A run that cannot go on; the message says why, what is safe, and what to do."""


class RunFolder:
    """The paths of a run, and what is read from and written to them."""

    def __init__(self, path):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.categories_file = self.path / "categories.json"
        self.log_file = self.path / "log.csv"
        self.curves_file = self.path / "curves.png"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.best_weights = self.checkpoints / "best.weights.h5"
        self.best_file = self.checkpoints / "best.json"
        self.export = self.path / "export"
        self.failed = self.path / "failed"

    def evaluation(self, split):
        """The folder of a split's results."""
        return self.path / "eval" / split

    def start(self, config, categories):
        """Make the folder, or check that the run in it is this one, and write config.json and categories.json.

        Raises:
            RunError: where the folder cannot be written, or holds another run, whose differences it names.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if self.config_file.exists() and any(self.checkpoints.iterdir()):
                changes, free = self._changes(config)
                if self.categories_file.exists() and self.categories() != categories:
                    changes.append(f"the categories were {self.categories().names}, now {categories.names}")
                if changes:
                    raise RunError(
                        f"{self.path} holds a run of other settings, which cannot be mixed with these: "
                        f"{'; '.join(changes)}. Train into another folder with --workdir, or set these back"
                    )
                if free:
                    print(f"Changed since the last start: {'; '.join(free)}")
            write_atomically(self.config_file, json.dumps(config.to_dict(), indent=2) + "\n")
            write_atomically(self.categories_file, json.dumps(categories.to_list(), indent=1) + "\n")
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({error.strerror or error}). Choose another folder with --workdir"
            ) from None

    def _changes(self, config):
        """What differs from the run's own configuration: what cannot be mixed with it, and what can."""
        old, new = _flat(load_config_of(self).to_dict()), _flat(config.to_dict())
        changes, free = [], []
        for key in new:
            if old.get(key) != new[key]:
                said = f"{key} was {json.dumps(old.get(key))}, now {json.dumps(new[key])}"
                (free if key.startswith(FREE_TO_CHANGE) else changes).append(said)
        return changes, free

    def log_rows(self):
        """The rows of log.csv as dicts of numbers; empty cells are left out."""
        if not self.log_file.exists():
            return []
        *whole, _ = self.log_file.read_text().split("\n")  # what has no line end was cut off by a kill or a full disk
        return [{key: float(value) for key, value in row.items() if key and value} for row in csv.DictReader(whole)]

    def cut_log(self, step):
        """Drop the rows after `step`: a resumed run writes them again."""
        rows = [row for row in self.log_rows() if row["step"] <= step]
        lines = [",".join(LOG_COLUMNS)]
        lines += [",".join(_cell(row, column) for column in LOG_COLUMNS) for row in rows]
        write_atomically(self.log_file, "\n".join(lines) + "\n")

    def log(self, row):
        """Append one row, a dict of some of LOG_COLUMNS."""
        with open(self.log_file, "a") as file:
            file.write(",".join(_cell(row, column) for column in LOG_COLUMNS) + "\n")

    def best(self):
        """{"step", "AP"} of the best evaluation so far, or None."""
        return json.loads(self.best_file.read_text()) if self.best_file.exists() else None

    def keep_best(self, model, step, ap):
        """Save the weights where they are the best so far. A kill between the two writes costs one evaluation."""
        best = self.best()
        if best is None or ap > best["AP"]:
            partial = self.checkpoints / "partial.weights.h5"
            model.save_weights(partial)
            os.replace(partial, self.best_weights)
            write_atomically(self.best_file, json.dumps({"step": step, "AP": ap}) + "\n")

    def categories(self):
        """The Categories the run was trained on."""
        return Categories.from_list(json.loads(self.categories_file.read_text()))


def settle(config):
    """The Config with the pixel mean that its file of weights expects, so that the run's own config.json has it."""
    weights = config.model.weights
    if weights in (None, "imagenet") or not Path(weights).is_file():
        return config
    try:
        mean = pretrained.pixel_mean(weights)
    except OSError:  # no such file as it should be; loading it says so
        return config
    return replace(config, model=replace(config.model, pixel_mean=mean)) if mean else config


def build_model(config, categories, weights=None):
    """The compiled RetinaNet of a configuration.

    Args:
        config: a Config.
        categories: Categories.
        weights: overrides `model.weights`; pass None where all weights will be loaded anyway.
    """
    model = config.model
    net = RetinaNet(
        len(categories), model.backbone, weights=weights, anchors=config.anchors, targets=config.targets,
        detection=config.detection, fpn_channels=model.fpn_channels, head_depth=model.head_depth, prior=model.prior,
        norm=model.norm, width=model.width, freeze_at=model.freeze_at, pixel_mean=model.pixel_mean,
        categories=categories.to_list(), dtype=config.train.precision,
    )  # fmt: skip
    loss = config.loss
    net.compile(
        optimizers.build(config.train), _classification_loss(loss), losses.SmoothL1Loss(loss.box_beta),
        box_weight=loss.box_weight, normalizer=loss.normalizer, mining=config.mining,
        jit_compile=config.train.jit_compile, check_finite=True,
    )  # fmt: skip
    return net


def _classification_loss(config):
    """The Keras loss of a LossConfig."""
    if config.kind == "cross_entropy":
        return losses.CrossEntropyLoss(config.alpha)
    if config.kind == "focal_star":
        return losses.FocalStarLoss(config.alpha, config.gamma, config.star_beta)
    if config.kind == "hinge":
        return losses.HingeLoss(config.alpha, config.hinge_threshold)
    return losses.FocalLoss(config.alpha, config.gamma)


def load_weights(model, path):
    """Load a .weights.h5 file, for inference: the optimizer's state in it, where there is any, is left alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        model.load_weights(path)


def load_config_of(folder):
    """The Config in a run's folder.

    Raises:
        RunError: where there is no run, or its config.json cannot be read.
    """
    if not folder.config_file.exists():
        raise RunError(
            f"There is no run in {folder.path}: it has no config.json. Train one first: "
            f"python train.py --config CONFIG.json --workdir {folder.path}"
        )
    try:
        return config_from_dict(json.loads(folder.config_file.read_text()))
    except (json.JSONDecodeError, ConfigError) as error:
        raise RunError(f"{folder.config_file} cannot be read: {error}") from None


def write_atomically(path, text):
    """Write a file so that there is either the old or the new one, whatever happens."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _flat(tree, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _cell(row, column):
    value = row.get(column)
    return "" if value is None else f"{value:.0f}" if column == "step" else f"{value:.6g}"
