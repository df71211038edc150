"""Image files that must not be opened or decoded are refused at every door: named pipes, giants; files of any name."""

import io
import logging
import os
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, PngImagePlugin

from retinanet_keras.config import config_from_dict
from retinanet_keras.data import coco, coco_splits, dataset_formats, image_decoding, inference_batches, training_batches
from retinanet_keras.data.listing import image_files
from retinanet_keras.dataset_check import inspection
from retinanet_keras.dataset_check.image_files import examine_image
from retinanet_keras.errors import DataError

pytestmark = pytest.mark.eager

LIMIT = 64 * 48


def giant(path, width=100_000, height=100_000):
    """A PNG of some bytes that says it has 10 gigapixels: 30 GB."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    path.write_bytes(data)


@pytest.fixture
def made(tmp_path):
    """A function that writes a dataset of images of 64x48 under these names; (its config, its folder of images)."""

    def make(*names, **settings):
        (tmp_path / "images").mkdir()
        (tmp_path / "annotations").mkdir()
        images = [{"id": i + 1, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names)]
        tree = {
            "images": images,
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": i["id"], "image_id": i["id"], "category_id": 1, "bbox": [8, 8, 32, 32]}
                            for i in images],
        }  # fmt: skip
        for i, name in enumerate(names):
            buffer = io.BytesIO()
            Image.new("RGB", (64, 48), (i, i, i)).save(buffer, "PNG")
            with open(os.path.join(os.fsencode(tmp_path / "images"), os.fsencode(name)), "wb") as file:
                file.write(buffer.getvalue())
        for split in ("train", "val"):
            coco_splits.write(tmp_path / f"annotations/instances_{split}.json", *map(tree.get, tree_keys))
        data = {"source": "coco", "dir": str(tmp_path), "short_side": 48, "max_side": 64, "train_split": "train",
                "val_split": "val", **settings}  # fmt: skip
        return config_from_dict({"data": data}), tmp_path / "images"

    tree_keys = ("images", "annotations", "categories")
    return make


def test_a_named_pipe_is_refused_before_it_is_opened(made):
    config, images = made("a.png", "b.png")
    (images / "b.png").unlink()
    os.mkfifo(images / "b.png")
    dataset = dataset_formats.open_split(config.data, "train")
    for check in (lambda: inspection.check_before_training(dataset, config), lambda: inspection.check_files(dataset)):
        with pytest.raises(DataError, match="1 images that are not regular files: .*b.png"):
            check()
    for read in (
        lambda: image_decoding.image_of(dataset, 1),
        lambda: image_decoding.read_image(images / "b.png", LIMIT),
    ):
        with pytest.raises(DataError, match="b.png cannot be read as an image: it is not a regular file"):
            read()


def test_inspect_tells_of_a_named_pipe(made, tmp_path):
    config, images = made("a.png", "b.png")
    (images / "b.png").unlink()
    os.mkfifo(images / "b.png")
    report = inspection.inspect(config, tmp_path / "out")
    assert any("b.png cannot be read as an image: it is not a regular file" in line for line in report["errors"])


def test_a_command_line_takes_regular_files_alone(tmp_path, caplog):
    (tmp_path / "a.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "c.png").touch()
    os.mkfifo(tmp_path / "b.png")
    with caplog.at_level(logging.WARNING, "retinanet_keras"):
        found = image_files([tmp_path])
    assert found == [(tmp_path / "a.png", "a.png"), (tmp_path / "folder.png" / "c.png", "folder.png/c.png")]
    assert "skipped 1 paths that are not regular files, such as" in caplog.text and "b.png" in caplog.text
    with pytest.raises(DataError, match="b.png is not a regular file"):
        image_files([tmp_path / "b.png"])
    with pytest.raises(DataError, match="/dev/zero is not a regular file"):
        image_files(["/dev/zero"])


def test_a_giant_is_refused_by_its_header_wherever_it_is_read(made):
    config, images = made("a.png", "b.png", max_pixels=LIMIT)
    dataset = dataset_formats.open_split(config.data, "train")
    inspection.check_before_training(dataset, config)
    assert image_decoding.image_of(dataset, 1).shape == (48, 64, 3)  # of as many pixels as are allowed
    giant(images / "b.png")
    words = r"b.png has 10,000,000,000 pixels by its header, more than data.max_pixels, 3,072\. Make it smaller"
    with pytest.raises(DataError, match=words):
        image_decoding.image_of(dataset, 1)
    with pytest.raises(DataError, match=words):
        image_decoding.read_image(images / "b.png", LIMIT)
    assert len(image_decoding.unusable_images(dataset, [0, 1])) == 1
    plan = inference_batches.inference_plan(dataset.sizes, 2)
    for batches in (
        training_batches.training_batches(dataset, config.data, batch_size=2, seed=0),
        inference_batches.inference_batches(dataset, plan, config.data),
        inference_batches.inference_batches(dataset.subset([1]), [np.array([0])]),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="expected an image of at most"):
            next(iter(batches))


def test_inspect_decodes_no_image_that_is_too_large_by_its_header(made, monkeypatch):
    config, images = made("a.png", "b.png", max_pixels=LIMIT)
    dataset, loaded, load = dataset_formats.open_split(config.data, "train"), [], PngImagePlugin.PngImageFile.load
    Image.new("RGB", (64, 49)).save(images / "b.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: loaded.append(self.size) or load(self))
    files = [examine_image(dataset, i) for i in (0, 1)]
    assert loaded == [(64, 48)] and "3,136 pixels by its header" in files[1].problem
    assert [file.mode for file in files] == ["RGB", "RGB"]


def test_inspect_leaves_other_formats_and_damaged_files_to_the_decoder_and_hides_no_other_error(made, monkeypatch):
    config, images = made("a.png", "b.png", "c.png")
    dataset = dataset_formats.open_split(config.data, "train")
    Image.new("RGB", (64, 48)).save(images / "a.png", "TIFF")
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:40])
    for file in (examine_image(dataset, 0), examine_image(dataset, 1)):
        assert file.mode == "unknown" and "cannot be read as an image" in file.problem

    def fail(*_):
        raise AttributeError("of the check")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "getexif", fail)
    with pytest.raises(AttributeError, match="of the check"):
        examine_image(dataset, 2)


def test_images_that_are_too_large_by_their_annotations_stop_at_once(made):
    config, _ = made("a.png", "b.png", max_pixels=LIMIT - 1)
    dataset = dataset_formats.open_split(config.data, "train")
    for check in (lambda: inspection.check_before_training(dataset, config), lambda: inspection.check_files(dataset)):
        with pytest.raises(DataError, match=r"2 images of more than data.max_pixels, 3,071: .*a.png has 3,072"):
            check()


def test_the_limit_of_training_is_that_of_exports_unless_one_is_changed():
    config = config_from_dict({"data": {"max_pixels": 5}})
    assert config.data.max_pixels == 5 and config.serving.max_pixels == config_from_dict({}).data.max_pixels


# Names


NAMES = ["\udcff\udcfe.png", "\x1b[31m.png", "a" * 251 + ".png", "ß\u202e.png"]


def test_files_of_any_name_are_read(made):
    config, _ = made(*NAMES)
    dataset = dataset_formats.open_split(config.data, "train")
    inspection.check_before_training(dataset, config)
    (batch,) = inference_batches.inference_batches(dataset, [np.arange(4)], config.data)
    assert batch[0][:, 0, 0, 0].numpy().tolist() == [0, 1, 2, 3]


def test_names_that_no_disk_has_are_told(made):
    config, images = made("a.png")
    text = (images.parent / "annotations/instances_train.json").read_text()
    for name, shown in (("b" * 300, "bbb"), (r"half \ud800", r"half \\ud800"), (r"null \u0000", r"null \\x00")):
        (images.parent / "annotations/instances_train.json").write_text(text.replace("a.png", name))
        dataset = dataset_formats.open_split(config.data, "train")
        with pytest.raises(DataError, match=f"1 image files that do not exist: .*{shown}"):
            inspection.check_before_training(dataset, config)
        with pytest.raises(DataError, match="cannot be read as an image"):
            image_decoding.image_of(dataset, 0)


def test_what_a_check_says_of_names_is_text(made, capsys):
    config, images = made(*NAMES)
    os.remove(os.path.join(os.fsencode(images), b"\xff\xfe.png"))
    report = images.parent / "annotations/instances_train.json"
    report.write_text(report.read_text().replace('"cat"', r'"cat \u001b[31m' + "x" * 100_000 + '"'))
    inspection.inspect(config, images.parent / "out")
    written = (images.parent / "out/report.txt").read_text(encoding="utf-8")
    for text in (written, capsys.readouterr().out):
        assert "\x1b" not in text and r"\xff\xfe.png" in text and r"cat \x1b[31m" in text and len(text) < 5000
    assert isinstance(coco.read(report), dict)
