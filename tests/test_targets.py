"""Targets: hand-worked cases, and the whole IoU matrix in NumPy as a reference, ties and padding included."""

import backends
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from retinanet_keras import boxes
from retinanet_keras.anchors import anchor_boxes
from retinanet_keras.config import AnchorConfig
from retinanet_keras.targets import BACKGROUND, IGNORE, assign

pytestmark = pytest.mark.check

RULES = ("none", "detectron", "all")


def run(anchors, gt_boxes, gt_labels, **settings):
    """`assign`, as NumPy."""
    classes, deltas = assign(np.float32(anchors), np.float32(gt_boxes), np.int32(gt_labels), **settings)
    return ops.convert_to_numpy(classes), ops.convert_to_numpy(deltas)


def check(anchors, gt_boxes, gt_labels, rule, **thresholds):
    """A batch against the reference, image by image."""
    names = {"positive": "positive_iou", "negative": "negative_iou"}
    classes, deltas = run(
        anchors, gt_boxes, gt_labels, low_quality=rule, **{names[name]: value for name, value in thresholds.items()}
    )
    assert classes.dtype == "int32" and deltas.dtype == "float32"
    for b in range(len(gt_boxes)):
        expected_classes, expected_deltas = reference.assign(anchors, gt_boxes[b], gt_labels[b], rule, **thresholds)
        np.testing.assert_array_equal(classes[b], expected_classes)
        np.testing.assert_allclose(deltas[b], expected_deltas, atol=1e-4)
    return classes


def random_truth(rng, batch, count, side, num_classes=5):
    """Boxes of all sizes; some rows padding, some boxes without area."""
    center = rng.uniform(0, side, (batch, count, 2))
    half = np.exp(rng.uniform(np.log(4), np.log(side / 2), (batch, count, 2)))
    gt_boxes = np.concatenate([center - half, center + half], axis=-1).astype("float32")
    gt_labels = rng.integers(-1, num_classes, (batch, count))
    gt_boxes[0, 0, 2:] = gt_boxes[0, 0, :2]
    return gt_boxes, gt_labels


def shaken_anchors(rng, height, width):
    """The paper's anchors moved by parts of a pixel: anchors of one size inside one box would tie but for rounding."""
    anchors = ops.convert_to_numpy(anchor_boxes(height, width))
    return anchors + rng.uniform(-0.5, 0.5, anchors.shape).astype("float32")


# By hand


ANCHORS = np.float32([[0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 24], [0, 0, 10, 25], [0, 0, 10, 30], [50, 50, 60, 60]])


def test_thresholds_by_hand():
    """IoU 1, 1/2, 10/24, 2/5, 1/3 and 0: 0.5 is positive, 0.4 is not background."""
    classes, deltas = run(ANCHORS, [[[0, 0, 10, 10]]], [[3]])
    assert classes.tolist() == [[3, 3, IGNORE, IGNORE, BACKGROUND, BACKGROUND]]
    np.testing.assert_allclose(deltas[0, 1], [0, -0.25, 0, -np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(deltas[0, [0, 2, 3, 4, 5]], 0)


def test_constants():
    assert (BACKGROUND, IGNORE) == (-1, -2)


def test_low_quality_by_hand():
    """One box whose best anchor reaches 0.45, one whose best reaches 0.25, and one that touches no anchor."""
    anchors = [[0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10]]
    truth = [[[0, 0, 10, 4.5], [100, 0, 110, 2.5], [300, 0, 310, 10]]]
    labels = [[0, 1, 2]]
    assert run(anchors, truth, labels, low_quality="none")[0].tolist() == [[IGNORE, BACKGROUND, BACKGROUND]]
    assert run(anchors, truth, labels, low_quality="detectron")[0].tolist() == [[0, BACKGROUND, BACKGROUND]]
    assert run(anchors, truth, labels, low_quality="all")[0].tolist() == [[0, 1, BACKGROUND]]


def test_ties_are_forced_together():
    anchors = [[0, 0, 10, 10], [0, 0, 10, 10], [0, 10, 10, 20], [0, 0, 10, 11]]
    classes, _ = run(anchors, [[[0, 5.5, 10, 14.5]]], [[1]], low_quality="all")  # IoU 4.5/14.5 thrice, 5.5/14.5
    assert classes.tolist() == [[BACKGROUND, BACKGROUND, BACKGROUND, 1]]
    classes, _ = run(anchors[:3], [[[0, 5.5, 10, 14.5]]], [[1]], low_quality="all")
    assert classes.tolist() == [[1, 1, 1]]


def test_a_forced_anchor_takes_its_own_best_box():
    """Box 1's best anchor is box 0's too, and fits box 0 better."""
    anchors = [[0, 0, 10, 10], [90, 90, 95, 95]]
    truth = np.float32([[[0, 0, 10, 9], [0, 0, 10, 4.2]]])
    for rule in ("detectron", "all"):
        classes, deltas = run(anchors, truth, [[7, 8]], low_quality=rule)
        assert classes.tolist() == [[7, BACKGROUND]]
        np.testing.assert_allclose(boxes.decode(np.float32(anchors), deltas[0])[0], truth[0, 0], atol=1e-5)


def test_the_first_of_equal_boxes_wins():
    truth = [[[0, 0, 10, 10], [0, 0, 10, 10]]]
    assert run(ANCHORS, truth, [[4, 2]])[0][0, 0] == 4
    assert run(ANCHORS, truth, [[2, 4]])[0][0, 0] == 2
    assert run(ANCHORS, truth, [[-1, 4]])[0][0, 0] == 4


# Against the reference


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_random_boxes_equal_the_whole_matrix(seed, rule):
    rng = np.random.default_rng(seed)
    anchors = shaken_anchors(rng, 128, 160)
    classes = check(anchors, *random_truth(rng, 3, 12, 150), rule)
    assert {BACKGROUND, IGNORE} <= set(classes.ravel()) and (classes >= 0).sum() > 5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(8))
def test_ties_and_duplicates_equal_the_whole_matrix(seed, rule):
    """Small whole numbers make many equal IoUs, and float32 divides them as exactly as float64 compares them."""
    rng = np.random.default_rng(seed)

    def whole_boxes(*shape):
        corner, sides = rng.integers(0, 6, (*shape, 2)), rng.integers(0, 5, (*shape, 2))
        return np.concatenate([corner, corner + sides], axis=-1).astype("float32")

    anchors = whole_boxes(80)
    anchors[:, 2:] += 1  # anchors have sides
    gt_boxes = whole_boxes(3, 7)
    gt_boxes[:, 4] = gt_boxes[:, 1]
    gt_labels = rng.integers(-1, 4, (3, 7))
    check(anchors, gt_boxes, gt_labels, rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_full_set_of_anchors_equals_the_whole_matrix(rule):
    """320 x 416: images with 20 boxes, with padding between boxes, with none, with copies, with boxes without area."""
    rng = np.random.default_rng(10)
    anchors = shaken_anchors(rng, 320, 416)
    assert len(anchors) == 24993
    gt_boxes, gt_labels = random_truth(rng, 5, 20, 400, num_classes=80)
    gt_labels[0] = rng.integers(0, 80, 20)
    gt_labels[1, [0, 3, 4, 19]] = -1
    gt_labels[2] = -1
    gt_boxes[3, 10:] = gt_boxes[3, :10]
    gt_labels[3] = np.arange(20)
    for n, order in enumerate([[2, 1, 0, 3], [0, 3, 2, 1], [2, 3, 0, 1], [0, 1, 0, 3], [0, 1, 2, 1]]):
        gt_boxes[4, n] = gt_boxes[4, n, order]
    classes = check(anchors, gt_boxes, gt_labels, rule)
    assert (classes[[0, 1, 3, 4]] >= 0).sum(axis=1).min() > 20 and (classes[2] == BACKGROUND).all()
    assert classes[3].max() < 10  # the first of equal boxes


@pytest.mark.parametrize("rule", RULES)
def test_ties_on_a_full_set_of_anchors_equal_the_whole_matrix(rule):
    """One square anchor per cell has corners of whole numbers, so that the equal IoUs of whole boxes are exact."""
    rng = np.random.default_rng(11)
    anchors = ops.convert_to_numpy(anchor_boxes(320, 416, AnchorConfig(scales=1, ratios=(1.0,))))
    corner, sides = 4 * rng.integers(0, 90, (2, 40, 2)), 4 * rng.integers(0, 40, (2, 40, 2))
    gt_boxes = np.concatenate([corner, corner + sides], axis=-1).astype("float32")
    overlap = reference.iou(anchors, gt_boxes[0])
    assert (np.sort(overlap, axis=0)[-1] == np.sort(overlap, axis=0)[-2]).sum() > 5  # boxes with several best anchors
    check(anchors, gt_boxes, rng.integers(-1, 80, (2, 40)), rule)


@pytest.mark.parametrize("rule", RULES)
def test_other_thresholds(rule):
    rng = np.random.default_rng(5)
    anchors = shaken_anchors(rng, 96, 96)
    truth = random_truth(rng, 2, 8, 90)
    check(anchors, *truth, rule, positive=0.7, negative=0.3)
    classes = check(anchors, *truth, rule, positive=0.5, negative=0.5)
    assert IGNORE not in classes


@pytest.mark.parametrize("rule", RULES)
def test_images_without_boxes(rule):
    rng = np.random.default_rng(6)
    anchors = shaken_anchors(rng, 64, 64)
    gt_boxes, gt_labels = random_truth(rng, 3, 6, 60)
    gt_labels[1] = -1
    gt_labels[2, 3] = 2
    classes = check(anchors, gt_boxes, gt_labels, rule)
    assert (classes[1] == BACKGROUND).all() and (classes[2] >= 0).any()


@pytest.mark.parametrize("rule", RULES)
def test_no_rows_at_all(rule):
    classes, deltas = run(ANCHORS, np.zeros((2, 0, 4)), np.zeros((2, 0)), low_quality=rule)
    np.testing.assert_array_equal(classes, np.full((2, 6), BACKGROUND))
    np.testing.assert_array_equal(deltas, np.zeros((2, 6, 4)))


@pytest.mark.parametrize("rule", RULES)
def test_padding_changes_nothing(rule):
    rng = np.random.default_rng(7)
    anchors = ops.convert_to_numpy(anchor_boxes(64, 64))
    gt_boxes, gt_labels = random_truth(rng, 1, 5, 60)
    plain = run(anchors, gt_boxes, gt_labels, low_quality=rule)
    garbage = rng.uniform(0, 60, (1, 4, 4))
    padded = run(
        anchors,
        np.concatenate([gt_boxes, garbage], axis=1),
        np.concatenate([gt_labels, [[-1] * 4]], axis=1),
        low_quality=rule,
    )
    for a, b in zip(plain, padded, strict=True):
        np.testing.assert_array_equal(a, b)


def test_box_targets_decode_to_the_matched_box():
    rng = np.random.default_rng(8)
    anchors = ops.convert_to_numpy(anchor_boxes(128, 128))
    gt_boxes, _ = random_truth(rng, 1, 6, 120)
    classes, deltas = run(anchors, gt_boxes, [range(6)])  # the label tells which box
    positive = np.flatnonzero(classes[0] >= 0)
    assert len(positive) > 10
    decoded = ops.convert_to_numpy(boxes.decode(anchors[positive], deltas[0, positive]))
    np.testing.assert_allclose(decoded, gt_boxes[0, classes[0, positive]], atol=1e-3)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(7)), st.sampled_from(RULES))
def test_the_order_of_boxes_and_of_anchors_does_not_matter(seed, order, rule):
    rng = np.random.default_rng(seed)
    anchors = reference.anchors(64, 64)[:: rng.integers(2, 6)]
    gt_boxes, gt_labels = random_truth(rng, 1, 7, 60)
    plain_classes, plain_deltas = run(anchors, gt_boxes, gt_labels, low_quality=rule)
    classes, deltas = run(anchors, gt_boxes[:, order], gt_labels[:, order], low_quality=rule)
    np.testing.assert_array_equal(classes, plain_classes)
    np.testing.assert_allclose(deltas, plain_deltas, atol=1e-6)
    shuffle = rng.permutation(len(anchors))
    classes, deltas = run(anchors[shuffle], gt_boxes, gt_labels, low_quality=rule)
    np.testing.assert_array_equal(classes, plain_classes[:, shuffle])
    np.testing.assert_allclose(deltas, plain_deltas[:, shuffle], atol=1e-6)


def test_boxes_far_from_any_size_of_anchor_stay_finite():
    truth = [[[0, 0, 1e-3, 1e-3], [0, 0, 1e5, 1e5], [20, 20, 10, 10], [5, 5, 5, 9]]]
    for rule in RULES:
        classes, deltas = run(reference.anchors(64, 64), truth, [[0, 1, 2, 3]], low_quality=rule)
        assert np.isfinite(deltas).all()
        assert not (classes >= 2).any()  # inverted, and without width


@backends.tensorflow_only
def test_in_a_graph_of_unknown_sizes():
    import tensorflow as tf

    rng = np.random.default_rng(9)
    anchors = np.float32(reference.anchors(64, 64))
    spec = [
        tf.TensorSpec((None, 4), tf.float32), tf.TensorSpec((None, None, 4), tf.float32),
        tf.TensorSpec((None, None), tf.int64),
    ]  # fmt: skip
    in_graph = tf.function(assign, input_signature=spec)
    for batch, count in ((2, 5), (1, 0)):
        gt_boxes = np.zeros((batch, 0, 4), "float32")
        gt_labels = np.zeros((batch, 0), "int64")
        if count:
            gt_boxes, gt_labels = random_truth(rng, batch, count, 60)
        for a, b in zip(in_graph(anchors, gt_boxes, gt_labels), run(anchors, gt_boxes, gt_labels), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match='"none", "detectron" or "all", got \'best\''):
        assign(ANCHORS, np.zeros((1, 1, 4)), np.zeros((1, 1)), low_quality="best")
