"""§5: rows of the paper's tables as changes of settings, at the paper's scale and at one for two CPU cores.

The small scale keeps the contrasts of the tables and shrinks the rest: a small ResNet from random weights, trained for
a few minutes on generated images with one or two small objects among some twenty shapes of no class, so there is one
positive anchor to some 600 others. Its numbers here are this project's choices.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retinanet_keras import config_schema
from retinanet_keras.config import Config
from retinanet_keras.errors import UserError
from retinanet_keras.experiments import paper

SCALES = ("paper", "small")
NAMES = ("1a", "1b", "1c", "1d", "1e", "2", "3", "text")
LONGER = {400: 667, 500: 833, 600: 1000, 700: 1166, 800: 1333}  # longer side by shorter side, in Detectron's ratio
R50_600 = {"data.short_side": 600, "data.max_side": 1000}  # Table 1: unless noted
SMALL = {
    "data.source": "shapes", "data.train_split": "train", "data.val_split": "val", "data.test_split": "test",
    "data.short_side": 192, "data.max_side": 192, "data.shapes.side": 192, "data.shapes.train_images": 2000,
    "data.shapes.val_images": 10, "data.shapes.test_images": 300, "data.shapes.objects": 2,
    "data.shapes.size": [0.07, 0.25], "data.shapes.clutter": 20,
    "model.backbone": "resnet18", "model.weights": None, "model.width": 32, "model.norm": "batch",
    "model.freeze_at": 0, "model.fpn_channels": 64, "model.head_depth": 2, "anchors.size": 2.0,
    "train.iterations": 600, "train.batch_size": 8, "train.optimizer": "adamw", "train.learning_rate": 0.001,
    "train.schedule": "cosine", "train.warmup": 50, "train.weight_decay": 0.004, "train.clip_norm": 10,
    "train.checkpoint_every": 200, "train.keep_checkpoints": 1, "train.log_every": 10,
    "strategy.kind": "default", "eval.every": 0, "eval.pictures": 4,
}  # fmt: skip
FEW_STEPS = {  # anchors are half as large, as some images are
    "train.iterations": 4, "train.batch_size": 2, "train.warmup": 2, "train.log_every": 2, "model.width": 16,
    "anchors.size": 1.0,
}  # fmt: skip
# §5.1, Network Initialization, is about SGD without clipping; AdamW's steps do not grow with the gradient.
PLAIN_SGD = {
    "train.iterations": 300, "train.optimizer": "sgd", "train.learning_rate": 0.01,
    "train.weight_decay": 1e-4, "train.clip_norm": None, "train.log_every": 2,
}  # fmt: skip
CE = {"loss.kind": "cross_entropy", "loss.alpha": None}
SEARCHED = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)  # in the paper "[.01, .999]"; the steps are this project's


@dataclass(frozen=True)
class Row:
    """A row of a table: one training, as changes of the paper's settings.

    Attributes:
        name: str. Name of the row.
        changes: dict. Settings at both scales.
        paper: dict. Further settings at the paper's scale.
        small: dict. Further settings at the small scale.
        scales: tuple of str. Scales that have this row.
        group: str. Group that can be selected by name; empty for none.
        against: tuple of str. Names of baseline rows, of which the first at the scale applies; empty for the table's.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    scales: tuple[str, ...] = SCALES
    group: str = ""
    against: tuple[str, ...] = ()


def _cross_entropies() -> list[Row]:
    return [Row(name, {"loss.kind": "cross_entropy", "loss.alpha": row["alpha"]}) for name, row in _paper("1a")]


def _focal_losses() -> list[Row]:
    return [
        Row(name, {"loss.kind": "focal", "loss.gamma": row["gamma"], "loss.alpha": row["alpha"]})
        for name, row in _paper("1b")
    ]


def _anchors() -> list[Row]:
    ratios = {1: [1.0], 3: [0.5, 1.0, 2.0]}
    return [
        Row(name, {"anchors.scales": row["scales"], "anchors.ratios": ratios[row["ratios"]]})
        for name, row in _paper("1c")
    ]


def _mining() -> list[Row]:
    """At the small scale images have about a sixteenth of the anchors, and so do the minibatches of anchors."""
    rows = []
    for name, row in _paper("1d"):
        if row["batch_size"] is None:
            rows.append(Row(name))
            continue
        changes = {**CE, "mining.nms_iou": row["nms_iou"], "mining.ratio": 3 if row["method"] == "OHEM 1:3" else None}
        sizes = [{"mining.batch_size": row["batch_size"] // part} for part in (1, 16)]
        rows.append(Row(name, changes, paper=sizes[0], small=sizes[1]))
    return rows


def _depths_and_scales() -> list[Row]:
    rows = []
    for name, row in _paper("1e"):
        side = round(row["scale"] * 0.24)  # 800 becomes 192
        rows.append(
            Row(
                name,
                {"model.backbone": f"resnet{row['depth']}"},
                paper={"data.short_side": row["scale"], "data.max_side": LONGER[row["scale"]]},
                small={"data.short_side": side, "data.max_side": side},
            )
        )
    return rows


def _best_models() -> list[Row]:
    longer = {"data.scale_jitter": [0.8, 1.0], "train.iterations": 135_000, "train.drops": [90_000, 120_000]}
    other_weights = {**longer, "model.weights": "weights/x101_32x8d.weights.h5"}
    small = {"data.scale_jitter": [0.8, 1.0]}
    return [
        Row("retinanet_r101", {"model.backbone": "resnet101"}, paper=longer, small=small),
        Row("retinanet_x101", {"model.backbone": "resnext101_32x8d"}, paper=other_weights, small=small),
    ]


def _focal_star() -> list[Row]:
    star = [
        Row(name, {"loss.kind": "focal_star", "loss.gamma": row["gamma"], "loss.star_beta": row["beta"]})
        for name, row in _paper("3")
        if row["loss"] == "FL*"
    ]
    return [Row("ce", {"loss.kind": "cross_entropy", "loss.alpha": 0.75}), Row("fl"), *star]


def _running_text() -> list[Row]:
    initial: dict[str, Any] = {"group": "initialization"}
    priors: dict[str, Any] = {"group": "pi"}
    focal: dict[str, Any] = {"group": "focal"}
    return [
        Row("no_prior", {**CE, "model.prior": 0.5}, small=PLAIN_SGD, against=("prior",), **initial),
        Row("prior", CE, small=PLAIN_SGD, against=("prior",), **initial),
        Row("pi_.001", {**CE, "model.prior": 0.001}, against=("pi_.01", "prior"), **priors),
        Row("pi_.01", CE, scales=("small",), against=("pi_.01",), **priors),  # `prior` at the paper's scale
        Row("pi_.1", {**CE, "model.prior": 0.1}, against=("pi_.01", "prior"), **priors),
        Row("pi_.5", {**CE, "model.prior": 0.5}, scales=("small",), against=("pi_.01",), **priors),  # `no_prior`
        Row("fl", **focal),
        Row("fl_alpha_.5", {"loss.alpha": 0.5}, **focal),
        Row("fl_no_alpha", {"loss.alpha": None}, **focal),
        Row("hinge", {"loss.kind": "hinge", "loss.alpha": None}, **focal),
        Row("last_layer", {"anchors.levels": "last"}, **focal),
        *_search(),
    ]


def _search() -> list[Row]:
    """§5.1: "we find the best alpha for each gamma"."""
    return [
        Row(
            _searched(gamma, alpha),
            {"loss.kind": "focal", "loss.gamma": gamma, "loss.alpha": alpha},
            group="search",
            against=(_searched(gamma, best),),
        )
        for gamma, best in ((row["gamma"], row["alpha"]) for _, row in _paper("1b"))
        for alpha in SEARCHED
    ]


def _searched(gamma: float, alpha: float) -> str:
    """Name of a row of the search."""
    return f"gamma_{gamma:g}_alpha_{alpha:g}"


def _paper(table: str) -> ItemsView[str, dict[str, Any]]:
    return paper.rows(table).items()


# Table: (its rows, the baseline row, changes at the paper's scale, changes at the small scale)
_TABLES: dict[str, tuple[Callable[[], list[Row]], str, dict[str, Any], dict[str, Any]]] = {
    "1a": (_cross_entropies, "alpha_.50", R50_600, {}),
    "1b": (_focal_losses, "gamma_0", R50_600, {}),
    "1c": (_anchors, "scales_3_ratios_3", R50_600, {}),
    "1d": (_mining, "fl", {**R50_600, "model.backbone": "resnet101"}, {}),
    "1e": (_depths_and_scales, "r50_400", {}, FEW_STEPS),
    "2": (_best_models, "retinanet_r101", {}, FEW_STEPS),
    "3": (_focal_star, "ce", R50_600, {}),
    "text": (_running_text, "fl", R50_600, {}),
}


def rows(table: str, scale: str, only: Sequence[str] = ()) -> list[Row]:
    """Return the Rows of a table at a scale, in the paper's order.

    Args:
        table: str. One of NAMES.
        scale: str. One of SCALES.
        only: sequence of str. Names of rows or groups; empty for all.

    Raises:
        UserError: naming the valid rows, where one is unknown.
    """
    available = [row for row in _TABLES[table][0]() if scale in row.scales]
    known = {name for row in available for name in (row.name, row.group) if name}
    unknown = sorted(set(only) - known)
    if unknown:
        shown = ", ".join(row.name for row in available if row.group != "search")
        groups = ", ".join(dict.fromkeys(row.group for row in available if row.group))
        raise UserError(
            f"Table {table} has no row {unknown[0]} at {scale} scale. Choose from {shown}"
            + (f"; or the groups {groups}" if groups else "")
        )
    return [row for row in available if not only or row.name in only or row.group in only]


def baseline(table: str, row: Row, scale: str) -> str:
    """Return the name of the row that a Row is compared with."""
    names = {other.name for other in rows(table, scale)}
    return next(name for name in (*row.against, _TABLES[table][1]) if name in names)


def tree(
    table: str,
    row: Row,
    scale: str,
    data_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the configuration of a row, as in a JSON file of train.py: differences from the paper's settings.

    Args:
        table: str. One of NAMES.
        row: Row. A row of the table.
        scale: str. One of SCALES.
        data_dir: str, Path or None. Folder of the generated data, for the small scale.
        overrides: sequence of str. Each `section.key=value`, applied last, as in train.py.
    """
    _, _, for_paper, for_small = _TABLES[table]
    if scale == "paper":
        changes = {**for_paper, **row.changes, **row.paper}
    else:
        changes = {**SMALL, "data.dir": str(data_dir), **for_small, **row.changes, **row.small}
    built: dict[str, Any] = {"version": 1}
    for key, value in changes.items():
        *sections, last = key.split(".")
        branch = built
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    for override in overrides:
        config_schema.apply(Config, built, override)
    return built


def differs(row: Row, scale: str, than: Row | None = None) -> str:
    """Describe the settings of a Row, or those that differ from another Row, as `key=value`."""
    of_both = [{**one.changes, **(one.paper if scale == "paper" else one.small)} if one else {} for one in (row, than)]
    changes = {key: value for key, value in of_both[0].items() if key not in of_both[1] or of_both[1][key] != value}
    return " ".join(f"{key}={config_schema.show(value)}" for key, value in changes.items()) or "the paper's settings"
