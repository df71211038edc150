"""Faults planted in a small dataset, each of which the check has to report."""

import dataclasses
import json
import logging
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinanet_keras import anchors, boxes
from retinanet_keras.config import AnchorConfig, config_from_dict
from retinanet_keras.data import coco
from retinanet_keras.dataset_check import inspection, reach
from retinanet_keras.errors import DataError
from retinanet_keras.storage import disk

SPLITS = {"train_split": "train", "val_split": "val"}
BCCD = Path(__file__).parents[1].parent / "shared/data/bccd"


class Dataset:
    """Six images of 64x48 with a box of 32x32 each, as train and val, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "images").mkdir()
        (folder / "annotations").mkdir()
        self.trees = {}
        for split in ("train", "val"):
            images, annotations = [], []
            for i in range(6):
                name = f"{split}_{i}.jpg"
                pixels = np.random.default_rng(i).integers(0, 256, [48, 64, 3], np.uint8)
                Image.fromarray(pixels).save(folder / "images" / name)
                images.append({"id": i + 1, "file_name": name, "width": 64, "height": 48})
                annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1 + i % 2, "bbox": [8, 8, 32, 32]})
            categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
            self.trees[split] = {"images": images, "categories": categories, "annotations": annotations}
        self.train = self.trees["train"]

    def image(self, i):
        return self.folder / "images" / f"train_{i}.jpg"

    def add(self, **annotation):
        own = {"id": 100 + len(self.train["annotations"]), "image_id": 1, "category_id": 1, "bbox": [8, 8, 32, 32]}
        self.train["annotations"].append({**own, **annotation})

    def config(self, **sections):
        data = {"source": "coco", "dir": str(self.folder), "short_side": 48, "max_side": 64, **SPLITS}
        data |= sections.pop("data", {})
        return config_from_dict({"data": data, **sections})

    def write(self):
        for split, tree in self.trees.items():
            (self.folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))

    def inspect(self, **sections):
        self.write()
        return inspection.inspect(self.config(**sections), self.folder / "out")

    def load(self):
        self.write()
        return coco.load(self.folder / "annotations" / "instances_train.json", self.folder / "images")


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path)


def test_a_sound_dataset(dataset, capsys):
    report = dataset.inspect()
    assert report["errors"] == [] and report["warnings"] == []
    train = report["splits"]["train"]
    assert (train["images"], train["boxes"], train["images_without_boxes"]) == (6, 6, 0)
    assert train["classes"]["cat (1)"] == {"boxes": 3, "reached": 3, "below_negative_iou": 0}
    assert train["image_modes"] == {"RGB": 6} and train["left_out"] == {}
    out = dataset.folder / "out"
    files = {"report.txt", "report.json", *(f"{s}_{p}.png" for s in ("train", "val") for p in ("boxes", "anchors"))}
    assert {path.name for path in out.iterdir()} == {*files, disk.LOCK}
    assert json.loads((out / "report.json").read_text()) == report
    printed = capsys.readouterr().out
    assert (out / "report.txt").read_text().strip() in printed
    assert "0 errors" in printed and "cat (1)" in printed


def truncate(d):
    d.image(2).write_bytes(d.image(2).read_bytes()[:600])


def no_image(d):
    d.image(3).write_text("not an image")


def other_size(d):
    Image.new("RGB", (48, 64)).save(d.image(1))


def exif(d):
    rotation = Image.Exif()
    rotation[0x0112] = 6
    Image.new("RGB", (64, 48)).save(d.image(4), exif=rotation)


def gray(d):
    Image.new("L", (64, 48)).save(d.image(0))


def cmyk(d):
    Image.new("CMYK", (64, 48)).save(d.image(0))


def sixteen_bit(d):
    """A PNG of three 16-bit channels, which Pillow cannot write."""
    parts = [
        b"IHDR" + struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(48 * 385)),
        b"IEND",
    ]
    chunks = (struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    d.image(0).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def sixteen_bit_gray(d):
    Image.fromarray(np.zeros([48, 64], np.uint16)).save(d.image(0), "PNG")


def into_val(d):
    d.trees["val"]["images"][5]["file_name"] = "train_0.jpg"


ERRORS = {
    "missing file": (lambda d: d.image(5).unlink(), "1 image files that do not exist: .*train_5.jpg"),
    "truncated": (truncate, "1 image files that cannot be decoded: .*train_2.jpg"),
    "no image": (no_image, "1 image files that cannot be decoded: .*train_3.jpg"),
    "empty file": (lambda d: d.image(0).write_bytes(b""), "cannot be decoded: .*train_0.jpg"),
    "other size": (other_size, "train_1.jpg is 48x64, the JSON says 64x48"),
    "image id twice": (
        lambda d: d.train["images"][1].update(id=1),
        r"1 images with a duplicate id: 1 \(train_1.jpg\)",
    ),
    "unknown image": (lambda d: d.add(image_id=77), r"not in `images`: annotation 106 \(image_id 77\)"),
    "unknown category": (lambda d: d.add(category_id=9), r"not in `categories`: annotation 106 \(category_id 9\)"),
    "bbox of three": (lambda d: d.add(bbox=[1, 2, 3]), "1 annotations whose `bbox` is not 4 numbers"),
    "category id twice": (
        lambda d: d.train["categories"][1].update(id=1),
        r"categories with a duplicate id: 1 \(dog\)",
    ),
    "no file_name": (lambda d: d.train["images"][1].pop("file_name"), "1 images without a `file_name`"),
    "no boxes": (lambda d: d.train["annotations"].clear(), "0 usable boxes in 6 images"),
    "other categories": (
        lambda d: d.trees["val"]["categories"][1].update(name="cow"),
        "differ from those of train: val",
    ),
    "no images": (lambda d: d.train["images"].clear(), "missing or empty: `images`"),
}
WARNINGS = {
    "outside": (lambda d: d.add(bbox=[70, 8, 5, 5]), "1 boxes outside the image: annotation 106"),
    "overhang": (lambda d: d.add(bbox=[40, 8, 40, 30]), "1 boxes that reach more than a pixel beyond the image"),
    "zero area": (lambda d: d.add(bbox=[8, 8, 0, 5]), "1 boxes without area: annotation 106"),
    "inverted": (lambda d: d.add(bbox=[30, 30, -10, -10]), "1 boxes without area: annotation 106"),
    "NaN": (lambda d: d.add(bbox=[float("nan"), 8, 5, 5]), "1 boxes not finite: annotation 106"),
    "annotation id twice": (lambda d: d.add(id=1), "1 annotations with a duplicate id: annotation 1"),
    "category name twice": (
        lambda d: d.train["categories"][1].update(name="cat"),
        "1 categories with a duplicate name",
    ),
    "file twice": (lambda d: d.train["images"][1].update(file_name="train_0.jpg"), "1 images with a duplicate file"),
    "EXIF": (exif, "1 images with an EXIF rotation: .*train_4.jpg"),
    "grayscale": (gray, "1 grayscale images: .*train_0.jpg"),
    "CMYK": (cmyk, "1 CMYK images: .*train_0.jpg"),
    "16 bits": (sixteen_bit, "1 images of 16 bits: .*train_0.jpg"),
    "16 bits, grayscale": (sixteen_bit_gray, "1 images of 16 bits: .*train_0.jpg"),
    "category without boxes": (lambda d: d.train["categories"].append({"id": 5, "name": "ox"}), "without a box: ox"),
    "in both splits": (into_val, "1 images that are both in train and in val: .*train_0.jpg"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(dataset, name, monkeypatch):
    monkeypatch.setattr(inspection, "_draw", lambda *_: None)  # which the other tests run
    plant, words = ERRORS[name]
    plant(dataset)
    report = dataset.inspect()
    assert any(re.search(words, line) for line in report["errors"]), report["errors"]


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings(dataset, name, monkeypatch):
    monkeypatch.setattr(inspection, "_draw", lambda *_: None)
    plant, words = WARNINGS[name]
    plant(dataset)
    report = dataset.inspect()
    assert any(re.search(words, line) for line in report["warnings"]), report["warnings"]
    if name not in ("category without boxes", "category name twice"):  # in which val differs
        assert report["errors"] == []


def test_many_faults_at_once_are_all_reported_and_drawn_around(dataset):
    for plant in (truncate, no_image, other_size, exif):
        plant(dataset)
    dataset.image(5).unlink()
    dataset.add(image_id=77)
    dataset.add(bbox=[8, 8, 0, 0])
    dataset.add(iscrowd=1)
    dataset.train["annotations"][0]["category_id"] = 40
    report = dataset.inspect()
    assert len(report["errors"]) == 5 and len(report["warnings"]) == 2
    train = report["splits"]["train"]
    assert (
        train["images_without_boxes"] == 1
        and train["boxes"] == 5
        and train["left_out"] == {"crowd": 1, "without area": 1}
    )
    assert train["image_modes"]["missing"] == 1 and train["exif_rotated"] == 1
    assert (dataset.folder / "out" / "train_boxes.png").exists()


def test_a_split_that_cannot_be_read_does_not_stop_the_others(dataset):
    dataset.write()
    (dataset.folder / "annotations" / "instances_train.json").write_text("{")
    report = inspection.inspect(dataset.config(data={"test_split": "test"}), dataset.folder / "out")
    assert ["train: " in e or "test: " in e for e in report["errors"]] == [True, True]
    assert "is not valid JSON" in report["errors"][0] and "instances_test.json does not exist" in report["errors"][1]
    assert list(report["splits"]) == ["val"]


def test_boxes_no_anchor_reaches(dataset):
    for annotation in dataset.train["annotations"]:
        annotation["bbox"] = [16, 16, 8, 8]
    report = dataset.inspect()
    (error,) = report["errors"]
    assert "6 of 6 boxes that no anchor overlaps by IoU 0.5" in error and "cat (3), dog (3)" in error
    assert "their median side is 8 pixels at data.short_side=48, where anchors have 32 to 813" in error
    assert "100% of all boxes get no positive anchor" in error and "anchors.size=1 would reach 100%" in error
    assert report["splits"]["train"]["below_negative_iou"] == 6
    report = dataset.inspect(anchors={"size": 1.0})
    assert report["errors"] == [] and report["splits"]["train"]["reached"] == 6


@pytest.mark.parametrize("low_quality, level", [("none", "errors"), ("detectron", "warnings"), ("all", "warnings")])
def test_what_a_box_needs_depends_on_low_quality(dataset, low_quality, level):
    """The smallest anchors are 32x32; one of them contains the box of 30x15, so its IoU is 450 / 1024 = 0.44."""
    for annotation in dataset.train["annotations"]:
        annotation["bbox"] = [21, 16.5, 30, 15]
    report = dataset.inspect(
        targets={"low_quality": low_quality}, anchors={"scales": 1, "ratios": [1.0]}, data={"val_split": "train"}
    )
    assert len(report[level]) == 1 and "6 of 6 boxes" in report[level][0]
    assert report["splits"]["train"]["below_negative_iou"] == 0


@pytest.mark.parametrize("levels", ["pyramid", "last"])
@pytest.mark.parametrize("rounding", ["none", "cell", "integers"])
def test_best_iou_is_that_of_all_anchors(rounding, levels):
    """Of boxes anywhere, at the border, without area, and of an anchor's own place and size; canvases mixed."""
    rng = np.random.default_rng(0)
    canvases = [(96, 160), (160, 96), (32, 32), (416, 672)]  # of 128 the last level has partial cells
    settings = [{"offset": offset} for offset in (0.0, 0.2, 0.5, 1.0)]
    settings.append({"offset": 0.0, "size": 2.5, "scales": 2, "ratios": (0.3, 1.0, 4.0)})
    for config in (AnchorConfig(rounding=rounding, levels=levels, **values) for values in settings):
        truth, expected = [], []
        for height, width in canvases:
            everywhere = np.asarray(anchors.anchor_boxes(height, width, config))
            first = rng.uniform(-20, [width, height], [60, 2])
            first[40:] = rng.choice([[-3, -3], [width - 30, height - 30]], 20)
            size = np.exp(rng.uniform(np.log(1), np.log(600), [60, 2]))
            own = [np.concatenate([first, first + size], axis=1), rng.choice(everywhere, 20), [[50, 50, 50, 60]]]
            truth.append(np.concatenate(own).astype(np.float32))
            expected.append(np.asarray(boxes.iou(truth[-1], everywhere)).max(axis=1))
        found = reach.best_iou(np.concatenate(truth), np.repeat(canvases, 81, axis=0), config)
        np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=1e-5)
    assert reach.best_iou(np.zeros([0, 4], np.float32), np.zeros([0, 2], int), config).shape == (0,)


def test_boxes_are_measured_at_the_training_size(dataset):
    """A box of 16x16, twice as large in the network, is an anchor's size."""
    for annotation in dataset.train["annotations"]:
        annotation["bbox"] = [10, 10, 16, 16]
    loaded = dataset.load()
    at = {side: dataset.config(data={"short_side": side, "max_side": 10_000}) for side in (48, 96)}
    assert (reach.best_iou_of(loaded, at[48])[0] < 0.4).all()
    best, labels, sides = reach.best_iou_of(loaded, at[96])
    assert sides.tolist() == [32] * 6
    assert (best > 0.999).all() and labels.tolist() == [0, 1, 0, 1, 0, 1]
    capped = dataset.config(data={"short_side": 96, "max_side": 64})
    assert (reach.best_iou_of(loaded, capped)[0] < 0.4).all()
    assert len(reach.best_iou_of(loaded, at[48], limit=4)[0]) == 4


def test_before_training(dataset, caplog):
    loaded, config = dataset.load(), dataset.config()
    with caplog.at_level(logging.WARNING, "retinanet_keras"):
        inspection.check_before_training(loaded, config)
        assert not caplog.records
        tiny = dataclasses.replace(
            loaded, boxes=np.concatenate([loaded.boxes[:5], [[20, 20, 24, 24]]]).astype("float32")
        )
        inspection.check_before_training(tiny, config)
    (record,) = caplog.records
    assert "1 of 6 boxes that no anchor overlaps by IoU 0.5" in record.getMessage()
    tiny = dataclasses.replace(loaded, boxes=np.tile(np.array([20, 20, 24, 24], np.float32), (6, 1)))
    with pytest.raises(DataError, match="6 of 6 boxes.*no positive anchor.*would reach"):
        inspection.check_before_training(tiny, config)
    without = dataclasses.replace(loaded, boxes=loaded.boxes[:0], labels=loaded.labels[:0], offsets=loaded.offsets * 0)
    with pytest.raises(DataError, match="0 usable boxes in 6 images"):
        inspection.check_before_training(without, config)
    dataset.image(2).unlink()
    with pytest.raises(DataError, match="1 image files that do not exist: .*train_2.jpg"):
        inspection.check_before_training(loaded, config)


def test_generated_images_are_inspected(tmp_path):
    few = {"train_images": 2, "val_images": 1, "test_images": 1, "side": 64}
    data = {"source": "shapes", "dir": str(tmp_path / "shapes"), "shapes": few, "short_side": 320, "max_side": 320}
    report = inspection.inspect(config_from_dict({"data": data | SPLITS}), tmp_path / "out")
    assert report["errors"] == [] and report["splits"]["train"]["images"] == 2


def test_real_photographs(tmp_path):
    if not BCCD.is_dir():
        pytest.skip(f"no {BCCD}")
    loaded = coco.load(BCCD / "annotations/instances_test.json", BCCD / "images")
    config = config_from_dict({"data": {"short_side": 240, "max_side": 320}, "anchors": {"size": 2.0}})
    inspection.check_before_training(loaded, config)
    assert (reach.best_iou_of(loaded, config)[0] >= 0.5).mean() > 0.99
