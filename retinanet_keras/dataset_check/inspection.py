"""The check of a dataset: errors that would make training fail, or let it run without learning anything.

`check_before_training` takes about a second and raises or warns; `inspect` decodes every image, lists all faults, and
draws boxes and anchors.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet_keras import anchors, errors, targets
from retinanet_keras.config import Config
from retinanet_keras.data import canvas, coco_rules, dataset_formats, image_decoding
from retinanet_keras.data.coco import CocoDataset
from retinanet_keras.data.coco_rules import ERROR, WARNING
from retinanet_keras.dataset_check import image_files, reach
from retinanet_keras.storage import disk
from retinanet_keras.storage.printable import printable
from retinanet_keras.visualization import draw

logger = logging.getLogger("retinanet_keras")

SAMPLE = 5000  # boxes that are examined before training
TOO_FEW_TRAINED = 0.5  # an error if a smaller fraction of the boxes gets a positive anchor
FEW_REACHED = 0.95  # a warning if a smaller fraction has an anchor with an IoU of `targets.positive_iou`
NAME = 32  # characters of a class name in the report
PICTURES, PAIRS = 12, 6  # images drawn with boxes; images drawn with their anchors


def check_before_training(dataset: CocoDataset, config: Config) -> None:
    """Check in about a second for missing files, no boxes, and anchors that do not fit the boxes.

    Args:
        dataset: CocoDataset.
        config: Config.

    Raises:
        DataError: training would fail. Lesser faults are logged as warnings.
    """
    findings = image_files.findings_of(dataset) + _no_boxes(dataset, ERROR)
    if not findings:
        findings = _reach(dataset, config, *reach.best_iou_of(dataset, config, SAMPLE))
    for finding in findings:
        text = f"{dataset.annotation_file}: {finding} Run `python -m retinanet_keras inspect` for details."
        if finding.level == ERROR:
            raise errors.DataError(text)
        logger.warning("%s", text)


def check_files(dataset: CocoDataset) -> None:
    """Raise a DataError if image files of a dataset are missing, not regular, or too large by the annotations."""
    for finding in image_files.findings_of(dataset):
        raise errors.DataError(f"{dataset.annotation_file}: {finding}")


def inspect(config: Config, to: str | os.PathLike[str]) -> dict[str, Any]:
    """Check every split of a configuration, print a summary, and write `report.txt`, `report.json` and pictures.

    Args:
        config: Config.
        to: path of the folder to write to.

    Returns:
        the report: a dict with `errors` and `warnings`, lists of sentences, and `splits`, the counts of each split.
    """
    to = Path(to)
    to.mkdir(parents=True, exist_ok=True)
    with disk.locked(to, "inspecting"):
        return _inspect(config, to)


def _inspect(config: Config, to: Path) -> dict[str, Any]:
    data = config.data
    splits = dict.fromkeys(filter(None, (data.train_split, data.val_split, data.test_split)))
    report: dict[str, Any] = {"errors": [], "warnings": [], "splits": {}}
    datasets: dict[str, CocoDataset] = {}
    for split in splits:
        try:
            findings, dataset = dataset_formats.examine(data, split)
        except errors.DataError as error:
            report["errors"].append(f"{split}: {error}")
            continue
        file_findings, usable, counts = image_files.check(dataset, f"Reading {split}")
        findings += file_findings + _no_boxes(dataset, ERROR if split == data.train_split else WARNING)
        best, labels, sides = reach.best_iou_of(dataset, config)
        findings += _reach(dataset, config, best, labels, sides)
        if split == data.train_split:
            findings += _unseen(dataset)
        for finding in findings:
            report["errors" if finding.level == ERROR else "warnings"].append(f"{split}: {finding}")
        report["splits"][split] = {**_counts(dataset, best, labels, config), **counts}
        report["splits"][split]["findings"] = {f.rule: f.count for f in findings}
        _draw(to, split, dataset.subset(usable), config)
        datasets[split] = dataset
    for finding in _between(datasets):
        report["errors" if finding.level == ERROR else "warnings"].append(str(finding))
    text = _text(report, config)
    disk.write(to / "report.txt", text + "\n")
    disk.write(to / "report.json", json.dumps(report, indent=1) + "\n")
    print(f"{text}\n\nreport.txt, report.json and pictures are in {to}")
    return report


def _no_boxes(dataset: CocoDataset, level: str) -> list[coco_rules.Finding]:
    if len(dataset.boxes):
        return []
    what = f"usable boxes in {len(dataset)} images"
    return [coco_rules.Finding("no-boxes", level, 0, what, (), "Add annotations: training and AP need boxes.")]


def _unseen(dataset: CocoDataset) -> list[coco_rules.Finding]:
    counts = np.bincount(dataset.labels, minlength=len(dataset.categories))
    return coco_rules.find(
        "category-unseen",
        WARNING,
        counts == 0,
        lambda i: dataset.categories.names[i],
        "categories without a box",
        "The model cannot learn them: add boxes, or remove these categories.",
    )


def _reach(
    dataset: CocoDataset, config: Config, best: npt.NDArray, labels: npt.NDArray, sides: npt.NDArray
) -> list[coco_rules.Finding]:
    """Report if the anchors do not fit the boxes.

    Args:
        dataset: CocoDataset.
        config: Config.
        best, labels, sides: [M] each. For each box the IoU with its best anchor, its label and its side, as returned by
            `reach.best_iou_of`.
    """
    if not len(best):
        return []
    missed, trained = best < config.targets.positive_iou, best >= reach.needed_iou(config.targets)
    if missed.mean() <= 1 - FEW_REACHED:
        return []
    most = Counter(labels[missed].tolist()).most_common(coco_rules.SHOWN)
    worst = [(printable(dataset.categories.names[label], NAME), count) for label, count in most]
    smallest, largest = reach.anchor_sides(config.anchors)
    sentences = [
        f"That is {100 * missed.mean():.0f}%",
        f"most often of {', '.join(f'{name} ({count})' for name, count in worst)}",
        f"their median side is {np.median(sides[missed]):.0f} pixels at data.short_side={config.data.short_side}, "
        f"where anchors have {smallest:.0f} to {largest:.0f}",
    ]
    if not trained.all():
        sentences.append(
            f"{100 * (1 - trained.mean()):.0f}% of all boxes get no positive anchor and do not contribute to training"
        )
    sentences += [f"{text} would reach {100 * reached:.0f}%" for reached, text in reach.suggestions(dataset, config)]
    what = f"of {len(best)} boxes that no anchor overlaps by IoU {config.targets.positive_iou:g}"
    level = ERROR if trained.mean() < TOO_FEW_TRAINED else WARNING
    return [coco_rules.Finding("anchors", level, int(missed.sum()), what, (), "; ".join(sentences) + ".")]


def _between(datasets: dict[str, CocoDataset]) -> list[coco_rules.Finding]:
    """Report faults between splits: different categories, shared images."""
    findings: list[coco_rules.Finding] = []
    (first, *rest) = list(datasets) or [""]
    for split in rest:
        if datasets[split].categories != datasets[first].categories:
            what = f"split whose categories differ from those of {first}"
            findings.append(
                coco_rules.Finding(
                    "split-categories", ERROR, 1, what, (split,), "Use the same categories in all splits."
                )
            )
    for n, split in enumerate(datasets):
        for other in list(datasets)[n + 1 :]:
            shared = sorted(_image_names(datasets[split]) & _image_names(datasets[other]))
            findings += coco_rules.find(
                "split-overlap",
                WARNING,
                np.ones([len(shared)], bool),
                shared.__getitem__,
                f"images that are both in {split} and in {other}",
                "Remove them from one split: results on training images do not measure generalization.",
            )
    return findings


def _image_names(dataset: CocoDataset) -> set[str]:
    return {dataset.name_of(i) for i in range(len(dataset))}


def _counts(dataset: CocoDataset, best: npt.NDArray, labels: npt.NDArray, config: Config) -> dict[str, Any]:
    """The counts of one split for the report."""
    positive, negative = config.targets.positive_iou, config.targets.negative_iou
    classes = {}
    for label, name in enumerate(dataset.categories.names):
        of_class = best[labels == label]
        classes[f"{name} ({dataset.categories.ids[label]})"] = {
            "boxes": len(of_class),
            "reached": int((of_class >= positive).sum()),
            "below_negative_iou": int((of_class < negative).sum()),
        }
    return {
        "annotation_file": dataset.annotation_file,
        "images": len(dataset),
        "images_without_boxes": int((np.diff(dataset.offsets) == 0).sum()),
        "boxes": len(dataset.boxes),
        "left_out": dataset.dropped,
        "reached": int((best >= positive).sum()),
        "below_negative_iou": int((best < negative).sum()),
        "classes": classes,
    }


def _text(report: dict[str, Any], config: Config) -> str:
    """Format the report as text."""
    lines = []
    for split, numbers in report["splits"].items():
        ignored = ", ".join(f"{count} {reason}" for reason, count in numbers["left_out"].items()) or "none"
        modes = ", ".join(f"{count} {mode}" for mode, count in numbers["image_modes"].items())
        lines += [
            f"{split}: {numbers['annotation_file']}",
            f"  {numbers['images']} images ({modes}), {numbers['images_without_boxes']} without boxes, "
            f"{numbers['exif_rotated']} with an EXIF rotation",
            f"  {numbers['boxes']} boxes; ignored: {ignored}",
            f"  IoU of each box with its best anchor, at data.short_side={config.data.short_side} and "
            f"anchors.size={config.anchors.size:g}:",
            f"  {'class (category id)':<{NAME}} {'boxes':>9} {f'{config.targets.positive_iou:g} or more':>16} "
            f"{f'under {config.targets.negative_iou:g}':>12}",
        ]
        for name, row in {**numbers["classes"], "all": numbers}.items():
            count, below = row["boxes"], row["below_negative_iou"]
            share = f"{100 * row['reached'] / count:.1f}%" if count else ""
            name = printable(name[:NAME], NAME)
            lines.append(f"  {name:<{NAME}} {count:>9} {row['reached']:>9} {share:>6} {below:>12}")
        lines.append("")
    for kind in ("errors", "warnings"):
        lines += [f"{len(report[kind])} {kind}", *(f"- {line}" for line in report[kind])]
    return printable("\n".join(lines), keep="\n")


def _draw(to: Path, split: str, dataset: CocoDataset, config: Config) -> None:
    """Draw `SPLIT_boxes.png`, images with boxes, and `SPLIT_anchors.png`, boxes with their positive anchors beside."""
    with_boxes = np.flatnonzero(np.diff(dataset.offsets))
    if not len(with_boxes):
        return

    def spread(n: int) -> npt.NDArray:  # the indices of n images, evenly spaced
        return with_boxes[np.linspace(0, len(with_boxes) - 1, min(n, len(with_boxes))).astype(int)]

    names = dataset.categories.names
    sheet = [
        draw.draw_boxes(image_decoding.image_of(dataset, i), dataset.boxes_of(i), dataset.labels_of(i), names)
        for i in spread(PICTURES)
    ]
    draw.save(to / f"{split}_boxes.png", draw.grid(sheet))
    sheet = []
    for i in spread(PAIRS):
        pixels, _, scale = canvas.fit(
            image_decoding.image_of(dataset, i)[None], config.data.short_side, config.data.max_side
        )
        pixels, boxes, labels = pixels[0].numpy(), dataset.boxes_of(i) * float(scale), dataset.labels_of(i)
        all_anchors = np.asarray(anchors.anchor_boxes(pixels.shape[0], pixels.shape[1], config.anchors))  # [A, 4]
        of_anchor, _ = targets.assign(
            all_anchors,
            boxes[None],
            labels[None],
            positive_iou=config.targets.positive_iou,
            negative_iou=config.targets.negative_iou,
            low_quality=config.targets.low_quality,
        )
        of_anchor = np.asarray(of_anchor)[0]  # [A]
        positive = of_anchor >= 0
        sheet.append(draw.draw_boxes(pixels, boxes, labels, names))
        sheet.append(draw.draw_boxes(pixels, all_anchors[positive], of_anchor[positive], [""] * len(names)))
    draw.save(to / f"{split}_anchors.png", draw.grid(sheet, columns=4))
