"""The model card of an export: what it is, what goes in and comes out, how good it is, and sums to check it by."""

import hashlib
import html
import json
from importlib import metadata
from pathlib import Path

EXTRA = Path("assets.extra")  # a folder that TensorFlow leaves alone
CARD, PAGE, SUMS = "model_card.json", "model_card.html", "SHA256SUMS"
VERIFY = f"sha256sum --check {EXTRA / SUMS}"
PARTS = ("retinanet_keras", "keras", "tensorflow")


def write(folder, model, config, *, precision=None, metrics=None, run=True):
    """Write model_card.json, model_card.html and SHA256SUMS into an export's `assets.extra`, after all else.

    Args:
        folder: of the SavedModel.
        model: the RetinaNet in it.
        config: the Config it was exported with.
        precision: of its convolutions; None: the model's own.
        metrics: {split: metrics} of its weights; None: not measured.
        run: whether `config` is also that of its training.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    card = describe(model, config, precision, metrics, run)
    card["checksums"] = {"algorithm": "SHA-256", "verify": f"{VERIFY}, in the version's folder", "files": sums}
    extra = folder / EXTRA
    (extra / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (extra / PAGE).write_text(_page(card), encoding="utf-8")
    (extra / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")


def describe(model, config, precision=None, metrics=None, run=True):
    """The card as JSON-able dicts and lists, without the checksums. Arguments as for `write`."""
    settings = model.get_config()
    names = (
        "num_classes", "fpn_channels", "head_depth", "norm", "width", "p6_source", "head_norm", "pixel_mean",
        "pixel_std", "anchors", "detection",
    )  # fmt: skip
    return {
        "name": "RetinaNet",
        "paper": "Lin et al., Focal Loss for Dense Object Detection, ICCV 2017",
        "model": {
            "backbone": model.backbone.name,
            "parameters": model.count_params(),
            "precision": precision or model.compute_dtype,
            **{name: settings[name] for name in names},
        },  # fmt: skip
        "inputs": {
            "serving_default": {
                "images": "uint8 [B, H, W, 3], RGB, any B, 0 included, any H and W from 1. Images without pixels fail "
                "with INVALID_ARGUMENT"
            },
            "serving_bytes": {
                "image_bytes": "string [B], JPEG, PNG, GIF (its first frame), BMP or still WebP, each of any size up "
                f"to {config.serving.max_pixels:,} pixels; EXIF rotation and transparency are ignored. What cannot be "
                "decoded or is larger fails its whole batch with INVALID_ARGUMENT"
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
        },  # fmt: skip
        "metrics": _numbers(metrics) if metrics else "not measured",
        "categories": model.categories,
        "license": {
            "graph": "made by retinanet_keras, Apache-2.0",
            "weights": config.serving.license or "not stated (serving.license in the configuration)",
        },
        "made_with": {name: metadata.version(name) for name in PARTS},
        "config": config.to_dict() if run else "not known: exported from a file of weights",
    }


def _numbers(metrics):
    """{split: {name: number}}, without what is by class, curves and the like."""
    plain = (int, float, type(None))
    return {split: {name: v for name, v in found.items() if isinstance(v, plain)} for split, found in metrics.items()}


def _page(card):
    """The card as a page that needs no other file."""
    rows = "".join(f"<h2>{html.escape(name.replace('_', ' '))}</h2>\n{_show(value)}\n" for name, value in card.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Model card</title><style>'
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;"
        f"vertical-align:top;overflow-wrap:anywhere}}</style></head>\n<body><h1>Model card</h1>\n{rows}</body></html>\n"
    )


def _show(value):
    """JSON as HTML: dicts and lists of dicts are tables."""
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
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
