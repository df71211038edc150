"""After a kill before any file operation of a write, either the old or the new is there, whole."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from kills import Killed, Kills, everywhere

from retinanet_keras.config import Config
from retinanet_keras.data.coco import Categories
from retinanet_keras.evaluation import report
from retinanet_keras.evaluation.coco_metrics import coco_metrics
from retinanet_keras.storage import disk
from retinanet_keras.training import best, log_file
from retinanet_keras.training.run_folder import RunFolder
from retinanet_keras.visualization import draw

pytestmark = pytest.mark.check
CATEGORIES = Categories.from_list([{"label": 0, "id": 1, "name": "cat"}])


def content(folder):
    """{name: bytes} of the files that are not hidden or in a hidden folder."""
    files = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
    shown = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    return {str(path): Path(folder, path).read_bytes() for path in shown}


def killed(tmp_path, before, act):
    """The contents after kills before every operation of an act, in copies of a folder; (contents, operations)."""

    def make(n):
        return shutil.copytree(before, tmp_path / f"killed-{n}")

    contents, operations = [], []
    for folder, operation in everywhere(make, act):
        contents.append(content(folder))
        operations.append(operation.split()[0])
        act(folder)  # the next one succeeds, and removes the unfinished files
        assert not [path for path in folder.rglob(".*") if path.name.startswith(".")], operation
        contents.append(content(folder))
    return contents, operations


def test_the_shim_finds_a_write_that_is_not_atomic(tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "before/a").write_text("old")
    contents, operations = killed(tmp_path, tmp_path / "before", lambda folder: (folder / "a").write_text("new"))
    assert contents == [{"a": b"old"}, {"a": b"new"}, {"a": b""}, {"a": b"new"}] and operations == ["open", "write"]


def test_the_shim_sees_every_way_to_change_a_folder_and_nothing_else(tmp_path):
    (tmp_path / "in").mkdir()
    with Kills(tmp_path / "in") as kills:
        for place in (tmp_path / "in", tmp_path):
            (place / "d/e").mkdir(parents=True)
            np.save(place / "d/e/a.npy", np.zeros(2))
            with open(place / "d/e/b", mode="a") as file:
                file.write("b")
            os.close(os.open(place / "d/c", os.O_WRONLY | os.O_CREAT))
            os.rename(place / "d/e/b", place / "d/f")
            os.replace(place / "d/f", place / "d/g")
            (place / "d/g").unlink()
            (place / "d/c").read_bytes()
            shutil.rmtree(place / "d")
    counted = [operation.split()[0] for operation in kills.operations]
    assert counted == [
        "mkdir", "mkdir", "mkdir", "open", "write", "open", "write", "open", "write", "rename", "replace", "unlink",
        *counted[12:],
    ]  # fmt: skip
    assert sorted(counted[12:]) == ["rmdir", "rmdir", "unlink", "unlink"]  # of rmtree


def test_after_a_kill_no_cleaning_up_is_done(tmp_path):
    with pytest.raises(Killed), Kills(tmp_path, 1):
        try:
            (tmp_path / "a").mkdir()
            (tmp_path / "b").mkdir()
        finally:
            (tmp_path / "a").rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_is_replaced(tmp_path, monkeypatch, exchange):
    """Without renameat2 there is a moment in which the place is empty, and the old folder beside it."""

    def act(folder):
        with disk.replacing_folder(folder / "1") as partial:
            (partial / "a").write_text("new")
            (partial / "c").write_text("new")

    if not exchange:
        monkeypatch.setattr(disk.sys, "platform", "other")
    (tmp_path / "before/1").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "before/1" / name).write_text("old")
    contents, operations = killed(tmp_path, tmp_path / "before", act)
    old, new = {"1/a": b"old", "1/b": b"old"}, {"1/a": b"new", "1/c": b"new"}
    gone = [] if exchange else [{}]
    assert all(found in [old, new, *gone] for found in contents[::2]) and all(found == new for found in contents[1::2])
    assert contents[0] == old and new in contents[::2] and "_rename" in operations


@pytest.fixture
def damaged(tmp_path):
    """A run's folder whose log.csv, best.json and categories.json are damaged; the log has two evaluations."""
    folder = RunFolder(tmp_path / "before")
    folder.start(Config(), CATEGORIES)
    with h5py.File(folder.best_weights, "w") as file:
        file["weights"] = 1
    rows = [{"step": 1, "AP": 0.25}, {"step": 2, "AP": 0.5}]
    folder.log_file.write_text(log_file.header() + "?\n" + "".join(map(log_file.line, rows)))
    folder.best_file.write_text("?")
    folder.categories_file.write_text("?")
    return folder.path


@pytest.mark.parametrize(
    "name, act",
    [
        ("log.csv", lambda folder: folder.cut_log(2)),
        ("checkpoints/best.json", best.repair),
        ("categories.json", lambda folder: folder.start(Config(), CATEGORIES)),
    ],
)
def test_a_damaged_file_of_a_run_is_there_until_the_new_one_is(tmp_path, damaged, caplog, name, act):
    old = (damaged / name).read_bytes()
    contents, operations = killed(tmp_path, damaged, lambda folder: act(RunFolder(folder)))
    (new,) = {found[name] for found in contents[1::2]}
    assert new != old and operations.count("replace") >= 2
    for found in contents:
        assert found[name] in (old, new) and found.get(f"{name}.damaged", old) == old
        assert found[name] == old or f"{name}.damaged" in found
    assert {found[name] for found in contents[::2]} == {old, new}
    assert all(len(found) == len(contents[1]) for found in contents[1::2])  # a second start keeps no second copy


def test_best_weights_that_are_damaged_are_set_aside_and_a_kill_in_between_is_noticed(tmp_path, damaged, caplog):
    (damaged / "checkpoints/best.json").write_text('{"step": 2, "AP": 0.5, "digest": "0"}')
    (damaged / "checkpoints/best.weights.h5").write_text("?")

    def act(folder):
        caplog.clear()
        best.repair(RunFolder(folder))
        there = (folder / "checkpoints/best.json").exists()
        assert not there and "next evaluation will be the best so far" in caplog.text

    contents, _ = killed(tmp_path, damaged, act)
    for found in contents:
        kept = {found.get(f"checkpoints/best.{end}") for end in ("weights.h5", "weights.h5.damaged")}
        assert b"?" in kept
    assert all("checkpoints/best.weights.h5" not in found for found in contents[1::2])


def test_a_picture_and_a_report(tmp_path):
    def act(folder):
        draw.save(folder / "pictures/a.png", np.full((20, 20, 3), 9, "uint8"))
        draw.save(folder / "pictures/a.jpeg", np.full((20, 20, 3), 9, "uint8"))
        report.write_report(folder / "report.html", metrics, title="new")

    metrics = coco_metrics({"images": [], "categories": [], "annotations": []}, [])
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        (folder / "pictures").mkdir(parents=True)
        for name in ("report.html", "pictures/a.png", "pictures/a.jpeg"):
            (folder / name).write_text("old")
    act(after)
    new = content(after)
    assert b"old" not in new.values() and len(new) == 3
    contents, operations = killed(tmp_path, before, act)
    assert operations.count("replace") == 3
    for found in contents[::2]:
        assert set(found) == set(new) and all(value in (b"old", new[name]) for name, value in found.items())
    assert all(found == new for found in contents[1::2])
