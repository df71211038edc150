"""The names and defaults that other programs call."""

import inspect

import pytest

import retinanet_keras
from retinanet_keras import RetinaNet, boxes, checkpoints, detections, load_config, losses, mining, targets
from retinanet_keras.anchors import anchor_boxes
from retinanet_keras.config import AnchorConfig

pytestmark = pytest.mark.check


def test_names_others_call():
    def names(function):
        return list(inspect.signature(function).parameters)

    def keywords(function):
        return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}

    def signature_of(function):
        """Names and defaults, without annotations."""
        signature = inspect.signature(function)
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))

    assert retinanet_keras.RetinaNet is RetinaNet and retinanet_keras.load_config is load_config
    assert names(load_config) == ["path", "overrides"]
    assert names(RetinaNet.__init__)[1:3] == ["num_classes", "backbone"]
    assert inspect.signature(RetinaNet.__init__).parameters["backbone"].default == "resnet50"
    made = keywords(RetinaNet.__init__)
    assert (
        made.items()
        >= {"weights": None, "anchors": AnchorConfig(), "fpn_channels": 256, "head_depth": 4, "prior": 0.01}.items()
    )
    assert names(RetinaNet.compile)[1:4] == ["optimizer", "classification_loss", "box_loss"]
    assert keywords(RetinaNet.compile)["jit_compile"] == "auto"
    assert names(RetinaNet.detect)[1] == "images"
    assert names(anchor_boxes) == ["height", "width", "config"]
    assert names(boxes.iou) == ["a", "b"]
    assert names(boxes.encode) == ["anchors", "boxes"]
    assert names(boxes.decode) == ["anchors", "deltas"]
    assert names(boxes.clip)[:3] == ["boxes", "height", "width"]
    assert names(targets.assign)[:3] == ["anchors", "gt_boxes", "gt_labels"]
    assert keywords(targets.assign) == {"positive_iou": 0.5, "negative_iou": 0.4, "low_quality": "detectron"}
    assert signature_of(losses.cross_entropy) == "(logits, targets, alpha=None)"
    assert signature_of(losses.focal) == "(logits, targets, alpha=0.25, gamma=2.0)"
    assert signature_of(losses.focal_star) == "(logits, targets, alpha=0.25, gamma=2.0, beta=1.0)"
    assert signature_of(losses.hinge) == "(logits, targets, alpha=None, threshold=0.5)"
    assert signature_of(losses.smooth_l1) == "(error, beta=0.11)"
    assert names(detections.decode)[:6] == ["logits", "deltas", "anchors", "level_sizes", "height", "width"]
    assert keywords(detections.decode).items() >= {
        "score_threshold": 0.05, "pre_nms_top_k": 1000, "nms_iou": 0.5, "max_detections": 100
    }.items()  # fmt: skip
    assert list(keywords(mining.select)) == ["batch_size", "nms_iou", "ratio"]
    assert names(mining.select)[:4] == ["losses", "anchors", "positive", "valid"]
    assert names(checkpoints.load)[0] == "path"
