"""Shared by the figures: colors, axes, and their files, a picture and its numbers."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # no pyplot: it keeps figures and a backend in global state

from retinanet_keras.errors import UserError
from retinanet_keras.storage import disk
from retinanet_keras.visualization.draw import PALETTE

COLORS = tuple("#{:02x}{:02x}{:02x}".format(*rgb) for rgb in PALETTE)
BLUE, ORANGE, GREEN, PINK, SKY, RED, _ = COLORS
BLACK, GRAY, LIGHT = "#222222", "#777777", "#dddddd"


def panels(columns: int = 1, size: tuple[float, float] = (6.4, 4.4), **settings: Any) -> tuple[Figure, list[Any]]:
    """Create (Figure, list of its axes) in this project's style; `settings` are those of `Figure.subplots`."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **settings)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color=LIGHT, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, list(axes)


def legend(axis: Any, **settings: Any) -> None:
    """Add a legend in this project's style."""
    axis.legend(**{"frameon": False, "fontsize": 9, "handlelength": 2.4, **settings})


def save(to: str | Path, name: str, figure: Figure, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Path:
    """Write NAME.png and NAME.csv to a folder, and print their paths.

    Args:
        to: str or Path. The folder.
        name: str. Name of the files.
        figure: Figure. The picture.
        columns: sequence of str. Names of the columns.
        rows: iterable of rows. Values of the columns; floats are written with 8 digits.

    Returns:
        The path of the picture.

    Raises:
        UserError: where the folder cannot be written.
    """
    picture, table = Path(to) / f"{name}.png", Path(to) / f"{name}.csv"
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        with disk.replacing(picture) as partial:
            figure.savefig(partial, format="png")
        with disk.replacing_text(table, newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([[_cell(value) for value in row] for row in rows])
    except OSError as error:
        raise UserError(f"{to} cannot be written ({error.strerror or error}). Name another folder with --to") from None
    print(f"{picture}\n{table}")
    return picture


def _cell(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value
