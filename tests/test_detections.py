"""Detections: the whole post-processing against NumPy at a realistic size, and each rule by hand."""

import backends
import numpy as np
import pytest
import reference
from keras import ops

from retinanet_keras import detections, nms
from retinanet_keras.anchors import anchor_boxes, level_sizes

pytestmark = pytest.mark.check


def run(logits, deltas, anchors, sizes, height, width, **settings):
    found = detections.decode(
        np.float32(logits), np.float32(deltas), np.float32(anchors), sizes, height, width, **settings
    )
    assert set(found) == {"boxes", "scores", "labels", "count"}
    return {name: ops.convert_to_numpy(value) for name, value in found.items()}


def post_process(logits, deltas, anchors, sizes, height, width, *, threshold=0.05, top_k=1000, nms_iou=0.5, most=100):
    """One image, in float64 NumPy. -> boxes, scores, labels of what is kept."""
    num_classes = logits.shape[1]
    boxes, scores, labels, start = [], [], [], 0
    for size in sizes:
        flat = np.float64(logits[start : start + size]).ravel()
        best = np.argsort(-flat, kind="stable")[:top_k]
        row, label = best // num_classes + start, best % num_classes
        boxes.append(reference.decode(anchors[row], deltas[row]))
        scores.append(np.exp(reference.log_sigmoid(flat[best])))
        labels.append(label)
        start += size
    boxes, scores, labels = np.concatenate(boxes), np.concatenate(scores), np.concatenate(labels)
    boxes = np.clip(boxes, 0, [width, height, width, height])
    scores = np.where(scores > threshold, scores, 0)
    kept = reference.nms(boxes, scores, labels, nms_iou, most)
    return boxes[kept], scores[kept], labels[kept]


def check(found, b, expected):
    boxes, scores, labels = expected
    n = len(scores)
    assert found["count"][b] == n
    np.testing.assert_array_equal(found["labels"][b, :n], labels)
    np.testing.assert_allclose(found["scores"][b, :n], scores, rtol=1e-5)
    np.testing.assert_allclose(found["boxes"][b, :n], boxes, atol=2e-3)
    np.testing.assert_array_equal(found["boxes"][b, n:], 0)
    np.testing.assert_array_equal(found["scores"][b, n:], 0)
    np.testing.assert_array_equal(found["labels"][b, n:], -1)


def outputs(seed, batch, anchors, num_classes):
    """Logits that are all different, a tenth of them above the paper's threshold; and deltas."""
    rng = np.random.default_rng(seed)
    spread = -12 + 14 * np.linspace(0, 1, batch * len(anchors) * num_classes) ** 4
    logits = rng.permutation(spread).reshape(batch, len(anchors), num_classes).astype("float32")
    return logits, rng.normal(0, 0.5, (batch, len(anchors), 4)).astype("float32")


@pytest.mark.parametrize("suppression", ["kernel", "loop"])
def test_equal_to_numpy_at_80_classes(suppression, monkeypatch):
    """With TensorFlow's kernel, and with the loop that other backends run."""
    if suppression == "loop":
        monkeypatch.setattr(nms, "_tensorflow_kernel", lambda b, s, labels, _, *rest: nms.greedy(b, s, labels, *rest))
    anchors = ops.convert_to_numpy(anchor_boxes(320, 416))
    sizes = level_sizes(320, 416)
    assert len(anchors) == 24993
    logits, deltas = outputs(0, 2, anchors, 80)
    heights, widths = np.float32([320, 201]), np.float32([390, 416])
    found = run(logits, deltas, anchors, sizes, heights, widths)
    assert found["boxes"].shape == (2, 100, 4)
    for b in range(2):
        expected = post_process(logits[b], deltas[b], anchors, sizes, heights[b], widths[b])
        assert len(expected[1]) == 100
        check(found, b, expected)


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("settings", [
    {"threshold": 0.3, "top_k": 20, "nms_iou": 0.3, "most": 7},
    {"threshold": 0.05, "top_k": 1000, "nms_iou": 0.5, "most": 300},  # fewer anchors than top_k on every level
    {"threshold": 0.0, "top_k": 3, "nms_iou": 1.0, "most": 40},
])  # fmt: skip
def test_equal_to_numpy_at_other_settings(settings, num_classes):
    anchors = ops.convert_to_numpy(anchor_boxes(32, 64))
    sizes = level_sizes(32, 64)
    logits, deltas = outputs(1, 2, anchors, num_classes)
    names = {"threshold": "score_threshold", "top_k": "pre_nms_top_k", "nms_iou": "nms_iou", "most": "max_detections"}
    found = run(logits, deltas, anchors, sizes, 32, 64, **{names[k]: v for k, v in settings.items()})
    for b in range(2):
        check(found, b, post_process(logits[b], deltas[b], anchors, sizes, 32, 64, **settings))


FAR = np.float32([[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])


def test_no_detection_at_all():
    found = run(np.full((2, 3, 4), -10.0), np.zeros((2, 3, 4)), FAR, [2, 1], 60, 60)
    assert found["count"].tolist() == [0, 0]
    np.testing.assert_array_equal(found["boxes"], np.zeros((2, 100, 4)))
    np.testing.assert_array_equal(found["scores"], np.zeros((2, 100)))
    np.testing.assert_array_equal(found["labels"], np.full((2, 100), -1))


def test_a_score_must_be_above_the_threshold():
    logits = np.zeros((1, 3, 1), "float32")
    logits[0, 1] = 1e-3
    found = run(logits, np.zeros((1, 3, 4)), FAR, [3], 60, 60, score_threshold=0.5)  # sigmoid(0) is 0.5
    assert found["count"].tolist() == [1]
    np.testing.assert_array_equal(found["boxes"][0, 0], FAR[1])


def test_one_anchor_can_be_of_two_classes():
    found = run([[[2.0, 3.0, -9.0]]], np.zeros((1, 1, 4)), FAR[:1], [1], 60, 60)
    assert found["labels"][0, :3].tolist() == [1, 0, -1]
    np.testing.assert_array_equal(found["boxes"][0, :2], FAR[[0, 0]])


def test_boxes_are_clipped_before_they_are_compared():
    anchors = [[0, 0, 10, 10], [0, 0, 10, 100]]  # IoU 0.1, but the same within 10 pixels
    logits = [[[3.0], [2.0]]]
    assert run(logits, np.zeros((1, 2, 4)), anchors, [2], 10, 10)["count"].tolist() == [1]
    assert run(logits, np.zeros((1, 2, 4)), anchors, [2], 100, 10)["count"].tolist() == [2]


def test_the_best_pairs_of_each_level_are_kept_exactly():
    """Two classes of one anchor can both be among the k best, and shut out another anchor."""
    logits = [[[5.0, 4.0], [3.0, 2.0], [9.0, -9.0]]]
    found = run(logits, np.zeros((1, 3, 4)), FAR, [2, 1], 60, 60, pre_nms_top_k=2)
    assert found["count"].tolist() == [3]
    assert found["labels"][0, :3].tolist() == [0, 0, 1]
    np.testing.assert_array_equal(found["boxes"][0, :3], FAR[[2, 0, 0]])


@backends.tensorflow_only
def test_sizes_known_only_to_the_graph():
    import tensorflow as tf

    num_classes = 3

    @tf.function(input_signature=[tf.TensorSpec((None, None, num_classes)), tf.TensorSpec((None, None, 4)),
                                  tf.TensorSpec((), tf.int32), tf.TensorSpec((), tf.int32)])  # fmt: skip
    def in_graph(logits, deltas, height, width):
        return detections.decode(
            logits, deltas, anchor_boxes(height, width), level_sizes(height, width), height, width, pre_nms_top_k=50
        )

    for height, width in ((32, 64), (64, 96)):
        anchors = ops.convert_to_numpy(anchor_boxes(height, width))
        logits, deltas = outputs(2, 1, anchors, num_classes)
        found = {name: value.numpy() for name, value in in_graph(logits, deltas, height, width).items()}
        check(
            found, 0, post_process(logits[0], deltas[0], anchors, level_sizes(height, width), height, width, top_k=50)
        )
