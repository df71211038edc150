"""What goes wrong in a run: images, annotations, disks, numbers; it is told, and nothing that was done is lost."""

import dataclasses
import json
import resource
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from retinanet_keras import runtime
from retinanet_keras.cli import commands
from retinanet_keras.cli import parser as command_line
from retinanet_keras.data import dataset_formats
from retinanet_keras.errors import DataError, RunError
from retinanet_keras.evaluation import detect
from retinanet_keras.serving import detector
from retinanet_keras.training import callbacks, failures, run
from retinanet_keras.training.batches import Stream, explain_errors
from retinanet_keras.training.resume import Checkpoints, load_run
from retinanet_keras.training.run_folder import RunFolder

pytestmark = pytest.mark.eager


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(tiny_config, data_dir, tmp_path):
    folder = RunFolder(tmp_path / "diverging")
    wild = tiny_config(data_dir, train={"optimizer": "sgd", "learning_rate": 1e20, "warmup": 0, "checkpoint_every": 1})
    with pytest.raises(RunError) as stop:
        run.train(wild, folder.path)
    message = str(stop.value)
    assert "not finite" in message and "step" in message
    newest = tf.train.latest_checkpoint(folder.checkpoints)
    assert newest and newest in message
    reader = tf.train.load_checkpoint(newest)
    values = [reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if "VALUE" in name]
    assert len(values) > 100 and all(np.isfinite(v).all() for v in values if v.dtype.kind == "f")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_step_that_is_not_finite_changes_nothing_and_its_file_reproduces_it(
    tiny_config, data_dir, tmp_path, capsys, norm
):
    """One pixel of the second image is infinite."""
    folder = RunFolder(tmp_path / "run")
    settings = tiny_config(data_dir, model={"norm": norm}, train={"iterations": 3}, eval={"every": 0, "keep": "last"})
    run.train(settings, folder.path)
    stream = Stream(dataset_formats.open_split(settings.data, "train"), settings)
    images, truth = stream.batch(3)
    _, model = load_run(folder.path)
    checkpoints = Checkpoints(model, folder, 3)
    checkpoints.restore()
    before = [variable.numpy() for variable in model.weights]
    images = images.numpy().astype("float32")
    images[1, 5, 5, 0] = np.inf
    stream.batch = lambda step: (images, truth)
    with pytest.raises(RunError, match="not finite in step 4, .* ids (\\d+), (\\d+); .*replay .*step-3") as stop:
        with callbacks.Signals() as signals, explain_errors(stream, checkpoints, signals):
            model.train_on_batch(images, truth)
    ids = truth["image_id"].numpy().tolist()
    assert f"ids {ids[0]}, {ids[1]}" in str(stop.value)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert model.optimizer.iterations == 3
    whole, good, bad = failures.replay(folder.failed / "step-4.npz")
    assert [whole["image_id"], good["image_id"], bad["image_id"]] == ["all", *ids]
    assert not np.isfinite(whole["gradient_norm"])
    assert np.isfinite(good["gradient_norm"]) and not good["not_finite"]
    assert not np.isfinite(bad["gradient_norm"]) and bad["not_finite"]
    assert commands.replay(folder.failed / "step-4.npz") == 1
    assert command_line.work_of_step(folder.failed / "step-4.npz") == runtime.OTHER  # of a small ResNet
    about = {"config": {"model": {"backbone": "resnet50", "width": 64}}}
    np.savez(tmp_path / "r50.npz", about=json.dumps(about))
    assert command_line.work_of_step(tmp_path / "r50.npz") == runtime.LARGE_TRAINING
    assert str(ids[1]) in capsys.readouterr().out
    for content in (b"", (folder.failed / "step-4.npz").read_bytes()[:5000]):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(RunError, match="cut.npz cannot be read .* train.py wrote"):
            next(failures.replay(tmp_path / "cut.npz"))
        assert command_line.work_of_step(tmp_path / "cut.npz") == runtime.OTHER


@pytest.mark.slow
def test_a_truncated_image_stops_with_its_name_and_training_goes_on_when_mended(tiny_config, data_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(data_dir, broken)
    victim = sorted((broken / "images").glob("train_*"))[3]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    folder = RunFolder(tmp_path / "run")
    settings = tiny_config(str(broken), train={"checkpoint_every": 1})
    with pytest.raises((RunError, DataError), match=victim.name):
        run.train(settings, folder.path)
    victim.write_bytes(whole)
    run.train(settings, folder.path)
    assert folder.log_rows()[-1]["step"] == 6


@pytest.mark.slow
def test_unreadable_images_are_skipped_and_counted_where_asked(tiny_config, data_dir, tmp_path, caplog):
    broken = tmp_path / "broken"
    shutil.copytree(data_dir, broken)
    victims = sorted((broken / "images").glob("train_*"))[2:4]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:200])
    settings = tiny_config(
        str(broken), data={"bad_images": "skip"}, train={"iterations": 10}, eval={"every": 0, "keep": "last"}
    )
    run.train(settings, tmp_path / "run")
    assert RunFolder(tmp_path / "run").log_rows()[-1]["step"] == 10
    assert "2 unreadable images were skipped in training" in caplog.text
    assert all(victim.name in caplog.text for victim in victims)


def test_a_folder_that_cannot_be_written_is_told_before_training(tiny_config, data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Choose another folder"):
        run.train(tiny_config(data_dir), tmp_path / "file" / "run")


def test_a_full_disk_leaves_the_checkpoint_before(finished, tmp_path):
    """The system refuses to write more than 10,000 bytes to a file."""
    folder = RunFolder(tmp_path / "full")
    shutil.copytree(finished[0].path, folder.path)
    _, model = load_run(folder.path)
    checkpoints = Checkpoints(model, folder, 3)
    checkpoints.restore()
    checkpoints.step = 7
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"step 7 could not be written \(.*step-6"):
            checkpoints.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Checkpoints(model, folder, 3).restore() == 6


def test_weights_that_are_not_finite_are_not_saved(finished, tmp_path):
    folder = RunFolder(tmp_path / "nan")
    shutil.copytree(finished[0].path, folder.path)
    _, model = load_run(folder.path)
    model.trainable_variables[0].assign(model.trainable_variables[0] * np.nan)
    checkpoints = Checkpoints(model, folder, 3)
    checkpoints.step = 8
    with pytest.raises(RunError, match="At step 8 .*not finite"):
        checkpoints.save()


def test_checkpoints_none_of_which_can_be_read_are_named(finished, tmp_path):
    folder = RunFolder(tmp_path / "damaged")
    shutil.copytree(finished[0].path, folder.path)
    for part in folder.checkpoints.glob("step-*"):
        part.write_bytes(part.read_bytes()[:100])
    settings, _ = load_run(folder.path)
    with pytest.raises(RunError, match="step-6 cannot be read.*step-3 cannot be read.*--workdir"):
        load_run(folder.path, dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, keep="last")))


def changed_annotations(data_dir, folder, split, change):
    """A copy of the dataset in which `change` was called on the tree of one annotation file."""
    shutil.copytree(data_dir, folder)
    file = folder / "annotations" / f"instances_{split}.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    return folder


def test_a_run_of_other_categories_is_not_mixed_in(tiny_config, data_dir, finished, tmp_path):
    def rename(tree):
        tree["categories"][0]["name"] = "mushroom"

    data = data_dir
    for i, split in enumerate(("train", "val")):
        data = changed_annotations(data, tmp_path / f"data{i}", split, rename)
    before = finished[0].categories_file.read_text()
    with pytest.raises(RunError, match="categories were .*'disk'.*now .*'mushroom'"):
        run.train(tiny_config(data), finished[0].path)
    assert finished[0].categories_file.read_text() == before


def test_faults_of_the_validation_split_are_told_before_training(tiny_config, data_dir, tmp_path):
    data = changed_annotations(data_dir, tmp_path / "data", "val", lambda tree: None)
    (data / "images/val_000001.jpg").unlink()
    with pytest.raises(DataError, match="val_000001.jpg"):
        run.train(tiny_config(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluated_image_of_another_size_than_annotated_is_named(tiny_config, data_dir, finished, tmp_path):
    def halve(tree):
        tree["images"][1].update(width=tree["images"][1]["width"] // 2)

    data = changed_annotations(data_dir, tmp_path / "data", "val", halve)
    dataset = dataset_formats.open_split(tiny_config(data).data, "val")
    settings, model = load_run(finished[0].path)
    with pytest.raises(DataError, match=r"val_000001.jpg is \d+x\d+ .* its annotation says"):
        list(detect.detect_split(model, dataset, settings))
    with pytest.raises(DataError, match=r"val_000001.jpg is"):
        list(detect.detect_split_by_export(detector.of_model(model, settings), dataset, settings))


@pytest.mark.slow
def test_training_on_odd_images_and_boxes(tiny_config, tmp_path):
    """One pixel, a ribbon, gray, CMYK, 16 bits; boxes that are inverted, empty, not numbers, or outside."""
    data = tmp_path / "odd"
    (data / "images").mkdir(parents=True)
    (data / "annotations").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), "uint8")
    color = Image.fromarray(pixels)
    pictures = {
        "pixel.png": color.resize((1, 1)), "ribbon.jpg": color.resize((6000, 200)), "gray.jpg": color.convert("L"),
        "cmyk.jpg": color.convert("CMYK"), "deep.png": Image.fromarray(pixels[..., 0].astype("uint16") * 257),
    }  # fmt: skip
    tree = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "thing"}]}
    bad = ([50, 50, -20, 10], [10, 10, 0, 5], [float("nan"), 1, 5, 5], [900, 900, 20, 20])
    for i, (name, picture) in enumerate(pictures.items()):
        picture.save(data / "images" / name)
        width, height = picture.size
        tree["images"].append({"id": i, "file_name": name, "width": width, "height": height})
        good = [width / 4, height / 4, width / 2, height / 2]
        for box in (good, *(bad if name == "gray.jpg" else ())):
            tree["annotations"].append({"id": len(tree["annotations"]), "image_id": i, "category_id": 5, "bbox": box})
    for split in ("train", "val"):
        (data / f"annotations/instances_{split}.json").write_text(json.dumps(tree))
    settings = tiny_config(data, data={"source": "coco"}, train={"iterations": 4}, eval={"every": 0})
    metrics = run.train(settings, tmp_path / "run")
    assert [row["step"] for row in RunFolder(tmp_path / "run").log_rows()] == [2, 4]
    assert metrics["per_class"]["thing"]["ground_truth"] == 8  # all but the one that is no number
    tree["annotations"] = []
    (data / "annotations/instances_train.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="box"):
        run.train(settings, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_there_is_no_run_in_an_empty_folder(tmp_path):
    with pytest.raises(RunError, match="There is no run .* python train.py"):
        load_run(tmp_path)
