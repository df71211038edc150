"""Figure 3: the network, drawn from the operations of a built RetinaNet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from retinanet_keras import keras_hooks
from retinanet_keras.config import Config
from retinanet_keras.errors import UserError
from retinanet_keras.experiments.figures import sheet
from retinanet_keras.model import RetinaNet
from retinanet_keras.training.build import build_network

COLUMNS = ("part", "node", "kind", "kernel", "stride", "height", "width", "channels", "parameters", "inputs")
SIZE = (640, 800)  # default height and width for which shapes are given
Row = dict[str, Any]  # an operation, by COLUMNS
LABELS = {"UpSampling2D": "2×", "Relu": "ReLU", "ZeroPadding2D": ""}  # drawn as arrows, not as boxes
# Columns of the picture, in its own unit
X_BACKBONE, X_LATERAL, X_SUM, X_OUTPUT, X_BUS, X_TOWER = 0.25, 2.5, 4.0, 5.5, 6.9, 8.0
PARTS = {"backbone": sheet.GRAY, "pyramid": sheet.BLUE, "class_subnet": sheet.RED, "box_subnet": sheet.GREEN}


def operations(model: RetinaNet, height: int, width: int) -> list[Row]:
    """List the operations of a RetinaNet in order, a row of COLUMNS for each.

    The model is called on symbolic tensors, part by part; a row's inputs are names of rows, or "images".

    Args:
        model: RetinaNet.
        height: int. Height of the images, in pixels.
        width: int. Width of the images, in pixels.

    Returns:
        A list of dicts. The outputs of the backbone are rows whose `output` is c3, c4 or c5, those of the pyramid p3
        to p7, those of the subnets logits and deltas.
    """
    images = keras.Input(batch_shape=(1, height, width, 3), name="images")
    rows: list[Row] = []
    names = {id(images): "images"}
    features = model.backbone.call(images)
    _trace("backbone", features, rows, names)
    levels = model.pyramid.call(features)
    _trace("pyramid", {f"p{level}": tensor for level, tensor in enumerate(levels, 3)}, rows, names)
    for part, output in (("class_subnet", "logits"), ("box_subnet", "deltas")):
        _trace(part, {output: getattr(model, part).call(levels)}, rows, names)
    return rows


def _trace(part: str, outputs: Mapping[str, Any], rows: list[Row], names: dict[int, str]) -> None:
    """Append the operations between the tensors already named and the outputs, a dict of tensors by name."""
    visited: set[int] = set()

    def visit(tensor: Any) -> str:
        if id(tensor) in names:
            return names[id(tensor)]
        operation, tensors = keras_hooks.inputs_of(tensor)
        inputs = [visit(one) for one in tensors]
        taken = {row["node"] for row in rows}
        base = f"{part}.{operation.name}"
        name = next(n for n in [base, *(f"{base}#{i}" for i in range(2, 1000))] if n not in taken)
        shape = tensor.shape[1:] if len(tensor.shape) == 4 else (None, *tensor.shape[1:])
        is_new_layer = isinstance(operation, keras.Layer) and id(operation) not in visited
        visited.add(id(operation))
        kernel, strides = getattr(operation, "kernel_size", None), getattr(operation, "strides", None)
        rows.append(
            {
                "part": part,
                "node": name,
                "kind": type(operation).__name__,
                "kernel": kernel and kernel[0],
                "stride": strides and strides[0],
                "height": shape[0],
                "width": shape[1],
                "channels": shape[2],
                "parameters": operation.count_params() if is_new_layer else 0,
                "inputs": inputs,
                "output": None,
            }
        )
        names[id(tensor)] = name
        return name

    for output, tensor in outputs.items():
        node = visit(tensor)
        next(row for row in rows if row["node"] == node)["output"] = output


def figure3(to: str | Path, config: Config, classes: int = 80, size: tuple[int, int] = SIZE) -> Path:
    """Draw Figure 3 of a configuration's network.

    Args:
        to: str or Path. Folder to write to.
        config: Config. Settings of the model; its backbone gets random weights.
        classes: int. Number of object classes, which a configuration leaves to the dataset.
        size: (height, width). Size in pixels of the image for which shapes are given, multiples of 32.

    Returns:
        The path of the picture.

    Raises:
        UserError: where the subnets do not use the whole pyramid, as the paper's network does.
    """
    if config.anchors.levels != "pyramid":
        raise UserError(
            f'anchors.levels: expected "pyramid", as figure 3 draws the levels P3 to P7, got "{config.anchors.levels}"'
        )
    model = build_network(config, classes)
    rows = operations(model, *size)
    figure = _draw(model, rows, size)
    written = [[" ".join(row[c]) if c == "inputs" else row[c] for c in COLUMNS] for row in rows]
    return sheet.save(to, "figure3", figure, COLUMNS, written)


def _draw(model: RetinaNet, rows: list[Row], size: tuple[int, int]) -> Figure:
    figure, (axis,) = sheet.panels(size=(16, 7))
    axis.axis("off")
    axis.set(ylim=(-0.5, 8.1))
    placed: dict[str, tuple[float, float]] = {}  # node -> (x, y)
    outputs = {row["output"]: row for row in rows if row["output"]}
    _draw_backbone(axis, [row for row in rows if row["part"] == "backbone"], size, placed)
    _draw_pyramid(axis, [row for row in rows if row["part"] == "pyramid"], size, placed)
    levels = [placed[outputs[f"p{level}"]["node"]] for level in range(3, 8)]
    right = X_TOWER
    for part, name, y in (("class_subnet", "logits", 6.2), ("box_subnet", "deltas", 3.0)):
        tower = [row for row in rows if row["part"] == part]
        right = max(right, _draw_subnet(axis, tower, outputs[name], y, model))
    axis.plot([X_BUS, X_BUS], [3.0, max(y for _, y in levels)], color=sheet.GRAY, linewidth=1)
    for x, y in levels:
        axis.plot([x + 0.6, X_BUS], [y, y], color=sheet.GRAY, linewidth=1)
    total = sum(row["parameters"] for row in rows)
    anchors = outputs["logits"]["width"]
    heads = ((0, "(a) backbone"), (X_SUM, "(b) feature pyramid"), ((X_TOWER + right) / 2, "(c), (d) subnets"))
    for x, words in heads:
        axis.text(x, 7.75, words, ha="center", fontsize=11)
    axis.text(
        right + 0.6,
        -0.2,
        f"image {size[0]}×{size[1]}, {anchors:,} anchors, {total / 1e6:.1f} M parameters",
        ha="right",
        fontsize=9,
        color=sheet.GRAY,
    )
    axis.set_xlim(-1.1, right + 0.8)
    return figure


def stages(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the backbone's operations by resolution, from the image up, each group ending with its last feature map.

    The last feature map is an output, or the end of the last residual block. Operations that follow it at the same
    resolution belong to the next group, as a block may change the resolution in its second convolution.
    """
    rows = [row for row in rows if row["kind"] not in LABELS]
    by_name = {row["node"]: row for row in rows}

    def rank(row: Row) -> tuple[bool, bool]:
        return bool(row["output"]), any(by_name.get(name, {}).get("kind") == "Add" for name in row["inputs"])

    ends = []
    for height in dict.fromkeys(row["height"] for row in rows):
        places = [i for i, row in enumerate(rows) if row["height"] == height]
        ends.append(max(places, key=lambda i: (rank(rows[i]), i)))
    starts = [0, *(end + 1 for end in ends)]
    return [rows[start : end + 1] for start, end in zip(starts, ends, strict=False)]


def _draw_backbone(axis: Any, rows: list[Row], size: tuple[int, int], placed: dict[str, tuple[float, float]]) -> None:
    """One box for each resolution."""
    below = None
    for stage in stages(rows):
        y = _level(stage[-1]["height"], size)
        convs = sum("Conv2D" in row["kind"] for row in stage)
        name = (stage[-1]["output"] or "").upper()
        content = f"{convs} conv" + "s" * (convs > 1) if convs else "image"
        words = "\n".join(filter(None, [name, _shape(stage[-1]), content]))
        _box(axis, 0, y, words, "backbone", width=1.7)
        for row in stage:
            placed[row["node"]] = (X_BACKBONE, y)
        if below is not None:
            _arrow(axis, (0, below + 0.36), (0, y - 0.36))
        below = y


def _draw_pyramid(axis: Any, rows: list[Row], size: tuple[int, int], placed: dict[str, tuple[float, float]]) -> None:
    """Convolutions and sums as boxes; operations between them as labels of the arrows."""
    by_name = {row["node"]: row for row in rows}
    for row in rows:
        if row["kind"] in LABELS:
            continue
        y = _level(row["height"], size)
        if row["kind"] == "Add":
            x = X_SUM
            axis.text(x, y, "+", ha="center", va="center", fontsize=13, zorder=4)
            axis.plot(
                [x], [y], marker="o", markersize=17, markerfacecolor="white", markeredgecolor=sheet.BLUE, zorder=3
            )
        else:
            x = X_LATERAL if row["kernel"] == 1 else X_OUTPUT
            _box(axis, x, y, f"{_named(row)}{_conv(row)}\n{_shape(row)}", "pyramid", width=1.2)
        placed[row["node"]] = (x, y)
        for name in row["inputs"]:
            words = []
            while name in by_name and by_name[name]["kind"] in LABELS:
                words.append(LABELS[by_name[name]["kind"]])
                (name,) = by_name[name]["inputs"]
            start = placed[name]
            gap = 0.16 if row["kind"] == "Add" else 0.6
            if start[1] != y and start[0] == x:  # P6 to P7, or one sum to the next
                up = 1 if y > start[1] else -1
                start_gap = 0.2 if row["kind"] == "Add" else 0.37
                _arrow(axis, (x, start[1] + up * start_gap), (x, y - up * start_gap), " ".join(filter(None, words)))
            elif start[0] == X_BACKBONE and start[1] != y:  # C5 to P6: up, then across
                axis.plot([X_BACKBONE, X_BACKBONE], [start[1] + 0.33, y], color=sheet.GRAY, linewidth=1)
                _arrow(axis, (X_BACKBONE, y), (x - gap, y))
            else:
                start_gap = 0.16 if by_name.get(name, {}).get("kind") == "Add" else 0.6
                end = (x, y + 0.2) if row["kind"] == "Add" and start[1] != y else (x - gap, y)
                _arrow(axis, (start[0] + start_gap, start[1]), end, " ".join(filter(None, words)))


def _draw_subnet(axis: Any, rows: list[Row], output: Row, y: float, model: RetinaNet) -> float:
    """Draw the tower on the first level; its right end."""
    height = next(row["height"] for row in rows if row["kind"] == "Conv2D")
    chain = [row for row in rows if row["height"] == height and row["kind"] in ("Conv2D", "Relu")]
    x, end = X_TOWER, X_BUS
    part = rows[0]["part"]
    convs = [row for row in chain if row["kind"] == "Conv2D"]
    for row in convs:
        follows = chain.index(row) + 1
        relu = " ReLU" if follows < len(chain) and chain[follows]["kind"] == "Relu" else ""
        _box(axis, x, y, f"{_conv(row)}{relu}\n{_shape(row)}", part, width=1.35)
        _arrow(axis, (end, y), (x - 0.68, y))
        end, x = x + 0.68, x + 1.65
    name = "class subnet" if output["output"] == "logits" else "box subnet"
    values = "K" if output["output"] == "logits" else "4"
    axis.text(
        X_TOWER - 0.6,
        y + 0.62,
        f"{name}, on P3; its {len(convs)} convolutions are shared by all levels",
        fontsize=9,
        color=PARTS[part],
    )
    axis.text(
        X_TOWER - 0.6,
        y - 0.82,
        f"{convs[-1]['channels']} = {model.anchors.per_cell} anchors × {values} values at each position; "
        f"over all levels {output['output']} [{output['width']:,}, {output['channels']}]",
        fontsize=9,
        color=sheet.GRAY,
    )
    return end


def _level(height: int, size: tuple[int, int]) -> int:
    """l of a level with this height: its resolution is 2^l lower than the input, §4."""
    return round(math.log2(size[0] / height))


def _named(row: Row) -> str:
    return f"{row['output'].upper()}: " if row["output"] else ""


def _conv(row: Row) -> str:
    return f"{row['kernel']}×{row['kernel']}" + (f", /{row['stride']}" if row["stride"] > 1 else "")


def _shape(row: Row) -> str:
    return f"{row['height']}×{row['width']}×{row['channels']}"


def _box(axis: Any, x: float, y: float, words: str, part: str, *, width: float) -> None:
    height = 0.62
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.08",
        facecolor="white",
        edgecolor=PARTS[part],
        linewidth=1.3,
        zorder=3,
    )
    axis.add_patch(patch)
    axis.text(x, y, words, ha="center", va="center", fontsize=8, linespacing=1.25, zorder=4)


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], words: str = "") -> None:
    axis.annotate(
        "",
        end,
        start,
        arrowprops={"arrowstyle": "-|>", "color": sheet.GRAY, "linewidth": 1, "shrinkA": 0, "shrinkB": 0},
    )
    if words:
        middle = (start[0] + end[0]) / 2 + 0.08, (start[1] + end[1]) / 2
        axis.text(*middle, words, fontsize=8, color=sheet.GRAY, va="center")
