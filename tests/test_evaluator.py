"""Detection over a split: interrupted, or shared by replicas, it gives what it gives undisturbed; what it leaves."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from retinanet_keras import CocoMetrics
from retinanet_keras.cli.evaluate import evaluate
from retinanet_keras.data import dataset_formats, image_decoding
from retinanet_keras.errors import RunError
from retinanet_keras.evaluation import coco_metrics, detect
from retinanet_keras.training.resume import load_run

pytestmark = pytest.mark.eager

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_copy(finished, tmp_path):
    shutil.copytree(finished[0].path, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """The results file of an evaluation of the split `train`, ten images in batches of one or two."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(finished[0].path, folder)
    evaluate("c.json", workdir=folder, split="train")
    return (folder / "eval/train/results.json").read_bytes()


@pytest.mark.eager(False)
def test_an_interrupted_evaluation_goes_on_where_it_was(run_copy, whole, monkeypatch, capsys):
    """It stops after two batches, and a third is cut off in the middle of its line."""
    batches = detect._by_model

    def failing(model, folded, dataset, data, plan):
        computed.append(len(plan))
        for number, batch in enumerate(batches(model, folded, dataset, data, plan)):
            if number == 2 and len(computed) == 1:
                raise KeyboardInterrupt
            yield batch

    computed = []
    monkeypatch.setattr(detect, "_by_model", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate("c.json", workdir=run_copy, split="train")
    unfinished = run_copy / "eval/train/unfinished.jsonl"
    done = [[one[0] for one in json.loads(line.split(" ", 1)[1])] for line in unfinished.read_text().splitlines()[1:]]
    assert len(done) == 2 and not (run_copy / "eval/train/results.json").exists()
    with open(unfinished, "a") as file:
        file.write("[[3, [[1.0, 2.")
    evaluate("c.json", workdir=run_copy, split="train")
    assert computed[1] == computed[0] - 2 and not unfinished.exists()
    assert f"Resuming after {sum(map(len, done))} of 10 images" in capsys.readouterr().out
    assert (run_copy / "eval/train/results.json").read_bytes() == whole


@pytest.mark.slow
def test_what_other_weights_or_sizes_have_found_is_not_gone_on_from(run_copy, monkeypatch, capsys):
    def stopping(model, folded, dataset, data, plan):
        yield from batches(model, folded, dataset, data, plan[:1])
        raise KeyboardInterrupt

    batches = detect._by_model
    monkeypatch.setattr(detect, "_by_model", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate("c.json", workdir=run_copy, split="train")
    monkeypatch.undo()
    evaluate("c.json", workdir=run_copy, split="train", overrides=["data.short_side=48"])
    assert "Resuming" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [3, 2])
def test_replicas_share_an_evaluation_and_find_the_same(run_copy, whole, replicas):
    """In a process of its own; seven batches of unequal canvases do not divide evenly."""
    command = [
        sys.executable, "evaluate.py", "--workdir", str(run_copy), "--split", "train", "--set",
        "strategy.kind=mirrored", f"strategy.replicas={replicas}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run_copy / "eval/train/results.json").read_bytes() == whole


@pytest.mark.eager(False)
def test_a_split_without_labels_gives_a_submission(run_copy, finished):
    """Named and zipped as COCO's server asks; nothing is scored."""
    data = Path(json.loads((run_copy / "config.json").read_text())["data"]["dir"])
    own = run_copy.parent / "data"
    shutil.copytree(data, own)
    tree = json.loads((own / "annotations/instances_val.json").read_text())
    del tree["annotations"]
    (own / "annotations/image_info_test-dev2017.json").write_text(json.dumps(tree))
    (own / "images").rename(own / "test2017")
    overrides = [f"data.dir={own}", "data.source=coco"]
    assert evaluate("c.json", workdir=run_copy, split="test-dev", overrides=overrides) is None
    folder = run_copy / "eval/test-dev"
    with zipfile.ZipFile(folder / "detections_test-dev2017_run_results.zip") as archive:
        assert archive.namelist() == ["detections_test-dev2017_run_results.json"]
        submitted = json.loads(archive.read(archive.namelist()[0]))
    expected = json.loads((finished[0].evaluation("val") / "results.json").read_text())
    assert sorted(map(str, submitted)) == sorted(map(str, expected)) and len(expected) > 10
    assert not (folder / "metrics.json").exists() and list((folder / "pictures").glob("*.jpg"))


def test_settings_of_another_model_are_refused_before_anything_is_done(run_copy):
    before = sorted(run_copy.rglob("*"))
    with pytest.raises(
        RunError, match="model.width is 8 in the run, 16 in these settings; anchors.scales is 3 in the run"
    ):
        evaluate("c.json", workdir=run_copy, overrides=["model.width=16", "anchors.scales=2"])
    assert sorted(run_copy.rglob("*")) == before


def test_the_time_of_an_image_is_told_in_parts(finished):
    settings, model = load_run(finished[0].path)
    dataset = dataset_formats.open_split(settings.data, "train")
    speed = {}
    assert len(list(detect.detect_split(model, dataset, settings, speed=speed))) == 10
    told = detect.milliseconds(speed)
    assert set(told) == {*detect.PARTS, "images_per_second"} and min(told.values()) > 0
    assert told["images_per_second"] == pytest.approx(1000 / sum(told[part] for part in detect.PARTS))
    assert 0 < speed["images"] < 10 and detect.milliseconds({}) is None  # without the first of each shape


def test_coco_metrics_in_fit_are_those_of_the_annotations(finished):
    """A dataset of batches: boxes in network pixels, whose scale brings them back to those of the files."""
    settings, model = load_run(finished[0].path)
    dataset = dataset_formats.open_split(settings.data, "val")
    expected = CocoMetrics(dataset, settings).evaluate(model)
    batches = []
    for i in range(len(dataset)):
        from retinanet_keras.data import canvas

        image, size, scale = canvas.fit(image_decoding.image_of(dataset, i)[None], 64, 64)
        truth = {
            "boxes": tf.pad(dataset.boxes_of(i) * scale, [[0, 2], [0, 0]])[None],
            "labels": tf.pad(dataset.labels_of(i), [[0, 2]], constant_values=-1)[None],
            "size": size[None], "scale": scale[None],
        }  # fmt: skip
        batches.append((image, truth))
    monitor, seen = CocoMetrics(batches), []
    after = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    monitor.set_model(model)
    logs = {"loss": 1.0}
    for callback in (monitor, after):
        callback.on_epoch_end(0, logs)
    for name in coco_metrics.METRICS:
        value = expected[name]
        assert seen[0].get(f"val_{name}") == (value if value is None else pytest.approx(value, abs=1e-6)), name
    assert "val_AP" in seen[0] and monitor.metrics["counts"]["objects"] == expected["counts"]["objects"]


@pytest.mark.slow
def test_coco_metrics_come_into_the_logs_of_fit_every_so_many_epochs(small_model):
    model = small_model()
    model.compile("sgd")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 64, 64, 3), "uint8")
    truth = {"boxes": np.array([[[8, 8, 40, 40]], [[0, 0, 0, 0]]], "float32"), "labels": np.array([[1], [-1]])}
    batches = tf.data.Dataset.from_tensors((images, truth))
    metrics = CocoMetrics(batches, every=2)
    history = model.fit(batches, epochs=3, callbacks=[metrics], verbose=0).history
    assert len(history["loss"]) == 3 and len(history["val_AP"]) == 1
    assert metrics.metrics["counts"]["objects"] == 1 and metrics.metrics["counts"]["images"] == 2
