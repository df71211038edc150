"""A whole run in miniature: the files it writes, how it resumes after a kill, and what it rejects."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from retinanet_keras import backbone as backbones
from retinanet_keras import losses
from retinanet_keras.config import MiningConfig, config_from_dict
from retinanet_keras.data import dataset_formats
from retinanet_keras.data.coco import Categories
from retinanet_keras.errors import Interrupted, RunError
from retinanet_keras.evaluation.coco_metrics import METRICS
from retinanet_keras.serving import detector
from retinanet_keras.training import callbacks, run
from retinanet_keras.training.build import build_model
from retinanet_keras.training.resume import Checkpoints, load_run
from retinanet_keras.training.run_folder import RunFolder
from retinanet_keras.weights import imagenet


def weights_and_slots(folder):
    """Everything that training resumes from, as NumPy."""
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

    config = tiny_config(data_dir, eval={"every": 0, "keep": "last"})
    monkeypatch.setattr(run, "_finish", lambda *_: None)  # evaluation and export are not what is compared
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(callbacks.Log, "on_train_batch_end", kill_at_five)
        run.train(config, folder.path)
    with open(folder.log_file, "a") as file:
        file.write("5,9,9,9,9,9,9,9,9,,\n6,0.5,1.2e-")  # a row of the step that was lost, and one cut off
    run.train(config, folder.path)
    assert "Resuming from step 4 of 6" in capsys.readouterr().out
    for ours, theirs in zip(weights_and_slots(folder), weights_and_slots(finished[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [row["step"] for row in folder.log_rows() if "loss" in row] == [2, 4, 6]


@pytest.mark.slow
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


def test_the_time_left_is_estimated_from_steps_alone(tiny_config, data_dir, tmp_path):
    """Not from tracing nor from an evaluation, made half a second long each here."""
    checkpoints = types.SimpleNamespace(step=0)
    start = time.perf_counter()
    log = callbacks.Log(RunFolder(tmp_path), tiny_config(data_dir), checkpoints)
    log.set_model(types.SimpleNamespace(optimizer=types.SimpleNamespace(learning_rate=0.1)))
    for _ in range(2):
        log.on_train_begin()
        time.sleep(0.5)
        for step in range(2):
            log.on_train_batch_begin(step)
            checkpoints.step += 1
            log.on_train_batch_end(step, dict.fromkeys(
                ("loss", "classification_loss", "box_loss", "positives", "gradient_norm"), 1.0
            ))  # fmt: skip
        log.on_train_end()
    assert log.bar.n == 4
    assert log.bar.format_dict["elapsed"] <= time.perf_counter() - start - 1.0
    log.close()


@pytest.mark.slow
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
    with pytest.raises(Interrupted, match="saved at step 5.* resume from there") as stop:
        run.train(tiny_config(data_dir), folder.path)
    monkeypatch.undo()
    assert stop.value.status == 128 + number and signal.getsignal(number) is before
    assert (folder.checkpoints / "step-5.index").exists()
    run.train(tiny_config(data_dir), folder.path)
    assert "Resuming from step 5 of 6" in capsys.readouterr().out
    for ours, theirs in zip(weights_and_slots(folder), weights_and_slots(finished[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_signal_outside_of_steps_and_a_second_one_end_at_once():
    with callbacks.Signals() as signals:
        with pytest.raises(Interrupted, match="files already written are complete"):
            signal.raise_signal(signal.SIGTERM)
        with signals.steps():
            signal.raise_signal(signal.SIGINT)
            assert signals.received == signal.SIGINT
            with pytest.raises(Interrupted):
                signal.raise_signal(signal.SIGINT)


HANGING = """
import sys
import tensorflow as tf
from retinanet_keras.training.callbacks import Signals

with Signals() as signals, signals.steps():
    signals.saved = lambda: "the last checkpoint is step-4"
    print("reading", flush=True)
    next(iter(tf.data.Dataset.from_tensors(sys.argv[1]).map(tf.io.read_file)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_whose_read_hangs(tmp_path, number):
    """A named pipe that nobody writes to, as a file on a network disk that is gone."""
    os.mkfifo(tmp_path / "image.jpg")
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, tmp_path / "image.jpg"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "reading\n"
    time.sleep(1)
    process.send_signal(number)
    while "again to stop at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert f"{signal.Signals(number).name}: the last checkpoint is step-4" in said


@pytest.mark.slow
def test_a_float16_run_counts_the_steps_its_optimizer_leaves_out(tiny_config, data_dir, tmp_path):
    """The first gradients overflow at a scale of 2^15 times as much, made here; the images go on regardless."""
    folder = RunFolder(tmp_path / "run")
    settings = tiny_config(
        data_dir, model={"norm": "group"}, train={"precision": "mixed_float16", "iterations": 4, "checkpoint_every": 2},
        eval={"every": 0, "keep": "last"},
    )  # fmt: skip
    categories = dataset_formats.open_split(settings.data, "train").categories
    folder.start(settings, categories)
    model = build_model(settings, categories)
    checkpoints = Checkpoints(model, folder, 3)
    model.optimizer.dynamic_scale.assign(2.0**60)
    checkpoints.save()
    run.train(settings, folder.path)
    again = Checkpoints(load_run(folder.path)[1], folder, 3)
    assert again.restore() == 4 and again.model.optimizer.iterations < 4
    assert float(again.model.optimizer.dynamic_scale) < 2.0**60


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny_config, data_dir, finished, tmp_path, caplog):
    folder = RunFolder(tmp_path / "damaged")
    shutil.copytree(finished[0].path, folder.path)
    for part in folder.checkpoints.glob("step-6.*"):
        part.write_bytes(part.read_bytes()[:100])
    run.train(tiny_config(data_dir), folder.path)
    assert "step-6 cannot be read" in caplog.text and "resuming from the checkpoint before it" in caplog.text
    for ours, theirs in zip(weights_and_slots(folder), weights_and_slots(finished[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # and step 6 was written again


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_keeps_the_pixel_mean_of_its_weights(tiny_config, data_dir, tmp_path):
    """And trains with another loss on mined anchors."""
    imagenet.save(backbones.resnet("resnet18", width=8, norm="batch"), tmp_path / "b.weights.h5", (100, 110, 120))
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
