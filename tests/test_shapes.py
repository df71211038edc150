"""The generated dataset: deterministic, learnable, and never written over anything."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from retinanet_keras.config import ShapesConfig
from retinanet_keras.data import coco, shapes
from retinanet_keras.errors import DataError

SMALL = ShapesConfig(train_images=20, val_images=3, test_images=2, side=128, seed=5)

DEFAULT_LABELS = [4, 1]
DEFAULT_BOXES = [[128.74, 60.54, 304.84, 236.64], [8.47, 245.37, 57.89, 301.22]]


@pytest.fixture(scope="module")
def rendered():
    return [shapes.render(0, "train", i, 320) for i in range(200)]


def test_an_image_is_a_function_of_its_name():
    one, other = (shapes.render(3, "val", 7, 160) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    for seed, split, index in ((4, "val", 7), (3, "train", 7), (3, "val", 8)):
        different = shapes.render(seed, split, index, 160)[0]
        assert different.shape != one[0].shape or (different != one[0]).mean() > 0.5


def test_every_tenth_image_is_empty_and_no_other(rendered):
    assert [i for i, (_, boxes, _) in enumerate(rendered) if not len(boxes)] == list(range(9, 200, 10))
    assert 8 <= max(len(boxes) for _, boxes, _ in rendered) <= 12


def test_images_differ_in_shape_and_orientation(rendered):
    sizes = {image.shape for image, *_ in rendered}
    assert sizes == {(320, side, 3) for side in (224, 256, 288, 320)} | {(side, 320, 3) for side in (224, 256, 288)}
    assert all(image.dtype == np.uint8 for image, *_ in rendered)


def test_boxes(rendered):
    sides = []
    for image, boxes, labels in rendered:
        height, width = image.shape[:2]
        assert boxes.shape == (len(labels), 4)
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        sides += (boxes[:, 2:] - boxes[:, :2]).max(axis=1).tolist()
    logs = np.log(sides)
    assert min(sides) >= 25 * 0.6 and max(sides) <= 260 and max(sides) / min(sides) >= 10
    share = np.histogram(logs, np.log([15, 45, 80, 145, 261]))[0] / len(sides)
    assert (share > 0.12).all()  # log-uniform would be a quarter each, but the large find less room
    counts = np.bincount(np.concatenate([labels for *_, labels in rendered]), minlength=len(shapes.NAMES))
    assert len(counts) == len(shapes.NAMES) >= 5 and (counts > 0.5 * counts.mean()).all()


def test_no_object_is_hidden(rendered):
    for _, boxes, _ in rendered:
        for i, box in enumerate(boxes):  # later boxes lie over earlier ones
            corners = np.minimum(boxes[i + 1 :, 2:], box[2:]) - np.maximum(boxes[i + 1 :, :2], box[:2])
            assert np.maximum(corners, 0).prod(axis=1).sum() <= 0.4 * (box[2:] - box[:2]).prod() + 1e-6


def test_the_numbers_of_the_default_pictures_stay():
    """Folders that were generated before serve on: the defaults draw what they drew, here by the boxes alone."""
    _, boxes, labels = shapes.render(0, "train", 0, 320)
    assert labels.tolist() == DEFAULT_LABELS
    np.testing.assert_allclose(boxes, DEFAULT_BOXES, atol=0.01)


def test_small_rare_objects_in_clutter():
    """Rare and small as asked; what lies around them makes the image, and none of it is labeled."""
    hard = {"objects": 2, "size": (0.07, 0.25), "clutter": 30}
    rendered = [shapes.render(0, "train", i, 192, **hard) for i in range(60)]
    counts = [len(boxes) for _, boxes, _ in rendered]
    assert set(counts) == {0, 1, 2} and counts.count(0) == 6
    sides = np.concatenate([(boxes[:, 2:] - boxes[:, :2]).max(axis=1) for _, boxes, _ in rendered])
    assert 0.6 * 0.07 * 192 <= sides.min() and 0.2 * 192 < sides.max() <= 0.25 * 192 + 1e-6

    def change(clutter):  # from pixel to pixel
        pictures = [shapes.render(0, "train", i, 192, **{**hard, "clutter": clutter})[0] for i in range(20)]
        return np.mean([np.abs(np.diff(pixels.astype(int), axis=1)).mean() for pixels in pictures])

    assert change(30) > 1.2 * change(1)


@pytest.mark.parametrize("kind", shapes.NAMES + shapes.DISTRACTORS)
def test_boxes_are_tight(kind):
    """Painted on a flat ground, the changed pixels span the box."""
    rng = np.random.default_rng(1)
    for angle in (0.0, 0.5, 2.5):
        contours, stroke = shapes._outline(rng, kind)
        contours = shapes._sized(contours, stroke, 90.0, angle)
        low, high = contours[0].min(axis=0), contours[0].max(axis=0)
        assert (high - low).max() + stroke * 90 == pytest.approx(90)
        np.testing.assert_allclose(low, -high, atol=1e-9)
        shift = np.array([60.3, 70.6])
        box = np.concatenate([low + shift - stroke * 45, high + shift + stroke * 45])
        pixels = np.full([150, 150, 3], 127, np.float32)
        shapes._paint(rng, pixels, [c + shift for c in contours], stroke * 90, box, 90.0, "plain", 0.3)
        y, x = np.nonzero((np.abs(pixels - 127) > 5).any(axis=2))
        painted = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
        if kind in shapes.NAMES:  # the box of a stroke has room for its ends
            np.testing.assert_allclose(painted, box, atol=1.5)
        assert (painted[:2] >= np.floor(box[:2])).all() and (painted[2:] <= np.ceil(box[2:])).all()


def test_generate_writes_a_dataset_that_loads(tmp_path):
    folder = tmp_path / "data" / "shapes"
    shapes.generate(folder, SMALL)
    assert sorted(p.name for p in folder.iterdir()) == ["annotations", "images", "shapes.json"]
    assert [p.name for p in folder.parent.iterdir()] == ["shapes"]  # nothing partial is left
    for split, count in (("train", 20), ("val", 3), ("test", 2)):
        file = folder / "annotations" / f"instances_{split}.json"
        dataset = coco.load(file, folder / "images")
        assert len(dataset) == count and coco.unusable_files(dataset) == ([], []) and dataset.dropped == {}
        assert dataset.categories.names == shapes.NAMES
        for i in range(count):
            _, boxes, labels = shapes.render(SMALL.seed, split, i, SMALL.side)
            np.testing.assert_allclose(dataset.boxes_of(i), boxes, atol=0.011)
            np.testing.assert_array_equal(dataset.labels_of(i), labels)
            with Image.open(dataset.files[i]) as image:
                assert image.size == tuple(dataset.sizes[i][::-1]) and image.format == "JPEG"
        for annotation in json.loads(file.read_text())["annotations"]:
            assert annotation["area"] == pytest.approx(annotation["bbox"][2] * annotation["bbox"][3], abs=0.01)


def test_generate_once(tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()  # an empty folder is as good as none
    config = ShapesConfig(train_images=1, val_images=1, test_images=1, side=64)
    shapes.generate(folder, config)
    mark = folder / "images" / "train_000000.jpg"
    mark.write_text("changed")
    shapes.generate(folder, config)
    assert mark.read_text() == "changed"
    other = ShapesConfig(train_images=1, val_images=1, test_images=1, side=64, seed=9)
    with pytest.raises(DataError, match="seed is 0 there and 9 in this configuration.*data.dir"):
        shapes.generate(folder, other)
    assert mark.read_text() == "changed"


def test_a_folder_older_than_a_setting_serves_where_that_is_the_default(tmp_path):
    config = ShapesConfig(train_images=1, val_images=1, test_images=1, side=64)
    shapes.generate(tmp_path, config)
    stamp = json.loads((tmp_path / "shapes.json").read_text())
    (tmp_path / "shapes.json").write_text(json.dumps({k: v for k, v in stamp.items() if k not in ("objects", "size")}))
    shapes.generate(tmp_path, config)
    for changed in ({"objects": 2}, {"size": (0.1, 0.2)}, {"clutter": 9}):
        with pytest.raises(DataError, match="generated with other settings"):
            shapes.generate(tmp_path, dataclasses.replace(config, **changed))


def test_generate_leaves_other_folders_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="holds files other than.*data.dir"):
        shapes.generate(tmp_path, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(DataError, match="is a file"):
        shapes.generate(tmp_path / "mine.txt", SMALL)


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(tmp_path / "shapes", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_same_images_for_any_number_of_images(tmp_path):
    for name, count in (("few", 2), ("more", 4)):
        shapes.generate(tmp_path / name, ShapesConfig(train_images=count, val_images=1, test_images=1, side=64))
    for i in range(2):
        few, more = ((tmp_path / name / "images" / f"train_{i:06d}.jpg").read_bytes() for name in ("few", "more"))
        assert few == more
