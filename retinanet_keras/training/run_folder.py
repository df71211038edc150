"""Folder of a run: its paths, and how its configuration, categories and log are read and written."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from retinanet_keras.config import Config, config_from_dict
from retinanet_keras.config_schema import show
from retinanet_keras.data.coco import Categories
from retinanet_keras.errors import ConfigError, DataError, RunError, first_line
from retinanet_keras.storage import disk, strict_json
from retinanet_keras.storage.disk import check_place
from retinanet_keras.training import log_file

logger = logging.getLogger("retinanet_keras")

# Settings that may change between two starts of a run
FREE_TO_CHANGE = (
    "data.dir",
    "data.bad_images",
    "eval.",
    "serving.",
    "detection.",
    "strategy.",
    "train.iterations",
    "train.learning_rate",
    "train.drops",
    "train.clip_norm",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.jit_compile",
)


class RunFolder:
    """Paths of a run, and the files read from and written to them.

    Args:
        path: str or Path. The folder, which need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.categories_file = self.path / "categories.json"
        self.data_file = self.path / "data.json"
        self.log_file = self.path / "log.csv"
        self.curves_file = self.path / "curves.png"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.best_weights = self.checkpoints / "best.weights.h5"
        self.best_file = self.checkpoints / "best.json"
        self.export = self.path / "export"
        self.failed = self.path / "failed"

    def evaluation(self, split: str) -> Path:
        """Return the folder of a split's results."""
        return self.path / "eval" / split

    def prepare(self) -> None:
        """Create the folder, so that it can be locked.

        Raises:
            RunError: where it cannot be written, or a file is in the place of a folder, or the reverse.
        """
        files = [self.config_file, self.categories_file, self.data_file, self.log_file, self.curves_file]
        files += [self.best_weights, self.best_file, self.checkpoints / "checkpoint", self.path / disk.LOCK]
        for path in (self.path, self.checkpoints, self.tensorboard, self.path / "eval", self.export, self.failed):
            check_place(path)
        for path in files:
            if path.is_dir():
                raise RunError(
                    f"{path} is a folder, and a run writes a file there. Choose another folder with --workdir"
                )
        with self.writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    def start(self, config: Config, categories: Categories, check_data: Callable[[], None] = lambda: None) -> None:
        """Create the folder, or check that it holds this run, and write config.json and categories.json.

        Args:
            config: Config. Settings of the run.
            categories: Categories. Those of the dataset.
            check_data: function without arguments, called after the other checks and before anything is written.

        Raises:
            RunError: where the folder cannot be written, or holds a different run; names the differences.
        """
        self.prepare()
        with self.writing():
            if self.started():
                self._check_same(config, self._recorded_categories(categories), categories)
            check_data()
            disk.write(self.config_file, json.dumps(config.to_dict(), indent=2) + "\n")
            disk.write(self.categories_file, json.dumps(categories.to_list(), indent=1) + "\n")

    def started(self) -> bool:
        """Whether there is a run to resume."""
        return self.config_file.exists() and self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def _check_same(self, config: Config, recorded: Categories, categories: Categories) -> None:
        """Raise a RunError where the run in the folder is a different one; print changes that are allowed."""
        changes, free = self._changes(config)
        if recorded != categories:
            changes.append(f"the categories were {recorded.names}, now {categories.names}")
        if changes:
            raise RunError(
                f"{self.path} holds a run with other settings, which cannot be mixed with these: "
                f"{'; '.join(changes)}. Train into another folder with --workdir, or restore these settings"
            )
        if (step := max(self.steps(), default=0)) > config.train.iterations:
            raise RunError(
                f"train.iterations: the run in {self.path} is at step {step}, and {config.train.iterations} steps are "
                f"configured. Set it to {step} or more, or train into another folder with --workdir"
            )
        if free:
            print(f"Changed since the last start: {'; '.join(free)}")

    def _recorded_categories(self, otherwise: Categories) -> Categories:
        """The run's Categories; where the file is damaged or missing, others, which the dataset's record checks."""
        if not self.categories_file.exists():
            return otherwise
        try:
            return self.categories()
        except RunError:
            aside = disk.set_aside(self.categories_file)
            logger.warning(
                "%s is damaged. It is kept as %s; a new one is written from the dataset", self.categories_file, aside
            )
            return otherwise

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an error in writing into a RunError."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({error.strerror or error}). Choose another folder with --workdir"
            ) from None

    def _changes(self, config: Config) -> tuple[list[str], list[str]]:
        """Differences from the run's configuration: (those that cannot be mixed with it, those that can)."""
        old, new = _flat(load_config_of(self).to_dict()), _flat(config.to_dict())
        changes: list[str] = []
        free: list[str] = []
        for key in new:
            if old.get(key) != new[key]:
                change = f"{key} was {json.dumps(old.get(key))}, now {json.dumps(new[key])}"
                (free if key.startswith(FREE_TO_CHANGE) else changes).append(change)
        return changes, free

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, in order: those with an index and data."""
        return [step for step in self.indexed_steps() if any(self.checkpoints.glob(f"step-{step}.data-*"))]

    def indexed_steps(self) -> list[int]:
        """Return the steps with at least the index of a checkpoint, in order."""
        matches = (re.fullmatch(r"step-(\d+)\.index", path.name) for path in self.checkpoints.glob("step-*.index"))
        return sorted(int(match[1]) for match in matches if match)

    def log_rows(self) -> list[dict[str, float]]:
        """Read the rows of log.csv as dicts of numbers; empty cells and damaged lines are skipped."""
        return log_file.read(self.log_file)[0]

    def cut_log(self, step: int) -> None:
        """Delete the rows after `step`, which a resumed run writes again. A damaged file is set aside."""
        rows, damaged = log_file.read(self.log_file)
        if damaged:
            logger.warning(
                "%s is damaged (%d lines). It is kept as %s; a new one has the %d rows that can be read",
                self.log_file,
                damaged,
                disk.set_aside(self.log_file),
                len(rows),
            )
        rows = [row for row in rows if row["step"] <= step]
        disk.write(self.log_file, log_file.header() + "".join(map(log_file.line, rows)))

    def log(self, row: Mapping[str, float | None]) -> None:
        """Append one row to log.csv, a dict of some of log_file.COLUMNS."""
        with open(self.log_file, "a") as file:
            file.write(log_file.line(row))

    def categories(self) -> Categories:
        """Read the Categories that the run was trained on.

        Raises:
            RunError: where categories.json cannot be read.
        """
        try:
            categories = Categories.from_list(strict_json.read(self.categories_file))
            if not categories:
                raise DataError("it has no categories")
            return categories
        except (strict_json.JsonError, DataError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self.categories_file} cannot be read ({first_line(error)}). Run train.py again with the settings of "
                "the run to rewrite it from the dataset"
            ) from None


def load_config_of(folder: RunFolder) -> Config:
    """Load the Config of the run in a folder.

    Raises:
        RunError: where there is no run, or its config.json cannot be read.
    """
    if not folder.config_file.exists():
        raise RunError(
            f"There is no run in {folder.path}: it has no config.json. Train one first: "
            f"python train.py --config CONFIG.json --workdir {folder.path}"
        )
    try:
        tree = strict_json.read(folder.config_file)
        if not isinstance(tree, dict):
            raise ConfigError(f"expected a JSON object of settings, got {show(tree)}")
        return config_from_dict(tree)
    except (strict_json.JsonError, OSError, ConfigError) as error:
        raise RunError(
            f"{folder.config_file} cannot be read: {error}. Copy the configuration of the run there again, or train "
            "into another folder"
        ) from None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
