"""How files of Detectron, Detectron2 and torchvision are laid out, and in what their networks differ from the paper.

A part of the network has the name of its layer here: `stem`, `res2_0_conv1` ..., `res2_0_shortcut`, `lateral3` to `5`,
`output3` to `5`, `p6`, `p7`, `class0` ..., `class_final`, `box0` ..., `box_final`.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from retinanet_keras.config import AnchorConfig, DetectionConfig, TargetConfig

# COCO's 80 categories, in the order of their ids.
COCO_CATEGORIES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip
COCO_SLOTS = 91  # classes of torchvision: the category ids themselves, 0 for the background

# RGB of 0..255; Detectron and Detectron2 take BGR, which is a permutation of the stem's kernel.
DETECTRON_MEAN = (122.7717, 115.9465, 102.9801)
DETECTRON2_MEAN = (123.675, 116.28, 103.53)  # torchvision's is the same, in parts of 255
RESNEXT_STD = (58.395, 57.12, 57.375)  # of Detectron2's X101, and of torchvision
NO_STD = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Layout:
    """A kind of file.

    `mark`: how an entry begins that files of this kind, and no others, have. `suffixes`: of kernel and bias. `norm`: of
    batch normalization's gamma, beta, mean and variance; only the first two where statistics are part of them. `cell`:
    position in the file's cell of each anchor, ordered scale, then ratio .5, 1, 2. `extras`: entries that the network
    does not use; those that end in a dot or a slash are beginnings. `settings`: of the RetinaNet.
    """

    name: str
    mark: str
    suffixes: tuple[str, str]
    norm: tuple[str, ...]
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    bgr: bool
    cell: tuple[int, ...]
    norm_epsilon: float
    extras: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


TORCH: dict[str, Any] = {
    "suffixes": (".weight", ".bias"),
    "norm": (".weight", ".bias", ".running_mean", ".running_var"),
}

DETECTRON = Layout(
    name="Detectron", mark="retnet_", suffixes=("_w", "_b"), norm=("_s", "_b"),
    pixel_mean=DETECTRON_MEAN, pixel_std=NO_STD, bgr=True, norm_epsilon=0.0,
    cell=tuple(3 * k + ratio for k in range(3) for ratio in (2, 0, 1)),  # its ratios: 1, 2, .5
    # Trained files carry along the classifier of ImageNet, and for a ResNet-50 a bias of conv1, none of it in use.
    extras=("__preserve__/", "fc1000_w", "fc1000_b", "pred_w", "pred_b", "conv1_b", "lr"),
    settings={
        "anchors": AnchorConfig(rounding="cell"),
        "targets": TargetConfig(low_quality="detectron"),
        "detection": DetectionConfig(clip="inclusive", p7_threshold=0.0, pad_multiple=128),
    },
)  # fmt: skip

DETECTRON2 = Layout(
    name="Detectron2", mark="backbone.bottom_up.", **TORCH,
    pixel_mean=DETECTRON2_MEAN, pixel_std=NO_STD, bgr=True, norm_epsilon=1e-5, cell=tuple(range(9)),
    extras=("anchor_generator.cell_anchors.", "backbone.bottom_up.stem.fc."),
    settings={
        "anchors": AnchorConfig(offset=0.0),
        "targets": TargetConfig(low_quality="all"),
        "detection": DetectionConfig(clip="after_nms"),
    },
)  # fmt: skip

TORCHVISION = Layout(
    name="torchvision", mark="backbone.body.", **TORCH,
    pixel_mean=DETECTRON2_MEAN, pixel_std=RESNEXT_STD, bgr=False, norm_epsilon=1e-5,
    cell=tuple(3 * ratio + k for k in range(3) for ratio in range(3)),  # ratio outer, scale inner
    settings={
        "anchors": AnchorConfig(offset=0.0, rounding="integers"),
        "targets": TargetConfig(low_quality="all"),
        "detection": DetectionConfig(max_detections=300),
    },
)  # fmt: skip

LAYOUTS = (DETECTRON, DETECTRON2, TORCHVISION)


def backbone_names(layout, blocks):
    """Names of the backbone's parts in a file.

    Args:
        layout: a Layout.
        blocks: numbers of blocks of res2 to res5.

    Returns:
        dict of part -> (convolution, normalization).
    """
    stem = {
        "Detectron": ("conv1", "res_conv1_bn"),
        "Detectron2": ("backbone.bottom_up.stem.conv1", "backbone.bottom_up.stem.conv1.norm"),
        "torchvision": ("backbone.body.conv1", "backbone.body.bn1"),
    }
    names = {"stem": stem[layout.name]}
    for stage, count in enumerate(blocks, start=2):
        for i in range(count):
            for part in ("conv1", "conv2", "conv3", "shortcut")[: 4 if i == 0 else 3]:
                names[f"res{stage}_{i}_{part}"] = _block_part(layout, stage, i, part)
    return names


def _block_part(layout, stage, i, part):
    if layout.name == DETECTRON.name:
        branch = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "shortcut": "1"}[part]
        conv = f"res{stage}_{i}_branch{branch}"
        return conv, f"{conv}_bn"
    if layout is DETECTRON2:
        conv = f"backbone.bottom_up.res{stage}.{i}.{part}"
        return conv, f"{conv}.norm"
    base = f"backbone.body.layer{stage - 1}.{i}"
    if part == "shortcut":
        return f"{base}.downsample.0", f"{base}.downsample.1"
    return f"{base}.{part}", f"{base}.bn{part[-1]}"


def head_names(layout, blocks, depth, weights):
    """Names of the parts after the backbone, as `backbone_names`; the normalization is None where there is none.

    Args:
        layout: a Layout.
        blocks: numbers of blocks of res2 to res5; Detectron's names have the last ones in them.
        depth: convolutions in a subnet before its last.
        weights: of the file; torchvision's have two ways of naming.
    """
    if layout.name == DETECTRON.name:
        ends = {level: f"res{level}_{blocks[level - 2] - 1}_sum" for level in (3, 4, 5)}
        names = {
            f"lateral{level}": f"fpn_inner_{end}" + ("" if level == 5 else "_lateral") for level, end in ends.items()
        }
        names |= {f"output{level}": f"fpn_{end}" for level, end in ends.items()} | {"p6": "fpn_6", "p7": "fpn_7"}
        for ours, theirs in (("class", "cls"), ("box", "bbox")):
            names |= {f"{ours}{i}": f"retnet_{theirs}_conv_n{i}_fpn3" for i in range(depth)}
            names[f"{ours}_final"] = f"retnet_{theirs}_pred_fpn3"
        return {part: (conv, None) for part, conv in names.items()}
    if layout is DETECTRON2:
        names = {
            f"{part}{level}": f"backbone.fpn_{part}{level}" for part in ("lateral", "output") for level in (3, 4, 5)
        }
        names |= {level: f"backbone.top_block.{level}" for level in ("p6", "p7")}
        names |= {f"class{i}": f"head.cls_subnet.{2 * i}" for i in range(depth)}
        names |= {f"box{i}": f"head.bbox_subnet.{2 * i}" for i in range(depth)}
        names |= {"class_final": "head.cls_score", "box_final": "head.bbox_pred"}
        return {part: (conv, None) for part, conv in names.items()}
    return _torchvision_head(depth, weights)


def _torchvision_head(depth, weights):
    new_pyramid = any(re.match(r"backbone\.fpn\.inner_blocks\.\d\.0\.", name) for name in weights)
    new_head = any(re.match(r"head\.\w+\.conv\.\d\.0\.", name) for name in weights)
    normed = any(re.match(r"head\.\w+\.conv\.\d\.1\.", name) for name in weights)
    names = {level: (f"backbone.fpn.extra_blocks.{level}", None) for level in ("p6", "p7")}
    for ours, theirs in (("lateral", "inner"), ("output", "layer")):
        for i in range(3):
            name = f"backbone.fpn.{theirs}_blocks.{i}"
            names[f"{ours}{i + 3}"] = (f"{name}.0" if new_pyramid else name, None)
    for ours, theirs, last in (("class", "classification", "cls_logits"), ("box", "regression", "bbox_reg")):
        base = f"head.{theirs}_head"
        for i in range(depth):
            conv = f"{base}.conv.{i}.0" if new_head else f"{base}.conv.{2 * i}"
            names[f"{ours}{i}"] = (conv, f"{base}.conv.{i}.1" if normed else None)
        names[f"{ours}_final"] = (f"{base}.{last}", None)
    return names


def find_blocks(layout, weights):
    """Numbers of blocks of res2 to res5 in a file, whatever entries of them are missing."""
    patterns = {
        "Detectron": r"res{stage}_(\d+)_",
        "Detectron2": r"backbone\.bottom_up\.res{stage}\.(\d+)\.",
        "torchvision": r"backbone\.body\.layer{layer}\.(\d+)\.",
    }
    pattern = patterns[layout.name]
    return tuple(_count(weights, pattern.format(stage=stage, layer=stage - 1)) for stage in (2, 3, 4, 5))


def find_depth(layout, weights):
    """Convolutions in a subnet before its last."""
    if layout.name == DETECTRON.name:
        return _count(weights, r"retnet_(?:cls|bbox)_conv_n(\d+)_fpn3")
    if layout is DETECTRON2:
        return (_count(weights, r"head\.(?:cls|bbox)_subnet\.(\d+)\.") + 1) // 2  # each second is a ReLU
    head = r"head\.(?:classification|regression)_head\.conv\.(\d+)\."
    return _count(weights, head + r"0\.") or (_count(weights, head) + 1) // 2


def _count(weights, pattern):
    """One more than the highest number that a pattern finds at the beginning of names."""
    found = (re.match(pattern, name) for name in weights)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def imagenet(weights):
    """The Layout of one of Detectron's ImageNet files, or of Detectron2's copies, which have their statistics."""
    convs = tuple(name.removesuffix("_w") + "_b" for name in weights if name.endswith("_w"))
    common = {"name": "Detectron", "mark": "conv1_w", "suffixes": ("_w", "_b"), "bgr": True, "cell": ()}
    common["extras"] = (
        "fc1000_w",
        "fc1000_b",
        "pred_w",
        "pred_b",
        *convs,
    )  # biases of convolutions: Detectron's network has none
    if "res_conv1_bn_s" in weights:
        return Layout(norm=("_s", "_b"), pixel_mean=DETECTRON_MEAN, pixel_std=NO_STD, norm_epsilon=0.0, **common)
    grouped = (
        "res2_0_branch2b_w" in weights and weights["res2_0_branch2b_w"].shape[1] < weights["res2_0_branch2b_w"].shape[0]
    )
    return Layout(
        norm=("_gamma", "_beta", "_running_mean", "_running_var"), pixel_mean=DETECTRON2_MEAN,
        pixel_std=RESNEXT_STD if grouped else NO_STD, norm_epsilon=1e-5, **common,
    )  # fmt: skip
