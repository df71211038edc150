"""Released files: the outputs and detections of the frameworks they come from, by `foreign`, which is independent."""

import functools
import pickle

import foreign
import keras
import numpy as np
import pytest
from keras import ops

from retinanet_keras import RetinaNet, checkpoints, detections
from retinanet_keras.anchors import anchor_boxes, level_sizes
from retinanet_keras.cli.parser import main
from retinanet_keras.errors import UserError

pytestmark = pytest.mark.eager

FILES = {  # name -> (kind, what makes the weights, those that its own forward takes, type of the file)
    "Detectron R50": ("detectron", lambda: foreign.detectron("R50", extras=True), None, "pkl"),
    "Detectron R101": ("detectron", lambda: foreign.detectron("R101"), None, "pkl"),
    "Detectron X101": ("detectron", lambda: foreign.detectron("X101-32x8d"), None, "pkl"),
    "Detectron2": ("detectron2", lambda: foreign.detectron2(buffers=True), None, "pkl"),
    "torchvision v1": ("torchvision_v1", foreign.torchvision_v1, None, "npz"),
    "torchvision v1, older names": (
        "torchvision_v1", lambda: foreign.torchvision_v1(older_names=True), foreign.torchvision_v1, "npz"
    ),
    "torchvision v2": ("torchvision_v2", foreign.torchvision_v2, None, "npz"),
}  # fmt: skip
PADDING = {"detectron": 128, "detectron2": 32, "torchvision_v1": 32, "torchvision_v2": 32}
MEAN = {  # RGB, to pad with what becomes 0
    "detectron": foreign.DETECTRON_MEAN[::-1], "detectron2": foreign.DETECTRON2_MEAN[::-1],
    "torchvision_v1": np.multiply(foreign.TORCHVISION_MEAN, 255),
    "torchvision_v2": np.multiply(foreign.TORCHVISION_MEAN, 255),
}  # fmt: skip


def write(path, weights):
    """A file as the framework writes it: Detectron and Detectron2 wrap the weights."""
    if path.suffix == ".npz":
        np.savez(path, **weights)
    else:
        wrapper = "blobs" if any(name.endswith("_w") for name in weights) else "model"
        path.write_bytes(pickle.dumps({wrapper: weights, "cfg": "MODEL: ..."}, 4))
    return path


SLOW = {"Detectron R101", "Detectron X101", "torchvision v1, older names"}  # of layouts that others are of, too


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FILES]
)
def released(request, tmp_path_factory):
    """(kind, weights of `foreign`, the model made of their file)."""
    kind, make, plain, suffix = FILES[request.param]
    weights = make()
    model = checkpoints.load(write(tmp_path_factory.mktemp("released") / f"file.{suffix}", weights))
    return kind, plain() if plain else weights, model


def theirs(kind, weights, images):
    """Logits and deltas of the framework in this project's order, of 80 classes."""
    logits, deltas = (foreign.in_that_order(kind, values) for values in foreign.forward(kind, weights, images))
    return logits[..., foreign.COCO_IDS] if logits.shape[-1] == 91 else logits, deltas


@pytest.mark.parametrize("height, width", [
    (96, 160), pytest.param(320, 416, marks=pytest.mark.slow), pytest.param(256, 352, marks=pytest.mark.slow),
])  # fmt: skip
def test_outputs_and_anchors_are_the_frameworks(released, height, width):
    kind, weights, model = released
    images = np.random.default_rng(1).integers(0, 256, (1, height, width, 3)).astype("uint8")
    ours, (logits, deltas) = model(images), theirs(kind, weights, images)
    assert logits.std() > 1 and deltas.std() > 0.05
    np.testing.assert_allclose(ours["logits"], logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours["deltas"], deltas, rtol=0, atol=1e-5)
    expected = foreign.in_that_order(kind, foreign.anchors(kind, height, width)[None])[0]
    np.testing.assert_allclose(anchor_boxes(height, width, model.anchors), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Detectron R50", "Detectron2", "torchvision v1", "torchvision v2"])
def test_post_processing_is_the_frameworks(name):
    """On random logits and deltas of one image, whose size is no multiple of anything."""
    kind = FILES[name][0]
    layout = next(layout for layout in checkpoints.layouts.LAYOUTS if layout.name == name.split()[0])
    anchors, detection = layout.settings["anchors"], layout.settings["detection"]
    height, width = 256, 352
    sizes = foreign.level_sizes(height, width)
    rng = np.random.default_rng(0)
    logits = rng.normal(-5, 2, (1, sum(sizes), 6)).astype("float32")
    deltas = (rng.normal(size=(1, sum(sizes), 4)) * [0.5, 0.5, 0.3, 0.3]).astype("float32")
    deltas[0, ::50, 2:] = 6  # beyond the clip
    frame = foreign.anchors(kind, height, width)
    expected = foreign.detections(kind, logits[0], deltas[0], frame, sizes, 230, 301)

    settings = {k: getattr(detection, k) for k in ("clip", "p7_threshold", "max_detections")}
    found = detections.decode(
        foreign.in_that_order(kind, logits), foreign.in_that_order(kind, deltas), anchor_boxes(height, width, anchors),
        level_sizes(height, width, anchors), 230, 301, **settings,
    )  # fmt: skip
    found = {key: ops.convert_to_numpy(value)[0] for key, value in found.items()}
    count = int(found["count"])
    assert count == len(expected[1]) and count > 90
    np.testing.assert_allclose(found["boxes"][:count], expected[0], atol=2e-3)
    np.testing.assert_allclose(found["scores"][:count], expected[1], atol=1e-6)
    np.testing.assert_array_equal(found["labels"][:count], expected[2])
    assert (found["labels"][count:] == -1).all() and not found["boxes"][count:].any()


@pytest.mark.parametrize(
    "released",
    [
        name if name in ("Detectron R50", "torchvision v2") else pytest.param(name, marks=pytest.mark.slow)
        for name in FILES
    ],
    indirect=True,
)
def test_detections_are_the_frameworks(released):
    """From pixels to boxes, padded as the framework pads, whatever color the padding given has."""
    kind, weights, model = released
    height, width, multiple = 150, 201, PADDING[kind]
    image = np.random.default_rng(2).integers(0, 256, (height, width, 3)).astype("float32")
    padded = np.tile(np.float32(MEAN[kind]), (-(-height // multiple) * multiple, -(-width // multiple) * multiple, 1))
    padded[:height, :width] = image
    logits, deltas = foreign.forward(kind, weights, padded[None])
    if logits.shape[-1] == 91:
        logits[..., np.setdiff1d(range(91), foreign.COCO_IDS)] = -1000  # classes that the model has not
    frame = foreign.anchors(kind, *padded.shape[:2])
    boxes, scores, labels = foreign.detections(
        kind, logits[0], deltas[0], frame, foreign.level_sizes(*padded.shape[:2]), height, width
    )
    given = np.full((1, 160, 224, 3), 77, "uint8")
    given[0, :height, :width] = image
    found = {key: ops.convert_to_numpy(value)[0] for key, value in model.detect(given, [[height, width]]).items()}
    ids = np.array(foreign.COCO_IDS if kind.startswith("torchvision") else range(80))
    assert abs(int(found["count"]) - len(scores)) <= 1 and len(scores) > 50
    for box, score, label in zip(boxes[:30], scores, labels, strict=False):
        same = (ids[found["labels"]] == label) & (np.abs(found["scores"] - score) < 1e-4)
        assert np.abs(found["boxes"][same] - box).max(axis=1).min() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("released", ["Detectron R50", "torchvision v2"], indirect=True)
def test_the_model_can_be_saved_and_trained(released, tmp_path):
    """Detections after saving are the same, and so are the parts that are frozen."""
    _, _, model = released
    images = np.random.default_rng(3).integers(0, 256, (1, 64, 96, 3)).astype("uint8")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.get_config() == model.get_config()
    for name, value in model.detect(images).items():
        np.testing.assert_allclose(again.detect(images)[name], value, atol=1e-3)
    assert [c["name"] for c in again.categories][79] == "toothbrush" and again.categories[79]["id"] == 90
    again.compile(keras.optimizers.SGD(1e-3))
    truth = {"boxes": np.float32([[[10, 10, 60, 50]]]), "labels": np.array([[17]])}
    before = {v.path: ops.convert_to_numpy(v) for v in again.variables}
    assert np.isfinite(again.fit(images, truth, verbose=0).history["loss"][0])
    moved = {path for path, value in before.items() if (value != ops.convert_to_numpy(next(
        v for v in again.variables if v.path == path))).any()}  # fmt: skip
    assert any("class_subnet" in path for path in moved) and any("res5" in path for path in moved)
    assert not any("stem" in path or "res2" in path or "_norm/" in path for path in moved if "subnet" not in path)


# Backbones


@pytest.mark.parametrize("depth, name, statistics", [
    pytest.param("R50", "resnet50", False, marks=pytest.mark.slow), ("R50", "resnet50", True),
    pytest.param("X101-32x8d", "resnext101_32x8d", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_imagenet_backbones(depth, name, statistics, tmp_path):
    weights = foreign.detectron_imagenet(
        depth, classifier="pred" if depth[0] == "X" else "fc1000", statistics=statistics
    )
    path = write(tmp_path / "file.pkl", weights)
    line = checkpoints.convert(path, tmp_path / "file.weights.h5")
    assert name in line
    model = RetinaNet(2, name, weights=tmp_path / "file.weights.h5", fpn_channels=16, head_depth=0)
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3)).astype("float32")
    mean = foreign.DETECTRON2_MEAN if statistics else foreign.DETECTRON_MEAN
    assert model.pixel_mean == pytest.approx(mean[::-1])
    if statistics:  # Detectron2's copies: foreign's network takes scale and shift, and its own mean and deviation
        for norm in [key.removesuffix("_gamma") for key in weights if key.endswith("_gamma")]:
            moments = [weights[f"{norm}_{what}"] for what in ("gamma", "beta", "running_mean", "running_var")]
            weights[f"{norm}_s"], weights[f"{norm}_b"] = foreign._affine(*moments, 1e-5)
        std = np.float32([57.375, 57.12, 58.395]) if depth[0] == "X" else np.ones(3, "float32")
        weights["conv1_w"] = weights["conv1_w"] / std[None, :, None, None]
        shift = np.float32(foreign.DETECTRON2_MEAN)[::-1] - np.float32(foreign.DETECTRON_MEAN)[::-1]
    else:
        shift = np.zeros(3, "float32")
    expected = foreign.backbone("detectron", weights, images - shift)
    ours = model.backbone((images - np.float32(model.pixel_mean)) / np.float32(model.pixel_std))
    for feature, theirs_ in zip(("c3", "c4", "c5"), expected, strict=True):
        assert theirs_.numpy().std() > 0.1
        np.testing.assert_allclose(ours[feature], theirs_, atol=1e-4 * np.abs(theirs_).max())


def test_convert_as_typed(tmp_path, monkeypatch, capsys):
    path, out = write(tmp_path / "model_final.pkl", foreign.detectron2()), tmp_path / "new" / "out.keras"
    monkeypatch.setattr("sys.argv", ["retinanet_keras", "convert", str(path), str(out)])
    assert not main()
    assert f"80 classes on resnet50, written to {out}" in capsys.readouterr().out
    assert keras.models.load_model(out).detection.clip == "after_nms"


# Refusals


@pytest.fixture(scope="module")
def small():
    """A file of two classes, to be spoilt."""
    return whole(foreign.detectron2, 2)


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


def test_unknown_missing_and_misshaped_entries_are_listed_by_name(small, tmp_path):
    spoilt = without(small, "backbone.fpn_lateral3.bias")
    spoilt |= {"head.extra.weight": np.zeros(3, "float32"), "roi.weight": np.zeros(3, "float32")}
    spoilt["backbone.bottom_up.res3.1.conv2.norm.bias"] = np.zeros(7, "float32")
    with pytest.raises(UserError) as error:
        checkpoints.load(write(tmp_path / "a.npz", spoilt))
    message = str(error.value)
    assert "Detectron2" in message and "missing: backbone.fpn_lateral3.bias\n" in message
    assert "unknown: head.extra.weight, roi.weight\n" in message
    assert "backbone.bottom_up.res3.1.conv2.norm.bias is [7], expected [128]" in message


def test_other_anchors_than_the_configurations_are_refused(tmp_path):
    weights = foreign.detectron2(num_classes=2, buffers=True)
    weights["anchor_generator.cell_anchors.2"] *= 2
    with pytest.raises(UserError, match="cell_anchors.2 holds other anchors"):
        checkpoints.load(write(tmp_path / "a.npz", weights))


def test_other_numbers_of_anchors_are_refused(small, tmp_path):
    weights = {**small, "head.cls_score.bias": np.zeros(10, "float32")}
    with pytest.raises(UserError, match=r"head.cls_score.bias is \[10\], expected \[18\]"):
        checkpoints.load(write(tmp_path / "a.npz", weights))


@functools.cache
def whole(make, num_classes):
    """Weights to be copied, not changed."""
    return make(num_classes=num_classes)


ENTRIES = [
    (foreign.detectron2, "head.cls_score.weight"),
]
MORE_ENTRIES = [
    (foreign.detectron, "res4_2_branch2a_w"), (foreign.torchvision_v1, "backbone.fpn.inner_blocks.0.0.weight"),
    (foreign.detectron, "retnet_cls_conv_n1_fpn3_w"), (foreign.detectron, "retnet_cls_pred_fpn3_w"),
    (foreign.detectron, "conv1_w"), (foreign.detectron2, "backbone.bottom_up.res4.2.conv1.weight"),
    (foreign.detectron2, "head.cls_subnet.2.weight"), (foreign.detectron2, "backbone.fpn_lateral5.weight"),
    (foreign.torchvision_v1, "head.classification_head.conv.0.0.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    "make, name", [*ENTRIES, *(pytest.param(*entry, marks=pytest.mark.slow) for entry in MORE_ENTRIES)]
)
def test_any_one_missing_entry_is_the_one_that_is_named(make, name, tmp_path):
    weights = whole(make, 91 if make is foreign.torchvision_v1 else 2)
    with pytest.raises(UserError) as error:
        checkpoints.load(write(tmp_path / "a.npz", without(weights, name)))
    assert str(error.value).endswith(f"but not all of it fits.\n  missing: {name}")


@pytest.mark.slow
def test_names_like_those_that_are_not_used_are_unknown(small, tmp_path):
    weights = {**whole(foreign.detectron, 2), "pred_mask_w": np.zeros(1), "lrn_conv_w": np.zeros(1)}
    with pytest.raises(UserError, match="unknown: pred_mask_w, lrn_conv_w$"):
        checkpoints.load(write(tmp_path / "a.npz", weights))
    weights = {**small, "roi.num_batches_tracked": np.zeros(())}
    with pytest.raises(UserError, match="unknown: roi.num_batches_tracked$"):
        checkpoints.load(write(tmp_path / "b.npz", weights))


def test_an_unknown_depth_is_refused(small, tmp_path):
    weights = {key: value for key, value in small.items() if ".res4.5." not in key}
    with pytest.raises(UserError, match=r"\[3, 4, 5, 3\] blocks.*resnet50 \[3, 4, 6, 3\]"):
        checkpoints.load(write(tmp_path / "a.npz", weights))


def test_files_of_other_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no RetinaNet: fc.weight, fc.bias. Files of Detectron"):
        checkpoints.load(write(tmp_path / "a.npz", {"fc.weight": np.zeros(2), "fc.bias": np.zeros(2)}))
    with pytest.raises(UserError, match="no backbone"):
        checkpoints.load_backbone(tmp_path / "a.npz")
    backbone = write(tmp_path / "b.pkl", foreign.detectron_imagenet())
    with pytest.raises(UserError, match="a backbone alone: convert it"):
        checkpoints.load(backbone)
    with pytest.raises(UserError, match="ends in .weights.h5"):
        checkpoints.convert(backbone, tmp_path / "b.keras")


def test_other_numbers_of_classes_have_the_categories_given(small, tmp_path):
    path = write(tmp_path / "a.npz", small)
    assert [c["name"] for c in checkpoints.load(path).categories] == ["class 0", "class 1"]
    names = [{"label": 0, "id": 5, "name": "cat"}, {"label": 1, "id": 9, "name": "dog"}]
    model = checkpoints.load(path, names)
    assert model.num_classes == 2 and model.categories == names


def test_the_categories_are_cocos():
    assert list(checkpoints.layouts.COCO_CATEGORIES) == foreign.COCO_IDS
