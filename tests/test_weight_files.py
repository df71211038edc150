"""Keras's files of weights: whole after a kill at any moment, and checked before they are read."""

import io
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import h5py
import keras
import kills
import numpy as np
import pytest
import weight_damage

from retinanet_keras import backbone as backbones
from retinanet_keras import checkpoints
from retinanet_keras.errors import UserError
from retinanet_keras.training import loading
from retinanet_keras.weights import imagenet, keras_files

NAMES = [{"label": i, "id": i + 1, "name": name} for i, name in enumerate("abc")]


@pytest.fixture(scope="module")
def model(small_model):
    return small_model(categories=NAMES)


@pytest.fixture(scope="module")
def net():
    """A backbone."""
    keras.utils.set_random_seed(0)
    return backbones.resnet("resnet18", width=8, norm="frozen")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def of_file(path):
    """The arrays of a file that is whole."""
    keras_files.check(path)
    content = path
    if path.suffix == ".keras":
        content = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5"))
    arrays = {}
    with h5py.File(content) as file:
        file.visititems(lambda name, item: arrays.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
        arrays["mean"] = file.attrs.get(imagenet.PIXEL_MEAN)
    return arrays


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


# One step

OF_LIBRARIES = [  # that change files
    (os, "fsync"), (zipfile.ZipFile, "writestr"), (h5py.File, "close"), (h5py.AttributeManager, "__setitem__"),
    *((h5py.Group, name) for name in ("create_group", "create_dataset", "__setitem__")),
]  # fmt: skip
WRITERS = {
    "save": ("a.keras", lambda model, net, path: model.save(path)),
    "save_weights": ("a.weights.h5", lambda model, net, path: model.save_weights(path)),
    "pretrained.save": ("a.weights.h5", lambda model, net, path: imagenet.save(net, path, (1.0, 2.0, 3.0))),
    "convert to .keras": ("a.keras", lambda model, net, path: checkpoints.convert("released.pkl", path)),
    "convert to .weights.h5": ("a.weights.h5", lambda model, net, path: checkpoints.convert("backbone.pkl", path)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("most", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_a_kill_at_any_file_operation_leaves_the_old_file_or_the_new(model, net, tmp_path, monkeypatch, writer, most):
    monkeypatch.setattr(checkpoints.reader, "read", lambda path: {"conv1_w": 0} if path == "backbone.pkl" else {})
    monkeypatch.setattr(checkpoints, "_retinanet_of", lambda *_: model)
    monkeypatch.setattr(checkpoints, "_backbone_of", lambda *_: (net, (4.0, 5.0, 6.0)))
    name, write = WRITERS[writer]
    path, new = tmp_path / "files" / name, tmp_path / name
    write(model, net, new)

    def old(_):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"old")
        return path.parent

    operations, seen = [], set()
    for _, operation in kills.everywhere(old, lambda _: write(model, net, path), OF_LIBRARIES, most):
        changed = path.read_bytes() != b"old"
        assert not changed or same(of_file(path), of_file(new)), operation
        operations.append(operation.split()[0])
        seen.add(changed)
    assert seen == {False, True} and "replace" in operations and len(operations) > (most or 100)
    write(model, net, path)
    assert names(path.parent) == [name]  # what the kills left is gone


def test_a_link_may_lead_to_a_file_of_any_name(model, tmp_path):
    for name, save, load in (
        ("a.keras", model.save, keras.models.load_model), ("a.weights.h5", model.save_weights, model.load_weights),
    ):  # fmt: skip
        (tmp_path / name).symlink_to(tmp_path / f"of {name[:-2]}")
        save(tmp_path / name)
        keras_files.check(tmp_path / name)
        load(tmp_path / name)
        assert (tmp_path / name).is_symlink()


def test_links_stay_and_other_targets_are_left_to_keras(model, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.keras").symlink_to(tmp_path / "disk/b.keras")
    model.save(tmp_path / "a.keras")
    assert (tmp_path / "a.keras").is_symlink() and names(tmp_path / "disk") == ["b.keras"]
    model.save(str(tmp_path / "unpacked"), zipped=False)
    assert "config.json" in names(tmp_path / "unpacked")
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(IsADirectoryError):
        model.save(tmp_path / "folder.keras")
    with pytest.raises(FileNotFoundError, match="absent/a.keras"):
        model.save(tmp_path / "absent/a.keras")
    with pytest.raises(ValueError, match="must end in `.weights.h5`"):
        model.save_weights(tmp_path / "a.h5")
    model.save_weights(tmp_path / "shards.weights.json", max_shard_size=1)
    model.load_weights(tmp_path / "shards.weights.json")
    assert names(tmp_path / "disk") == ["b.keras"]


@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5"])
def test_a_file_that_may_not_be_overwritten_is_asked_about(model, tmp_path, monkeypatch, name):
    save = model.save if name == "a.keras" else model.save_weights
    save(tmp_path / name, overwrite=False)
    of_file(tmp_path / name)
    (tmp_path / name).write_bytes(b"old")
    answers = ["?", "n", "y"]
    monkeypatch.setattr("builtins.input", lambda _: answers.pop(0))
    save(tmp_path / name, overwrite=False)
    assert (tmp_path / name).read_bytes() == b"old" and answers == ["y"]
    save(tmp_path / name, overwrite=False)
    of_file(tmp_path / name)


def test_convert_needs_a_place_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.reader, "read", lambda _: {})
    (tmp_path / "a.keras").mkdir()
    with pytest.raises(UserError, match="a.keras is a folder. Name the file"):
        checkpoints.convert("released.pkl", tmp_path / "a.keras")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        checkpoints.convert("released.pkl", tmp_path / "file/a.keras")


# Checksums


def test_a_checksum_goes_along_with_a_copy_and_h5py_does_not_see_it(model, tmp_path):
    model.save_weights(tmp_path / "a.weights.h5")
    copy = tmp_path / "b.weights.h5"
    copy.write_bytes((tmp_path / "a.weights.h5").read_bytes())
    assert keras_files.MARK in copy.read_bytes()[-100:]
    model.load_weights(copy)
    keras.Model.load_weights(model, copy)
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"b\.weights\.h5 is damaged or cut short: .* checksum says\. Copy or download"):
        model.load_weights(copy)


def test_a_checksum_that_was_cut_off_is_missed(model, tmp_path):
    path = tmp_path / "a.weights.h5"
    model.save_weights(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: content.rindex(keras_files.MARK)])
    with pytest.raises(UserError, match="its checksum is missing at the end"):
        model.load_weights(path)


def test_files_of_keras_itself_are_read(model, small_model, net, tmp_path):
    net.save_weights(tmp_path / "net.weights.h5")
    imagenet.load(net, tmp_path / "net.weights.h5")
    keras.Model.save_weights(model, tmp_path / "a.weights.h5")
    assert keras_files.MARK not in (tmp_path / "a.weights.h5").read_bytes()
    again = small_model(seed=1)
    again.load_weights(tmp_path / "a.weights.h5")
    keras.Model.save(model, tmp_path / "a.keras")
    with zipfile.ZipFile(tmp_path / "a.keras") as plain, zipfile.ZipFile(tmp_path / "b.keras", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    for one in (again, loading.of_file(tmp_path / "b.keras", "--model")):
        assert all(np.array_equal(*pair) for pair in zip(one.get_weights(), model.get_weights(), strict=True))


def test_damaged_weights_of_a_keras_file_are_not_read_in_parts(model, tmp_path):
    """Where Keras, told that the checksum of the member is wrong, reads it all the same."""
    path = tmp_path / "a.keras"
    model.save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive, pytest.raises(UserError, match="model.weights.h5 in it is not what its"):
        model.load_own_variables(types.SimpleNamespace(archive=archive))
    with pytest.raises(UserError, match="a.keras is damaged or cut short: BadZipFile"):
        model.load_weights(path)


# Damage


def check_damage(report, count):
    outcomes = report["outcomes"]
    assert not report["faults"]
    assert outcomes["undamaged: right"] == len(weight_damage.SUFFIXES) and sum(outcomes.values()) == count + 9
    assert sum(number for name, number in outcomes.items() if name.endswith(": refused")) > count / 2
    assert sum(number for name, number in outcomes.items() if name.endswith(": right")) > count / 20


def test_damaged_files_are_loaded_rightly_or_refused_in_a_sentence(tmp_path):
    """What cannot be told is a changed number in a file that has no checksum, of any kind."""
    check_damage(weight_damage.run(36, 2, tmp_path), 36)


@pytest.mark.slow
def test_2500_damaged_files_take_less_than_a_gigabyte(tmp_path):
    command = [sys.executable, weight_damage.__file__, "2500", "1", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, f"status {done.returncode} at {names(tmp_path)}\n{done.stderr[-2000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(report))
    check_damage(report, 2500)
    assert all(report["outcomes"].get(f"{kind}: refused", 0) > 80 for kind in weight_damage.SUFFIXES)
    assert report["peak_mb"] < 1000


def keras_file(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr({"config": "config.json", "weights": "model.weights.h5"}[name], content)


def hdf5(**datasets):
    file = io.BytesIO()
    with h5py.File(file, "w") as content:
        for name, settings in datasets.items():
            content.create_dataset(name, **settings)
    return file.getvalue()


LARGE = {"shape": (3 << 28,), "dtype": "f4", "chunks": (1 << 20,)}  # 3 GB of nothing


def test_small_files_of_large_arrays_are_refused(model, tmp_path):
    (tmp_path / "a.weights.h5").write_bytes(hdf5(a=LARGE))
    with pytest.raises(UserError, match="bytes, but arrays of 3221225472; refused"):
        model.load_weights(tmp_path / "a.weights.h5")
    keras_file(tmp_path / "a.keras", config="{}", weights=hdf5(a=LARGE))
    with pytest.raises(UserError, match="bytes, but arrays of 3221225472; refused"):
        model.load_weights(tmp_path / "a.keras")
    keras_file(tmp_path / "b.keras", config="{}", weights=bytes(100 << 20))
    with pytest.raises(UserError, match="would unpack to 104857602"):
        model.load_weights(tmp_path / "b.keras")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or cut short: BadZipFile, File is not a zip file"),
        ({"config": "{}"}, "no model of Keras: model.weights.h5 is missing"),
        ({"config": "{", "weights": hdf5()}, "config.json in it is not valid JSON, line 1, column 2"),
        ({"config": 100_000 * "[", "weights": hdf5()}, "not valid JSON, lists or objects are nested too deeply"),
        ({"config": 100 * "[" + 100 * "]", "weights": hdf5()}, "is not a model that Keras can load"),
        ({"config": 101 * "[" + 101 * "]", "weights": hdf5()}, "lists and objects in its config.json are nested more"),
        ({"config": 900 * '{"config":' + "1" + 900 * "}", "weights": hdf5()}, "nested more than 100 deep"),
        ({"config": "{}", "weights": b"HDF"}, "damaged or cut short: "),
        ({"config": "[]", "weights": hdf5()}, "is not a model that Keras can load"),
        ({"config": "{}", "weights": hdf5()}, "is not a model that Keras can load"),
    ],
)
def test_what_is_no_model_is_told_in_words(tmp_path, content, message):
    path = tmp_path / "a.keras"
    keras_file(path, **content) if isinstance(content, dict) else path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        loading.of_file(path, "--model")
    assert str(caught.value).startswith(f"--model: {path} ") and "\n" not in str(caught.value)


def test_a_damaged_file_of_a_backbone_names_the_setting(net, tmp_path):
    path = tmp_path / "a.weights.h5"
    imagenet.save(net, path, (1.0, 2.0, 3.0))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match=f"^weights: {path} is damaged or cut short"):
        imagenet.load(net, path)
    path.write_bytes(hdf5())
    for mean in ("red", [1.0, 2.0], 3.0):
        with h5py.File(path, "a") as file:
            file.attrs[imagenet.PIXEL_MEAN] = mean
        with pytest.raises(UserError, match="its attribute pixel_mean is not a color"):
            imagenet.pixel_mean(path)
