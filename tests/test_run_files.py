"""A run's own files that are damaged or in use, and what is in their way: told, set aside, rebuilt, or refused."""

import json
import os
import shutil
from importlib import metadata

import h5py
import numpy as np
import pytest

from retinanet_keras import errors
from retinanet_keras.cli.evaluate import evaluate
from retinanet_keras.config import config_from_dict
from retinanet_keras.data import dataset_formats, fingerprint
from retinanet_keras.errors import ConfigError, DataError, RunError
from retinanet_keras.evaluation import artifacts
from retinanet_keras.evaluation.results import ImageDetections
from retinanet_keras.evaluation.unfinished import Unfinished
from retinanet_keras.serving import model_card
from retinanet_keras.storage import disk
from retinanet_keras.training import best, data_record, log_file, preflight, run
from retinanet_keras.training.resume import load_run
from retinanet_keras.training.run_folder import RunFolder, load_config_of


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0].path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


# Two at once


def test_a_folder_that_is_in_use_is_refused_and_left_alone(tiny_config, data_dir, copy):
    before = everything(copy.path)
    with disk.locked(copy.path, "training"), pytest.raises(errors.InUse, match="in use: training, process"):
        run.train(tiny_config(data_dir, train={"iterations": 9}), copy.path)
    with disk.locked(copy.evaluation("val"), "evaluating"), pytest.raises(errors.InUse, match="in use: evaluating"):
        evaluate("c.json", workdir=copy.path, split="val")
    assert everything(copy.path) == before


# What is in the way


@pytest.mark.parametrize("where", ["", "checkpoints", "eval", "eval/val", "export", "eval/val/pictures"])
def test_a_file_in_the_place_of_a_folder_is_refused(tiny_config, data_dir, finished, tmp_path, where):
    if where:
        shutil.copytree(finished[0].path, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / where)
    (tmp_path / "run" / where).write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(RunError, match=f"{tmp_path / 'run' / where} is not a folder"):
        run.train(tiny_config(data_dir), tmp_path / "run")
    with pytest.raises(RunError, match="is not a folder" if where.startswith("eval") else "no run|categories|chec"):
        evaluate("c.json", workdir=tmp_path / "run" if where.startswith("eval") else tmp_path, split="val")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "log.csv", "checkpoints/best.json", "eval/val/metrics.json"])
def test_a_folder_in_the_place_of_a_file_is_refused(tiny_config, data_dir, copy, name):
    (copy.path / name).unlink()
    (copy.path / name).mkdir()
    with pytest.raises(RunError, match=f"{copy.path / name} is a folder"):
        run.train(tiny_config(data_dir), copy.path)
    if name.startswith("eval"):
        with pytest.raises(RunError, match=f"{copy.path / name} is a folder"):
            evaluate("c.json", workdir=copy.path, split="val")


def test_fewer_iterations_than_the_run_has_done_are_refused(tiny_config, data_dir, copy):
    before = everything(copy.path)
    with pytest.raises(RunError, match="train.iterations: the run in .* is at step 6, and 5 steps are configured"):
        run.train(tiny_config(data_dir, train={"iterations": 5}), copy.path)
    assert everything(copy.path) == before


# Other data


def other_data(data_dir, folder, split="train"):
    """A copy of the data with the modification times of the original, and the tree of a split's annotations."""
    shutil.copytree(data_dir, folder)
    file = folder / "annotations" / f"instances_{split}.json"
    return file, json.loads(file.read_text())


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_does_not_go_on_with_other_annotations(tiny_config, data_dir, copy, tmp_path, split):
    file, tree = other_data(data_dir, tmp_path / "data", split)
    tree["annotations"][0]["bbox"][0] += 3
    file.write_text(json.dumps(tree))
    before = everything(copy.path)
    with pytest.raises(
        RunError, match=f"the annotations of {split} are not those that the run started with.*--workdir"
    ):
        run.train(tiny_config(tmp_path / "data", train={"iterations": 9}), copy.path)
    assert everything(copy.path) == before


def test_image_files_of_other_sizes_are_refused_unless_they_were_to_be_repaired(
    tiny_config, data_dir, copy, tmp_path, caplog
):
    other_data(data_dir, tmp_path / "data")
    image = sorted((tmp_path / "data/images").glob("train_*"))[2]
    image.write_bytes(image.read_bytes() + b"more")
    data = {"train": fingerprint.fingerprint(dataset_formats.open_split(tiny_config(tmp_path / "data").data, "train"))}
    with pytest.raises(
        RunError, match="the sizes in bytes of image files of train are not those at the start of the run"
    ):
        data_record.check(copy, data, data)
    data_record.allow_other_files(copy)
    data_record.check(copy, data, data)
    assert "the sizes in bytes" in caplog.text
    caplog.clear()
    data_record.check(copy, data, data)
    assert not caplog.text and json.loads(copy.data_file.read_text()) == data


@pytest.mark.parametrize("change", ["area", "crowd"])
def test_what_scoring_alone_reads_is_part_of_the_annotations(tiny_config, data_dir, tmp_path, change):
    """An area decides for AP of small objects or of large ones; a crowd takes detections."""

    def digest():
        return fingerprint.of_annotations(dataset_formats.open_split(tiny_config(tmp_path / "data").data, "val"))

    file, tree = other_data(data_dir, tmp_path / "data", "val")
    before = digest()
    if change == "area":
        tree["annotations"][0]["area"] /= 2
    else:
        tree["annotations"].append({**tree["annotations"][0], "id": 10**6, "iscrowd": 1})
    file.write_text(json.dumps(tree))
    assert digest() != before


@pytest.mark.parametrize("name", ["unfinished.jsonl", "pictures/grid.png", disk.LOCK])
def test_a_folder_where_an_evaluation_writes_a_file_is_told_first(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(RunError, match="is a folder, and an evaluation writes a file there"):
        artifacts.check(tmp_path)


def test_images_with_other_modification_times_are_told(tiny_config, data_dir, copy, tmp_path, caplog):
    other_data(data_dir, tmp_path / "data")
    image = sorted((tmp_path / "data/images").glob("train_*"))[2]
    os.utime(image, (0, 0))
    data = {"train": fingerprint.fingerprint(dataset_formats.open_split(tiny_config(tmp_path / "data").data, "train"))}
    data_record.check(copy, data, data)
    assert "image files of train have other modification times" in caplog.text


def test_a_damaged_record_of_the_data_is_told(copy, caplog):
    for content in (b"", b"\xff", b"[1]", b'{"train": 3}', b'{"train": {"a": 1}, "train": {}}'):
        copy.data_file.write_bytes(content)
        data_record.check(copy, {"train": {"annotations": "a", "sizes": "b", "times": "c"}}, ["train"])
        assert "data.json is damaged" in caplog.text
        caplog.clear()
    assert len(list(copy.path.glob("data.json.damaged*"))) == 5
    assert (copy.path / "data.json.damaged-2").read_bytes() == b"\xff"


def test_an_interrupted_evaluation_starts_over_with_other_data(tiny_config, data_dir, finished, tmp_path, caplog):
    from retinanet_keras.evaluation import detect

    other_data(data_dir, tmp_path / "data")
    config = tiny_config(tmp_path / "data")
    about = detect.depends_on(dataset_formats.open_split(config.data, "val"), config, "w", "m")
    unfinished = Unfinished(tmp_path / "u.jsonl", about)
    unfinished.add([ImageDetections(7, np.zeros((1, 4)), np.ones(1), np.ones(1))])
    assert len(Unfinished(tmp_path / "u.jsonl", about).batches) == 1 and not caplog.text
    image = sorted((tmp_path / "data/images").glob("val_*"))[0]
    os.utime(image, (0, 0))
    changed = detect.depends_on(dataset_formats.open_split(config.data, "val"), config, "w", "m")
    assert Unfinished(tmp_path / "u.jsonl", changed).batches == []
    assert "with other dataset: this one starts over" in caplog.text


# Damaged files


def batches(count):
    rng = np.random.default_rng(0)
    return [[ImageDetections(i, rng.random((2, 4)), rng.random(2), np.arange(2))] for i in range(count)]


@pytest.mark.parametrize("change", [
    lambda line: line.replace(b"1", b"2"), lambda line: b"\x00\xff" + line, lambda line: b"\n", lambda line: b"{}\n",
    lambda line: line[:20] + b"\n", lambda line: line[9:],
])  # fmt: skip
def test_a_damaged_line_of_an_interrupted_evaluation_is_where_it_goes_on(tmp_path, caplog, change):
    path = tmp_path / "unfinished.jsonl"
    unfinished = Unfinished(path, {"a": 1})
    for batch in batches(4):
        unfinished.add(batch)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = change(lines[2])
    path.write_bytes(b"".join(lines))
    again = Unfinished(path, {"a": 1})
    assert again.images == 1 and "unfinished.jsonl is damaged after 1 images" in caplog.text
    assert path.with_name("unfinished.jsonl.damaged").read_bytes() == b"".join(lines)
    again.add(batches(2)[1])
    (_, (other,)) = Unfinished(path, {"a": 1}).batches
    np.testing.assert_array_equal(other.boxes, batches(2)[1][0].boxes.astype("float32"))
    second = path.read_bytes() + b"damaged again\n"
    path.write_bytes(second)
    assert Unfinished(path, {"a": 1}).images == 2
    assert path.with_name("unfinished.jsonl.damaged").read_bytes() == b"".join(lines)
    assert path.with_name("unfinished.jsonl.damaged-2").read_bytes() == second


def test_a_damaged_head_of_an_interrupted_evaluation_is_set_aside(tmp_path, caplog):
    path = tmp_path / "unfinished.jsonl"
    path.write_bytes(b"\x89PNG\n\n")
    assert Unfinished(path, {"a": 1}).batches == []
    assert "starts over" in caplog.text and path.with_name("unfinished.jsonl.damaged").read_bytes() == b"\x89PNG\n\n"


ROWS = [{"step": 2.0, "loss": 0.5}, {"step": 3.0, "AP": 0.25}, {"step": 4.0, "loss": 0.375}]


@pytest.mark.parametrize("change, kept", [
    (lambda text: text.split(b"\n", 1)[1], ROWS),
    (lambda text: text.replace(b"\n3,", b"\nx,"), [ROWS[0], ROWS[2]]),
    (lambda text: text.replace(b"\n2,", b"\n\x00\xff"), ROWS[1:]),
    (lambda text: b"\x00\x01\xff" * 50, []),
    (lambda text: b"\x00\x01\n\xff" * 50, []),
    (lambda text: text.replace(b"step", b"stap"), ROWS),
    (lambda text: text.replace(b"\n4,", b"\n1e999,"), ROWS[:2]),
])  # fmt: skip
def test_a_damaged_log_is_set_aside_and_what_can_be_read_of_it_kept(tmp_path, caplog, change, kept):
    folder = RunFolder(tmp_path)
    content = change((log_file.header() + "".join(map(log_file.line, ROWS))).encode())
    folder.log_file.write_bytes(content)
    assert folder.log_rows() == kept
    folder.cut_log(10)
    if b"\n" in content:  # else all of it looks like a last line that was cut off
        assert "log.csv is damaged" in caplog.text and (tmp_path / "log.csv.damaged").read_bytes() == content
    assert folder.log_rows() == kept and folder.log_file.read_text().startswith(log_file.header())
    caplog.clear()
    folder.cut_log(3)
    assert not caplog.text and folder.log_rows() == [row for row in kept if row["step"] <= 3]


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b"[]", b'{"step": "x", "AP": 1}', b'{"step": 1, "AP": NaN}'])
def test_a_damaged_best_json_is_refused_by_readers_and_rebuilt_by_training(copy, caplog, content):
    whole = json.loads(copy.best_file.read_text())
    copy.best_file.write_bytes(content)
    with pytest.raises(RunError, match="best.json cannot be read: .*to rewrite it from log.csv"):
        best.read(copy)
    best.repair(copy)
    assert "best.json is damaged" in caplog.text
    assert (copy.checkpoints / "best.json.damaged").read_bytes() == content
    again = json.loads(copy.best_file.read_text())
    assert again["AP"] == pytest.approx(whole.pop("AP"), abs=1e-5) and {**whole, "AP": again["AP"]} == again
    assert best.read(copy) == again


@pytest.mark.parametrize(
    "content, readable",
    [*((content, readable) for content in (b"", b"HDF", "cut", "flipped", None) for readable in (True, False)),
     ("other", True)],
)  # fmt: skip
def test_damaged_or_missing_best_weights_begin_anew_before_training(copy, caplog, content, readable):
    weights, about = copy.best_weights, copy.best_file.read_bytes() if readable else b"?"
    whole = bytearray(weights.read_bytes())
    if content == "other":
        with h5py.File(weights, "w") as file:
            file["other"] = 1
    elif content is None:
        weights.unlink()
    else:
        whole[len(whole) // 2] ^= 1
        weights.write_bytes({"cut": whole[:-100], "flipped": whole}.get(content, content))
    damaged = weights.read_bytes() if weights.exists() else None
    copy.best_file.write_bytes(about)
    best.repair(copy)
    assert "best.weights.h5 or best.json is damaged or missing" in caplog.text and best.read(copy) is None
    asides = {path.name: path.read_bytes() for path in copy.checkpoints.glob("best.*")}
    expected = {"best.json.damaged": about, **({} if damaged is None else {"best.weights.h5.damaged": damaged})}
    assert asides == expected
    caplog.clear()
    best.repair(copy)
    assert not caplog.text


def test_whole_best_weights_are_left_as_they_are(copy, caplog):
    before = everything(copy.path)
    best.repair(copy)
    assert everything(copy.path) == before and not caplog.text


def test_damaged_best_weights_are_told(copy):
    _, model = load_run(copy.path)
    content = bytearray(copy.best_weights.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:1000], b""):
        copy.best_weights.write_bytes(damaged)
        with pytest.raises(RunError, match="best.weights.h5 is damaged.*eval.keep=last"):
            best.load(copy, model)


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b'[{"label": 0}]', b"[" * 100_000])
def test_damaged_categories_are_refused_by_readers_and_rebuilt_by_training(
    tiny_config, data_dir, copy, caplog, content
):
    categories = copy.categories()
    copy.categories_file.write_bytes(content)
    with pytest.raises(RunError, match="categories.json cannot be read"):
        copy.categories()
    copy.start(tiny_config(data_dir), categories)
    assert copy.categories() == categories and "categories.json is damaged" in caplog.text
    assert (copy.path / "categories.json.damaged").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"3", b'{"train": {"iterations": "x"}}', b"[" * 100_000])
def test_a_damaged_configuration_of_a_run_is_told(tiny_config, data_dir, copy, content):
    copy.config_file.write_bytes(content)
    with pytest.raises(RunError, match="config.json cannot be read: "):
        load_config_of(copy)
    with pytest.raises(RunError, match="config.json cannot be read: "):
        copy.start(tiny_config(data_dir), copy.categories())


# What the end needs


@pytest.mark.parametrize("setting, value", [
    ("serving.max_pixels", 10**22), ("detection.max_detections", 10**9), ("eval.pictures", 10**12),
    ("detection.pre_nms_top_k", 10**12),
])  # fmt: skip
def test_numbers_that_only_the_end_would_fail_at_are_refused(setting, value):
    section, key = setting.split(".")
    with pytest.raises(ConfigError, match=f"{setting}: expected at most"):
        config_from_dict({section: {key: value}})


def test_a_name_with_half_a_surrogate_pair_is_refused_before_the_first_step(tiny_config, data_dir, tmp_path):
    for split in ("train", "val"):
        file, tree = other_data(data_dir, tmp_path / split, split)
        tree["categories"][1]["name"] = "tri\ud800angle"
        file.write_text(json.dumps(tree))
    shutil.copyfile(file, tmp_path / "train/annotations/instances_val.json")
    with pytest.raises(DataError, match=r"tri\\ud800angle.*a name must not contain lone surrogates"):
        run.train(tiny_config(tmp_path / "train"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_library_that_is_missing_is_missed_before_the_first_step(tiny_config, data_dir, copy, monkeypatch):
    preflight.check(tiny_config(data_dir), copy, "val")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="hotcoco is not installed"):
        preflight.check(tiny_config(data_dir, eval={"library": "hotcoco"}), copy, "val")


def test_a_package_without_metadata_is_told_in_the_model_card(copy, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    config, model = load_run(copy.path)
    assert model_card.describe(model, config)["made_with"] == dict.fromkeys(model_card.PARTS, "not installed")
