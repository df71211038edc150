"""The model: sizes and padding, the whole loss and its gradient against NumPy and a plain tape, detections, saving."""

import dataclasses

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from backends import numpy_of
from keras import ops

from retinanet_keras import RetinaNet, detections, losses, optimizers, targets
from retinanet_keras.anchors import anchor_boxes, level_sizes
from retinanet_keras.config import AnchorConfig, DetectionConfig, MiningConfig, TargetConfig, TrainConfig
from retinanet_keras.model import PAD_COLOR

pytestmark = pytest.mark.eager

TRUTH = {  # of 64 x 64 images: two boxes and padding; none; one box that is too thin for any anchor
    "boxes": np.float32([
        [[4, 4, 40, 36], [30, 20, 62, 60], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 3, 7, 49], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]),
    "labels": np.int32([[0, 2, -1], [-1, -1, -1], [1, -1, -1]]),
}  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype("uint8")
WEIGHTS = np.float32([0.5, 2.0, 0.25])
NO_BOXES = {"boxes": np.zeros((3, 0, 4), "float32"), "labels": np.zeros((3, 0), "int32")}


def weights(model):
    return [ops.convert_to_numpy(v) for v in model.trainable_variables]


def lively(model, seed=1):
    """Weights of a size that spreads scores, and makes gradients that can be compared."""
    rng = np.random.default_rng(seed)
    for layer in (model.class_subnet.final, model.box_subnet.final, *model.class_subnet.tower, *model.box_subnet.tower):
        layer.kernel.assign(rng.normal(0, 0.05, layer.kernel.shape))
    model.class_subnet.final.bias.assign(rng.normal(-3, 0.5, model.class_subnet.final.bias.shape))
    return model


def numpy_loss(model, normalizer, truth=TRUTH, box_weight=1.0, image_weights=1.0):
    """§4.1, from the model's outputs on: every anchor that is not ignored, normalized."""
    outputs = numpy_of(model(IMAGES))
    anchors = reference.anchors(64, 64)
    classification, box, counts, ignored = [], [], [], 0
    for b in range(len(IMAGES)):
        classes, deltas = reference.assign(anchors, truth["boxes"][b], truth["labels"][b], "detectron")
        one_hot = np.eye(model.num_classes)[np.maximum(classes, 0)] * (classes >= 0)[:, None]
        used = classes != -2
        ignored += (~used).sum()
        classification.append(reference.focal(outputs["logits"][b][used], one_hot[used]).sum())
        positive = classes >= 0
        box.append(reference.smooth_l1(outputs["deltas"][b][positive] - deltas[positive]).sum())
        counts.append(positive.sum())
    if truth is TRUTH:
        assert ignored > 0 and counts[0] > 3 and counts[1] == 0
    whole = image_weights * (np.array(classification) + box_weight * np.array(box))
    if normalizer == "image":
        return (whole / np.maximum(counts, 1)).mean()
    assigned = [reference.assigned(anchors, truth["boxes"][b], truth["labels"][b]) for b in range(len(IMAGES))]
    if truth is TRUTH:
        assert sum(assigned) > sum(counts)  # the best anchor of the thin box is under the lower threshold
    return whole.sum() / (np.array(assigned) + 1).sum()


# Calls


@pytest.mark.parametrize("height, width", [(64, 96), (100, 130), (1, 33)])
def test_call_shapes(small_model, height, width):
    model = small_model(5)
    image = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype("uint8")
    outputs = model(image)
    count = sum(level_sizes(-(-height // 32) * 32, -(-width // 32) * 32))
    assert tuple(outputs["logits"].shape) == (2, count, 5) and tuple(outputs["deltas"].shape) == (2, count, 4)
    assert outputs["logits"].dtype == outputs["deltas"].dtype == "float32"
    as_float = numpy_of(model(image.astype("float32")))
    for name, value in numpy_of(outputs).items():
        np.testing.assert_array_equal(as_float[name], value)


def test_unpadded_equals_padded_by_the_caller(small_model):
    model = lively(small_model())
    image = np.random.default_rng(0).integers(0, 256, (1, 100, 130, 3)).astype("uint8")
    padded = np.tile(np.float32(model.pixel_mean), (1, 128, 160, 1))
    padded[:, :100, :130] = image
    for a, b in zip(numpy_of(model(image)).values(), numpy_of(model(padded)).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_detections_do_not_depend_on_what_is_beyond_the_image(small_model):
    """Nor on how far that goes, as long as the padded size is the same."""
    model = lively(small_model(detection=SHOW_ALL, anchors=AnchorConfig(size=1.0)))
    image = np.random.default_rng(0).integers(0, 256, (1, 100, 130, 3)).astype("uint8")
    expected = numpy_of(model.detect(image))
    assert expected["count"] > 5
    for color, height, width in ((PAD_COLOR, 128, 160), ((0, 0, 0), 128, 160), ((255, 0, 255), 101, 140)):
        padded = np.tile(np.uint8(color), (1, height, width, 1))
        padded[:, :100, :130] = image
        for name, value in numpy_of(model.detect(padded, [[100, 130]])).items():
            np.testing.assert_allclose(value, expected[name], atol=1e-3)


@pytest.mark.slow
def test_a_larger_multiple_to_pad_to(small_model):
    """As if the caller had padded."""
    plain = lively(small_model(detection=SHOW_ALL))
    padding = lively(small_model(detection=dataclasses.replace(SHOW_ALL, pad_multiple=128)))
    expected = numpy_of(plain.detect(np.pad(IMAGES, [(0, 0), (0, 64), (0, 64), (0, 0)]), [[64, 64]] * 3))
    found = numpy_of(padding.detect(IMAGES))
    assert np.abs(found["scores"] - numpy_of(plain.detect(IMAGES))["scores"]).max() > 1e-4
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=5e-3)


def test_pixels_are_normalized_as_rgb(small_model):
    """The model equals its parts, on (RGB - mean) / std of ImageNet."""
    model = lively(small_model())
    x = (IMAGES - np.float32([123.68, 116.779, 103.939])) / np.float32([58.395, 57.12, 57.375])
    expected = model.class_subnet(model.pyramid(model.backbone(x)))
    np.testing.assert_allclose(model(IMAGES)["logits"], expected, atol=1e-4)


def test_every_anchor_starts_as_foreground_with_the_prior(small_model):
    scores = ops.sigmoid(small_model(prior=0.02)(IMAGES)["logits"])
    np.testing.assert_allclose(scores, 0.02, rtol=0.15)
    assert ops.convert_to_numpy(scores).mean() == pytest.approx(0.02, rel=0.02)


def test_anchors_follow_their_settings(small_model):
    model = small_model(anchors=AnchorConfig(scales=1, ratios=(1.0, 2.0)))
    assert model(IMAGES)["deltas"].shape[1] == 2 * (64 + 16 + 4 + 1 + 1)
    assert numpy_of(model.detect(IMAGES))["boxes"].shape == (3, 100, 4)


# Detections


SHOW_ALL = DetectionConfig(score_threshold=0.02, max_detections=40)


@pytest.fixture(scope="module")
def shown(small_model):
    """A model that detects many things, and was never compiled; not to be changed."""
    return lively(small_model(detection=SHOW_ALL))


def test_a_model_on_the_last_layer_alone(small_model, tmp_path):
    """Its anchors are those of `anchor_boxes`; it trains, detects, and comes back from its file."""
    config = AnchorConfig(size=1.0, levels="last")
    model = lively(small_model(detection=SHOW_ALL, anchors=config))
    outputs = model(IMAGES)
    assert outputs["logits"].shape[1] == outputs["deltas"].shape[1] == len(anchor_boxes(64, 64, config)) == 4 * 45
    found = numpy_of(model.detect(IMAGES))
    assert (found["count"] > 0).all()
    model.compile(keras.optimizers.SGD(1e-3))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.anchors == config
    np.testing.assert_array_equal(numpy_of(again.detect(IMAGES))["boxes"], found["boxes"])


def test_detect_is_decode_of_the_outputs(shown):
    found = numpy_of(shown.detect(IMAGES))
    assert {name: (value.shape, str(value.dtype)) for name, value in found.items()} == {
        "boxes": ((3, 40, 4), "float32"), "scores": ((3, 40), "float32"),
        "labels": ((3, 40), "int32"), "count": ((3,), "int32"),
    }  # fmt: skip
    outputs = shown(IMAGES)
    settings = dataclasses.asdict(SHOW_ALL)
    settings.pop("pad_multiple")
    expected = detections.decode(
        outputs["logits"], outputs["deltas"], anchor_boxes(64, 64), level_sizes(64, 64), 64, 64, **settings
    )
    assert found["count"].min() > 5
    for name, value in numpy_of(expected).items():
        np.testing.assert_allclose(found[name], value, atol=2e-3)
    assert (np.diff(found["scores"], axis=1) <= 0).all()


def test_rows_past_count(small_model):
    model = lively(small_model(detection=DetectionConfig(score_threshold=0.1)))
    found = numpy_of(model.detect(IMAGES))
    assert found["boxes"].shape == (3, 100, 4) and 0 < found["count"].max() < 100
    for b, count in enumerate(found["count"]):
        assert (found["scores"][b, :count] > 0.1).all() and (found["labels"][b, :count] >= 0).all()
        np.testing.assert_array_equal(found["boxes"][b, count:], 0)
        np.testing.assert_array_equal(found["scores"][b, count:], 0)
        np.testing.assert_array_equal(found["labels"][b, count:], -1)


def test_a_fresh_model_detects_nothing(small_model):
    assert numpy_of(small_model().detect(IMAGES))["count"].tolist() == [0, 0, 0]


def test_boxes_are_clipped_to_sizes(shown):
    whole = numpy_of(shown.detect(IMAGES))["boxes"]
    assert whole.max() == 64
    clipped = numpy_of(shown.detect(IMAGES, sizes=[[64, 64], [30, 50], [20, 64]]))["boxes"]
    assert clipped.min() >= 0
    np.testing.assert_array_equal(clipped[0], whole[0])
    assert clipped[1, :, [0, 2]].max() == 50 and clipped[1, :, [1, 3]].max() == 30
    assert clipped[2, :, [0, 2]].max() == 64 and clipped[2, :, [1, 3]].max() == 20
    odd = numpy_of(shown.detect(IMAGES[:, :50, :40]))["boxes"]  # padded inside: clipped to what was given
    assert odd[..., [0, 2]].max() == 40 and odd[..., [1, 3]].max() == 50


def test_predict_equals_detect(small_model):
    model = lively(small_model(detection=SHOW_ALL, anchors=AnchorConfig(size=1.0)))
    model.compile()
    sizes = np.int32([[64, 64], [30, 50], [20, 64]])
    plain, clipped = numpy_of(model.detect(IMAGES)), numpy_of(model.detect(IMAGES, sizes))
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, {**TRUTH, "size": sizes})).batch(2)
    for found, expected in (
        (model.predict(IMAGES, batch_size=3, verbose=0), plain),
        (model.predict(dataset, verbose=0), clipped),
    ):
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-3)


# The loss


@pytest.mark.parametrize("normalizer", ["image", "minibatch"])
def test_loss_equals_numpy(small_model, normalizer):
    model = lively(small_model())
    model.compile(normalizer=normalizer, box_weight=1.5)
    expected = numpy_loss(model, normalizer, box_weight=1.5)
    logs = model.evaluate(IMAGES, TRUTH, batch_size=3, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(expected, rel=1e-4)
    assert logs["classification_loss"] + 1.5 * logs["box_loss"] == pytest.approx(expected, rel=1e-4)
    assert logs["positives"] > 1


def test_sample_weight_weights_images_wherever_keras_takes_it(small_model):
    model = lively(small_model())
    model.compile(keras.optimizers.SGD(0.0))
    expected = numpy_loss(model, "image", image_weights=WEIGHTS)
    assert expected != pytest.approx(numpy_loss(model, "image"), rel=0.05)
    dataset = tf.data.Dataset.from_tensors((IMAGES, TRUTH, WEIGHTS))
    arrays = {"batch_size": 3, "verbose": 0}
    history = model.fit(
        IMAGES,
        TRUTH,
        sample_weight=WEIGHTS,
        validation_data=(IMAGES, TRUTH, WEIGHTS),
        validation_batch_size=3,
        **arrays,
    ).history
    found = {
        "fit": history["loss"][0],
        "validation": history["val_loss"][0],
        "fit on a dataset": model.fit(dataset, verbose=0).history["loss"][0],
        "evaluate": model.evaluate(IMAGES, TRUTH, sample_weight=WEIGHTS, return_dict=True, **arrays)["loss"],
        "evaluate on a dataset": model.evaluate(dataset, verbose=0, return_dict=True)["loss"],
        "train_on_batch": model.train_on_batch(IMAGES, TRUTH, WEIGHTS, return_dict=True)["loss"],
        "test_on_batch": model.test_on_batch(IMAGES, TRUTH, WEIGHTS, return_dict=True)["loss"],
        "compute_loss": float(model.compute_loss(IMAGES, TRUTH, model(IMAGES), WEIGHTS)),
    }
    assert found == pytest.approx(dict.fromkeys(found, expected), rel=1e-4)


def test_boxes_and_labels_may_have_weights_of_their_own(small_model):
    model = lively(small_model())
    model.compile()
    weights = {"boxes": np.float32([0, 1, 1]), "labels": np.float32([1, 0, 1])}
    outputs = model(IMAGES)
    found, plain, first, second = (
        np.array(model.loss_terms(IMAGES, TRUTH, outputs, given))
        for given in (weights, None, np.float32([1, 0, 0]), np.float32([0, 1, 0]))
    )
    assert first[1] > 0 and second[0] > 0
    np.testing.assert_allclose(found, plain - [second[0], first[1], 0, 0, 0], rtol=1e-5)


def test_no_boxes_at_all(small_model):
    model = lively(small_model())
    model.compile()
    padding = {"boxes": TRUTH["boxes"], "labels": np.full((3, 3), -1)}
    expected = numpy_loss(model, "image", padding)
    for truth in (NO_BOXES, padding):
        assert float(model.compute_loss(IMAGES, truth, model(IMAGES))) == pytest.approx(expected, rel=1e-4)
    assert float(model.box_tracker.result()) == float(model.positives_tracker.result()) == 0


def test_a_function_of_the_package_stands_for_its_loss(small_model):
    model = small_model()
    model.compile(classification_loss=losses.focal, box_loss=losses.smooth_l1)
    assert isinstance(model.classification_loss, losses.FocalLoss) and isinstance(model.box_loss, losses.SmoothL1Loss)


def test_a_keras_loss_gives_the_same_value(small_model):
    model = lively(small_model())
    outputs = model(IMAGES)
    values = []
    for loss in (
        None,
        losses.FocalLoss(),
        losses.FocalLoss(reduction="sum"),
        keras.losses.BinaryFocalCrossentropy(from_logits=True, alpha=0.25, gamma=2, apply_class_balancing=True),
        lambda y, x: losses.focal(x, y),
    ):
        model.compile(classification_loss=loss)
        values.append(float(model.compute_loss(IMAGES, TRUTH, outputs)))
    assert values[0] == pytest.approx(numpy_loss(model, "image"), rel=1e-4)
    assert values == pytest.approx([values[0]] * 5, rel=1e-4)
    model.compile(classification_loss=keras.losses.BinaryCrossentropy(from_logits=True))
    assert float(model.compute_loss(IMAGES, TRUTH, outputs)) > 3 * values[0]


def test_a_keras_box_loss(small_model):
    model = lively(small_model())
    values = []
    for loss in (losses.SmoothL1Loss(beta=1.0), keras.losses.Huber(delta=1.0)):  # equal at 1
        model.compile(box_loss=loss)
        model.compute_loss(IMAGES, TRUTH, model(IMAGES))
        values.append(float(model.box_tracker.result()))
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] > 0


# Training


def textbook_gradients(model, normalizer, image_weights=1.0):
    """A tape over the loss as a textbook writes it, with one-hot targets."""
    class_targets, box_targets = targets.assign(anchor_boxes(64, 64), TRUTH["boxes"], TRUTH["labels"])
    one_hot = tf.one_hot(class_targets, model.num_classes)
    positive, used = tf.cast(class_targets >= 0, tf.float32), tf.cast(class_targets != -2, tf.float32)
    with tf.GradientTape() as tape:
        outputs = model(IMAGES, training=True)
        x = outputs["logits"]
        p = tf.sigmoid(x)
        p_t = one_hot * p + (1 - one_hot) * (1 - p)
        alpha_t = one_hot * 0.25 + (1 - one_hot) * 0.75
        focal = -alpha_t * (1 - p_t) ** 2 * tf.math.log(p_t)
        error = tf.abs(outputs["deltas"] - box_targets)
        smooth = tf.where(error < 0.11, error**2 / 0.22, error - 0.055)
        per_image = tf.reduce_sum(focal * used[..., None], [1, 2]) + tf.reduce_sum(smooth * positive[..., None], [1, 2])
        per_image *= image_weights
        count = tf.reduce_sum(positive, 1)
        if normalizer == "image":
            loss = tf.reduce_mean(per_image / tf.maximum(count, 1.0))
        else:
            anchors = reference.anchors(64, 64)
            assigned = [reference.assigned(anchors, TRUTH["boxes"][b], TRUTH["labels"][b]) + 1.0 for b in range(3)]
            loss = tf.reduce_sum(per_image) / sum(assigned)
    return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]


@pytest.mark.parametrize(
    "normalizer, image_weights",
    [("image", None), pytest.param("image", WEIGHTS, marks=pytest.mark.slow), ("minibatch", WEIGHTS)],
)
def test_gradients_are_the_textbooks(small_model, normalizer, image_weights):
    model = lively(small_model())
    model.compile(keras.optimizers.SGD(1.0), normalizer=normalizer)
    factor = 1.0 if image_weights is None else image_weights
    expected, loss = textbook_gradients(model, normalizer, factor), numpy_loss(model, normalizer, image_weights=factor)
    before = weights(model)
    logs = model.train_on_batch(IMAGES, TRUTH, image_weights, return_dict=True)
    assert logs["loss"] == pytest.approx(loss, rel=1e-4)  # of before the step
    for variable, old, new, gradient in zip(model.trainable_variables, before, weights(model), expected, strict=True):
        assert np.abs(gradient).max() > 0, variable.path
        scale = np.abs(gradient).max() + np.abs(old).max() * 1e-3
        np.testing.assert_allclose(old - new, gradient, atol=2e-3 * scale, err_msg=variable.path)


@pytest.mark.parametrize("loss", [
    losses.CrossEntropyLoss(0.3), losses.FocalStarLoss(0.3, 4.0, 0.5), losses.HingeLoss(None, 0.6),
    losses.FocalLoss(None),
])  # fmt: skip
def test_every_loss_of_the_family_is_summed_without_one_hot_targets(small_model, loss):
    """The value and gradient of the loss on one-hot targets."""
    model = lively(small_model())
    model.compile(classification_loss=loss)
    logits = tf.constant(numpy_of(model(IMAGES))["logits"])
    class_targets, _ = targets.assign(anchor_boxes(64, 64), TRUTH["boxes"], TRUTH["labels"])
    one_hot, used = tf.one_hot(class_targets, 3), tf.cast(class_targets != -2, tf.float32)
    outputs = {"logits": logits, "deltas": tf.zeros((3, logits.shape[1], 4))}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        ours = model.loss_terms(IMAGES, TRUTH, outputs).classification
        count = tf.reduce_sum(tf.cast(class_targets >= 0, tf.float32), 1)
        each = tf.reduce_sum(loss.call(one_hot, logits) * used[..., None], [1, 2])
        textbook = tf.reduce_sum(each / tf.maximum(count, 1.0))
    np.testing.assert_allclose(ours, textbook, rtol=1e-5)
    np.testing.assert_allclose(tape.gradient(ours, logits), tape.gradient(textbook, logits), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "ratio, jit_compile",
    [pytest.param(None, False, marks=pytest.mark.slow), (3, False), pytest.param(3, True, marks=pytest.mark.slow)],
)
def test_mining_trains_on_the_hardest_anchors_alone(small_model, ratio, jit_compile):
    """The classification loss is that of the anchors that NumPy's NMS over their losses leaves; the box loss stays."""
    settings = MiningConfig(batch_size=20, nms_iou=0.5, ratio=ratio)
    model = lively(small_model())
    model.compile(classification_loss=losses.CrossEntropyLoss())
    unmined = model.evaluate(IMAGES, TRUTH, batch_size=3, verbose=0, return_dict=True)
    model.compile(classification_loss=losses.CrossEntropyLoss(), mining=settings, jit_compile=jit_compile)
    logits, anchors = numpy_of(model(IMAGES))["logits"], reference.anchors(64, 64)
    expected = []
    for b in range(3):
        classes, _ = reference.assign(anchors, TRUTH["boxes"][b], TRUTH["labels"][b], "detectron")
        one_hot = np.eye(3)[np.maximum(classes, 0)] * (classes >= 0)[:, None]
        each = reference.focal(logits[b], one_hot, None, 0).sum(axis=1)
        chosen = reference.ohem(each, anchors, classes >= 0, classes != -2, 20, 0.5, ratio)
        assert ratio or chosen.sum() == 20
        expected.append(each[chosen].sum() / max((classes >= 0).sum(), 1))
    weighted = model.test_on_batch(IMAGES, TRUTH, WEIGHTS, return_dict=True)
    assert weighted["classification_loss"] == pytest.approx(np.mean(WEIGHTS * expected), rel=1e-4)
    model.reset_metrics()
    logs = model.train_on_batch(IMAGES, TRUTH, return_dict=True)
    assert logs["classification_loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert logs["classification_loss"] < 0.9 * unmined["classification_loss"]
    assert logs["box_loss"] == pytest.approx(unmined["box_loss"], rel=1e-4) and logs["box_loss"] > 0


@pytest.mark.slow
def test_background_alone_trains_the_class_subnet(small_model):
    model = small_model()
    model.compile(keras.optimizers.SGD(0.1))
    before = weights(model)
    logs = model.train_on_batch(IMAGES, NO_BOXES, return_dict=True)
    assert logs["classification_loss"] > 0 and logs["box_loss"] == 0
    for variable, old, new in zip(model.trainable_variables, before, weights(model), strict=True):
        if "class_subnet" in variable.path:
            assert (old != new).any(), variable.path
        if "box_subnet" in variable.path:
            np.testing.assert_array_equal(old, new)


@pytest.mark.eager(False)
def test_fit_lowers_the_loss(small_model):
    model = small_model()
    model.compile(keras.optimizers.Adam(1e-3))
    dataset = tf.data.Dataset.from_tensors((IMAGES, TRUTH))
    first = model.evaluate(dataset, verbose=0, return_dict=True)
    history = model.fit(IMAGES, TRUTH, batch_size=3, epochs=25, validation_data=dataset, verbose=0).history
    last = model.evaluate(dataset, verbose=0, return_dict=True)
    assert set(last) == {"loss", "classification_loss", "box_loss", "positives"}
    assert history["val_loss"][-1] == pytest.approx(last["loss"], rel=1e-5)
    assert history["loss"][0] == pytest.approx(first["loss"], rel=1e-4)
    assert last["loss"] < 0.6 * first["loss"]
    assert last["box_loss"] < first["box_loss"] and last["classification_loss"] < first["classification_loss"]


@pytest.mark.slow
def test_xla_takes_the_same_step(small_model):
    model = lively(small_model())
    model.compile(keras.optimizers.SGD(0.01), jit_compile=True)
    before, gradients = weights(model), textbook_gradients(model, "image", WEIGHTS)
    loss = numpy_loss(model, "image", image_weights=WEIGHTS)
    assert model.train_on_batch(IMAGES, TRUTH, WEIGHTS, return_dict=True)["loss"] == pytest.approx(loss, rel=1e-4)
    for old, new, gradient in zip(before, weights(model), gradients, strict=True):
        np.testing.assert_allclose(new, old - 0.01 * gradient, atol=1e-5)


def test_frozen_layers_do_not_move(small_model):
    model = small_model(norm="frozen", freeze_at=2)
    model.compile(keras.optimizers.SGD(0.1))
    trained = {variable.path for variable in model.trainable_variables}
    frozen = [v for v in model.variables if v.path not in trained and ("stem" in v.path or "res" in v.path)]
    assert any("res2_0_conv1/kernel" in v.path for v in frozen) and any(
        "res5_0_conv1_norm/gamma" in v.path for v in frozen
    )
    assert any("res3_0_conv1/kernel" in path for path in trained)
    assert not any(path.endswith(("gamma", "beta")) or "stem" in path or "res2" in path for path in trained)
    before, others = [ops.convert_to_numpy(v) for v in frozen], weights(model)
    model.train_on_batch(IMAGES, TRUTH)
    for variable, old in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(variable, old, err_msg=variable.path)
    assert all((old != new).any() for old, new in zip(others, weights(model), strict=True))


def test_norm_and_freezing_follow_the_weights(small_model, tmp_path):
    """From random weights everything is trained, with groups; from a file, statistics and two stages stay."""
    file = tmp_path / "backbone.weights.h5"
    source = small_model(norm="frozen", seed=3)
    source.backbone.save_weights(file)
    model = small_model(weights=str(file), norm=None)
    assert isinstance(model.backbone.get_layer("stem_norm"), keras.layers.BatchNormalization)
    np.testing.assert_array_equal(model.backbone.get_layer("stem").kernel, source.backbone.get_layer("stem").kernel)
    assert not any("stem" in v.path or "res2" in v.path for v in model.trainable_variables)
    model = small_model(norm=None)
    assert isinstance(model.backbone.get_layer("stem_norm"), keras.layers.GroupNormalization)
    assert len(model.trainable_variables) == len(model.weights)


# Saving


RUNS = {
    "sgd": TrainConfig(iterations=10, warmup=4, drops=(3,), clip_norm=5.0),
    "adamw": TrainConfig(
        iterations=10, warmup=2, optimizer="adamw", schedule="cosine", learning_rate=1e-3, weight_decay=0.1
    ),
}


@pytest.mark.parametrize(
    "run, mined", [("adamw", None), pytest.param("sgd", MiningConfig(batch_size=50, ratio=3), marks=pytest.mark.slow)]
)
def test_a_saved_model_detects_and_trains_on_as_if_never_saved(small_model, tmp_path, run, mined):
    categories = [{"label": i, "id": i + 3, "name": f"c{i}"} for i in range(3)]
    model = lively(
        small_model(
            norm="batch", freeze_at=1, detection=SHOW_ALL, targets=TargetConfig(low_quality="all"),
            categories=categories, anchors=AnchorConfig(ratios=(0.5, 2.0)),
        )
    )  # fmt: skip
    model.compile(
        optimizers.build(RUNS[run]),
        losses.FocalLoss(gamma=1.0),
        losses.SmoothL1Loss(0.2),
        box_weight=0.7,
        normalizer="minibatch",
        mining=mined,
    )
    for _ in range(2):
        model.train_on_batch(IMAGES, TRUTH)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again, RetinaNet) and again.get_config() == model.get_config()
    assert (again.anchors, again.targets, again.detection) == (model.anchors, model.targets, model.detection)
    assert list(map(dict, again.categories)) == categories
    assert (again.box_weight, again.normalizer) == (0.7, "minibatch")
    assert again.mining == mined
    assert (again.classification_loss.gamma, again.box_loss.beta) == (1.0, 0.2)
    assert [v.path for v in again.trainable_variables] == [v.path for v in model.trainable_variables]
    found, expected = numpy_of(again.detect(IMAGES)), numpy_of(model.detect(IMAGES))
    assert expected["count"].min() > 0
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    assert int(again.optimizer.iterations) == 2
    for _ in range(2):
        expected_loss = model.train_on_batch(IMAGES, TRUTH, return_dict=True)["loss"]
        loss = again.train_on_batch(IMAGES, TRUTH, return_dict=True)["loss"]
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for a, b in zip(weights(again), weights(model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_a_model_that_was_never_compiled_can_be_saved(shown, small_model, tmp_path):
    shown.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(IMAGES)["logits"], shown(IMAGES)["logits"])
    assert again.detection == SHOW_ALL
    shown.save_weights(tmp_path / "model.weights.h5")
    other = small_model(detection=SHOW_ALL, seed=5)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(IMAGES)["logits"], shown(IMAGES)["logits"])


# Errors


@pytest.mark.parametrize("num_classes", [0, -1, True, 2.0, "3", None])
def test_num_classes_must_be_a_count(num_classes):
    with pytest.raises(ValueError, match="num_classes: expected a whole number of at least 1, got"):
        RetinaNet(num_classes)


def test_other_bad_arguments(small_model):
    with pytest.raises(ValueError, match="backbone: expected one of"):
        small_model(backbone="vgg")
    with pytest.raises(ValueError, match="norm: expected"):
        small_model(norm="instance")
    model = small_model()
    with pytest.raises(ValueError, match='normalizer: expected "image" or "minibatch", got \'batch\''):
        model.compile(normalizer="batch")
    for shape in ((64, 64, 3), (1, 64, 64), (1, 64, 64, 4), (1, 0, 64, 3)):
        with pytest.raises(ValueError, match="images: expected RGB images"):
            model.detect(np.zeros(shape, "uint8"))
