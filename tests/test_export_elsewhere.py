"""An export outside of this package finds the same: TF Serving's loader in C++, the graph rewriter, gRPC, ONNX.

By default with a run of a few steps and pictures of noise. `pytest tests/test_export_elsewhere.py --run runs/bccd`
takes a trained one instead, and parts of the first images of its test split.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from serving_double import Double

from retinanet_keras.cli import commands
from retinanet_keras.config import config_from_dict
from retinanet_keras.data import canvas, dataset_formats
from retinanet_keras.errors import UserError
from retinanet_keras.serving import export
from retinanet_keras.serving import onnx as onnx_file
from retinanet_keras.serving.conversation import connect
from retinanet_keras.training.resume import load_run

pytestmark = pytest.mark.eager

SIZES = [(96, 64), (64, 96), (80, 80), (50, 120)]  # height, width


@pytest.fixture(scope="module")
def run_folder(request):
    return request.config.getoption("--run") or request.getfixturevalue("finished")[0].path


@pytest.fixture(scope="module")
def trained(run_folder):
    """(config, model) of the run; after a few steps its scores are low and different."""
    return load_run(run_folder)


@pytest.fixture(scope="module")
def base_path(run_folder, tmp_path_factory):
    to = tmp_path_factory.mktemp("served")
    assert commands.export(to, run_folder) == 0
    return to


@pytest.fixture(scope="module")
def saved(base_path):
    return base_path / "1"


@pytest.fixture(scope="module")
def picture(request, trained):
    """A function of a size (height, width) and a seed to an image uint8 [H, W, 3]."""
    data = trained[0].data
    split = dataset_formats.open_split(data, data.test_split) if request.config.getoption("--run") else None

    def make(size, seed=0):
        if split is None:
            noise = np.random.default_rng([seed, *size]).integers(0, 256, (6, 8, 3), "uint8")
            return np.asarray(Image.fromarray(noise).resize(size[::-1], Image.BICUBIC))
        with Image.open(split.files[seed]) as image:
            part = 3 * min(image.width / size[1], image.height / size[0]) / 4
            return np.asarray(image.convert("RGB").crop((0, 0, round(part * size[1]), round(part * size[0]))))

    return make


def own_path(trained, image):
    """(scores [n], labels [n], boxes [n, 4]) by the model itself, not folded, and evaluation's functions."""
    config, model = trained
    pixels, size, scale = canvas.fit(image[None], config.data.short_side, config.data.max_side)
    found = model.detect(pixels, size[None])
    boxes = canvas.to_original(found["boxes"], scale, image.shape[:2])[0].numpy()
    n = int(found["count"][0])
    assert n > 5  # else the comparison would be of nothing
    return found["scores"][0, :n].numpy(), found["labels"][0, :n].numpy(), boxes[:n]


def assert_same(found, expected, score=1e-5, box=0.05):
    """The same detections; two whose scores differ by less than `score` may come in either order."""
    assert len(found[0]) == len(expected[0])
    np.testing.assert_allclose(found[0], expected[0], atol=score, rtol=0)
    left = list(range(len(expected[0])))
    for one, label, sides in zip(*found, strict=True):
        same = [
            i for i in left
            if expected[1][i] == label and abs(expected[0][i] - one) <= score
            and np.abs(expected[2][i] - sides).max() <= box
        ]  # fmt: skip
        assert same, (one, label, sides)
        left.remove(same[0])


def as_png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """tests/serve.cc, built against the TensorFlow that is installed."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    out, home = tmp_path_factory.mktemp("serve") / "serve", Path(tf.sysconfig.get_lib())
    done = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-w", f"-I{home}/include", str(Path(__file__).with_name("serve.cc")), "-o",
         str(out), f"-L{home}", "-Wl,--no-as-needed", "-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2",
         f"-Wl,-rpath,{home}"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_tf_servings_loader_in_cpp(trained, saved, picture, program, tmp_path):
    """Three images of one size, and a batch of mixed sizes and orientations, after bytes that are no image."""
    same = [picture(SIZES[0], seed) for seed in range(3)]
    (tmp_path / "pixels").write_bytes(np.stack(same).tobytes())
    mixed = [picture(size) for size in SIZES]
    for i, image in enumerate(mixed):
        (tmp_path / f"{i}.png").write_bytes(as_png(image))
    files = [tmp_path / f"{i}.png" for i in range(len(mixed))]
    height, width = same[0].shape[:2]
    command = [program, saved, height, width, tmp_path / "pixels", *files]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *lines = done.stdout.strip().split("\n")
    assert first == f"bad {tf.errors.INVALID_ARGUMENT}"
    assert [line.split()[0] for line in lines] == ["serving_default"] * 3 + ["serving_bytes"] * 4
    for line, image in zip(lines, same + mixed, strict=True):
        _, count, *numbers = line.split()
        rows = np.array(numbers, "float64").reshape(int(count), 6)
        assert_same((rows[:, 0], rows[:, 1], rows[:, 2:]), own_path(trained, image))


@pytest.mark.slow
def test_tf_servings_loader_in_cpp_with_no_images(saved, program, tmp_path):
    """And with oneDNN, whose convolutions fail on an empty batch."""
    (tmp_path / "pixels").touch()
    command = [program, saved, "64", "96", tmp_path / "pixels"]
    env = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"bad {tf.errors.INVALID_ARGUMENT}\n"


def run_in_session(saved, signature, value, config=None):
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph, config=config) as session:
        meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(saved)).signature_def[signature]
        (entry,) = meta.inputs.values()
        found = session.run({name: output.name for name, output in meta.outputs.items()}, {entry.name: value})
    return [
        (found["scores"][i, :n], found["labels"][i, :n], found["boxes"][i, :n])
        for i, n in enumerate(found["num_detections"])
    ]


@pytest.mark.slow
def test_the_session_loader_with_mixed_sizes_in_a_batch_and_alone(trained, saved, picture):
    images = [picture(size) for size in SIZES]
    for found, image in zip(run_in_session(saved, "serving_bytes", [as_png(i) for i in images]), images, strict=True):
        assert_same(found, own_path(trained, image))
        assert_same(run_in_session(saved, "serving_bytes", [as_png(image)])[0], found, 1e-6, 1e-3)


@pytest.mark.slow
def test_grpc_with_mixed_sizes_and_with_pixels(trained, base_path, picture):
    """By way of the double of a server."""
    images = [picture(size) for size in SIZES]
    with Double(base_path) as double, connect(double.grpc, "shapes") as ask:
        found = ask("serving_bytes", {"image_bytes": [as_png(image) for image in images]})
        for i, image in enumerate(images):
            expected, pixels = own_path(trained, image), ask("serving_default", {"images": image[None]})
            for answer, row in ((found, i), (pixels, 0)):
                n = answer["num_detections"][row]
                assert_same([answer[name][row, :n] for name in ("scores", "labels", "boxes")], expected)


def rewriter_acts(config):
    """Whether TensorFlow computes a convolution otherwise under a config: its rewriter needs oneDNN's kernels."""
    rng, found = np.random.default_rng(0), []
    for c in (config, None):
        with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph, config=c) as session:
            x = tf.compat.v1.placeholder(tf.float32, (1, 16, 16, 8))
            y = tf.nn.relu(tf.nn.conv2d(x, tf.constant(rng.normal(size=(3, 3, 8, 8)), tf.float32), 1, "SAME"))
            y = tf.nn.conv2d(y, tf.constant(rng.normal(size=(3, 3, 8, 8)), tf.float32), 1, "SAME")
            found.append(session.run(y, {x: np.linspace(-1, 1, 2048).reshape(1, 16, 16, 8)}))
        rng = np.random.default_rng(0)
    return not np.array_equal(*found)


def test_the_graph_rewriter_of_mixed_precision(saved, picture):
    """What `tensorflow_model_server --mixed_precision=bfloat16` sets: scores move by less than bfloat16's steps do.

    Where TensorFlow cannot rewrite, they do not move at all.
    """
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 = 1  # RewriterConfig.ON
    image = picture(SIZES[0])[None]
    (found,), (exact,) = (run_in_session(saved, "serving_default", image, c) for c in (config, None))
    assert np.array_equal(found[0], exact[0]) != rewriter_acts(config)
    np.testing.assert_allclose(found[0][:20], exact[0][:20], atol=0.02)


def test_onnx_finds_the_same(trained, run_folder, picture, tmp_path):
    """One file for any batch, height and width, written by the command alone."""
    pytest.importorskip("tf2onnx", reason="the extra `onnx` is not installed")
    onnx = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    path = tmp_path / "to" / "model.onnx"
    assert commands.export(None, run_folder, onnx=path) == 0
    session = onnx.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["categories"]) == trained[1].categories
    names = [output.name for output in session.get_outputs()]
    for batch in ([picture(SIZES[0], seed) for seed in range(2)], [picture(SIZES[1])], [picture(SIZES[3])]):
        found = dict(zip(names, session.run(None, {"images": np.stack(batch)}), strict=True))
        for i, image in enumerate(batch):
            n = found["num_detections"][i]
            assert_same([found[name][i, :n] for name in ("scores", "labels", "boxes")], own_path(trained, image))
    assert {len(found) for found in session.run(None, {"images": np.zeros((0, 64, 96, 3), "uint8")})} == {0}


def test_without_its_packages_onnx_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(UserError, match="pip install tf2onnx"):
        onnx_file.write(None, trained[1].categories, tmp_path / "model.onnx")


@pytest.mark.slow
def test_the_limit_of_pixels_is_the_configurations(trained):
    config, model = trained
    small = config_from_dict({**config.to_dict(), "serving": {"max_pixels": 80 * 80}})
    bytes_of = export.signatures(model, small)[1]
    square = as_png(np.zeros((80, 80, 3), "uint8"))
    assert bytes_of(tf.constant([square]))["boxes"].shape == (1, config.detection.max_detections, 4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most"):
        bytes_of(tf.constant([as_png(np.zeros((80, 81, 3), "uint8"))]))
