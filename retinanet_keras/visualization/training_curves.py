"""Plot of a training log."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure  # not pyplot, which keeps figures and a backend in global state
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from retinanet_keras.visualization.draw import PALETTE


def training_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Plot a training log as PNG: losses and learning rate on log axes, and AP if it was measured.

    Args:
        rows: dicts. The rows of log.csv: step, loss, classification_loss, box_loss, learning_rate and optionally AP, as
            numbers or text; values that are missing, empty, or not finite are skipped.
        path: path of the PNG file.
    """
    steps = np.array([_number(row.get("step")) for row in rows], np.float64)  # [R]
    order = np.argsort(steps, kind="stable")  # a resumed run may have logged a step twice
    steps = steps[order]

    def points(column: str) -> tuple[npt.NDArray, npt.NDArray]:
        values = np.array([_number(row.get(column)) for row in rows], np.float64)[order]
        known = np.isfinite(values) & np.isfinite(steps)
        return steps[known], values[known]

    has_ap = points("AP")[0].size > 0
    figure = Figure(figsize=(8, 7 if has_ap else 5.2), dpi=150, layout="constrained")
    axes = figure.subplots(3 if has_ap else 2, 1, sharex=True, height_ratios=[3, 1.6, 1.1] if has_ap else [3, 1.1])
    losses = (("classification_loss", "classification", 1), ("box_loss", "box", 0), ("loss", "total", None))
    for column, name, index in losses:
        x, y = points(column)
        x, y = x[y > 0], y[y > 0]  # a log axis has no zero
        paint = "#222222" if index is None else _hex(PALETTE[index])
        many = len(x) > 100
        axes[0].plot(x, y, color=paint, linewidth=0.8 if many else 1.6, alpha=0.25 if many else 1, **_marks(x))
        if many:
            axes[0].plot(x, _smooth(y, len(y) // 50), color=paint, linewidth=1.6)
        if x.size:
            axes[0].plot([], [], color=paint, linewidth=1.6, label=name)
    axes[0].set(ylabel="loss", yscale="log")
    if has_ap:
        x, y = points("AP")
        axes[1].plot(x, 100 * y, color=_hex(PALETTE[2]), linewidth=1.4, marker="o", markersize=4.5)
        best = int(np.argmax(y))
        axes[1].set_ylabel("AP (%)")
        axes[1].set_title(f"best {100 * y[best]:.1f} at step {x[best]:,.0f}", loc="right", fontsize=9, color="#555555")
        axes[1].margins(y=0.15)
    x, y = points("learning_rate")
    axes[-1].plot(x[y > 0], y[y > 0], color=_hex(PALETTE[5]), linewidth=1.6, **_marks(x[y > 0]))
    axes[-1].set(ylabel="learning rate", yscale="log", xlabel="step")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        if axis.get_yscale() == "log":
            low, high = axis.get_ylim()
            few = high / low < (
                100 if axis is axes[0] else 10
            )  # powers of ten alone would leave the axis without labels
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        if not any(len(line.get_xdata()) for line in axis.lines):
            axis.text(0.5, 0.5, "nothing logged yet", transform=axis.transAxes, ha="center", color="#888888")
            axis.grid(False)
            axis.tick_params(which="both", left=False, labelleft=False, bottom=False, labelbottom=False)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    figure.align_ylabels()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _smooth(values: npt.NDArray, half: int) -> npt.NDArray:
    """The moving average over 2 * half + 1 rows, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    rows = np.arange(len(values))
    first, last = np.maximum(rows - half, 0), np.minimum(rows + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _marks(x: npt.NDArray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if len(x) < 2 else {}  # a line of one point is invisible


def _hex(rgb: tuple[int, ...]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)
