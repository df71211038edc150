"""Plots as SVG elements for an HTML page, whose style sheet sets their colors.

Classes for the style sheet: `grid` and `axis` lines, text, series `s0`, `s1`, ... as lines or bars. No text comes from
data; the page names the series beside the plot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 36  # margins of a plot with axes, in pixels


def lines(
    series: Sequence[Sequence[float]], label: str, *, size: tuple[int, int] = (420, 300), axes: bool = True
) -> str:
    """Plot precision-recall curves, with both axes from 0 to 1.

    Args:
        series: lists of values in 0..1, at evenly spaced recall from 0 to 1.
        label: str. What the plot shows, for screen readers.
        size: (width, height) in pixels.
        axes: bool. False for a small plot with a frame and one line at 0.5 instead of axes.

    Returns:
        an SVG element.
    """
    width, height = size
    box = (LEFT, TOP, width - LEFT - RIGHT, height - TOP - BOTTOM) if axes else (1, 1, width - 2, height - 2)
    left, top, across, down = box
    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1) if axes else (0.5,):
        x, y = left + tick * across, top + (1 - tick) * down
        parts.append(_line("grid", left, y, left + across, y) + _line("grid", x, top, x, top + down))
        if axes:
            parts.append(_text(x, top + down + 16, f"{tick:g}", "middle") + _text(left - 6, y + 4, f"{tick:g}", "end"))
    parts.append(f'<rect class="axis" x="{left}" y="{top}" width="{across}" height="{down}"/>')
    for n, values in enumerate(series):
        step = across / max(1, len(values) - 1)
        points = " ".join(f"{left + i * step:.1f},{top + (1 - v) * down:.1f}" for i, v in enumerate(values))
        parts.append(f'<polyline class="s{n}" points="{points}"/>')
    if axes:
        parts.append(_names("recall", "precision", box, size))
    return _svg(parts, label, size)


def bars(
    edges: Sequence[float],
    series: Sequence[Sequence[int]],
    label: str,
    x_name: str,
    y_name: str,
    *,
    size: tuple[int, int] = (560, 300),
) -> str:
    """Plot histograms side by side on a logarithmic axis, on which a count of 1 has the height of a factor of ten.

    Args:
        edges: [n + 1]. Increasing edges of the bins.
        series: lists of n counts.
        label: str. What the plot shows, for screen readers.
        x_name, y_name: str. Labels of the axes.
        size: (width, height) in pixels.

    Returns:
        an SVG element.
    """
    width, height = size
    left, top, across, down = box = (LEFT + 14, TOP, width - LEFT - 14 - RIGHT, height - TOP - BOTTOM)
    decades = max(1, math.ceil(math.log10(max([1, *(count for counts in series for count in counts)]))))
    unit = down / (decades + 1)  # height of a factor of ten, and of the first count
    parts = []
    for decade in range(decades + 1):
        y = top + down - (decade + 1) * unit
        parts.append(_line("grid", left, y, left + across, y) + _text(left - 6, y + 4, f"{10**decade:,}", "end"))
    parts.append(_text(left - 6, top + down + 4, "0", "end"))
    span = edges[-1] - edges[0]
    for i in range(0, len(edges), max(1, (len(edges) - 1) // 5)):
        x = left + (edges[i] - edges[0]) / span * across
        parts.append(_text(x, top + down + 16, f"{edges[i]:.2g}", "middle"))
    slot = across / (len(edges) - 1)
    bar = slot * 0.84 / len(series)
    for n, counts in enumerate(series):
        for i, count in enumerate(counts):
            if count:
                high = unit * (1 + math.log10(count))
                x, y = left + (i + 0.08) * slot + n * bar, top + down - high
                parts.append(f'<rect class="s{n}" x="{x:.1f}" y="{y:.1f}" width="{bar:.1f}" height="{high:.1f}"/>')
    parts.append(_line("axis", left, top + down, left + across, top + down) + _names(x_name, y_name, box, size))
    return _svg(parts, label, size)


def _svg(parts: Sequence[str], label: str, size: tuple[int, int]) -> str:
    width, height = size
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _names(x_name: str, y_name: str, box: tuple[int, int, int, int], size: tuple[int, int]) -> str:
    left, top, across, down = box
    middle = top + down / 2
    return _text(left + across / 2, size[1] - 4, x_name, "middle") + (
        f'<text x="11" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 11 {middle:.1f})">{y_name}</text>'
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
