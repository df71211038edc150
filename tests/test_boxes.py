"""Boxes: hand-worked numbers, float64 NumPy, KerasCV, and the law of encode and decode."""

import math

import keras
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from retinanet_keras import boxes

pytestmark = pytest.mark.check


def random_boxes(rng, *shape, size=100.0):
    corners = rng.uniform(0, size, (*shape, 2, 2))
    return np.concatenate([corners.min(axis=-2), corners.max(axis=-2)], axis=-1).astype("float32")


# IoU


def test_iou_by_hand():
    a = [[0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 4, 1]]
    b = [[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6], [2, 0, 4, 2]]
    expected = [[1, 1 / 3, 0, 0], [1 / 7, 1 / 3, 0, 1 / 7], [1 / 3, 1 / 3, 0, 1 / 3]]
    np.testing.assert_allclose(boxes.iou(np.float32(a), np.float32(b)), expected, rtol=1e-6)


def test_iou_equals_float64_numpy():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 60), random_boxes(rng, 70)
    np.testing.assert_allclose(boxes.iou(a, b), reference.iou(a, b), atol=1e-6)


def test_iou_is_symmetric_and_one_with_itself():
    a = random_boxes(np.random.default_rng(2), 15)
    overlaps = ops.convert_to_numpy(boxes.iou(a, a))
    np.testing.assert_array_equal(overlaps, overlaps.T)
    np.testing.assert_array_equal(np.diag(overlaps), 1.0)


DEGENERATE = [[5, 5, 5, 5], [1, 2, 1, 9], [1, 2, 9, 2], [9, 9, 1, 1], [9, 1, 1, 9], [0, 0, 0, 0]]


def test_iou_of_degenerate_and_inverted_boxes_is_0():
    proper = [[0, 0, 10, 10], [3, 3, 6, 6]]
    every = np.float32(DEGENERATE + proper)
    overlaps = ops.convert_to_numpy(boxes.iou(every, every))
    assert np.isfinite(overlaps).all()
    np.testing.assert_array_equal(overlaps[:6], 0)
    np.testing.assert_array_equal(overlaps[:, :6], 0)
    assert overlaps[6, 7] == pytest.approx(0.09)


def test_iou_with_batches_and_without_boxes():
    rng = np.random.default_rng(3)
    a, b = random_boxes(rng, 2, 3, 5), random_boxes(rng, 2, 3, 4)
    overlaps = ops.convert_to_numpy(boxes.iou(a, b))
    assert overlaps.shape == (2, 3, 5, 4)
    np.testing.assert_allclose(overlaps[1, 2], reference.iou(a[1, 2], b[1, 2]), atol=1e-6)
    shared = ops.convert_to_numpy(boxes.iou(a, b[:1, :1]))  # one set of boxes for the whole batch
    np.testing.assert_allclose(shared[1, 2], reference.iou(a[1, 2], b[0, 0]), atol=1e-6)
    assert tuple(boxes.iou(a[0, 0], np.zeros((0, 4), "float32")).shape) == (5, 0)
    assert tuple(boxes.iou(np.zeros((2, 0, 4), "float32"), b[:, 0]).shape) == (2, 0, 4)


def test_iou_takes_integers():
    np.testing.assert_allclose(boxes.iou(np.array([[0, 0, 2, 2]]), np.array([[0, 0, 1, 2]])), [[0.5]])


def test_area():
    np.testing.assert_array_equal(boxes.area(np.float32([[1, 2, 4, 7], *DEGENERATE])), [15, 0, 0, 0, 0, 0, 0])


# Clip


def test_clip_to_one_size():
    given_boxes = np.float32([[-5, -6, 3, 4], [2, 3, 50, 60], [30, 40, 50, 60], [1, 2, 3, 4]])
    expected = [[0, 0, 3, 4], [2, 3, 20, 10], [20, 10, 20, 10], [1, 2, 3, 4]]  # 10 high, 20 wide
    np.testing.assert_array_equal(boxes.clip(given_boxes, 10, 20), expected)
    np.testing.assert_array_equal(boxes.clip(given_boxes[None], 10, 20)[0], expected)


def test_clip_to_a_size_for_each_image():
    given_boxes = np.float32([[[-1, -1, 100, 100]], [[-1, 5, 100, 100]]])
    expected = [[[0, 0, 20, 10]], [[0, 5, 40, 30]]]
    np.testing.assert_array_equal(boxes.clip(given_boxes, np.array([10, 30]), np.array([20.0, 40.0])), expected)


# Deltas


def test_encode_by_hand():
    anchor = np.float32([[10, 20, 30, 60]])  # center 20, 40; 20 wide, 40 high
    box = np.float32([[20, 10, 60, 50]])  # center 40, 30; 40 wide, 40 high
    np.testing.assert_allclose(boxes.encode(anchor, box), [[1.0, -0.25, math.log(2), 0]], rtol=1e-6)
    np.testing.assert_array_equal(boxes.encode(anchor, anchor), [[0, 0, 0, 0]])


def test_encode_and_decode_equal_float64_numpy():
    rng = np.random.default_rng(4)
    anchors, others = random_boxes(rng, 50) + np.float32([0, 0, 2, 2]), random_boxes(rng, 50) + np.float32([0, 0, 2, 2])
    np.testing.assert_allclose(boxes.encode(anchors, others), reference.encode(anchors, others), rtol=1e-4, atol=1e-5)
    deltas = rng.normal(0, 1, (50, 4)).astype("float32")
    np.testing.assert_allclose(boxes.decode(anchors, deltas), reference.decode(anchors, deltas), rtol=1e-5, atol=1e-3)


side = st.floats(1, 60, width=32)
corner = st.floats(-200, 1000, width=32)
pair = st.tuples(corner, corner, side, side, corner, corner, side, side)


@settings(max_examples=60, deadline=None)
@given(st.lists(pair, min_size=1, max_size=8))
def test_decode_inverts_encode(rows):
    rows = np.float32(rows)
    anchors = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)
    others = np.concatenate([rows[:, 4:6], rows[:, 4:6] + rows[:, 6:8]], axis=1)
    np.testing.assert_allclose(boxes.decode(anchors, boxes.encode(anchors, others)), others, atol=2e-2, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), st.tuples(side, side))
def test_encode_inverts_decode(deltas, sides):
    anchor = np.float32([[7, 3, 7 + sides[0], 3 + sides[1]]])
    deltas = np.float32([deltas])
    np.testing.assert_allclose(boxes.encode(anchor, boxes.decode(anchor, deltas)), deltas, atol=1e-3)


def test_decode_clips_the_growth_of_the_sides():
    anchor = np.float32([[0, 0, 16, 32]])
    decoded = ops.convert_to_numpy(boxes.decode(anchor, np.float32([[0, 0, 1000, 5]])))[0]
    np.testing.assert_allclose(decoded[2:] - decoded[:2], [1000, 2000], rtol=1e-5)  # 62.5 times the anchor's
    assert np.isfinite(ops.convert_to_numpy(boxes.decode(anchor, np.float32([[0, 0, 1e30, -1e30]])))).all()


def test_half_precision_deltas_are_decoded_in_float32():
    anchor = np.float32([[1000, 1000, 1033, 1033]])
    decoded = boxes.decode(anchor, ops.cast(np.zeros((1, 4)), "bfloat16"))
    assert keras.backend.standardize_dtype(decoded.dtype) == "float32"
    np.testing.assert_array_equal(decoded, anchor)
