"""The paper's numbers, as printed, from `paper.json`, the only place that has them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@functools.cache
def _tables() -> dict[str, Any]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def about(table: str) -> dict[str, str]:
    """Return {"where", "title", "data"} of a table: its name in the paper, its caption, what it was measured on."""
    return {key: _tables()[table][key] for key in ("where", "title", "data")}


def rows(table: str) -> dict[str, dict[str, Any]]:
    """Return {row: {column: value}} of a table in the paper's order: AP in percent, time in milliseconds.

    Values that the paper does not print are None. `text` has `difference`, that of AP to the row's baseline, and the
    paper's `words`.
    """
    columns = _tables()[table]["columns"]
    return {cells[0]: dict(zip(columns[1:], cells[1:], strict=True)) for cells in _tables()[table]["rows"]}
