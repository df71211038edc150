"""Figure 2: milliseconds an image against AP, the paper's and, where there are runs, those measured here."""

import json
import time
from pathlib import Path

import numpy as np

from retinanet_keras.data import pipeline, sources
from retinanet_keras.errors import UserError
from retinanet_keras.experiments import paper
from retinanet_keras.experiments.figures import sheet
from retinanet_keras.serving import inference
from retinanet_keras.training.checkpoints import load_run
from retinanet_keras.training.folder import RunFolder

OTHERS = ("faster_rcnn_fpn", "yolov2", "ssd513", "dssd513")  # of Table 2
COLUMNS = ("whose", "method", "scale", "AP", "milliseconds", "source")
LABELS = {("RetinaNet-50", scale): (4, -12) for scale in ("600", "700", "800")}  # beside their points, in points
LABELS["RetinaNet-101", "400"] = (6, -10)
REPEATS = 10  # timed detections of one image, of which the median counts


def of_the_paper():
    """The paper's points: dicts of method, scale, AP in percent, milliseconds (None: not in its text), source."""
    points = [
        {"method": f"RetinaNet-{row['depth']}", "scale": str(row["scale"]), "AP": row["AP"],
         "milliseconds": row["time"], "source": "Table 1e"}
        for row in paper.rows("1e").values()
    ]  # fmt: skip
    for name in OTHERS:
        row, printed = paper.rows("2")[name], paper.rows("speed").get(name, {}).get("time")
        source = f"AP: Table 2; time: {paper.about('speed')['where']}" if printed else "Table 2"
        points.append(
            {"method": row["method"], "scale": "", "AP": row["AP"], "milliseconds": printed, "source": source}
        )
    return points


def of_runs(folder, measure=None):
    """Points of the runs in a folder, or of the one run that it is, one for each of a run's evaluated splits.

    Args:
        measure: a function of a run's folder and a split that gives milliseconds; None: `detection_time`.

    Raises:
        UserError: where no run in it has been evaluated.
    """
    folder = Path(folder)
    files = sorted(folder.glob("eval/*/metrics.json")) or sorted(folder.glob("*/eval/*/metrics.json"))
    if not files:
        raise UserError(f"{folder} holds no evaluated run: there is no eval/SPLIT/metrics.json in it, nor below it")
    points = []
    for file in files:
        run, split = file.parents[2], file.parent.name
        ap = json.loads(file.read_text(encoding="utf-8"))["AP"]
        if ap is not None:
            points.append({
                "method": run.name, "scale": "", "AP": 100 * ap, "source": f"{run}, {split}",
                "milliseconds": (measure or detection_time)(run, split),
            })  # fmt: skip
    return points


def detection_time(run, split):
    """Milliseconds from pixels on the canvas to detections, of one image: the median of `REPEATS` after a first one."""
    config, model = load_run(RunFolder(run).path)
    detect = inference.compiled(model)
    dataset = sources.open_split(config.data, split)
    image, size, _ = pipeline.fit(sources.image_of(dataset, 0)[None], config.data.short_side, config.data.max_side)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        detect(image, size[None])["boxes"].numpy()
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[1:]))


def figure2(to, runs=None):
    """Figure 2. `runs`: a folder of evaluated runs, which get a panel of their own: another machine, other images."""
    printed, own = of_the_paper(), of_runs(runs) if runs else []
    figure, axes = sheet.panels(2 if own else 1, (11 if own else 6.4, 4.6))
    _draw_paper(axes[0], printed)
    if own:
        _draw_own(axes[1], own)
    rows = [["the paper", *(row[c] for c in COLUMNS[1:])] for row in printed]
    rows += [["measured here", *(row[c] for c in COLUMNS[1:])] for row in own]
    return sheet.save(to, "figure2", figure, COLUMNS, rows)


def _draw_paper(axis, rows):
    looks = {"RetinaNet-50": (sheet.BLUE, "o"), "RetinaNet-101": (sheet.ORANGE, "D")}
    for method, (color, marker) in looks.items():
        own = [row for row in rows if row["method"] == method]
        x, y = ([row[key] for row in own] for key in ("milliseconds", "AP"))
        axis.plot(x, y, color=color, marker=marker, linewidth=1.6, markersize=6, label=f"{method}, 400 to 800 pixels")
        for row in own:
            place = LABELS.get((method, row["scale"]), (-17, 5))
            axis.annotate(row["scale"], (row["milliseconds"], row["AP"]), place, textcoords="offset points",
                          fontsize=7.5, color=sheet.GREY)  # fmt: skip
    for row in rows:
        if row["method"] in looks:
            continue
        if row["milliseconds"] is None:
            axis.axhline(row["AP"], color=sheet.GREY, linewidth=0.8, linestyle=":")
            axis.text(228, row["AP"] + 0.15, row["method"], ha="right", fontsize=8, color=sheet.GREY)
        else:
            axis.plot([row["milliseconds"]], [row["AP"]], marker="s", color=sheet.GREEN, linestyle="none", markersize=7,
                      label=row["method"])  # fmt: skip
    axis.set(xlim=(40, 230), ylim=(20, 39.5), xlabel="milliseconds an image (Nvidia M40)", ylabel="AP (%)")
    axis.set_title("The paper's numbers: COCO test-dev", loc="left", fontsize=10)
    axis.plot([], [], color=sheet.GREY, linewidth=0.8, linestyle=":", label="AP alone: Table 2 gives no times")
    sheet.legend(axis, loc="lower right", bbox_to_anchor=(1, 0.1))


def _draw_own(axis, points):
    for number, point in enumerate(points):
        color = sheet.COLORS[number % 6]
        name = f"{point['method']}, {Path(point['source']).name.split(', ')[-1]}"
        axis.plot([point["milliseconds"]], [point["AP"]], marker="oDs^v"[number // 6 % 5], color=color,
                  linestyle="none", markersize=7, label=name)  # fmt: skip
    axis.margins(0.3)
    axis.set(xlabel="milliseconds an image (this machine)", ylabel="AP (%)")
    axis.set_title("Measured here: each run on its own images", loc="left", fontsize=10)
    sheet.legend(axis, loc="best")
