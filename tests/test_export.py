"""The SavedModel finds what the run's own path finds, in a process that knows nothing of this package."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from retinanet_keras import RetinaNet, folding
from retinanet_keras.config import config_from_dict
from retinanet_keras.data import canvas
from retinanet_keras.evaluation.identity import identity
from retinanet_keras.serving import detector, export
from retinanet_keras.serving.model_card import describe

pytestmark = pytest.mark.eager

CONFIG = config_from_dict({"data": {"short_side": 96, "max_side": 128}})
CATEGORIES = [{"label": 0, "id": 7, "name": "cat"}, {"label": 1, "id": 3, "name": "dog"}]
SIZES = [(120, 160), (160, 120), (75, 200), (64, 64)]  # height, width


@pytest.fixture(scope="module")
def model():
    net = RetinaNet(2, "resnet18", width=8, fpn_channels=16, head_depth=1, prior=0.3, categories=CATEGORIES)
    rng = np.random.default_rng(0)
    for subnet in (net.class_subnet, net.box_subnet):  # from the initial sigma .01 all scores would be equal
        kernel = subnet.final.kernel
        kernel.assign(rng.normal(0, 0.2, kernel.shape))
    return net


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return export.export_model(model, CONFIG, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def loaded(saved):
    return tf.saved_model.load(str(saved))


def picture(size, seed=0):
    rng = np.random.default_rng([seed, *size])
    return np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), "uint8")).resize(size[::-1], Image.BICUBIC))


def own_path(model, image):
    """Resize, detect and scale back with the functions that evaluation uses."""
    pixels, size, scale = canvas.fit(image[None], CONFIG.data.short_side, CONFIG.data.max_side)
    found = model.detect(pixels, size[None])
    boxes = canvas.to_original(found["boxes"], scale, image.shape[:2])
    return {**{name: np.asarray(value)[0] for name, value in found.items()}, "boxes": boxes[0].numpy()}


def assert_same(found, expected):
    n = int(expected["count"])
    assert n > 5  # else the comparison would be of nothing
    assert int(found["num_detections"]) == n
    np.testing.assert_allclose(found["scores"][:n], expected["scores"][:n], atol=1e-5)
    # Rows whose scores differ by rounding alone may come in either order.
    pairs = np.abs(found["scores"][:n, None] - expected["scores"][:n]) <= 1e-5
    pairs &= np.abs(found["boxes"][:n, None] - expected["boxes"][:n]).max(-1) <= 0.05
    pairs &= found["labels"][:n, None] == expected["labels"][:n]
    assert pairs.any(0).all() and pairs.any(1).all()


def first(outputs):
    return {name: np.asarray(value)[0] for name, value in outputs.items()}


@pytest.mark.parametrize("size", [*SIZES[:2], *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES[2:])])
def test_images_signature_equals_the_runs_own_path(model, saved, size):
    detect, categories = detector.of_export(saved)
    image = picture(size)
    found = first(detect(image[None]))
    assert_same(found, own_path(model, image))
    n = found["num_detections"]
    np.testing.assert_array_equal(found["category_ids"][:n], np.array([7, 3])[found["labels"][:n]])
    assert [name.decode() for name in found["names"][:n]] == [categories.names[label] for label in found["labels"][:n]]
    assert (found["boxes"][:n] >= 0).all() and (found["boxes"][:n] <= [*size[::-1]] * 2).all()


def test_a_batch_of_images_equals_its_images(model, saved):
    detect, _ = detector.of_export(saved)
    images = np.stack([picture(SIZES[0], seed) for seed in range(3)])
    found = detect(images)
    for i, image in enumerate(images):
        assert_same({name: value[i] for name, value in found.items()}, own_path(model, image))


def test_bytes_of_mixed_sizes_and_formats_in_one_batch(model, loaded):
    encoded, pictures = [], [picture(size) for size in SIZES]
    for image, kind in zip(pictures, ("PNG", "BMP", "PNG", "WEBP"), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind, lossless=True)
        encoded.append(buffer.getvalue())
    found = loaded.signatures["serving_bytes"](image_bytes=tf.constant(encoded))
    for i, image in enumerate(pictures):
        assert_same({name: value.numpy()[i] for name, value in found.items()}, own_path(model, image))


def test_rows_past_the_count_are_empty():
    """An untrained model is sure of nothing."""
    net = RetinaNet(2, "resnet18", width=8, fpn_channels=16, head_depth=1, categories=CATEGORIES)
    found = export.signatures(net, CONFIG)[0](tf.constant(picture(SIZES[0])[None]))
    assert found["num_detections"].numpy() == [0]
    assert not found["boxes"].numpy().any() and not found["scores"].numpy().any()
    assert set(found["labels"].numpy()[0]) == set(found["category_ids"].numpy()[0]) == {-1}
    assert set(found["names"].numpy()[0]) == {b""}


SESSION = """
import sys, numpy as np, tensorflow as tf
graph = tf.Graph()
with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
    meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], sys.argv[1])
    data = np.load(sys.argv[2])
    out = {}
    for key, name, value in [("images", "serving_default", data["image"][None]),
                             ("image_bytes", "serving_bytes", np.array([data["png"].tobytes()] * 2, object))]:
        signature = meta.signature_def[name]
        outputs = {k: v.name for k, v in signature.outputs.items()}
        result = session.run(outputs, {signature.inputs[key].name: value})
        out.update({f"{name}_{k}": v[0] for k, v in result.items() if k != "names"})
assert not any(m.split(".")[0] == "retinanet_keras" for m in sys.modules), "imports more than tensorflow"
np.savez(sys.argv[3], **out)
"""


def test_session_loader_in_a_process_with_tensorflow_alone(model, saved, tmp_path):
    """TF Serving's way of loading; it fails where variables hang on Keras objects."""
    image = picture(SIZES[1])
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    np.savez(tmp_path / "in.npz", image=image, png=np.frombuffer(buffer.getvalue(), "uint8"))
    command = [sys.executable, "-c", SESSION, str(saved), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    out = np.load(tmp_path / "out.npz")
    for name in ("serving_default", "serving_bytes"):
        found = {key.removeprefix(f"{name}_"): out[key] for key in out if key.startswith(name)}
        assert_same(found, own_path(model, image))


EMPTY = """
import sys, numpy as np, tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
answers = [signatures["serving_default"](images=tf.zeros([0, 50, 70, 3], tf.uint8)),
           signatures["serving_bytes"](image_bytes=tf.zeros([0], tf.string))]
graph = tf.Graph()
with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
    meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], sys.argv[1])
    none = {"serving_default": np.zeros([0, 50, 70, 3], "uint8"), "serving_bytes": np.array([], object)}
    for name, value in none.items():
        signature = meta.signature_def[name]
        (entry,) = signature.inputs.values()
        answers.append(session.run({k: v.name for k, v in signature.outputs.items()}, {entry.name: value}))
for shape in ([1, 0, 0, 3], [2, 0, 40, 3], [2, 40, 0, 3]):
    try:
        signatures["serving_default"](images=tf.zeros(shape, tf.uint8))
    except tf.errors.InvalidArgumentError:
        continue
    sys.exit(f"images of shape {shape} were accepted")
for found in answers:
    assert {name: value.shape[1:] for name, value in found.items()} == {
        **{name: (100,) for name in ("scores", "labels", "category_ids", "names")}, "boxes": (100, 4),
        "num_detections": ()}
    assert {value.shape[0] for value in found.values()} == {0}
"""
EMPTY_FOR_MODEL = """
import keras, numpy as np, tensorflow as tf
from conftest import five_convolutions
from retinanet_keras import RetinaNet
model = RetinaNet(2, five_convolutions(), fpn_channels=16, head_depth=1)
none, one = np.zeros([0, 50, 70, 3], "uint8"), np.zeros([1, 50, 70, 3], "uint8")
batches = tf.data.Dataset.from_generator(lambda: (none, one, none), output_signature=tf.TensorSpec([None, 50, 70, 3]))
for found, count in [(model.detect(none), 0), (model.predict_on_batch(none), 0), (model.predict(none, verbose=0), 0),
                     (model.predict(batches, verbose=0), 1)]:
    assert found["boxes"].shape == (count, 100, 4) and found["count"].shape == (count,)
"""


@pytest.mark.parametrize(
    "code", [EMPTY, pytest.param(EMPTY_FOR_MODEL, marks=pytest.mark.slow)], ids=["export", "model"]
)
def test_an_empty_batch_has_no_detections(saved, code):
    """With oneDNN, whose convolutions fail on one; whether it is used is decided when TensorFlow starts."""
    places = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    env = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1", "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_bad_bytes_are_an_invalid_argument(loaded):
    signature = loaded.signatures["serving_bytes"]
    for bad in (b"", b"not an image", b"\xff\xd8\xff\xe0 cut"):
        with pytest.raises(tf.errors.InvalidArgumentError):
            signature(image_bytes=tf.constant([bad]))


def test_versions_count_up_and_a_given_one_is_replaced(model, saved, tmp_path):
    assert saved.name == "1" and export.find(saved.parent) == saved and export.find(saved) == saved
    assert json.loads((saved / export.CATEGORIES_FILE).read_text()) == CATEGORIES
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "saved_model.pb").touch()
    assert export.versions(tmp_path) == [3]
    assert export.find(tmp_path / "nowhere") is None


def test_the_weights_are_stored_once(model, saved):
    graph = saved_model_pb2.SavedModel.FromString((saved / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def
    constants = [node for function in graph.library.function for node in function.node_def if node.op == "Const"]
    stored = sum(len(node.attr["value"].tensor.tensor_content) for node in constants)
    stored += (saved / "variables/variables.data-00000-of-00001").stat().st_size
    assert 0.97 < stored / (4 * model.count_params()) < 1.03


def test_nothing_in_the_graph_runs_python_or_reads_the_disk(saved):
    graph = saved_model_pb2.SavedModel.FromString((saved / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def
    asked = [f for f in graph.library.function if "traced_save" not in f.signature.name]
    asked = [f for f in asked if "traced_restore" not in f.signature.name]  # loading itself reads the variables' file
    inside = {node.op for function in asked for node in function.node_def} | {node.op for node in graph.node}
    assert "Conv2D" in inside and not {op for op in inside if "Py" in op or "File" in op}


@pytest.mark.parametrize("settings", [
    {"backbone": "resnet18", "norm": "batch"},
    pytest.param({"backbone": "resnet50", "norm": "frozen", "stride_in": "3x3"}, marks=pytest.mark.slow),
    {"backbone": "resnext101_32x8d", "norm": "frozen", "width": 8},
    pytest.param(
        {"backbone": "resnet18", "norm": "group", "head_norm": "group", "p6_source": "p5"}, marks=pytest.mark.slow
    ),
])  # fmt: skip
def test_the_folded_model_finds_what_the_model_finds(small_model, settings):
    """Batch normalization with statistics, scales and shifts of its own; two images of different sizes on a canvas."""
    net = small_model(2, prior=0.3, **{"width": 8, **settings})
    rng = np.random.default_rng(0)
    for layer in net.backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.gamma.shape
            factor = 0.3 if layer.name.endswith(("_conv3_norm", "_conv2_norm")) else 1.0
            layer.gamma.assign(factor * rng.uniform(0.7, 1.3, shape))
            layer.beta.assign(rng.normal(0, 0.2, shape))
            layer.moving_mean.assign(rng.normal(0, 0.2, shape))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, shape))
    for subnet in (net.class_subnet, net.box_subnet):
        subnet.final.kernel.assign(rng.normal(0, 0.1, subnet.final.kernel.shape))
    before = [weight.numpy() for weight in net.weights]
    images, sizes = np.stack([picture((96, 128), seed) for seed in (0, 1)]), np.array([[96, 128], [70, 101]])
    found, expected = folding.compiled(net)(images, sizes), net.detect(images, sizes)
    for i in range(2):
        one = {**first({name: value[i : i + 1] for name, value in found.items()})}
        assert_same(
            {**one, "num_detections": one["count"]}, {name: value[i].numpy() for name, value in expected.items()}
        )
    for weight, old in zip(net.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)


@pytest.mark.slow
def test_a_keras_backbone_runs_as_it_is(tmp_path):
    inputs = keras.Input((None, None, 3))
    outputs, x = {}, keras.layers.Conv2D(8, 3, 4, "same")(inputs)
    for name in ("c3", "c4", "c5"):
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(8, 3, 2, "same")(x)))
        outputs[name] = x
    keras.utils.set_random_seed(0)
    net = RetinaNet(2, keras.Model(inputs, outputs), fpn_channels=16, head_depth=1, prior=0.3, categories=CATEGORIES)
    kernel = net.class_subnet.final.kernel
    kernel.assign(np.random.default_rng(0).normal(0, 0.2, kernel.shape))
    detect, _ = detector.of_export(export.export_model(net, CONFIG, tmp_path))
    assert_same(first(detect(picture(SIZES[0])[None])), own_path(net, picture(SIZES[0])))


@pytest.mark.parametrize(("precision", "ratio"), [("bfloat16", 2.5), ("bfloat16", 0.5), ("float32", 2.5)])
def test_a_slower_precision_is_told_by_what_was_timed(model, tmp_path, monkeypatch, caplog, precision, ratio):
    monkeypatch.setattr(folding, "bfloat16_time", lambda: ratio)

    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr(export, "signatures", stop)
    with pytest.raises(InterruptedError):  # before anything is written
        export.export_model(model, CONFIG, tmp_path, precision=precision)
    told = "bfloat16 takes 2.5 times as long as in float32 on this machine" in caplog.text
    assert told == (precision == "bfloat16" and ratio > 1)


def test_bfloat16_is_timed_against_float32():
    assert 0.05 < folding.bfloat16_time(side=128, turns=2) < 500


@pytest.mark.slow
def test_bfloat16_is_an_export_of_half_the_size_with_nearly_the_same_scores(model, saved, tmp_path):
    small = export.export_model(model, CONFIG, tmp_path, precision="bfloat16")
    image = picture(SIZES[0])[None]
    found, expected = (first(detector.of_export(path)[0](image)) for path in (small, saved))
    assert found["scores"].dtype == found["boxes"].dtype == np.float32
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=0.03)
    assert not np.array_equal(found["scores"], expected["scores"])
    sizes = [(path / "variables/variables.data-00000-of-00001").stat().st_size for path in (small, saved)]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_warm_up_requests_run(saved, loaded):
    logs = [
        prediction_log_pb2.PredictionLog.FromString(record.numpy())
        for record in tf.data.TFRecordDataset(str(saved / "assets.extra/tf_serving_warmup_requests"))
    ]
    requests = [log.predict_log.request for log in logs]
    assert sorted({r.model_spec.signature_name for r in requests}) == ["serving_bytes", "serving_default"]
    for request in requests:
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        found = loaded.signatures[request.model_spec.signature_name](**inputs)
        assert found["boxes"].shape == (1, 100, 4)


def test_the_model_card(model, tmp_path):
    config = config_from_dict({"data": {"short_side": 96, "max_side": 128}, "serving": {"license": "CC <BY> 4.0"}})
    measured = {"AP": 0.25, "step": 7, **identity(model, config, "val")}
    saved = export.export_model(model, config, tmp_path, metrics={"val": measured})
    card = json.loads((saved / "assets.extra/model_card.json").read_text())
    assert card["config"] == config.to_dict() and card["metrics"] == {"val": {"AP": 0.25, "step": 7}}
    assert card["license"]["weights"] == "CC <BY> 4.0" and card["model"]["parameters"] == model.count_params()
    signature = tf.saved_model.load(str(saved)).signatures["serving_default"]
    assert set(card["outputs"]) == set(signature.structured_outputs)
    page = (saved / "assets.extra/model_card.html").read_text()
    assert "CC &lt;BY&gt; 4.0" in page and "0.25" in page and "http" not in page.split("</style>")[0]
    check = ["sha256sum", "--check", "--quiet", "assets.extra/SHA256SUMS"]
    assert subprocess.run(check, cwd=saved).returncode == 0
    with open(saved / "saved_model.pb", "ab") as file:
        file.write(b"!")
    assert subprocess.run(check, cwd=saved, capture_output=True).returncode == 1


def test_the_card_claims_nothing_that_is_not_known(model, saved):
    card = describe(model, CONFIG, run=False)
    assert card["metrics"] == "not measured" and "not known" in card["config"]
    assert "not stated" in card["license"]["weights"]


def test_the_card_shows_metrics_of_these_weights_and_settings_alone(model):
    metrics = {"AP": 0.25, "curves": {}, "step": 7, **identity(model, CONFIG, "val")}
    others = [
        {**metrics, "weights": "0" * 16},
        {**metrics, "settings": {**metrics["settings"], "detection.nms_iou": 0.6}},
        {**metrics, "settings": {**metrics["settings"], "data.short_side": 800}},
        {"AP": 0.25},
    ]
    for other in others:
        assert describe(model, CONFIG, metrics={"val": other})["metrics"] == "not measured"
    shown = describe(model, CONFIG, metrics={"val": metrics, "test": others[0]})["metrics"]
    assert shown == {"val": {"AP": 0.25, "step": 7}}
    assert describe(model, CONFIG, metrics={"test": metrics})["metrics"] == "not measured"
    assert describe(model, CONFIG, "bfloat16", {"val": metrics})["metrics"] == "not measured"


def test_half_a_character_in_a_name_is_a_question_mark_in_the_graph(small_model):
    model = small_model(2, prior=0.3, categories=[{"label": i, "id": i, "name": f"{i}\ud800"} for i in range(2)])
    found = export.signatures(model, CONFIG)[0](tf.constant(picture(SIZES[3])[None]))
    assert found["num_detections"].numpy() > 0 and set(found["names"].numpy()[0]) <= {b"0?", b"1?", b""}
