"""Figure 2: milliseconds per image against AP, the paper's and, where there are runs, those measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retinanet_keras import folding
from retinanet_keras.config import Config, ModelConfig
from retinanet_keras.errors import UserError
from retinanet_keras.experiments import measurements, paper, timing
from retinanet_keras.experiments.figures import sheet
from retinanet_keras.training.resume import load_run
from retinanet_keras.training.run_folder import RunFolder, load_config_of

OTHERS = ("faster_rcnn_fpn", "yolov2", "ssd513", "dssd513")  # rows of Table 2
COLUMNS = ("whose", "method", "scale", "AP", "milliseconds", "source")
LABELS = {("RetinaNet-50", scale): (4, -12) for scale in ("600", "700", "800")}  # beside their points, in points
LABELS["RetinaNet-101", "400"] = (6, -10)
TABLE = "1e"  # the table drawn from a folder of tables
METRICS = "eval/*/metrics.json"  # in the folder of a run
FROM_RUN, FROM_TABLE = "of each run's model", "time.json"


def of_the_paper() -> list[dict[str, Any]]:
    """Return the paper's points: dicts of method, scale, AP in percent, milliseconds (None: not printed), source."""
    points = [
        {
            "method": f"RetinaNet-{row['depth']}",
            "scale": str(row["scale"]),
            "AP": row["AP"],
            "milliseconds": row["time"],
            "source": "Table 1e",
        }
        for row in paper.rows("1e").values()
    ]
    for name in OTHERS:
        row, printed = paper.rows("2")[name], paper.rows("speed").get(name, {}).get("time")
        source = f"AP: Table 2; time: {paper.about('speed')['where']}" if printed else "Table 2"
        points.append(
            {"method": row["method"], "scale": "", "AP": row["AP"], "milliseconds": printed, "source": source}
        )
    return points


def of_runs(
    folder: str | Path, measure: Callable[[list[Path]], Mapping[Path, float]] | None = None
) -> list[dict[str, Any]]:
    """Return points of a table's rows, with the mean AP of their seeds, or of plain runs, one per evaluated split.

    Args:
        folder: str or Path. A table's folder; a folder of tables, of which Table 1e is drawn; a folder of runs; a run.
        measure: function from run folders to {run folder: milliseconds}, or None for `detection_times`. Called for
            models without a time in the table's time.json, which has only the paper's models.

    Raises:
        UserError: where the folder is none of these, or has no AP.
    """
    folder = Path(folder)
    points = _of_rows(folder / TABLE) or _of_rows(folder) or _of_plain_runs(folder)
    if not points:
        raise UserError(
            f"{folder} holds no evaluated run and no finished row of a table. Give --runs a folder of train.py's "
            f"runs, or train rows first with `python -m retinanet_keras experiments {TABLE} --to {folder}`"
        )
    untimed = [point for point in points if point["milliseconds"] is None]
    times = (measure or detection_times)(list(dict.fromkeys(point["run"] for point in untimed)))
    for point in untimed:
        point["milliseconds"] = times[point["run"]]
    return points


def _of_rows(place: Path) -> list[dict[str, Any]]:
    """Points of a table's folder, in the layout of `runner`."""
    times = (measurements.read_times(place) or {"rows": {}})["rows"]
    points = []
    for row, seeds in measurements.results(place).items():
        done = sorted(seed for seed, result in seeds.items() if result.get("AP") is not None)
        if not done:
            continue
        run = place / row / str(done[0])
        config = load_config_of(RunFolder(run))
        split = config.data.test_split or config.data.val_split
        time = times.get(row) if _is_of_the_paper(config, row) else None
        source = f"{place / row}, {split}, mean of seeds {' '.join(map(str, done))}"
        points.append(
            {
                "method": row,
                "scale": "",
                "AP": measurements.mean_ap(seeds),
                "run": run,
                "split": split,
                "milliseconds": time,
                "timed": FROM_TABLE if time else FROM_RUN,
                "source": f"{source}; time: {place}/time.json" if time else source,
            }
        )
    return points


def _is_of_the_paper(config: Config, row: str) -> bool:
    """Whether a run has the network and the image scale of the row of Table 1e, so that time.json applies."""
    printed, default = paper.rows(TABLE).get(row), ModelConfig()
    return (
        printed is not None
        and (config.model.backbone, config.data.short_side) == (f"resnet{printed['depth']}", printed["scale"])
        and all(
            getattr(config.model, name) == getattr(default, name) for name in ("width", "fpn_channels", "head_depth")
        )
    )


def _of_plain_runs(folder: Path) -> list[dict[str, Any]]:
    """Points of the runs in a folder, or of the run that it is."""
    points = []
    for file in sorted(folder.glob(METRICS)) or sorted(folder.glob(f"*/{METRICS}")):
        run, split = file.parents[2], file.parent.name
        ap = measurements.read_ap(file)
        if ap is not None:
            points.append(
                {
                    "method": run.name,
                    "scale": "",
                    "AP": 100 * ap,
                    "run": run,
                    "split": split,
                    "milliseconds": None,
                    "timed": FROM_RUN,
                    "source": f"{run}, {split}",
                }
            )
    return points


def detection_times(runs: Iterable[Path]) -> dict[Path, float]:
    """Return {run folder: milliseconds} of trained models, timed as those of Table 1e: see `timing`."""
    calls = {}
    for run in runs:
        config = timing.without_threshold(load_config_of(RunFolder(run)))
        detect = folding.compiled(load_run(run, config)[1])
        calls[run] = timing.call(detect, config.data.short_side, config.data.max_side)
    return timing.medians(calls)


def figure2(to: str | Path, runs: str | Path | None = None) -> Path:
    """Draw Figure 2.

    Args:
        to: str or Path. Folder to write to.
        runs: str, Path or None. Folder as of `of_runs`, drawn in a separate panel: another machine, other images.
    """
    printed, measured = of_the_paper(), of_runs(runs) if runs else []
    figure, axes = sheet.panels(2 if measured else 1, (11 if measured else 6.4, 4.6))
    _draw_paper(axes[0], printed)
    if measured:
        _draw_measured(axes[1], measured)
    rows = [["the paper", *(row[c] for c in COLUMNS[1:])] for row in printed]
    rows += [["measured here", *(row[c] for c in COLUMNS[1:])] for row in measured]
    return sheet.save(to, "figure2", figure, COLUMNS, rows)


def _draw_paper(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    looks = {"RetinaNet-50": (sheet.BLUE, "o"), "RetinaNet-101": (sheet.ORANGE, "D")}
    for method, (color, marker) in looks.items():
        points = [row for row in rows if row["method"] == method]
        x, y = ([row[key] for row in points] for key in ("milliseconds", "AP"))
        axis.plot(x, y, color=color, marker=marker, linewidth=1.6, markersize=6, label=f"{method}, 400 to 800 pixels")
        for row in points:
            offset = LABELS.get((method, row["scale"]), (-17, 5))
            point = (row["milliseconds"], row["AP"])
            axis.annotate(row["scale"], point, offset, textcoords="offset points", fontsize=7.5, color=sheet.GRAY)
    for row in rows:
        if row["method"] in looks:
            continue
        if row["milliseconds"] is None:
            axis.axhline(row["AP"], color=sheet.GRAY, linewidth=0.8, linestyle=":")
            axis.text(228, row["AP"] + 0.15, row["method"], ha="right", fontsize=8, color=sheet.GRAY)
        else:
            look: dict[str, Any] = {"marker": "s", "color": sheet.GREEN, "linestyle": "none", "markersize": 7}
            axis.plot([row["milliseconds"]], [row["AP"]], label=row["method"], **look)
    axis.set(xlim=(40, 230), ylim=(20, 39.5), xlabel="milliseconds per image (Nvidia M40)", ylabel="AP (%)")
    axis.set_title("The paper's numbers: COCO test-dev", loc="left", fontsize=10)
    axis.plot([], [], color=sheet.GRAY, linewidth=0.8, linestyle=":", label="AP only: Table 2 gives no times")
    sheet.legend(axis, loc="lower right", bbox_to_anchor=(1, 0.1))


def _draw_measured(axis: Any, points: Sequence[Mapping[str, Any]]) -> None:
    for number, point in enumerate(points):
        color = sheet.COLORS[number % 6]
        name = f"{point['method']}, {point['split']}"
        look: dict[str, Any] = {"marker": "oDs^v"[number // 6 % 5], "linestyle": "none", "markersize": 7}
        axis.plot([point["milliseconds"]], [point["AP"]], color=color, label=name, **look)
    axis.margins(0.3)
    timed = " or ".join(sorted({point["timed"] for point in points}))
    axis.set(xlabel=f"milliseconds per image ({timed})", ylabel="AP (%)")
    axis.set_title("Measured here: each run on its own images", loc="left", fontsize=10)
    sheet.legend(axis, loc="best")
