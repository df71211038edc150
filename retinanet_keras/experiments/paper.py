"""The paper's numbers, as printed: `paper.json`, the only place that has them."""

import functools
import json
from pathlib import Path

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@functools.cache
def _tables():
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def about(table):
    """{"where", "title", "data"} of a table: its name in the paper, its caption, what it was measured on."""
    return {key: _tables()[table][key] for key in ("where", "title", "data")}


def rows(table):
    """{row: {column: value}} of a table in the paper's order: AP in percent, time in milliseconds.

    None where the paper prints none. `text` has `difference`, of AP to the row's baseline, and the paper's `words`.
    """
    columns = _tables()[table]["columns"]
    return {cells[0]: dict(zip(columns[1:], cells[1:], strict=True)) for cells in _tables()[table]["rows"]}
