"""KerasCV 0.9 as a second opinion, written by others: where it agrees, and in which numbers it differs.

Agreement holds in float32; each difference is asserted, and its test says what it is.
"""

import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from retinanet_keras import boxes, losses, nms
from retinanet_keras.anchors import LEVELS, STRIDES, anchor_boxes
from retinanet_keras.config import AnchorConfig
from retinanet_keras.targets import BACKGROUND, IGNORE, assign

keras_cv = pytest.importorskip("keras_cv")
from keras_cv.models import retinanet as their_retinanet  # noqa: E402
from keras_cv.src.bounding_box import converters  # noqa: E402  (the coding of deltas has no public name)

XYWH_FROM_YXHW = [1, 0, 3, 2]  # KerasCV's deltas are dy, dx, dh, dw; the permutation is its own inverse
NO_VARIANCE = (1.0, 1.0, 1.0, 1.0)


def numpy(x):
    return ops.convert_to_numpy(x)


def random_boxes(rng, *shape, side=200.0):
    """Boxes [..., 4] inside a square, sides of 4 pixels to half of the square's."""
    corner, sides = rng.uniform(0, side / 2, (*shape, 2)), rng.uniform(4, side / 2, (*shape, 2))
    return np.concatenate([corner, corner + sides], axis=-1).astype("float32")


# IoU


def their_iou(a, b):
    return numpy(keras_cv.bounding_box.compute_iou(a, b, bounding_box_format="xyxy"))


def test_iou_is_theirs_degenerate_and_inverted_boxes_included():
    rng = np.random.default_rng(0)
    odd = np.float32([[5, 5, 5, 5], [1, 2, 1, 90], [90, 90, 10, 10], [90, 10, 10, 90]])
    a = np.concatenate([random_boxes(rng, 2, 20), np.broadcast_to(odd, (2, 4, 4))], axis=1)
    b = np.concatenate([random_boxes(rng, 2, 30), np.broadcast_to(odd, (2, 4, 4))], axis=1)
    overlaps = numpy(boxes.iou(a, b))
    assert (overlaps > 0.5).sum() > 10
    np.testing.assert_allclose(overlaps, their_iou(a, b), atol=1e-6)


def test_iou_of_tiny_boxes_is_exact_here_and_shrunk_there():
    """KerasCV adds 1e-7 square pixels to the union: a box of area 1e-8 overlaps itself by 1/11, here by 1."""
    tiny = np.float32([[0, 0, 1e-4, 1e-4]])
    np.testing.assert_allclose(their_iou(tiny, tiny), [[1 / 11]], rtol=1e-4)
    np.testing.assert_array_equal(boxes.iou(tiny, tiny), [[1]])


# Anchors


def their_generator(ratios):
    return keras_cv.layers.AnchorGenerator(
        bounding_box_format="xyxy",
        sizes={level: 4.0 * stride for level, stride in zip(LEVELS, STRIDES, strict=True)},
        strides=dict(zip(LEVELS, STRIDES, strict=True)),
        scales=[2 ** (k / 3) for k in range(3)],
        aspect_ratios=ratios,
    )


def their_anchors(height, width, ratios):
    levels = their_generator(ratios)(image_shape=(height, width, 3))
    return np.concatenate([numpy(levels[level]) for level in LEVELS])


@pytest.mark.parametrize("size", [(256, 384), (100, 250)])  # the second a multiple of no stride
def test_anchors_are_theirs_with_the_ratios_inverted(size):
    """KerasCV's ratio is width / height, here height / width; levels, cells, scales and their order are the same."""
    np.testing.assert_allclose(anchor_boxes(*size), their_anchors(*size, [2.0, 1.0, 0.5]), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(
        anchor_boxes(*size, AnchorConfig(ratios=(3.0,))), their_anchors(*size, [1 / 3]), rtol=1e-5, atol=1e-3
    )


def test_the_papers_ratios_give_one_set_of_anchors_in_two_orders():
    """1:2, 1:1, 2:1 contains its own inverses, so KerasCV's third ratio is the first here."""
    ours = numpy(anchor_boxes(64, 96)).reshape(-1, 3, 4)
    theirs = their_anchors(64, 96, [0.5, 1.0, 2.0]).reshape(-1, 3, 4)
    np.testing.assert_allclose(ours, theirs[:, ::-1], atol=1e-3)
    assert np.abs(ours - theirs).max() > 100


# Deltas


def their_deltas(anchors, matched, variance=NO_VARIANCE):
    deltas = converters._encode_box_to_deltas(anchors, matched, "xyxy", "xyxy", variance=variance)
    return numpy(deltas)[..., XYWH_FROM_YXHW]


def their_boxes(anchors, deltas):
    deltas = np.float32(deltas)[..., XYWH_FROM_YXHW]
    return numpy(converters._decode_deltas_to_boxes(anchors, deltas, "xyxy", "xyxy", variance=NO_VARIANCE))


def test_deltas_are_theirs_in_another_order():
    """KerasCV's order is dy, dx, dh, dw; without variances the numbers are the same, both ways."""
    rng = np.random.default_rng(1)
    anchors, matched = random_boxes(rng, 40), random_boxes(rng, 40)
    deltas = numpy(boxes.encode(anchors, matched))
    np.testing.assert_allclose(deltas, their_deltas(anchors, matched), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(boxes.decode(anchors, deltas), their_boxes(anchors, deltas), rtol=1e-5, atol=1e-3)


def test_their_default_deltas_are_divided_by_variances():
    """KerasCV's RetinaNet divides by 0.1 (centers) and 0.2 (sides); the paper and R-CNN by nothing."""
    rng = np.random.default_rng(2)
    anchors, matched = random_boxes(rng, 40), random_boxes(rng, 40)
    encoder = their_retinanet.LabelEncoder("xyxy", their_generator([1.0]))
    scaled = their_deltas(anchors, matched, encoder.box_variance_tuple)
    np.testing.assert_allclose(boxes.encode(anchors, matched), scaled * [0.1, 0.1, 0.2, 0.2], rtol=1e-4, atol=1e-5)


def test_growth_of_the_sides_is_clipped_here_and_free_there():
    """KerasCV takes exp(dw) as it is; here, as in Detectron, a box is at most 1000/16 of its anchor."""
    anchor, deltas = np.float32([[-8, -8, 8, 8]]), [[0, 0, 5, 6]]
    np.testing.assert_allclose(boxes.decode(anchor, np.float32(deltas)), [[-500, -500, 500, 500]], rtol=1e-5)
    grown = [8 * np.exp(5), 8 * np.exp(6)]
    np.testing.assert_allclose(their_boxes(anchor, deltas), [[-grown[0], -grown[1], *grown]], rtol=1e-5)


# Targets


def their_targets(height, width, gt_boxes, gt_labels):
    """Deltas dx, dy, dw, dh [B, A, 4] and classes [B, A] of KerasCV's RetinaNet."""
    encoder = their_retinanet.LabelEncoder(
        "xyxy", their_generator([2.0, 1.0, 0.5]), box_variance=NO_VARIANCE, background_class=-1.0, ignore_class=-2.0
    )
    images = np.zeros((len(gt_boxes), height, width, 3), "float32")
    deltas, classes = encoder(images, {"boxes": gt_boxes, "classes": gt_labels.astype("float32")})
    return numpy(deltas)[..., XYWH_FROM_YXHW], numpy(classes)


def test_targets_by_thresholds_alone_are_theirs():
    """KerasCV forces no anchors: it agrees with low_quality="none". Where an anchor is not positive, its deltas lead to
    the best box, here they are 0; no loss sees them."""
    rng = np.random.default_rng(3)
    gt_boxes, gt_labels = random_boxes(rng, 3, 12, side=180.0), rng.integers(0, 5, (3, 12))
    gt_boxes[1, 7:], gt_labels[1, 7:] = -1, -1  # KerasCV's padding
    deltas, classes = their_targets(160, 192, gt_boxes, gt_labels)
    anchors = anchor_boxes(160, 192)
    own_classes, own_deltas = map(numpy, assign(anchors, gt_boxes, gt_labels, low_quality="none"))
    np.testing.assert_array_equal(own_classes, classes)
    assert {BACKGROUND, IGNORE, 0, 1, 2, 3, 4} <= set(classes.ravel())
    positive = classes >= 0
    np.testing.assert_allclose(own_deltas[positive], deltas[positive], rtol=1e-4, atol=1e-5)
    assert np.abs(deltas[~positive]).max() > 1
    np.testing.assert_array_equal(own_deltas[~positive], 0)


# Losses


LOGITS = np.linspace(-12, 12, 97, dtype="float32")


def their_focal(predicted, targets, from_logits=True, **settings):
    """KerasCV sums over the last axis: here an axis of 1, so element by element."""
    loss = keras_cv.losses.FocalLoss(from_logits=from_logits, reduction="none", **settings)
    return loss(targets[:, None], predicted[:, None])


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 0.0), (0.75, 0.5), (0.25, 5.0)])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_focal_loss_is_theirs(alpha, gamma, target):
    """KerasCV subtracts p_t from 1 in float32, so a sure and right logit keeps few digits there: hence the atol."""
    targets = np.full_like(LOGITS, target)
    theirs = their_focal(LOGITS, targets, alpha=alpha, gamma=gamma)
    np.testing.assert_allclose(losses.focal(LOGITS, targets, alpha, gamma), theirs, rtol=1e-4, atol=1e-7)


def test_focal_loss_on_probabilities_stops_growing_there():
    """From probabilities, its default, KerasCV clips at 1e-7: a logit of -40 for a true class costs -log(1e-7) = 16.1
    in place of 40. From logits it agrees."""
    logits, targets = np.float32([-40, -80]), np.ones(2, "float32")
    np.testing.assert_allclose(losses.focal(logits, targets), [10, 20], rtol=1e-6)
    np.testing.assert_allclose(their_focal(logits, targets), [10, 20], rtol=1e-6)
    clipped = their_focal(np.float32(1 / (1 + np.exp(-np.float64(logits)))), targets, from_logits=False)
    np.testing.assert_allclose(clipped, 0.25 * -np.log(1e-7), rtol=1e-5)


def test_focal_loss_at_a_gamma_under_1_has_a_gradient_here_and_nan_there():
    """KerasCV's (1 - p_t)^gamma has no derivative at p_t = 1, where a sure and right logit lands in float32."""
    logits, targets = tf.constant([3.0, 40.0]), np.ones(2, "float32")
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        ours, theirs = losses.focal(logits, targets, gamma=0.5), their_focal(logits, targets, gamma=0.5)
    ours, theirs = numpy(tape.gradient(ours, logits)), numpy(tape.gradient(theirs, logits))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    assert np.isnan(theirs[1])
    np.testing.assert_allclose(ours[1], 0, atol=1e-12)


ERRORS = np.linspace(-3, 3, 121, dtype="float32")


def their_smooth_l1(errors, cutoff):
    loss = keras_cv.losses.SmoothL1Loss(l1_cutoff=cutoff, reduction="none")
    return numpy(loss(np.zeros_like(errors)[:, None], errors[:, None]))


def test_smooth_l1_at_fast_rcnns_beta_is_theirs():
    np.testing.assert_allclose(losses.smooth_l1(ERRORS, beta=1.0), their_smooth_l1(ERRORS, 1.0), rtol=1e-6)


def test_smooth_l1_at_other_betas_is_continuous_here_and_jumps_there():
    """KerasCV's cut-off moves the border and not the pieces, 0.5 e^2 and |e| - 0.5: at 0.11 the loss of its linear
    part is negative near the border. Here the pieces are e^2 / (2 beta) and |e| - beta / 2."""
    theirs, ours = their_smooth_l1(ERRORS, 0.11), numpy(losses.smooth_l1(ERRORS, beta=0.11))
    inside = np.abs(ERRORS) < 0.11
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(theirs[inside], 0.11 * ours[inside], rtol=1e-5)
    np.testing.assert_allclose(theirs[~inside], ours[~inside] + 0.055 - 0.5, rtol=1e-5, atol=1e-6)
    assert theirs.min() < -0.3 and ours.min() == 0


# Non-maximum suppression


def crowd(rng, count=24, num_classes=4):
    """Overlapping boxes [1, N, 4] with scores [1, N] and labels [1, N]; no two scores are equal."""
    found = random_boxes(rng, 1, count, side=120.0)
    scores = rng.permutation(np.linspace(0.02, 0.98, count)).astype("float32")[None]
    return found, scores, rng.integers(0, num_classes, (1, count)).astype("int32")


def by_class(scores, labels, num_classes=4):
    return scores[..., None] * (labels[..., None] == np.arange(num_classes))  # [1, N, K]


def their_multi_class(found, class_scores, threshold, most):
    layer = keras_cv.layers.MultiClassNonMaxSuppression(
        "xyxy", from_logits=False, iou_threshold=threshold, confidence_threshold=0.0, max_detections=most
    )
    return {name: numpy(value)[0] for name, value in layer(found, class_scores).items()}


def portable(boxes, scores, labels, num_classes, *, iou_threshold, max_detections):
    return nms.greedy(boxes, scores, labels, iou_threshold, max_detections)


both = pytest.mark.parametrize("run", [nms.per_class, portable], ids=["per_class", "greedy"])


@both
@pytest.mark.parametrize("threshold, most", [(0.5, 24), (0.3, 24), (0.5, 8)])
def test_nms_of_several_classes_is_theirs(run, threshold, most):
    """KerasCV's MultiClassNonMaxSuppression; its rows past the count are -1, here box 0, score 0, label -1."""
    found, scores, labels = crowd(np.random.default_rng(4))
    theirs = their_multi_class(found, by_class(scores, labels), threshold, most)
    kept = run(found, scores, labels, 4, iou_threshold=threshold, max_detections=most)
    kept_boxes, kept_scores, kept_labels, count = (numpy(part)[0] for part in kept)
    assert 7 < count < scores.size and count == theirs["num_detections"]
    np.testing.assert_allclose(kept_boxes[:count], theirs["boxes"][:count], atol=1e-4)
    np.testing.assert_array_equal(kept_scores[:count], theirs["confidence"][:count])
    np.testing.assert_array_equal(kept_labels[:count], theirs["classes"][:count])
    np.testing.assert_array_equal(theirs["boxes"][count:], -1)


def their_agnostic(found, class_scores, threshold=0.5):
    """Scores kept by KerasCV's NonMaxSuppression, falling."""
    layer = keras_cv.layers.NonMaxSuppression(
        "xyxy", from_logits=False, iou_threshold=threshold, confidence_threshold=0.0
    )
    kept = layer(found, class_scores)
    return numpy(kept["confidence"])[0, : int(numpy(kept["num_detections"])[0])]


def our_scores(run, found, scores, labels, threshold=0.5):
    _, kept, _, count = run(found, scores, labels, 4, iou_threshold=threshold, max_detections=scores.size)
    return numpy(kept)[0, : int(numpy(count)[0])]


@both
def test_nms_is_theirs_class_by_class(run):
    """KerasCV's NonMaxSuppression does not look at classes: run on each class by itself, it keeps what is kept here."""
    found, scores, labels = crowd(np.random.default_rng(5))
    kept = []
    for k in range(4):
        kept.extend(their_agnostic(found, by_class(scores, labels)[..., k : k + 1]))  # a score of 0 is no candidate
    np.testing.assert_allclose(our_scores(run, found, scores, labels), np.sort(kept)[::-1])
    as_one = our_scores(run, found, scores, np.zeros_like(labels))
    np.testing.assert_allclose(as_one, their_agnostic(found, by_class(scores, labels)))
    assert len(as_one) < len(kept)


@both
def test_an_overlap_equal_to_the_threshold_is_kept_here_and_dropped_there(run):
    """KerasCV's NonMaxSuppression drops an IoU at or over the threshold, here (and in its layer for several classes)
    one over it."""
    found, scores, labels = np.float32([[[0, 0, 2, 1], [0, 0, 1, 1]]]), np.float32([[0.9, 0.8]]), np.int32([[0, 0]])
    np.testing.assert_array_equal(our_scores(run, found, scores, labels), np.float32([0.9, 0.8]))
    np.testing.assert_array_equal(their_agnostic(found, scores[..., None]), np.float32([0.9]))
    assert their_multi_class(found, scores[..., None], 0.5, 2)["num_detections"] == 2
