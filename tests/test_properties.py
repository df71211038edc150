"""Laws that hold for all boxes: of IoU, of the deltas, of the assignment and of NMS."""

import functools

import backends
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import ops

from retinanet_keras import boxes, nms
from retinanet_keras.anchors import anchor_boxes
from retinanet_keras.targets import assign

ROWS = 8


def floats(low, high, width=4):
    return arrays("float32", (ROWS, width), elements=st.floats(low, high, width=32))


def box_arrays(least, most):
    """ROWS boxes within 1,300 pixels, with sides from `least` to `most`."""
    corners, sides = floats(-200, 1000, 2), floats(least, most, 2)
    return st.builds(lambda corner, side: np.concatenate([corner, corner + side], axis=1), corners, sides)


def whole_boxes(count, side=12):
    """Boxes with corners of small whole numbers, of which many tie, and some have no area."""
    corners = arrays("int32", (count, 2), elements=st.integers(0, side))
    sides = arrays("int32", (count, 2), elements=st.integers(0, side))
    return st.builds(lambda corner, side: np.float32(np.concatenate([corner, corner + side], axis=1)), corners, sides)


# IoU and deltas


@settings(max_examples=60, deadline=None)
@given(floats(-100, 1300), floats(-100, 1300))
def test_iou_is_symmetric_and_between_0_and_1(a, b):
    """Of any numbers: half of these boxes are inverted."""
    overlap = ops.convert_to_numpy(boxes.iou(a, b))
    np.testing.assert_array_equal(overlap, ops.convert_to_numpy(boxes.iou(b, a)).T)
    assert (overlap >= 0).all() and (overlap <= 1).all()


@settings(max_examples=60, deadline=None)
@given(box_arrays(0.125, 1000))
def test_iou_of_a_box_with_itself_is_1(a):
    np.testing.assert_array_equal(np.diag(boxes.iou(a, a)), 1)


@settings(max_examples=60, deadline=None)
@given(box_arrays(16, 1000), box_arrays(16, 1000))
def test_decode_inverts_encode(anchors, others):
    """For sides up to 1000/16 of the anchor's, the bound of `decode`; float32 pixels are 1e-4 apart at 1,300."""
    np.testing.assert_allclose(boxes.decode(anchors, boxes.encode(anchors, others)), others, atol=2e-3)


@settings(max_examples=60, deadline=None)
@given(box_arrays(8, 1000), floats(-2, 2))
def test_encode_inverts_decode(anchors, deltas):
    np.testing.assert_allclose(boxes.encode(anchors, boxes.decode(anchors, deltas)), deltas, atol=2e-3)


# Assignment


ANCHORS = np.concatenate(
    [ops.convert_to_numpy(anchor_boxes(32, 32))[::3], [[0, 0, 6, 6], [3, 3, 12, 9], [0, 0, 12, 12]]]
)


@functools.cache
def assigning(rule):
    return backends.compiled(lambda *truth: assign(np.float32(ANCHORS), *truth, low_quality=rule))


@pytest.mark.parametrize("rule", ["none", "detectron", "all"])
@settings(max_examples=40, deadline=None)
@given(
    whole_boxes(9), arrays("int32", 6, elements=st.integers(0, 3)), st.permutations(range(9)), st.floats(1, 4, width=32)
)
def test_the_order_of_boxes_and_padding_between_them_do_not_matter(rule, truth, labels, order, scale):
    """The last three rows are padding. An anchor that has its highest IoU with several boxes takes the first of them.

    So class and deltas of those anchors may change with the order, but not whether they are positive or ignored. IoUs
    of whole numbers this small tie in float32 where they tie in float64.
    """
    truth = truth * np.round(scale)
    plain = [part[0] for part in backends.numpy_of(assigning(rule)(truth[None, :6], labels[None]))]
    labels = np.concatenate([labels, [-1, -1, -1]]).astype("int32")
    shuffled = backends.numpy_of(assigning(rule)(truth[None, order], labels[None, order]))
    classes, deltas = (part[0] for part in shuffled)

    overlap = np.sort(reference.iou(ANCHORS, truth[:6]), axis=1)
    single = (overlap[:, -1] > overlap[:, -2] + 1e-6) | (overlap[:, -1] == 0)
    np.testing.assert_array_equal(classes[single], plain[0][single])
    np.testing.assert_array_equal(deltas[single], plain[1][single])
    np.testing.assert_array_equal(np.minimum(classes, 0), np.minimum(plain[0], 0))


# NMS


@backends.compiled
def by_loop(boxes, scores, labels):
    return nms.greedy(boxes, scores, labels, 0.5, 20)


def by_kernel(boxes, scores, labels):
    return nms.per_class(boxes, scores, labels, 3, max_detections=20)


@pytest.mark.parametrize("suppress", [by_loop, by_kernel])
@settings(max_examples=40, deadline=None)
@given(
    whole_boxes(20),
    arrays("float32", 20, elements=st.floats(0.125, 1, width=16)),
    arrays("int32", 20, elements=st.integers(0, 2)),
)
def test_nms_keeps_all_that_it_kept_in_the_same_order(suppress, candidates, scores, labels):
    def run(boxes, scores, labels):
        *rows, count = (part[0] for part in backends.numpy_of(suppress(boxes[None], scores[None], labels[None])))
        return [part[:count] for part in rows]

    kept = run(candidates, scores, labels)
    again = run(*kept)
    np.testing.assert_array_equal(again[1], kept[1])
    for first, second in zip(kept, again, strict=True):
        np.testing.assert_array_equal(second, first)
