"""The commands as a user types them, and what they answer to bad input."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinanet_keras.cli import commands
from retinanet_keras.cli.evaluate import evaluate
from retinanet_keras.config import DataConfig, DetectionConfig, ServingConfig
from retinanet_keras.data import image_decoding
from retinanet_keras.errors import DataError, RunError, UserError
from retinanet_keras.evaluation.coco_metrics import METRICS
from retinanet_keras.serving import model_card
from retinanet_keras.serving.export import CATEGORIES_FILE
from retinanet_keras.training import run
from retinanet_keras.training.resume import load_run
from retinanet_keras.training.run_folder import RunFolder, load_config_of

pytestmark = pytest.mark.eager

ROOT = Path(__file__).parents[1]


def shell(*arguments, cwd=ROOT):
    """(exit status, output and errors) of a Python command in the repository."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def run_copy(finished, tmp_path):
    return shutil.copytree(finished[0].path, tmp_path / "run")


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (["train.py", "--config", "configs/shape.json"], "Did you mean configs/shapes.json?"),
        (
            ["train.py", "--config", "configs/shapes.json", "--set", "train.iteration=3"],
            "Did you mean train.iterations?",
        ),
        (["train.py", "--config", "configs/shapes.json", "--set", "version=99"], "Upgrade retinanet_keras"),
        (["train.py", "--config", "README.md"], "is not valid JSON: line 1"),
        pytest.param(  # it imports TensorFlow, as the next ones do
            ["evaluate.py", "--split", "minival"],
            "There is no run in runs/r101_800. Train it first: python train.py",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["-m", "retinanet_keras", "detect", "--model", "nowhere", "README.md", "--to", "x"],
            "neither a run's folder",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["-m", "retinanet_keras", "convert", "README.md", "x.keras"],
            "README.md is not a .pkl of Detectron",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mistakes_are_answered_in_one_line(command, answer):
    status, output = shell(*command)
    assert status == 2 and answer in output and "Traceback" not in output


def test_help_does_not_wait_for_tensorflow():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    )
    code += "except SystemExit: pass\nassert 'tensorflow' not in sys.modules and 'keras' not in sys.modules"
    status, output = shell("-c", code)
    assert status == 0, output
    assert "--config" in output


def test_config_lists_every_setting():
    status, output = shell("-m", "retinanet_keras", "config")
    assert status == 0 and "loss.gamma = 2.0" in output and "[§5.1, Table 1b]" in output


def test_evaluate_scores_the_run_as_training_did(finished, run_copy):
    metrics = evaluate("configs/unused.json", workdir=run_copy)
    assert metrics == finished[1]
    assert json.loads((run_copy / "eval/val/metrics.json").read_text()) == metrics


def test_evaluate_an_export_and_a_results_file_give_the_runs_numbers(finished, run_copy):
    of_export = evaluate("configs/unused.json", workdir=run_copy, export=run_copy / "export")
    of_file = evaluate("configs/unused.json", workdir=run_copy, results=run_copy / "eval/val/results.json")
    for name in METRICS:
        expected = finished[1][name]
        assert of_export[name] == (expected if expected is None else pytest.approx(expected, abs=1e-3))
        assert of_file[name] == expected
    assert (run_copy / "eval/val-export/metrics.json").exists()
    assert json.loads((run_copy / "eval/val-results.json/metrics.json").read_text()) == of_file
    assert "<img" in (run_copy / "eval/val-results.json/report.html").read_text()
    assert json.loads((run_copy / "eval/val/metrics.json").read_text()) == finished[1]  # not written over


@pytest.mark.slow
def test_evaluate_weights_from_files(finished, run_copy):
    _, model = load_run(run_copy)
    model.save(run_copy / "model.keras")
    model.save_weights(run_copy / "model.weights.h5")
    for name in ("model.keras", "model.weights.h5"):
        assert evaluate("configs/unused.json", workdir=run_copy, weights=run_copy / name) == finished[1]


@pytest.mark.parametrize(
    "setting, given",
    [("detection.nms_iou=0.6", {"weights": "m.keras"}), ("data.short_side=96", {"export": "served"}),
     ("anchors.size=2", {"export": "served"}), ("model.prior=0.1", {"results": "found.json"})],
)  # fmt: skip
def test_settings_that_cannot_act_are_refused(run_copy, setting, given):
    with pytest.raises(UserError, match=f"{setting}: this setting is fixed in {next(iter(given.values()))}"):
        evaluate("c.json", workdir=run_copy, overrides=[setting], **given)


def test_evaluate_refuses_what_does_not_fit(run_copy):
    with pytest.raises(DataError, match="there is no file"):
        evaluate("c.json", workdir=run_copy, weights=run_copy / "none.keras")
    (run_copy / "bad.weights.h5").write_text("no weights")
    with pytest.raises(DataError, match="does not fit"):
        evaluate("c.json", workdir=run_copy, weights=run_copy / "bad.weights.h5")
    categories = json.loads((run_copy / "categories.json").read_text())
    categories[0]["name"] = "mushroom"
    (run_copy / "categories.json").write_text(json.dumps(categories))
    with pytest.raises(DataError, match="mushroom"):
        evaluate("c.json", workdir=run_copy)
    with pytest.raises(RunError, match="There is no run"):
        evaluate("c.json", workdir=run_copy / "nowhere")
    with pytest.raises(UserError, match="instances_moon.json"):
        evaluate("c.json", workdir=run_copy, split="moon", export=run_copy / "export")


@pytest.mark.slow
def test_export_makes_the_next_version(run_copy, tmp_path, capsys):
    assert commands.export(tmp_path / "served", run_copy) == 0
    assert commands.export(tmp_path / "served", run_copy) == 0
    assert sorted(p.name for p in (tmp_path / "served").iterdir()) == ["1", "2"]
    assert str(tmp_path / "served/2") in capsys.readouterr().out


@pytest.mark.slow
def test_a_keras_file_is_detected_with_and_exported(small_model, tmp_path, capsys):
    """Without a run: as after `convert`, at the paper's size."""
    categories = [{"label": i, "id": i + 3, "name": f"c{i}"} for i in range(3)]
    model = small_model(categories=categories, prior=0.3, detection=DetectionConfig(score_threshold=0.0))
    model.save(tmp_path / "model.keras")
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (45, 60, 3), "uint8")).save(image)
    assert commands.export(tmp_path / "served", weights=tmp_path / "model.keras") == 0
    capsys.readouterr()
    tables = []
    for source in (tmp_path / "model.keras", tmp_path / "served"):
        assert commands.detect(source, [image], tmp_path / "out", min_score=0.0) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and " c1 " in tables[0]
    (tmp_path / "bad.keras").write_text("no model")
    with pytest.raises(DataError, match="--model: .*no model that Keras can load"):
        commands.detect(tmp_path / "bad.keras", [image], tmp_path / "out", 0.3)
    with pytest.raises(DataError, match="--weights: there is no file"):
        commands.export(tmp_path / "served", weights=tmp_path / "none.keras")


def test_detect_reads_every_kind_of_image_and_goes_on_past_broken_ones(run_copy, tmp_path, capsys):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), "uint8")
    color = Image.fromarray(pixels)
    color.save(folder / "rgb.jpg")
    color.convert("L").save(folder / "gray.jpg")
    color.convert("CMYK").save(folder / "cmyk.jpg")
    color.convert("P").save(folder / "palette.png")
    color.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(pixels[..., 0].astype("uint16") * 257).save(folder / "sixteen.png")
    color.resize((1, 1)).save(folder / "one_pixel.png")
    color.resize((600, 20)).save(folder / "sub/long.webp")
    (folder / "truncated.jpg").write_bytes((folder / "rgb.jpg").read_bytes()[:700])
    (folder / "text.png").write_text("no image")
    (folder / "ignored.txt").write_text("not even named like one")

    for model in (run_copy, run_copy / "export", run_copy / "export/1"):
        to = tmp_path / f"found-{model.name}"
        assert commands.detect(model, [folder], to, min_score=0.0) == 1
        output = capsys.readouterr()
        assert "truncated.jpg cannot be read" in output.err and "text.png cannot be read" in output.err
        drawn = {str(path.relative_to(to)) for path in to.rglob("*.png")}
        names = [
            "rgb.jpg",
            "gray.jpg",
            "cmyk.jpg",
            "palette.png",
            "alpha.png",
            "sixteen.png",
            "one_pixel.png",
            "sub/long.webp",
        ]
        assert drawn == {f"{name}.png" for name in names}
        assert Image.open(to / "rgb.jpg.png").size == (80, 60)


def test_detect_takes_any_name_and_no_giant(small_model, tmp_path, capsys):
    categories = [{"label": i, "id": i + 1, "name": f"\x1b[3{i}m"} for i in range(3)]
    model = small_model(categories=categories, prior=0.3, detection=DetectionConfig(score_threshold=0.0))
    model.save(tmp_path / "model.keras")
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["a" * 251 + ".png", "\x1b[2J\udcff.png"]
    for name in names:
        Image.new("RGB", (80, 60)).save(folder / name)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    giant = bytearray(buffer.getvalue())
    giant[18:26] = struct.pack("<ii", 100_000, 100_000)
    (folder / "giant \x1b[2J.bmp").write_bytes(giant)
    assert commands.detect(tmp_path / "model.keras", [folder], tmp_path / "out", min_score=0.0) == 1
    output = capsys.readouterr()
    assert r"giant \x1b[2J.bmp has 10,000,000,000 pixels by its header, more than data.max_pixels" in output.err
    assert "\x1b" not in output.out + output.err and r"\x1b[2J\xff.png" in output.out and r"\x1b[3" in output.out
    assert len(list((tmp_path / "out").iterdir())) == len(names)


@pytest.mark.slow
def test_detect_prints_the_same_table_for_a_run_and_its_export(run_copy, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 60, 3), "uint8")).save(image)
    tables = []
    for model in (run_copy, run_copy / "export"):
        assert commands.detect(model, [image], tmp_path / "out", min_score=0.0) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and len(tables[0].splitlines()) > 3


def test_detect_refuses_a_folder_without_images(run_copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image files"):
        commands.detect(run_copy, [tmp_path / "empty"], tmp_path / "out", 0.3)


# Strangers' files and places


def big_png(path, side=20_000):
    """A PNG of few bytes that says it has side x side pixels, and has them."""
    row = zlib.compress(bytes(side * (3 * side + 1)), 9) if side < 1000 else zlib.compress(b"")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b""))


@pytest.mark.slow
def test_detect_has_the_pixel_limit_of_the_export(tiny_export, tmp_path, capsys, monkeypatch):
    """What is larger is told by its header and not decoded."""
    export = shutil.copytree(tiny_export, tmp_path / "served")
    images = tmp_path / "images"
    images.mkdir()
    big_png(images / "bomb.png")
    big_png(images / "large.png", 41)
    big_png(images / "small.png", 40)
    Image.new("RGB", (30, 30)).save(
        images / "frames.gif", save_all=True, append_images=[Image.new("RGB", (30, 30), "red")]
    )
    decoded, decode = [], image_decoding._graph
    monkeypatch.setattr(image_decoding, "_graph", lambda encoded: (decoded.append(len(encoded)), decode(encoded))[1])
    sizes = {path.name: path.stat().st_size for path in images.iterdir()}
    assert commands.detect(export, [images], tmp_path / "out", 0.3) == 1
    assert "bomb.png has 400,000,000 pixels" in capsys.readouterr().err
    assert sorted(decoded) == sorted(sizes[name] for name in ("frames.gif", "large.png", "small.png"))

    file = export / "1" / model_card.EXTRA / model_card.CARD
    tree = json.loads(file.read_text())
    assert tree["inputs"]["serving_bytes"]["max_pixels"] == ServingConfig().max_pixels
    tree["inputs"]["serving_bytes"]["max_pixels"] = 1600
    file.write_text(json.dumps(tree))
    decoded.clear()
    assert commands.detect(export, [images], tmp_path / "out", 0.3) == 1
    said = capsys.readouterr()
    assert "large.png has 1,681 pixels" in said.err and "frames.gif has 1,800 pixels by" in said.err
    assert decoded == [sizes["small.png"]] and "1 picture in" in said.out


def test_an_export_that_was_cut_off_is_told(tiny_export, tmp_path):
    export = shutil.copytree(tiny_export, tmp_path / "served")
    image = tmp_path / "image.png"
    big_png(image, 30)
    (shard,) = export.rglob("variables.data-*")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(
        DataError, match=r"1 is not a SavedModel of a RetinaNet exported by this package \(.*Export one with"
    ):
        commands.detect(export, [image], tmp_path / "out", 0.3)


@pytest.mark.parametrize("card_is_there", [True, False])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_an_export_whose_categories_are_not_its_models_is_told(tiny_export, tmp_path, count, card_is_there):
    served = shutil.copytree(tiny_export, tmp_path / "served")
    if not card_is_there:
        (served / "1" / model_card.EXTRA / model_card.CARD).unlink()
    categories = [{"label": i, "id": i, "name": str(i)} for i in range(count)]
    (served / "1" / CATEGORIES_FILE).write_text(json.dumps(categories))
    big_png(tmp_path / "image.png", 30)
    if count == 4 and not card_is_there:  # nothing tells, and no label is without a name
        assert commands.detect(served, [tmp_path / "image.png"], tmp_path / "out", 0.0) == 0
        return
    with pytest.raises(DataError, match=f"categories.json has {count} categories, expected "):
        commands.detect(served, [tmp_path / "image.png"], tmp_path / "out", 0.0)


def test_detect_takes_file_names_of_every_kind(tiny_export, tmp_path, capsys):
    names = [b"caf\xe9.png", b"\x1b[2J.png", b"l" * 251 + b".png"]
    folder = os.fsencode(tmp_path / "images")
    os.mkdir(folder)
    for name in names:
        big_png(Path(os.fsdecode(os.path.join(folder, name))), 30)
    Path(os.fsdecode(os.path.join(folder, b"\x1b[3J\xff.png"))).write_text("no image")
    assert commands.detect(tiny_export, [tmp_path / "images"], tmp_path / "out", 0.3) == 1
    said = capsys.readouterr()
    text = (said.out + said.err).encode("utf-8").decode()  # all of it is text
    assert "\x1b" not in text and r"caf\xe9.png" in text and r"\x1b[3J\xff.png cannot be read" in text
    assert len(list((tmp_path / "out").rglob("*.png"))) == len(names)


def test_output_paths_that_cannot_be_are_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "load_trained", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="^--to: .*file is not a folder"):
            commands.export(tmp_path / place, tmp_path)
        with pytest.raises(UserError, match="^--to: .*file is not a folder"):
            commands.detect(tmp_path, [tmp_path / "file"], tmp_path / place, 0.3)
    for place, answer in (("folder", "folder is a folder"), ("file/a.onnx", "file is not a folder")):
        with pytest.raises(UserError, match=f"^--onnx: .*{answer}"):
            commands.export(None, tmp_path, onnx=tmp_path / place)


def test_the_card_is_given_metrics_of_the_runs_own_step(tmp_path, caplog):
    folder, data = RunFolder(tmp_path), DataConfig(val_split="val", test_split="test")
    right = {"AP": 0.5, "step": 6, "dataset": "of val"}
    folder.data_file.write_text(json.dumps({split: {"annotations": f"of {split}"} for split in ("val", "test")}))
    for split, metrics in (("val", right), ("test", {**right, "step": 4, "dataset": "of test"})):
        folder.evaluation(split).mkdir(parents=True)
        (folder.evaluation(split) / "metrics.json").write_text(json.dumps(metrics))
    assert commands._metrics(folder, data, 6) == {"val": right}
    (folder.evaluation("val") / "metrics.json").write_text(json.dumps({**right, "dataset": "of another"}))
    assert commands._metrics(folder, data, 6) == {}
    for content in ("{", "[" * 100_000, '{"AP": ' + "1" * 5000 + "}"):
        caplog.clear()
        (folder.evaluation("val") / "metrics.json").write_text(content)
        assert commands._metrics(folder, data, 6) == {} and "metrics.json cannot be read" in caplog.text
    (folder.evaluation("val") / "metrics.json").write_text("[]")
    assert commands._metrics(folder, data, 6) == {}


def test_an_export_of_a_run_shows_the_metrics_of_its_weights(finished, run_copy, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(commands, "export_model", lambda model, config, to, **given: shown.append(
        model_card.describe(model, config, given["precision"], given["metrics"])["metrics"]))  # fmt: skip
    commands.export(tmp_path, run_copy)
    assert shown[-1]["val"]["AP"] == finished[1]["AP"] and shown[-1]["val"]["step"] == finished[1]["step"]
    commands.export(tmp_path, run_copy, precision="bfloat16")
    assert shown[-1] == "not measured"
    evaluate("c.json", workdir=run_copy, overrides=["detection.nms_iou=0.3"])  # other numbers in the same place
    commands.export(tmp_path, run_copy)
    assert shown[-1] == "not measured"


def test_a_finished_run_that_is_started_again_leaves_its_export_alone(finished, run_copy):
    """A server may be reading it."""
    before = {path.name: path.stat().st_ino for path in (run_copy / "export").rglob("*")}
    assert before
    run.train(load_config_of(RunFolder(run_copy)), run_copy)
    assert {path.name: path.stat().st_ino for path in (run_copy / "export").rglob("*")} == before
