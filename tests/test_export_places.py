"""Where an export is written: the old or the new is there, whole, and nothing of others is touched.

What is written is the same as always, but for the graph, which takes seconds to trace.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import keras
import kills
import numpy as np
import pytest

from retinanet_keras.config import config_from_dict
from retinanet_keras.errors import UserError
from retinanet_keras.serving import export, model_card

CONFIG = config_from_dict({"data": {"short_side": 96, "max_side": 128}})
CATEGORIES = [{"label": 0, "id": 7, "name": "cat"}, {"label": 1, "id": 3, "name": "dog"}]


@pytest.fixture
def quick(monkeypatch, small_model):
    """A function that exports, quickly, a model whose first weight is the given number."""

    class Archive:
        def add_endpoint(self, *_):
            pass

        def write_out(self, folder, verbose):
            Path(folder, "variables").mkdir(parents=True)
            Path(folder, "variables/variables.index").write_text("index")
            Path(folder, "saved_model.pb").write_text(f"weights {first.numpy().ravel()[0]}")

    monkeypatch.setattr(export, "signatures", lambda *_: (None, None))
    monkeypatch.setattr(keras.export, "ExportArchive", Archive)
    net = small_model(2, categories=CATEGORIES)
    first = net.weights[0]

    def make(folder, number=0.0, version=None):
        first.assign(np.full(first.shape, number))
        return export.export_model(net, CONFIG, folder, version)

    return make


def content(folder):
    """{name: bytes} of what is not hidden."""
    files = {path.relative_to(folder): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if not name.parts[0].startswith(".")}


@pytest.mark.parametrize("version", [None, 1])
def test_after_a_kill_at_any_operation_an_export_is_the_old_or_the_new(quick, tmp_path, version):
    quick(tmp_path / "old", 1.0)
    (tmp_path / "old/1/theirs").write_text("of the old version")
    old = content(tmp_path / "old")
    after = shutil.copytree(tmp_path / "old", tmp_path / "after")
    quick(after, 2.0, version)
    new = content(after)
    assert new != old and new["1/theirs"] == old["1/theirs"]
    operations = []
    for folder, operation in kills.everywhere(
        lambda n: shutil.copytree(tmp_path / "old", tmp_path / f"killed-{n}"),
        lambda folder: quick(folder, 2.0, version),
    ):
        operations.append(operation)
        found = content(folder)
        assert found in (old, new), operation
        assert export.find(folder) == folder / ("2" if found == new and version is None else "1")
        quick(folder, 2.0, version)
        if version:
            assert content(folder) == new and [path.name for path in folder.iterdir()] == ["1"], operation
    assert len(operations) > 15 and any("_rename" in operation for operation in operations)


def test_an_equal_version_is_not_written_again(quick, tmp_path):
    """A server may be reading it. One with a damaged or missing file, or of other weights, is replaced."""

    def number():
        return (tmp_path / "1").stat().st_ino

    quick(tmp_path, 1.0, 1)
    first = number()
    assert quick(tmp_path, 1.0, 1) == tmp_path / "1" and number() == first
    quick(tmp_path, 2.0, 1)
    assert (second := number()) != first and (tmp_path / "1/saved_model.pb").read_text() == "weights 2.0"
    for damage in (
        lambda: (tmp_path / "1/saved_model.pb").write_text("weights 9.0"),
        (tmp_path / "1/variables/variables.index").unlink,
        lambda: (tmp_path / "1" / "assets.extra/model_card.json").write_text("[" * 100_000),
        lambda: (tmp_path / "1" / "assets.extra/model_card.json").write_text("[]"),
        (tmp_path / "1/assets.extra/model_card.html").unlink,
    ):
        (tmp_path / "1/theirs").touch()
        damage()
        quick(tmp_path, 2.0, 1)
        assert number() != second or not (tmp_path / "1/theirs").exists()
        assert (tmp_path / "1/saved_model.pb").read_text() == "weights 2.0"
        second = number()


def test_a_new_version_takes_no_name_that_is_taken(quick, tmp_path):
    """Not that of a folder of another tool, of a file or a link; what is no version's name is left alone."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1/model.onnx").write_text("another tool's")
    (tmp_path / "2").write_text("a file")
    (tmp_path / "3").symlink_to(tmp_path / "nowhere")
    for name in ("²", "٣", "04x", "-7", "9" * 19, "9" * 200):
        (tmp_path / name).mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    assert quick(tmp_path, 1.0) == tmp_path / "4" and quick(tmp_path, 1.0) == tmp_path / "5"
    assert {path.name for path in tmp_path.iterdir()} == before | {"4", "5"}
    assert (tmp_path / "1/model.onnx").read_text() == "another tool's" and (tmp_path / "2").read_text() == "a file"
    assert export.versions(tmp_path) == [4, 5] and export.find(tmp_path) == tmp_path / "5"
    (tmp_path / "0012").mkdir()
    assert quick(tmp_path, 1.0) == tmp_path / "13"


def test_exports_to_one_base_path_at_once_are_two_versions(quick, tmp_path, monkeypatch):
    """The second begins and ends while the first is being written."""
    warmup, numbers = export.warmup.write, []

    def write(path):
        if not numbers:
            numbers.append(1)
            with monkeypatch.context() as patch:
                patch.setattr(export.disk.os, "getpid", lambda: os.getppid())  # another process, and alive
                numbers.append(quick(tmp_path, 2.0))
        warmup(path)

    monkeypatch.setattr(export.warmup, "write", write)
    first = quick(tmp_path, 1.0)
    assert (numbers[1].name, first.name) == ("1", "2") and export.versions(tmp_path) == [1, 2]
    for path in (first, numbers[1]):
        assert subprocess.run(["sha256sum", "--check", "--quiet", "assets.extra/SHA256SUMS"], cwd=path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("version", [None, 1])
def test_a_file_where_the_export_belongs_is_told_before_anything_is_traced(quick, tmp_path, monkeypatch, version):
    monkeypatch.setattr(export, "signatures", None)
    (tmp_path / "file").touch()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/1").touch()
    for place in ["file", "file/below", *(["base"] if version else [])]:
        with pytest.raises(UserError, match="is not a folder. Name another, or move that file away"):
            quick(tmp_path / place, version=version)


def test_a_card_of_odd_categories(small_model, monkeypatch):
    """Half a character, markup, terminal escapes and 100,000 letters; a package that runs from its folder."""
    names = ["half \ud800", "</td><script>alert(1)</script>", "\x1b[2J", "m" * 100_000]
    model = small_model(4, categories=[{"label": i, "id": i, "name": name} for i, name in enumerate(names)])
    monkeypatch.setattr(model_card, "PARTS", ("no_such_package_here", "keras"))
    described = model_card.describe(model, CONFIG)
    assert described["made_with"]["no_such_package_here"] == "not installed"
    assert described["made_with"]["keras"] == keras.__version__
    page = model_card._page(described)
    assert "<script" not in page and "\x1b" not in page and "\\x1b[2J" in page
    assert json.loads(json.dumps(described))["categories"] == model.categories
