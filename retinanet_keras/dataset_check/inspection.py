"""The check of a dataset: what would stop a training, or let it run and find nothing.

`check_before_training` takes about a second and raises or warns; `inspect` decodes every image, lists all faults, and
draws boxes and anchors.
"""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np

from retinanet_keras import anchors, errors, targets
from retinanet_keras.data import canvas, coco_rules, dataset_formats, image_decoding
from retinanet_keras.data.coco_rules import ERROR, WARNING
from retinanet_keras.dataset_check import image_files, reach
from retinanet_keras.storage import disk
from retinanet_keras.storage.printable import printable
from retinanet_keras.visualization import draw

logger = logging.getLogger("retinanet_keras")

SAMPLE = 5000  # boxes looked at before training
TOO_FEW_TRAINED = 0.5  # of the boxes that get a positive anchor: an error
FEW_REACHED = 0.95  # of the boxes, by an anchor of `targets.positive_iou`: a warning
NAME = 32  # characters of a class's name in the report
PICTURES, PAIRS = 12, 6  # images drawn with boxes; images drawn with their anchors


def check_before_training(dataset, config):
    """The fast part: files that are missing, no boxes, anchors that do not fit the boxes.

    Args:
        dataset: a CocoDataset.
        config: a Config.

    Raises:
        DataError: where training could not work. What only makes it worse is logged as a warning.
    """
    findings = image_files.findings_of(dataset) + _no_boxes(dataset, ERROR)
    if not findings:
        findings = _reach(dataset, config, *reach.best_iou_of(dataset, config, SAMPLE))
    for finding in findings:
        text = f"{dataset.annotation_file}: {finding} `python -m retinanet_keras inspect` shows more."
        if finding.level == ERROR:
            raise errors.DataError(text)
        logger.warning("%s", text)


def check_files(dataset):
    """A DataError where image files of a dataset are missing, not regular, or too large by the annotations."""
    for finding in image_files.findings_of(dataset):
        raise errors.DataError(f"{dataset.annotation_file}: {finding}")


def inspect(config, to):
    """Check every split of a configuration, print a summary, and write `report.txt`, `report.json` and pictures.

    Args:
        config: a Config.
        to: the folder to write to.

    Returns:
        the report: a dict with `errors` and `warnings`, lists of sentences, and `splits`, the numbers of each.
    """
    to = Path(to)
    to.mkdir(parents=True, exist_ok=True)
    with disk.locked(to, "inspecting"):
        return _inspect(config, to)


def _inspect(config, to):
    data = config.data
    splits = dict.fromkeys(filter(None, (data.train_split, data.val_split, data.test_split)))
    report = {"errors": [], "warnings": [], "splits": {}}
    datasets = {}
    for split in splits:
        try:
            findings, dataset = dataset_formats.examine(data, split)
        except errors.DataError as error:
            report["errors"].append(f"{split}: {error}")
            continue
        found, sound, counts = image_files.check(dataset, f"Reading {split}")
        findings += found + _no_boxes(dataset, ERROR if split == data.train_split else WARNING)
        best, labels, sides = reach.best_iou_of(dataset, config)
        findings += _reach(dataset, config, best, labels, sides)
        if split == data.train_split:
            findings += _unseen(dataset)
        for finding in findings:
            report["errors" if finding.level == ERROR else "warnings"].append(f"{split}: {finding}")
        report["splits"][split] = {**_counts(dataset, best, labels, config), **counts}
        report["splits"][split]["findings"] = {f.rule: f.count for f in findings}
        _draw(to, split, dataset.subset(sound), config)
        datasets[split] = dataset
    for finding in _between(datasets):
        report["errors" if finding.level == ERROR else "warnings"].append(str(finding))
    text = _text(report, config)
    disk.write(to / "report.txt", text + "\n")
    disk.write(to / "report.json", json.dumps(report, indent=1) + "\n")
    print(f"{text}\n\nreport.txt, report.json and pictures are in {to}")
    return report


def _no_boxes(dataset, level):
    if len(dataset.boxes):
        return []
    what = f"usable boxes in {len(dataset)} images"
    return [coco_rules.Finding("no-boxes", level, 0, what, (), "There is nothing to learn, and AP is undefined.")]


def _unseen(dataset):
    counts = np.bincount(dataset.labels, minlength=len(dataset.categories))
    return coco_rules.find(
        "category-unseen", WARNING, counts == 0, lambda i: dataset.categories.names[i],
        "categories without a box", "The model cannot learn them; remove them if they mean nothing.",
    )  # fmt: skip


def _reach(dataset, config, best, labels, sides):
    """Whether the anchors fit the boxes; of each box the IoU of its best anchor, its label and its side, [M] each."""
    if not len(best):
        return []
    missed, trained = best < config.targets.positive_iou, best >= reach.needed_iou(config.targets)
    if missed.mean() <= 1 - FEW_REACHED:
        return []
    worst = Counter(labels[missed].tolist()).most_common(coco_rules.SHOWN)
    worst = [(printable(dataset.categories.names[label], NAME), count) for label, count in worst]
    smallest, largest = reach.anchor_sides(config.anchors)
    sentences = [
        f"That is {100 * missed.mean():.0f}%",
        f"the most are of {', '.join(f'{name} ({count})' for name, count in worst)}",
        f"their median side is {np.median(sides[missed]):.0f} pixels at data.short_side={config.data.short_side}, "
        f"where anchors have {smallest:.0f} to {largest:.0f}",
    ]
    if not trained.all():
        sentences.append(f"{100 * (1 - trained.mean()):.0f}% of all boxes get no positive anchor and train nothing")
    sentences += [f"{text} would reach {100 * now:.0f}%" for now, text in reach.suggestions(dataset, config)]
    what = f"of {len(best)} boxes that no anchor overlaps by IoU {config.targets.positive_iou:g}"
    level = ERROR if trained.mean() < TOO_FEW_TRAINED else WARNING
    return [coco_rules.Finding("anchors", level, int(missed.sum()), what, (), "; ".join(sentences) + ".")]


def _between(datasets):
    """Faults that show between splits: other categories, shared images."""
    findings, (first, *rest) = [], list(datasets) or [None]
    for split in rest:
        if datasets[split].categories != datasets[first].categories:
            what = f"split whose categories are not those of {first}"
            findings.append(
                coco_rules.Finding("split-categories", ERROR, 1, what, (split,), "All splits need the same.")
            )
    for n, split in enumerate(datasets):
        for other in list(datasets)[n + 1 :]:
            shared = sorted(_image_names(datasets[split]) & _image_names(datasets[other]))
            findings += coco_rules.find(
                "split-overlap", WARNING, np.ones([len(shared)], bool), lambda i, shared=shared: shared[i],
                f"images that are both in {split} and in {other}", "Results on images trained on mean little.",
            )  # fmt: skip
    return findings


def _image_names(dataset):
    return {dataset.name_of(i) for i in range(len(dataset))}


def _counts(dataset, best, labels, config):
    """The numbers of one split, for the report."""
    positive, needed = config.targets.positive_iou, config.targets.negative_iou
    classes = {}
    for label, name in enumerate(dataset.categories.names):
        own = best[labels == label]
        classes[f"{name} ({dataset.categories.ids[label]})"] = {
            "boxes": len(own), "reached": int((own >= positive).sum()), "below_negative_iou": int((own < needed).sum()),
        }  # fmt: skip
    return {
        "annotation_file": dataset.annotation_file,
        "images": len(dataset),
        "images_without_boxes": int((np.diff(dataset.offsets) == 0).sum()),
        "boxes": len(dataset.boxes),
        "left_out": dataset.dropped,
        "reached": int((best >= positive).sum()),
        "below_negative_iou": int((best < needed).sum()),
        "classes": classes,
    }


def _text(report, config):
    """The report as a page of text."""
    lines = []
    for split, numbers in report["splits"].items():
        ignored = ", ".join(f"{count} {reason}" for reason, count in numbers["left_out"].items()) or "none"
        modes = ", ".join(f"{count} {mode}" for mode, count in numbers["image_modes"].items())
        lines += [
            f"{split}: {numbers['annotation_file']}",
            f"  {numbers['images']} images ({modes}), {numbers['images_without_boxes']} without boxes, "
            f"{numbers['exif_rotated']} with an EXIF rotation",
            f"  {numbers['boxes']} boxes; ignored: {ignored}",
            f"  IoU of the boxes with their best anchor, at data.short_side={config.data.short_side} and "
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


def _draw(to, split, dataset, config):
    """`SPLIT_boxes.png`, a sheet of images; `SPLIT_anchors.png`, boxes and right of them their anchors."""
    filled = np.flatnonzero(np.diff(dataset.offsets))
    if not len(filled):
        return
    spread = lambda n: filled[np.linspace(0, len(filled) - 1, min(n, len(filled))).astype(int)]  # noqa: E731
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
        everywhere = np.asarray(anchors.anchor_boxes(*pixels.shape[:2], config.anchors))  # [A, 4]
        of_anchor, _ = targets.assign(
            everywhere, boxes[None], labels[None], positive_iou=config.targets.positive_iou,
            negative_iou=config.targets.negative_iou, low_quality=config.targets.low_quality,
        )  # fmt: skip
        of_anchor = np.asarray(of_anchor)[0]  # [A]
        positive = of_anchor >= 0
        sheet.append(draw.draw_boxes(pixels, boxes, labels, names))
        sheet.append(draw.draw_boxes(pixels, everywhere[positive], of_anchor[positive], [""] * len(names)))
    draw.save(to / f"{split}_anchors.png", draw.grid(sheet, columns=4))
