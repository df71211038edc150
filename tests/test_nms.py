"""Non-maximum suppression: TensorFlow's kernel and the portable loop against NumPy, and by hand."""

import functools

import backends
import numpy as np
import pytest
import reference
from keras import ops

from retinanet_keras import nms

pytestmark = pytest.mark.check


def kernel(boxes, scores, labels, num_classes, threshold, most):
    found = nms.per_class(
        np.float32(boxes),
        np.float32(scores),
        np.int32(labels),
        num_classes,
        iou_threshold=threshold,
        max_detections=most,
    )
    return [ops.convert_to_numpy(part) for part in found]


def loop(boxes, scores, labels, num_classes, threshold, most):
    del num_classes
    found = nms.greedy(np.float32(boxes), np.float32(scores), np.int32(labels), threshold, most)
    return [ops.convert_to_numpy(part) for part in found]


@functools.cache
def graph(threshold, most):
    return backends.compiled(lambda boxes, scores, labels: nms.greedy(boxes, scores, labels, threshold, most))


def compiled_loop(boxes, scores, labels, num_classes, threshold, most):
    """As `loop`; eagerly, hundreds of picks are slow."""
    found = graph(threshold, most)(boxes, scores, np.int32(labels))
    return [ops.convert_to_numpy(part) for part in found]


both = pytest.mark.parametrize("run", [kernel, loop])


def candidates(seed, batch=2, count=150, num_classes=4):
    rng = np.random.default_rng(seed)
    corner, sides = rng.uniform(0, 80, (batch, count, 2)), rng.uniform(2, 50, (batch, count, 2))
    boxes = np.concatenate([corner, corner + sides], axis=-1).astype("float32")
    scores = rng.permuted(np.linspace(0.01, 0.99, batch * count)).reshape(batch, count).astype("float32")
    scores[rng.random((batch, count)) < 0.2] = 0
    return boxes, scores, rng.integers(0, num_classes, (batch, count))


@pytest.mark.parametrize("run", [kernel, compiled_loop])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("threshold, most", [(0.5, 20), (0.3, 150), (0.0, 30), (1.0, 50)])
def test_equal_to_numpy_in_the_same_order(run, seed, threshold, most):
    boxes, scores, labels = candidates(seed)
    found_boxes, found_scores, found_labels, count = run(boxes, scores, labels, 4, threshold, most)
    for b in range(len(boxes)):
        kept = reference.nms(boxes[b], scores[b], labels[b], threshold, most)
        n = len(kept)
        assert count[b] == n
        np.testing.assert_array_equal(found_boxes[b, :n], boxes[b, kept])
        np.testing.assert_array_equal(found_scores[b, :n], scores[b, kept])
        np.testing.assert_array_equal(found_labels[b, :n], labels[b, kept])


@both
def test_by_hand(run):
    boxes = [[[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 5], [0, 0, 10, 10], [20, 20, 30, 30]]]
    scores, labels = [[0.9, 0.8, 0.7, 0.6, 0.5]], [[1, 1, 1, 0, 1]]
    # IoU .6 falls; exactly .5 does not exceed the threshold; another class does not count.
    found_boxes, found_scores, found_labels, count = run(boxes, scores, labels, 2, 0.5, 4)
    assert count.tolist() == [4]
    np.testing.assert_allclose(found_scores, [[0.9, 0.7, 0.6, 0.5]])
    assert found_labels.tolist() == [[1, 1, 0, 1]]
    np.testing.assert_array_equal(found_boxes[0, 3], [20, 20, 30, 30])


@both
def test_the_first_of_equal_scores_is_taken_and_comes_first(run):
    """Saturated sigmoids are equal."""
    boxes = np.float32([[[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 9], [20, 0, 30, 10]]])
    found, _, _, count = run(boxes, np.full((1, 4), 0.5), np.zeros((1, 4)), 1, 0.5, 4)
    assert count.tolist() == [2]
    np.testing.assert_array_equal(found[0, :2], boxes[0, [0, 2]])


@both
def test_many_equal_scores_come_in_the_order_given(run):
    rng = np.random.default_rng(5)
    boxes, _, labels = candidates(5, batch=1)
    scores = np.float32(rng.integers(0, 4, (1, 150))) / 4
    found_boxes, found_scores, found_labels, count = run(boxes, scores, labels, 4, 0.5, 60)
    kept = reference.nms(boxes[0], scores[0], labels[0], 0.5, 60)
    assert count[0] == len(kept) > 50
    np.testing.assert_array_equal(found_boxes[0, : len(kept)], boxes[0, kept])
    np.testing.assert_array_equal(found_labels[0, : len(kept)], labels[0, kept])


@both
def test_what_is_suppressed_suppresses_nothing(run):
    boxes = [[[0, 0, 10, 10], [0, 4, 10, 14], [0, 8, 10, 18]]]  # each overlaps the next by 6/14
    assert run(boxes, [[0.9, 0.8, 0.7]], [[0, 0, 0]], 1, 0.4, 3)[1].tolist()[0][:2] == pytest.approx([0.9, 0.7])


@both
def test_boxes_without_area_are_no_trouble(run):
    boxes = [[[5, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10]]]
    _, scores, _, count = run(boxes, [[0.9, 0.8, 0.7]], [[0, 0, 0]], 1, 0.5, 3)
    assert count.tolist() == [3] and np.isfinite(scores).all()


def test_rows_past_count():
    boxes, scores, labels = candidates(0, count=6)
    scores[1] = 0  # no candidate in the second image
    found_boxes, found_scores, found_labels, count = kernel(boxes, scores, labels, 4, 0.5, 10)
    assert found_boxes.shape == (2, 10, 4) and found_labels.dtype == "int32" and count.dtype == "int32"
    assert count[1] == 0 and 0 < count[0] <= 6
    for b in range(2):
        np.testing.assert_array_equal(found_boxes[b, count[b] :], 0)
        np.testing.assert_array_equal(found_scores[b, count[b] :], 0)
        np.testing.assert_array_equal(found_labels[b, count[b] :], -1)


def test_pixels_are_not_clipped_to_the_unit_square():
    box = [[[-30, 40, 700, 900]]]
    np.testing.assert_array_equal(kernel(box, [[0.9]], [[0]], 1, 0.5, 1)[0], box)
