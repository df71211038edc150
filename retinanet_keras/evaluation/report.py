"""The report of an evaluation: one self-contained HTML page without scripts."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from retinanet_keras.evaluation.coco_metrics import IOUS, MEANINGS, METRICS
from retinanet_keras.storage import disk
from retinanet_keras.storage.printable import printable
from retinanet_keras.visualization import plots

PICTURE_SIDE = 640  # longer side of a picture in pixels; two panels lie beside each other in it
JPEG_QUALITY = 82
LONGEST = 300  # characters of a name
STAGES = {
    "input": "waiting for the image, which is read, decoded and resized ahead",
    "network": "the forward pass",
    "post_processing": "decoding of boxes and non-maximum suppression",
}
SIZES = {"s": ("small", "area up to 32²"), "m": ("medium", "32² to 96²"), "l": ("large", "from 96²")}


def write_report(
    path: str | os.PathLike[str],
    metrics: dict[str, Any],
    *,
    title: str = "Evaluation",
    about: Mapping[str, str] | None = None,
    speed: Mapping[str, float] | None = None,
    best: Iterable[tuple[str, npt.NDArray]] = (),
    worst: Iterable[tuple[str, npt.NDArray]] = (),
) -> None:
    """Write the page; an earlier file is replaced only when the new one is complete.

    Args:
        path: path of the HTML file; its folder is created.
        metrics: dict. As of `coco_metrics.coco_metrics`.
        title: str. Title of the page.
        about: {label: text} about what was evaluated, such as the model, split, library and date.
        speed: {"input", "network", "post_processing": milliseconds per image; "images_per_second"}, each of which may
            be missing. None: no such section.
        best, worst: (caption, uint8 image [H, W, 3]) of the best and worst images, as of `draw.side_by_side`; large
            ones are downscaled.
    """
    sections = [
        _head(title, about or {}, metrics),
        _section("The 12 numbers", _twelve(metrics)),
        _section("By size of the object", _sizes(metrics)),
        _section("Precision and recall", _curves(metrics["curves"])),
        _section("Scores", _scores(metrics["scores"])),
        _section("Speed", _speed(speed)) if speed is not None else "",
        _section("Classes", _classes(metrics["per_class"])),
        _section("Worst images", _pictures(worst, "worst", metrics["images"])) if worst else "",
        _section("Best images", _pictures(best, "best", metrics["images"])) if best else "",
    ]
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The browser blocks every request to another file or host.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )
    with disk.replacing_text(path) as file:
        file.write(page)


def caption(row: Mapping[str, Any]) -> str:
    """The caption of a picture, from a row of `metrics["images"]["best"]` or `["worst"]`."""
    return (
        f"Image {row['image_id']}: F1 {row['f1']:.2f}; {row['found']} found, {row['missed']} missed, "
        f"{row['false']} false"
    )


def _head(title, about, metrics):
    counts = metrics["counts"]
    crowds = f", and {counts['crowds']:,} crowds, which count neither way" if counts["crowds"] else ""
    rows = "".join(f"<dt>{_text(label)}</dt><dd>{_text(value)}</dd>" for label, value in about.items())
    cards = "".join(
        f'<div class="card"><span>{name}</span><b>{_percent(metrics[name])}</b>'
        f'<span class="soft">{MEANINGS[name]}</span></div>'
        for name in ("AP", "AP50", "AP75", "AR100")
    )
    return (
        f"<h1>{_text(title)}</h1>\n"
        f'<p class="soft">{counts["images"]:,} images, {counts["objects"]:,} objects of '
        f"{len(metrics['per_class']):,} classes{crowds}; {counts['detections']:,} detections.</p>\n"
        f'<dl class="about">{rows}</dl>\n<div class="cards">{cards}</div>'
    )


def _twelve(metrics):
    rows = "".join(
        f'<tr><th scope="row">{name}</th>{_level(metrics[name])}'
        f'<td class="words">{_text(meaning).replace("^2", "²")}</td></tr>'
        for name, meaning in MEANINGS.items()
    )
    return (
        "<p>COCO's numbers, in percent; a dash stands where there are no objects to tell from. Precision: how many of "
        "the detections are right; recall: how many of the objects are found; IoU: the overlap asked for. Means "
        f'are over the classes that have objects.</p>\n<div class="wide"><table><tbody>{rows}</tbody></table></div>'
    )


def _sizes(metrics):
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td class="words">{area}</td><td>{metrics["counts"][name]:,}</td>'
        f"{_level(metrics['AP' + key])}{_level(metrics['AR' + key])}</tr>"
        for key, (name, area) in SIZES.items()
    )
    return (
        '<div class="wide"><table><thead><tr><th>size</th><th class="words">pixels</th><th>objects</th><th>AP</th>'
        f"<th>AR, 100 detections</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _curves(curves):
    if curves["all"] is None:
        return "<p>There are no objects, and so no curves.</p>"
    key = "".join(f'<span class="k{n}">IoU {name}</span>' for n, name in enumerate(IOUS))
    key = f'<div class="key">{key}</div>'
    drawn = plots.lines([curves["all"][name] for name in IOUS], "precision over recall, mean of the classes")
    small = "".join(
        f"<figure>{plots.lines([row[n] for n in IOUS], 'precision over recall', size=(150, 100), axes=False)}"
        f'<figcaption title="{_text(name)}">{_text(name)}</figcaption></figure>'
        for name, row in curves["per_class"].items()
        if row is not None
    )
    return (
        "<p>Precision when the score is lowered until a given recall is reached, at most 100 detections an image; mean "
        f"of the classes. The area under a curve is its average precision.</p>\n<figure>{key}{drawn}</figure>\n"
        f'<details><summary>Every class</summary>{key}<div class="small">{small}</div></details>'
    )


def _scores(scores):
    names = f"found an object (IoU {scores['iou']:g} or more)", "found none"
    key = "".join(f'<span class="k{n}">{name}: {sum(scores[k]):,}</span>'
                  for n, (name, k) in enumerate(zip(names, ("matched", "unmatched"), strict=True)))  # fmt: skip
    drawn = plots.bars(
        scores["edges"], [scores["matched"], scores["unmatched"]], "detections by score", "score", "detections"
    )
    return (
        "<p>How well the score tells right detections from wrong ones. The axis of counts is logarithmic.</p>\n"
        f'<figure><div class="key">{key}</div>{drawn}</figure>'
    )


def _speed(speed):
    rows = "".join(
        f'<tr><th scope="row">{name.replace("_", "-")}</th><td>{speed[name]:,.2f}</td>'
        f'<td class="words">{meaning}</td></tr>'
        for name, meaning in STAGES.items()
        if speed.get(name) is not None
    )
    total = sum(speed[name] for name in STAGES if speed.get(name) is not None)
    rate = speed.get("images_per_second")
    rate = f"<p>{rate:,.1f} images per second, all stages together.</p>\n" if rate is not None else ""
    return (
        f'{rate}<div class="wide"><table><thead><tr><th>stage</th><th>ms per image</th><th></th></tr></thead>'
        f'<tbody>{rows}<tr><th scope="row">sum</th><td>{total:,.2f}</td><td></td></tr></tbody></table></div>'
    )


def _classes(per_class):
    order = sorted(per_class.items(), key=lambda item: -1 if item[1]["AP"] is None else item[1]["AP"], reverse=True)
    head = "".join(f'<th title="{MEANINGS[name]}">{name}</th>' for name in METRICS)
    rows = "".join(
        f'<tr><th scope="row" title="{_text(name)}">{_text(name)}</th>{_level(row["AP"])}'
        + "".join(f"<td>{_percent(row[key])}</td>" for key in METRICS[1:])
        + f"<td>{row['ground_truth']:,}</td><td>{row['detections']:,}</td></tr>"
        for name, row in order
    )
    return (
        "<p>The best first, in percent.</p>\n"
        f'<div class="wide"><table class="classes"><thead><tr><th>class</th>{head}<th>objects</th><th>detections</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _pictures(pictures, end, images):
    shown = "".join(
        f'<figure><img src="{_data_uri(image)}" alt="{_text(words)}"><figcaption>{_text(words)}</figcaption></figure>'
        for words, image in pictures
    )
    return (
        f"<p>The images of the {'lowest' if end == 'worst' else 'highest'} F1, which is 2 found / (2 found + missed + "
        f"false) at IoU {images['iou']:g}, over detections with a score of {images['min_score']:.2f} or more: from "
        f"there on the F1 of all images together is highest{_overall(images)}. Images without objects and without such "
        f'detections are not ranked.</p>\n<div class="pictures">{shown}</div>'
    )


def _overall(images):
    return "" if images["f1"] is None else f", {images['f1']:.2f}"


def _section(title, content):
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _level(value):
    """A cell with a percentage over a bar of its length."""
    if value is None:
        return "<td>–</td>"
    return f'<td class="level" style="--part:{100 * value:.1f}%">{_percent(value)}</td>'


def _percent(value):
    return "–" if value is None else f"{100 * value:.1f}"


def _text(value: object) -> str:
    """A value as escaped HTML text, also for attributes."""
    return html.escape(printable(value, LONGEST), quote=True)


def _data_uri(image):
    picture = Image.fromarray(np.asarray(image, np.uint8))
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"
