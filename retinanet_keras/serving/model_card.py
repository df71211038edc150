"""The model card of an export: model, inputs, outputs, metrics, and checksums of its files."""

from __future__ import annotations

import functools
import hashlib
import html
import json
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet_keras.evaluation.identity import identity
from retinanet_keras.storage import disk, strict_json
from retinanet_keras.storage.printable import printable

if TYPE_CHECKING:
    from retinanet_keras.config import Config
    from retinanet_keras.model import RetinaNet

EXTRA = Path("assets.extra")  # a folder of a SavedModel that TensorFlow ignores
CARD, PAGE, SUMS = "model_card.json", "model_card.html", "SHA256SUMS"
VERIFY = f"sha256sum --check {EXTRA / SUMS}"
PARTS = ("retinanet_keras", "keras", "tensorflow")


def write(folder: str | os.PathLike[str], card: dict[str, Any]) -> None:
    """Write model_card.json, model_card.html and SHA256SUMS into `assets.extra`, after all other files of an export.

    Args:
        folder: path of the SavedModel.
        card: dict. As of `describe`.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = {str(p.relative_to(folder)): _sum(p) for p in files}
    checksums = {"algorithm": "SHA-256", "verify": f"{VERIFY}, in the version's folder", "files": sums}
    card, extra = {**card, "checksums": checksums}, folder / EXTRA
    disk.write(extra / CARD, json.dumps(card, indent=1) + "\n")
    disk.write(extra / PAGE, _page(card))
    disk.write(extra / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def is_of(folder: str | os.PathLike[str], card: dict[str, Any]) -> bool:
    """Whether a folder contains a complete, undamaged export with this card."""
    folder = Path(folder)
    try:
        present = strict_json.read(folder / EXTRA / CARD)
        sums = present.pop("checksums")["files"]
        complete = all((folder / EXTRA / name).is_file() for name in (PAGE, SUMS))
        return complete and present == json.loads(json.dumps(card)) and all(_sum(folder / p) == sums[p] for p in sums)
    except (OSError, strict_json.JsonError, KeyError, TypeError, AttributeError):  # none, or not from this package
        return False


def others(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the files in a folder that do not belong to the export in it, such as an ONNX file beside it."""
    folder = Path(folder)
    try:
        exported = {*strict_json.read(folder / EXTRA / CARD)["checksums"]["files"]}
    except (OSError, strict_json.JsonError, KeyError, TypeError):  # no export, or a damaged one
        exported = set()
    exported |= {str(EXTRA / name) for name in (CARD, PAGE, SUMS)}
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [name for name in names if name not in exported]


def max_pixels(folder: str | os.PathLike[str]) -> int | None:
    """The largest number of pixels of an image that an export takes; None if its card does not say."""
    return _count(folder, "inputs", "serving_bytes", "max_pixels")


def num_classes(folder: str | os.PathLike[str]) -> int | None:
    """The number of classes of the model of an export; None if its card does not say."""
    return _count(folder, "model", "num_classes")


def _count(folder: str | os.PathLike[str], *keys: str) -> int | None:
    try:
        value: Any = functools.reduce(lambda tree, key: tree[key], keys, strict_json.read(Path(folder) / EXTRA / CARD))
    except (OSError, strict_json.JsonError, KeyError, TypeError):
        return None
    return value if type(value) is int else None


def describe(
    model: RetinaNet,
    config: Config,
    precision: str | None = None,
    metrics: dict[str, dict[str, Any]] | None = None,
    run: bool = True,
) -> dict[str, Any]:
    """The card as JSON-able dicts and lists, without the checksums.

    Args:
        model: RetinaNet. The exported model.
        config: Config. The one that it is exported with.
        precision: str. That of its convolutions. None: the model's own.
        metrics: {split: metrics, with the "weights" and "settings" of `identity`}. Those of other weights or settings
            than the export's are not shown. None: not measured.
        run: bool. Whether `config` is also that of the training.
    """
    settings, known = model.get_config(), identity(model, config)
    known["settings"]["precision"] = precision or model.compute_dtype
    names = (
        "num_classes",
        "fpn_channels",
        "head_depth",
        "norm",
        "width",
        "p6_source",
        "head_norm",
        "pixel_mean",
        "pixel_std",
        "anchors",
        "detection",
    )
    return {
        "name": "RetinaNet",
        "paper": "Lin et al., Focal Loss for Dense Object Detection, ICCV 2017",
        "model": {
            "backbone": model.backbone.name,
            "parameters": model.count_params(),
            "precision": known["settings"]["precision"],
            "weights": known["weights"],
            **{name: settings[name] for name in names},
        },
        "inputs": {
            "serving_default": {
                "images": "uint8 [B, H, W, 3], RGB, any B, 0 included, any H and W from 1. Images without pixels fail "
                "with INVALID_ARGUMENT"
            },
            "serving_bytes": {
                "image_bytes": "string [B], JPEG, PNG, GIF (its first frame), BMP or still WebP, each of any size up "
                f"to {config.serving.max_pixels:,} pixels; EXIF rotation and transparency are ignored. What cannot be "
                "decoded or is larger fails its whole batch with INVALID_ARGUMENT",
                "max_pixels": config.serving.max_pixels,
            },
            "resize": f"inside: shorter side {config.data.short_side} pixels, longer at most {config.data.max_side}",
        },
        "outputs": {
            "boxes": f"float32 [B, {model.detection.max_detections}, 4], x1, y1, x2, y2 in pixels of the image given",
            "scores": "float32 [B, D], falling",
            "labels": "int32 [B, D], 0..K-1; -1: nothing",
            "category_ids": "int64 [B, D], the dataset's; -1: nothing",
            "names": "string [B, D]",
            "num_detections": "int32 [B]; rows past it are empty",
        },
        "metrics": _measured(metrics or {}, known) or "not measured",
        "categories": model.categories,
        "license": {
            "graph": "made by retinanet_keras, Apache-2.0",
            "weights": config.serving.license or "not stated (serving.license in the configuration)",
        },
        "made_with": {name: _version(name) for name in PARTS},
        "config": config.to_dict() if run else "not known: exported from a file of weights",
    }


def _measured(metrics: dict[str, dict[str, Any]], known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{split: {name: number}} for these weights and settings, without metrics by class, curves and the like."""
    plain = (int, float, type(None))
    return {
        split: {name: value for name, value in values.items() if isinstance(value, plain)}
        for split, values in metrics.items()
        if values.get("weights") == known["weights"] and values.get("settings") == {**known["settings"], "split": split}
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # it is on the path, but not installed
        return "not installed"


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _page(card: dict[str, Any]) -> str:
    """The card as a self-contained HTML page."""
    rows = "".join(f"<h2>{html.escape(name.replace('_', ' '))}</h2>\n{_show(value)}\n" for name, value in card.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Model card</title><style>'
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;"
        f"vertical-align:top;overflow-wrap:anywhere}}</style></head>\n<body><h1>Model card</h1>\n{rows}</body></html>\n"
    )


def _show(value: Any) -> str:
    """JSON as HTML, dicts and lists of dicts as tables."""
    if isinstance(value, dict):
        rows = "".join(
            f"<tr><th>{html.escape(str(key))}</th><td>{_show(item)}</td></tr>" for key, item in value.items()
        )
        return f"<table>{rows}</table>"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        head = "".join(f"<th>{html.escape(str(key))}</th>" for key in value[0])
        rows = "".join("<tr>" + "".join(f"<td>{_show(item)}</td>" for item in row.values()) + "</tr>" for row in value)
        return f"<table><tr>{head}</tr>{rows}</table>"
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(item) for item in value)
    return html.escape(f"{value:.4g}" if isinstance(value, float) else printable(value))
