"""log.csv of a run: written row by row, and read even where a kill or a disk has damaged it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

COLUMNS = (
    "step", "loss", "classification_loss", "box_loss", "positives", "learning_rate", "gradient_norm",
    "images_per_second", "data_wait", "AP", "AP50",
)  # fmt: skip


def read(path: str | Path) -> tuple[list[dict[str, float]], int]:
    """Read (rows as dicts of numbers, number of damaged lines); empty cells are skipped.

    Without its first line, which names the columns, a file is read as COLUMNS. A last line without a line break was
    truncated by a kill or a full disk and does not count as damaged.
    """
    path = Path(path)
    if not path.exists():
        return [], 0
    *lines, _ = path.read_bytes().decode("utf-8", "replace").split("\n")
    columns: Sequence[str] = lines[0].rstrip("\r").split(",") if lines else COLUMNS
    named = "step" in columns
    rows = [_row(text.rstrip("\r"), columns if named else COLUMNS) for text in (lines[1:] if named else lines)]
    damaged = sum(row is None for row in rows)
    return [row for row in rows if row is not None], damaged if named or not lines else max(damaged, 1)


def line(row: Mapping[str, float | None]) -> str:
    """Format a row, a dict of some of COLUMNS, as a line of the file."""
    return ",".join(_cell(row, column) for column in COLUMNS) + "\n"


def header() -> str:
    """Return the first line of the file."""
    return ",".join(COLUMNS) + "\n"


def _row(text: str, columns: Sequence[str]) -> dict[str, float] | None:
    """A line as a dict of numbers; None if it is damaged."""
    cells = text.split(",")
    if len(cells) != len(columns):
        return None
    try:
        row = {key: float(value) for key, value in zip(columns, cells, strict=True) if key and value}
    except ValueError:
        return None
    step = row.get("step", math.nan)
    return row if 0 <= step < math.inf and step == int(step) else None


def _cell(row: Mapping[str, float | None], column: str) -> str:
    value = row.get(column)
    return "" if value is None else f"{value:.0f}" if column == "step" else f"{value:.6g}"
