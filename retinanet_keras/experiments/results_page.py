"""Write a table as text, CSV and HTML: measured results next to the paper's."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from retinanet_keras.experiments import measurements, paper, tables
from retinanet_keras.storage import disk

MEASURED_ON = {
    "paper": "COCO minival, which has public labels",
    "small": "generated images with small models: compare differences and orders with the paper's, not values",
}
EARLY = 300  # steps shown in the loss curves
MOST_CURVES = 12  # per picture
STYLE = """body { margin: 24px; font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1b1f24; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { padding: 3px 9px; text-align: right; }
tr { border-bottom: 1px solid #d9dee3; } th { background: #f5f7f9; } .words { text-align: left; }
img { max-width: 100%; } .paper { background: #eef5fa; } p { max-width: 76ch; }"""


def printed(row: Mapping[str, Any]) -> str:
    """Describe the paper's numbers of a row."""
    parts = [f"{key} {row[key]:.1f}" for key in paper.METRICS if row.get(key) is not None]
    parts += [f"{key} {row[key]:g}" for key in ("time", "difference") if row.get(key) is not None]
    if row.get("words"):
        parts.append(f'"{row["words"]}"')
    return "paper: " + (", ".join(parts) or "no number")


def write(place: Path, table: str, scale: str) -> str:
    """Write table.txt, table.csv and table.html in a table's folder; return the text."""
    rows = measurements.lines(place, table, scale)
    place.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with disk.replacing_text(place / "table.csv") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    heads, cells = _cells(rows)
    text = "\n".join([*_about(place, table, scale), "", *_aligned(heads, cells), "", *measurements.best_alphas(rows)])
    with disk.replacing_text(place / "table.txt") as file:
        file.write(text)
    with disk.replacing_text(place / "table.html") as file:
        file.write(_page(place, table, scale, rows, heads, cells))
    return text


def _about(place: Path, table: str, scale: str) -> list[str]:
    """Captions of the columns."""
    about = paper.about(table)
    lines = [
        f"{about['where']}: {about['title']}",
        f"paper: as printed, on COCO {about['data']}",
        f"ours: measured at {scale} scale, on {MEASURED_ON[scale]}; +- is the standard deviation over the seeds",
        f"each row: {'; '.join(measurements.budgets(place)) or 'not run'}",
        "diff: AP minus that of the row named `against`, to which `changes` are relative",
    ]
    if times := measurements.read_times(place):
        lines.append(f"time: {times['about']}; x: relative to the first row")
    return lines


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(column headings, [[texts]]) of the table, without empty columns; the paper's begin with `paper`."""

    def number(value: float | None, digits: int = 1, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.{digits}f}"

    def cells(row: Mapping[str, Any]) -> dict[str, str]:
        mean = number(row.get("AP"))
        if row.get("AP_deviation") is not None:
            mean += f" +-{row['AP_deviation']:.1f}"
        notes = []
        if row.get("diverged"):
            notes.append(f"diverged: {row['diverged']} of {row['seeds']}, in step {row['diverged_in_steps']}")
        if row.get("seeds") == 0:
            notes.append("not run")
        shown = {"row": row["row"], "changes": row["changes"], "against": row.get("baseline", ""), "AP": mean}
        shown |= {key: number(row.get(key)) for key in paper.METRICS[1:]}
        shown |= {"diff": number(row.get("difference"), sign="+"), "ms": number(row.get("time"), 0)}
        shown["x"] = number(row.get("relative_time"), 2)
        shown["loss"] = " > ".join(f"{row[k]:.3g}" for k in ("loss_first", "loss_last") if row.get(k) is not None)
        shown["note"] = "; ".join(notes)
        shown |= {f"paper {key}": number(row.get(f"paper_{key}")) for key in paper.METRICS}
        shown["paper diff"] = number(row.get("paper_difference"), sign="+")
        shown |= {"paper ms": number(row.get("paper_time"), 0), "paper x": number(row.get("paper_relative_time"), 2)}
        shown["paper's words"] = row.get("paper_words") or ""
        return shown

    shown = [cells(row) for row in rows]
    heads = [head for head in shown[0] if any(row[head] for row in shown)]
    return heads, [[row[head] for head in heads] for row in shown]


WIDEST = 72  # characters of a cell in table.txt
WORDS = ("row", "changes", "against", "note", "paper's words")


def _aligned(heads: list[str], cells: list[list[str]]) -> list[str]:
    """Lines of a table with aligned columns."""
    cells = [[text if len(text) <= WIDEST else text[: WIDEST - 3] + "..." for text in row] for row in cells]
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
    texts = []
    for row in [heads, *cells]:
        parts = [
            text.ljust(width) if head in WORDS else text.rjust(width)
            for head, text, width in zip(heads, row, widths, strict=True)
        ]
        texts.append("  ".join(parts).rstrip())
    return texts


def _page(
    place: Path, table: str, scale: str, rows: Sequence[Mapping[str, Any]], heads: list[str], cells: list[list[str]]
) -> str:
    """The HTML page."""

    def line(tag: str, row: Sequence[str]) -> str:
        texts = []
        for head, text in zip(heads, row, strict=True):
            kinds = " ".join(
                name for name, has in (("words", head in WORDS), ("paper", head.startswith("paper"))) if has
            )
            texts.append(f'<{tag} class="{kinds}">{html.escape(text)}</{tag}>')
        return f"<tr>{''.join(texts)}</tr>"

    title, *about = _about(place, table, scale)
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(text)}</p>" for text in about)]
    parts.append("<table>" + line("th", heads) + "".join(line("td", row) for row in cells) + "</table>")
    parts += [f"<p>{html.escape(text)}</p>" for text in measurements.best_alphas(rows)]
    results = measurements.results(place)
    groups: dict[str, list[str]] = {}
    for row in tables.rows(table, scale):
        if row.name in results:
            groups.setdefault(row.group, []).append(row.name)
    for group, names in groups.items():
        if len(names) <= MOST_CURVES:
            picture = base64.b64encode(_curves({name: results[name] for name in names})).decode()
            parts.append(f"<h2>Loss of the first {EARLY} steps {html.escape(group)}</h2>")
            parts.append(f'<img alt="loss by step" src="data:image/png;base64,{picture}">')
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _curves(rows: Mapping[str, measurements.Results]) -> bytes:
    """PNG of the early losses of {row: {seed: result}}; a cross marks where a row diverged."""
    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for n, (name, seeds) in enumerate(rows.items()):
        for one in seeds.values():
            points = [(step, loss) for step, loss in one["losses"] if step <= EARLY and loss > 0]
            x, y = [step for step, _ in points], [loss for _, loss in points]
            (drawn,) = axes.plot(x, y, color=f"C{n % 10}", linewidth=1, linestyle="-" if n < 10 else "--")
            if "diverged" in one:
                axes.plot([one["diverged"]], [y[-1] if y else 1], "x", color=drawn.get_color(), markersize=9)
        axes.plot([], [], color=f"C{n % 10}", label=name, linestyle="-" if n < 10 else "--")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
