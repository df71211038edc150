"""A whole run in miniature: what it leaves behind, how it goes on after a kill, and what it refuses."""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from retinanet_keras import backbone as backbones
from retinanet_keras import commands, losses, pretrained
from retinanet_keras.config import MiningConfig, config_from_dict
from retinanet_keras.data import sources
from retinanet_keras.data.coco import Categories, DataError
from retinanet_keras.errors import Interrupted
from retinanet_keras.results.evaluation import METRICS
from retinanet_keras.serving import detector
from retinanet_keras.training import callbacks, evaluator, replay, run
from retinanet_keras.training.checkpoints import Checkpoints, load_run
from retinanet_keras.training.folder import RunError, RunFolder, build_model
from retinanet_keras.training.stream import Stream, explained


def weights_and_slots(folder):
    """All that training goes on from, as NumPy."""
    settings, model = load_run(folder.path, config_from_dict(json.loads(folder.config_file.read_text())))
    Checkpoints(model, folder, 3).restore()
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def test_a_run_leaves_what_it_promises(finished):
    folder, metrics = finished
    assert config_from_dict(json.loads(folder.config_file.read_text())).train.iterations == 6
    assert set(METRICS) < set(metrics) and set(metrics["per_class"]) == set(folder.categories().names)
    assert json.loads((folder.evaluation("val") / "metrics.json").read_text()) == metrics
    assert isinstance(json.loads((folder.evaluation("val") / "results.json").read_text()), list)
    assert len(list((folder.evaluation("val") / "pictures").glob("*.jpg"))) == 2
    assert (folder.evaluation("val") / "pictures/grid.png").stat().st_size > 1000
    assert folder.curves_file.exists() and list(folder.tensorboard.iterdir())
    assert (folder.export / "1/saved_model.pb").exists()
    rows = folder.log_rows()
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "AP" in row] == [3, 6]
    for row in (row for row in rows if "loss" in row):
        assert row["loss"] > 0 and row["images_per_second"] > 0 and row["gradient_norm"] > 0 and row["positives"] > 0
        assert 0 <= row["data_wait"] <= 1
    assert {p.name for p in folder.checkpoints.glob("step-*.index")} == {"step-3.index", "step-4.index", "step-6.index"}


def test_the_export_of_a_run_finds_what_the_run_finds(finished):
    folder, _ = finished
    settings, model = load_run(folder.path)
    export, categories = detector.of_export(folder.export / "1")
    own = detector.of_model(model, settings)
    assert categories == folder.categories()
    image = np.random.default_rng(0).integers(0, 256, (1, 70, 90, 3), "uint8")
    assert own(image)["num_detections"] == [100]
    for name, value in own(image).items():
        if name != "names":
            np.testing.assert_allclose(export(image)[name], value, atol=1e-4)


def test_a_killed_run_goes_on_to_the_same_end(tiny_config, data_dir, finished, tmp_path, monkeypatch, capsys):
    folder = RunFolder(tmp_path / "killed")
    seen = callbacks.Log.on_train_batch_end

    def kill_at_five(self, batch, logs=None):
        if self.model.optimizer.iterations == 5:  # a step after the checkpoint of step 4
            raise MemoryError("killed")
        seen(self, batch, logs)

    monkeypatch.setattr(callbacks.Log, "on_train_batch_end", kill_at_five)
    with pytest.raises(MemoryError):
        run.train(tiny_config(data_dir), folder.path)
    monkeypatch.undo()
    with open(folder.log_file, "a") as file:
        file.write("5,9,9,9,9,9,9,9,9,,\n6,0.5,1.2e-")  # a row of the step that was lost, and one cut off
    run.train(tiny_config(data_dir), folder.path)
    assert "Going on from step 4 of 6" in capsys.readouterr().out
    for ours, theirs in zip(weights_and_slots(folder), weights_and_slots(finished[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [row["step"] for row in folder.log_rows() if "loss" in row] == [2, 4, 6]


def test_a_finished_run_is_not_trained_again_but_may_be_prolonged(tiny_config, data_dir, finished, tmp_path):
    folder = RunFolder(tmp_path / "longer")
    shutil.copytree(finished[0].path, folder.path)
    before = weights_and_slots(folder)
    run.train(tiny_config(data_dir), folder.path)
    for ours, theirs in zip(weights_and_slots(folder), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    run.train(tiny_config(data_dir, train={"iterations": 7}), folder.path)
    assert folder.log_rows()[-1]["step"] == 7


def test_a_run_of_other_settings_is_not_mixed_in(tiny_config, data_dir, finished):
    before = finished[0].config_file.read_text()
    with pytest.raises(RunError, match=r"model.prior was 0.01, now 0.1; train.seed was 0, now 1"):
        run.train(tiny_config(data_dir, train={"seed": 1}, model={"prior": 0.1}), finished[0].path)
    assert finished[0].config_file.read_text() == before


def test_what_may_change_between_starts_is_told(tiny_config, data_dir, finished, tmp_path, capsys):
    folder = RunFolder(tmp_path / "changed")
    shutil.copytree(finished[0].path, folder.path)
    changed = tiny_config(data_dir, train={"learning_rate": 0.0001}, eval={"every": 0})
    folder.start(changed, folder.categories())
    told = "Changed since the last start: train.learning_rate was 0.001, now 0.0001; eval.every was 3, now 0"
    assert told in capsys.readouterr().out
    assert config_from_dict(json.loads(folder.config_file.read_text())) == changed


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(tiny_config, data_dir, tmp_path):
    folder = RunFolder(tmp_path / "diverging")
    wild = tiny_config(data_dir, train={"optimizer": "sgd", "learning_rate": 1e20, "warmup": 0, "checkpoint_every": 1})
    with pytest.raises(RunError) as stop:
        run.train(wild, folder.path)
    message = str(stop.value)
    assert "not finite" in message and "step" in message
    manager = tf.train.latest_checkpoint(folder.checkpoints)
    if manager:
        assert manager in message
        reader = tf.train.load_checkpoint(manager)
        values = [reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if "VALUE" in name]
        assert all(np.isfinite(v).all() for v in values if v.dtype.kind == "f")


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_step_that_is_not_finite_changes_nothing_and_its_file_reproduces_it(
    tiny_config, data_dir, tmp_path, capsys, norm
):
    """One pixel of the second image is infinite."""
    folder = RunFolder(tmp_path / "run")
    settings = tiny_config(data_dir, model={"norm": norm}, train={"iterations": 3}, eval={"every": 0, "keep": "last"})
    run.train(settings, folder.path)
    stream = Stream(sources.open_split(settings.data, "train"), settings)
    images, truth = stream.batch(3)
    _, model = load_run(folder.path)
    checkpoints = Checkpoints(model, folder, 3)
    checkpoints.restore()
    before = [variable.numpy() for variable in model.weights]
    images = images.numpy().astype("float32")
    images[1, 5, 5, 0] = np.inf
    stream.batch = lambda step: (images, truth)
    with pytest.raises(RunError, match="not finite in step 4, .* ids (\\d+), (\\d+); .*replay .*step-3") as stop:
        with callbacks.Signals() as signals, explained(stream, model, settings, folder, checkpoints, signals):
            model.train_on_batch(images, truth)
    ids = truth["image_id"].numpy().tolist()
    assert f"ids {ids[0]}, {ids[1]}" in str(stop.value)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert model.optimizer.iterations == 3
    whole, good, bad = replay.replay(folder.failed / "step-4.npz")
    assert [whole["image_id"], good["image_id"], bad["image_id"]] == ["all", *ids]
    assert not np.isfinite(whole["gradient_norm"])
    assert np.isfinite(good["gradient_norm"]) and not good["not_finite"]
    assert not np.isfinite(bad["gradient_norm"]) and bad["not_finite"]
    assert commands.replay(folder.failed / "step-4.npz") == 1
    assert str(ids[1]) in capsys.readouterr().out
    for content in (b"", (folder.failed / "step-4.npz").read_bytes()[:5000]):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(RunError, match="cut.npz cannot be read .* train.py wrote"):
            next(replay.replay(tmp_path / "cut.npz"))


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


def test_unreadable_images_are_left_out_and_counted_where_asked(tiny_config, data_dir, tmp_path, caplog):
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
    assert "2 unreadable images were left out of training" in caplog.text
    assert all(victim.name in caplog.text for victim in victims)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on(
    tiny_config, data_dir, finished, tmp_path, monkeypatch, capsys, number
):
    folder = RunFolder(tmp_path / "stopped")
    count = callbacks.Count.on_train_batch_end

    def send_at_five(self, batch, logs=None):
        count(self, batch, logs)
        if self.checkpoints.step == 5:  # no step that would be saved otherwise
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr(callbacks.Count, "on_train_batch_end", send_at_five)
    with pytest.raises(Interrupted, match="saved at step 5.* goes on from there") as stop:
        run.train(tiny_config(data_dir), folder.path)
    monkeypatch.undo()
    assert stop.value.status == 128 + number and signal.getsignal(number) is before
    assert (folder.checkpoints / "step-5.index").exists()
    run.train(tiny_config(data_dir), folder.path)
    assert "Going on from step 5 of 6" in capsys.readouterr().out
    for ours, theirs in zip(weights_and_slots(folder), weights_and_slots(finished[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_signal_outside_of_steps_and_a_second_one_end_at_once():
    with callbacks.Signals() as signals:
        with pytest.raises(Interrupted, match="what was written before is whole"):
            signal.raise_signal(signal.SIGTERM)
        with signals.steps():
            signal.raise_signal(signal.SIGINT)
            assert signals.received == signal.SIGINT
            with pytest.raises(Interrupted):
                signal.raise_signal(signal.SIGINT)


def test_a_float16_run_counts_the_steps_its_optimizer_leaves_out(tiny_config, data_dir, tmp_path):
    """The first gradients overflow at a scale of 2^15 times as much, made here; the images go on regardless."""
    folder = RunFolder(tmp_path / "run")
    settings = tiny_config(
        data_dir, model={"norm": "group"}, train={"precision": "mixed_float16", "iterations": 4, "checkpoint_every": 2},
        eval={"every": 0, "keep": "last"},
    )  # fmt: skip
    categories = sources.open_split(settings.data, "train").categories
    folder.start(settings, categories)
    model = build_model(settings, categories)
    checkpoints = Checkpoints(model, folder, 3)
    model.optimizer.dynamic_scale.assign(2.0**60)
    checkpoints.save()
    run.train(settings, folder.path)
    again = Checkpoints(load_run(folder.path)[1], folder, 3)
    assert again.restore() == 4 and again.model.optimizer.iterations < 4
    assert float(again.model.optimizer.dynamic_scale) < 2.0**60


def test_a_folder_that_cannot_be_written_is_told_before_training(tiny_config, data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Choose another folder"):
        run.train(tiny_config(data_dir), tmp_path / "file" / "run")


def test_a_failing_disk_leaves_the_checkpoint_before(data_dir, finished, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "full")
    shutil.copytree(finished[0].path, folder.path)
    _, model = load_run(folder.path)
    checkpoints = Checkpoints(model, folder, 3)
    checkpoints.restore()
    checkpoints.step = 7

    def no_space(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(checkpoints.manager, "save", no_space)
    with pytest.raises(RunError, match=r"step 7 could not be written \(No space left.*step-6"):
        checkpoints.save()
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


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny_config, data_dir, finished, tmp_path, caplog):
    folder = RunFolder(tmp_path / "damaged")
    shutil.copytree(finished[0].path, folder.path)
    for part in folder.checkpoints.glob("step-6.*"):
        part.write_bytes(part.read_bytes()[:100])
    run.train(tiny_config(data_dir), folder.path)
    assert "step-6 cannot be read" in caplog.text and "going on from the checkpoint before it" in caplog.text
    for ours, theirs in zip(weights_and_slots(folder), weights_and_slots(finished[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # and step 6 was written again


def test_checkpoints_none_of_which_can_be_read_are_named(finished, tmp_path):
    folder = RunFolder(tmp_path / "damaged")
    shutil.copytree(finished[0].path, folder.path)
    for part in folder.checkpoints.glob("step-*"):
        part.write_bytes(part.read_bytes()[:100])
    settings, _ = load_run(folder.path)
    with pytest.raises(RunError, match="step-6 cannot be read.*step-3 cannot be read.*--workdir"):
        load_run(folder.path, dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, keep="last")))


def test_an_evaluation_that_was_missed_is_made_up(tiny_config, data_dir, finished, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "missed")

    def kill(*_):
        raise MemoryError("killed")

    monkeypatch.setattr(run, "_validate", kill)
    with pytest.raises(MemoryError):
        run.train(tiny_config(data_dir), folder.path)
    monkeypatch.undo()
    run.train(tiny_config(data_dir), folder.path)
    assert [row["step"] for row in folder.log_rows() if "AP" in row] == [3, 6]


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
    dataset = sources.open_split(tiny_config(data).data, "val")
    settings, model = load_run(finished[0].path)
    with pytest.raises(DataError, match=r"val_000001.jpg is \d+x\d+ .* its annotation says"):
        list(evaluator.detect_split(model.detect, dataset, settings))
    with pytest.raises(DataError, match=r"val_000001.jpg is"):
        list(evaluator.detect_split_one_by_one(detector.of_model(model, settings), dataset))


def test_training_on_odd_images_and_boxes(tiny_config, tmp_path):
    """One pixel, a ribbon, grey, CMYK, 16 bits; boxes that are inverted, empty, not numbers, or outside."""
    data = tmp_path / "odd"
    (data / "images").mkdir(parents=True)
    (data / "annotations").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), "uint8")
    colour = Image.fromarray(pixels)
    pictures = {
        "pixel.png": colour.resize((1, 1)), "ribbon.jpg": colour.resize((6000, 200)), "grey.jpg": colour.convert("L"),
        "cmyk.jpg": colour.convert("CMYK"), "deep.png": Image.fromarray(pixels[..., 0].astype("uint16") * 257),
    }  # fmt: skip
    tree = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "thing"}]}
    bad = ([50, 50, -20, 10], [10, 10, 0, 5], [float("nan"), 1, 5, 5], [900, 900, 20, 20])
    for i, (name, picture) in enumerate(pictures.items()):
        picture.save(data / "images" / name)
        width, height = picture.size
        tree["images"].append({"id": i, "file_name": name, "width": width, "height": height})
        good = [width / 4, height / 4, width / 2, height / 2]
        for box in (good, *(bad if name == "grey.jpg" else ())):
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


def test_a_run_keeps_the_pixel_mean_of_its_weights(tiny_config, data_dir, tmp_path):
    """And trains with another loss on mined anchors."""
    pretrained.save(backbones.resnet("resnet18", width=8, norm="batch"), tmp_path / "b.weights.h5", (100, 110, 120))
    config = tiny_config(
        data_dir, model={"weights": str(tmp_path / "b.weights.h5")}, loss={"kind": "cross_entropy", "alpha": None},
        mining={"batch_size": 16, "ratio": 3}, train={"iterations": 2}, eval={"every": 0, "keep": "last"},
    )  # fmt: skip
    run.train(config, tmp_path / "run")
    (tmp_path / "b.weights.h5").unlink()
    again, model = load_run(tmp_path / "run")
    assert model.pixel_mean == again.model.pixel_mean == (100, 110, 120)
    assert isinstance(model.classification_loss, losses.CrossEntropyLoss)
    assert model.mining == MiningConfig(batch_size=16, nms_iou=0.5, ratio=3)


@pytest.mark.parametrize("settings, expected", [
    ({}, losses.FocalLoss(0.25, 2.0)),
    ({"kind": "focal", "alpha": None, "gamma": 0.5}, losses.FocalLoss(None, 0.5)),
    ({"kind": "cross_entropy", "alpha": 0.75}, losses.CrossEntropyLoss(0.75)),
    ({"kind": "focal_star", "gamma": 4, "star_beta": 0.0}, losses.FocalStarLoss(0.25, 4.0, 0.0)),
    ({"kind": "hinge", "alpha": None, "hinge_threshold": 0.7}, losses.HingeLoss(None, 0.7)),
])  # fmt: skip
def test_the_loss_of_a_configuration(tiny_config, tmp_path, settings, expected):
    categories = Categories.from_list([{"label": 0, "id": 1, "name": "a"}])
    model = build_model(tiny_config(tmp_path, loss=settings), categories)
    assert type(model.classification_loss) is type(expected)
    assert model.classification_loss.get_config() == expected.get_config()
    assert model.mining is None
