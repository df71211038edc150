"""log.csv of a run: written row by row, and read whatever a kill or a damaged disk has left of it."""

import math
from pathlib import Path

COLUMNS = (
    "step", "loss", "classification_loss", "box_loss", "positives", "learning_rate", "gradient_norm",
    "images_per_second", "data_wait", "AP", "AP50",
)  # fmt: skip


def read(path):
    """The rows of a file as dicts of numbers, and how many of its lines are damaged. Empty cells are skipped.

    A file without its first line, which names the columns, has COLUMNS; a last line without its end was cut off by a
    kill or a full disk and is no damage.
    """
    path = Path(path)
    if not path.exists():
        return [], 0
    *lines, _ = path.read_bytes().decode("utf-8", "replace").split("\n")
    columns = lines[0].rstrip("\r").split(",") if lines else COLUMNS
    named = "step" in columns
    rows = [_row(text.rstrip("\r"), columns if named else COLUMNS) for text in (lines[1:] if named else lines)]
    damaged = sum(row is None for row in rows)
    return [row for row in rows if row is not None], damaged if named or not lines else max(damaged, 1)


def line(row):
    """One line of the file, of a dict of some of COLUMNS."""
    return ",".join(_cell(row, column) for column in COLUMNS) + "\n"


def header():
    """The first line of the file."""
    return ",".join(COLUMNS) + "\n"


def _row(text, columns):
    """A line as a dict of numbers, or None."""
    cells = text.split(",")
    if len(cells) != len(columns):
        return None
    try:
        row = {key: float(value) for key, value in zip(columns, cells, strict=True) if key and value}
    except ValueError:
        return None
    step = row.get("step", math.nan)
    return row if 0 <= step < math.inf and step == int(step) else None


def _cell(row, column):
    value = row.get(column)
    return "" if value is None else f"{value:.0f}" if column == "step" else f"{value:.6g}"
