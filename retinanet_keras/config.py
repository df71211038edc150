"""Configuration: frozen dataclasses with the paper's values as defaults, read from JSON, overridden and validated.

A JSON file holds only what differs from the defaults:

    {"version": 1, "data": {"source": "coco", "dir": "data/my_set"}, "train": {"iterations": 2000}}

Every default names its source in the field's metadata, printed by `python -m retinanet_keras config`: a section of
the paper, Detectron (the authors' own code, for what the paper leaves open), or this project's own choice.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retinanet_keras import config_schema
from retinanet_keras.config_schema import setting
from retinanet_keras.errors import ConfigError
from retinanet_keras.storage import strict_json

VERSION = 1

OURS = "this project's choice"
DETECTRON = "Detectron: not in the paper"
MAX_PIXELS = 64_000_000  # per image; 3 bytes each when decoded, 9 in progressive JPEGs


@dataclass(frozen=True)
class AnchorConfig:
    """§4, Anchors. An anchor of level l, scale k and ratio r has area (size * 2^l * 2^(k / scales))^2 and h / w = r."""

    size: float = setting(4.0, "§4: areas 32^2 to 512^2 on P3 to P7", "side of the first scale, in strides", above=0)
    scales: int = setting(3, "§4: sizes 2^0, 2^(1/3), 2^(2/3)", "scales 2^(k/scales) per octave", at_least=1)
    ratios: tuple[float, ...] = setting((0.5, 1.0, 2.0), "§4: ratios 1:2, 1:1, 2:1", "height over width", above=0)
    offset: float = setting(
        0.5,
        DETECTRON,
        "position of an anchor's center in its cell, in strides; 0 for Detectron2 and torchvision",
        at_least=0,
        at_most=1,
    )
    levels: str = setting(
        "pyramid",
        "§4",
        "features with anchors: P3 to P7; last: only the last ResNet layer, with all sizes",
        choices=("pyramid", "last"),
    )
    rounding: str = setting(
        "none",
        OURS,
        "rounding of anchors; cell: Detectron's, sides rounded at the size of a cell; integers: torchvision's",
        choices=("none", "cell", "integers"),
    )

    @property
    def per_cell(self) -> int:
        """A of the paper: anchors per position."""
        return self.scales * len(self.ratios) * (5 if self.levels == "last" else 1)


@dataclass(frozen=True)
class ShapesConfig:
    """Generated dataset of source `shapes`; written to `data.dir` once."""

    train_images: int = setting(1000, OURS, "images of the split `train`", at_least=1)
    val_images: int = setting(100, OURS, "images of the split `val`", at_least=1)
    test_images: int = setting(100, OURS, "images of the split `test`", at_least=1)
    side: int = setting(320, OURS, "longer side of the generated images, in pixels", at_least=64, at_most=4096)
    seed: int = setting(0, OURS, "another seed gives another dataset", at_least=0)
    objects: int = setting(
        12,
        OURS,
        "maximum number of objects in an image; the minimum is 1, except that every tenth image has none",
        at_least=1,
    )
    size: tuple[float, float] = setting(
        (25 / 320, 260 / 320), OURS, "range of the longer side of an object over that of the image", above=0, at_most=1
    )
    clutter: int = setting(4, OURS, "maximum number of shapes of no class in an image; the minimum is 1", at_least=1)


@dataclass(frozen=True)
class DataConfig:
    """Dataset, and how its images become network input."""

    source: str = setting("tfds", OURS, "kind of dataset", choices=("coco", "shapes", "tfds"))
    dir: str = setting("data/tfds", OURS, "folder of the dataset, relative to the current folder")
    name: str = setting("coco/2017", OURS, "TFDS builder; source `tfds` only")
    annotations: str = setting(
        "annotations/instances_{split}.json", "COCO's layout", "annotation file in `dir`, {split} filled in"
    )
    images: str = setting("images", OURS, "image folder in `dir`; may contain {split}")
    train_split: str = setting("trainval35k", "§5", "split trained on")
    val_split: str = setting("minival", "§5", "split evaluated during training")
    test_split: str = setting("", OURS, "split evaluated at the end; empty: `val_split`")
    keep_empty: bool = setting(False, DETECTRON, "whether to train on images without boxes, too")
    short_side: int = setting(800, "§5: s = 800", "length the shorter side is resized to, in pixels", at_least=32)
    max_side: int = setting(1333, DETECTRON, "cap on the longer side after resizing, in pixels", at_least=32)
    flip: float = setting(
        0.5, "§4.1: horizontal image flipping", "probability of a horizontal flip", at_least=0, at_most=1
    )
    vertical_flip: float = setting(0.0, "off in the paper", "probability of a vertical flip", at_least=0, at_most=1)
    scale_jitter: tuple[float, float] = setting(
        (1.0, 1.0), "off but in Table 2", "range of the random zoom around the training size", above=0
    )
    aspect_jitter: float = setting(
        1.0, "off in the paper", "largest random stretch of an image's aspect ratio, as a factor", at_least=1
    )
    color_jitter: float = setting(
        0.0,
        "off in the paper",
        "largest shift of brightness and of each channel, as a fraction of 255",
        at_least=0,
        at_most=1,
    )
    buckets: int = setting(
        3,
        OURS,
        "number of padded sizes in training, each one shape for XLA; Detectron pads each batch to its largest image",
        at_least=1,
        at_most=8,
    )
    decode: str = setting(
        "exact",
        OURS,
        "reduced: in training, JPEGs that shrink by 2 or more are decoded at 1/2, 1/4 or 1/8",
        choices=("exact", "reduced"),
    )
    bad_images: str = setting(
        "stop",
        OURS,
        "on an unreadable image in training: stop and name it, or skip, count and replace it",
        choices=("stop", "skip"),
    )
    max_pixels: int = setting(
        MAX_PIXELS,
        OURS,
        "images with more pixels are rejected before decoding, in training, evaluation and detection",
        at_least=1,
        at_most=2**40,
    )
    shapes: ShapesConfig = field(default_factory=ShapesConfig)


@dataclass(frozen=True)
class ModelConfig:
    """§4. Backbone, feature pyramid and subnets."""

    backbone: str = setting(
        "resnet50",
        "§4.1; Table 2: ResNeXt-101-32x8d",
        "kind and depth of the ResNet",
        choices=("resnet18", "resnet50", "resnet101", "resnet152", "resnext101_32x8d"),
    )
    weights: str | None = setting(
        "imagenet",
        "§4.1: pre-trained on ImageNet1k",
        "backbone weights: imagenet, a .weights.h5 file, or null for random",
    )
    width: int = setting(64, "ResNet paper", "channels of the backbone's stem; others follow", at_least=8)
    norm: str = setting(
        "frozen",
        DETECTRON,
        "normalization in the backbone: batch statistics frozen or trained, or groups",
        choices=("frozen", "batch", "group"),
    )
    pixel_mean: tuple[float, float, float] = setting(
        (123.68, 116.779, 103.939), "§4.1: of the MSRA weights", "mean of the pixels, RGB; a weights file has its own"
    )
    freeze_at: int = setting(
        2, DETECTRON, "backbone stages not trained: 1 the stem, 2 res2 too, ... 5; 0 trains all", at_least=0, at_most=5
    )
    fpn_channels: int = setting(256, "§4: C = 256", "channels of the pyramid and the subnets", at_least=8)
    head_depth: int = setting(4, "§4: four 3x3 conv layers", "convolutions in each subnet before the last", at_least=0)
    prior: float = setting(0.01, "§4.1: pi = .01", "initial foreground probability", above=0, below=1)


@dataclass(frozen=True)
class TargetConfig:
    """§4, Anchors. Which anchors are positive, background or ignored."""

    positive_iou: float = setting(
        0.5, "§4: threshold of 0.5", "IoU from which an anchor is positive", above=0, at_most=1
    )
    negative_iou: float = setting(0.4, "§4: IoU in [0, 0.4)", "IoU below which it is background", at_least=0, at_most=1)
    low_quality: str = setting(
        "detectron",
        DETECTRON,
        "whether a box's best anchors are positive below the threshold",
        choices=("none", "detectron", "all"),
    )


@dataclass(frozen=True)
class LossConfig:
    """§3, §4.1. Losses."""

    kind: str = setting(
        "focal",
        "§3",
        "kind of the classification loss; focal_star: Appendix A, hinge: §5.1",
        choices=("focal", "cross_entropy", "focal_star", "hinge"),
    )
    alpha: float | None = setting(
        0.25, "§5.1, Table 1b: .25 for gamma 2", "weight of the rare class; null: no weight", at_least=0, at_most=1
    )
    gamma: float = setting(2.0, "§5.1, Table 1b", "focusing parameter; steepness of focal_star", at_least=0)
    star_beta: float = setting(1.0, "Appendix A, Table 3", "shift of focal_star")
    hinge_threshold: float = setting(0.5, OURS, "p_t from which the hinge loss is 0", above=0, at_most=1)
    box_beta: float = setting(0.11, DETECTRON, "where smooth L1 turns linear", above=0)
    box_weight: float = setting(1.0, DETECTRON, "weight of the box loss in the sum", at_least=0)
    normalizer: str = setting(
        "image",
        "§4.1: by the number of anchors assigned to a ground-truth box",
        "count per image, or per minibatch",
        choices=("image", "minibatch"),
    )


@dataclass(frozen=True)
class MiningConfig:
    """§5.1, Online Hard Example Mining: anchors that contribute to the classification loss."""

    batch_size: int = setting(0, "§5.1, Table 1d", "hardest anchors of an image; 0: all anchors, no mining", at_least=0)
    nms_iou: float = setting(
        0.5,
        "§5.1, Table 1d: .5 for the best",
        "anchors that overlap a harder one by more are suppressed",
        at_least=0,
        at_most=1,
    )
    ratio: int | None = setting(None, "§5.1: 1:3", "negatives per positive; null: no fixed ratio", at_least=1)


@dataclass(frozen=True)
class TrainConfig:
    """§4.1, Optimization."""

    iterations: int = setting(90_000, "§4.1", "total number of steps", at_least=1)
    batch_size: int = setting(16, "§4.1: 16 images per minibatch", "images per step, over all devices", at_least=1)
    optimizer: str = setting("sgd", "§4.1", "SGD with momentum, or AdamW", choices=("sgd", "adamw"))
    learning_rate: float = setting(0.01, "§4.1", "rate after warm-up, for `reference_batch` images per step", above=0)
    reference_batch: int | None = setting(
        16,
        "§4.1; the linear scaling rule is Detectron's",
        "the rate is scaled by batch_size / this, sgd only; null: learning_rate as it is",
        at_least=1,
    )
    schedule: str = setting(
        "step", "§4.1", "divide by 10 at `drops`, or follow a cosine to zero", choices=("step", "cosine")
    )
    drops: tuple[int, ...] = setting((60_000, 80_000), "§4.1", "steps at which the rate is divided by 10", at_least=1)
    warmup: int = setting(500, DETECTRON, "steps of linear warm-up from a third of the rate", at_least=0)
    momentum: float = setting(0.9, "§4.1", "momentum of SGD", at_least=0, below=1)
    weight_decay: float = setting(
        1e-4, "§4.1", "L2 in the gradient for sgd, decoupled for adamw; kernels only", at_least=0
    )
    bias_rate: float = setting(2.0, DETECTRON, "factor on the gradient of biases; sgd only", above=0)
    clip_norm: float | None = setting(
        None, "off in the paper", "cap on the global norm of the gradient of all images of a step", above=0
    )
    precision: str = setting(
        "float32",
        OURS,
        "precision of convolutions; losses, targets and weights are always float32",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
    )
    seed: int = setting(0, OURS, "seed of initialization, order and augmentation", at_least=0, at_most=2**32 - 1)
    checkpoint_every: int = setting(1000, OURS, "steps between checkpoints", at_least=1)
    keep_checkpoints: int = setting(3, OURS, "newest checkpoints kept", at_least=1)
    log_every: int = setting(20, OURS, "steps averaged in one row of log.csv", at_least=1)
    jit_compile: bool | str = setting(
        "auto", OURS, "XLA for forward and backward; auto: on for GPUs", choices=(True, False, "auto")
    )

    @property
    def scaled_rate(self) -> float:
        """The learning rate after warm-up, by the linear scaling rule where it applies."""
        if self.optimizer != "sgd" or self.reference_batch is None:
            return self.learning_rate
        return self.learning_rate * self.batch_size / self.reference_batch


@dataclass(frozen=True)
class StrategyConfig:
    """§4.1: synchronized SGD over 8 GPUs. Devices of the replicas of a run."""

    kind: str = setting(
        "auto",
        "§4.1",
        "auto: all visible GPUs, or else the default device; workers: several machines, by TF_CONFIG",
        choices=("auto", "default", "mirrored", "workers"),
    )
    replicas: int | None = setting(
        None,
        OURS,
        "replicas of mirrored, on this machine; null: all GPUs. Without GPUs, logical CPUs, for testing",
        at_least=1,
    )


@dataclass(frozen=True)
class DetectionConfig:
    """§4.1, Inference."""

    score_threshold: float = setting(0.05, "§4.1", "confidence a detection must exceed", at_least=0, at_most=1)
    pre_nms_top_k: int = setting(1000, "§4.1", "best predictions decoded per level", at_least=1, at_most=10**6)
    nms_iou: float = setting(0.5, "§4.1", "threshold of non-maximum suppression", at_least=0, at_most=1)
    max_detections: int = setting(100, DETECTRON, "detections kept per image", at_least=1, at_most=10**5)
    clip: str = setting(
        "before_nms",
        DETECTRON,
        "when boxes are clipped to the image; inclusive: Detectron's pixels, also before",
        choices=("before_nms", "after_nms", "inclusive"),
    )
    p7_threshold: float | None = setting(
        None, OURS, "score threshold on P7, if different (Detectron: 0)", at_least=0, at_most=1
    )
    pad_multiple: int = setting(32, OURS, "images are padded to multiples of this (Detectron: 128)", at_least=32)


@dataclass(frozen=True)
class EvalConfig:
    """When and how to evaluate."""

    batch_size: int = setting(8, OURS, "images per inference step", at_least=1)
    every: int = setting(10_000, OURS, "steps between evaluations on `val_split`; 0: none", at_least=0)
    keep: str = setting(
        "last", "§4.1: the trained model", "weights evaluated and exported at the end", choices=("last", "best")
    )
    pictures: int = setting(16, OURS, "number of images drawn", at_least=0, at_most=1000)
    library: str = setting(
        "pycocotools",
        "COCO's own",
        "evaluation library; hotcoco gives the same numbers, bit for bit, in less time",
        choices=("pycocotools", "hotcoco"),
    )


@dataclass(frozen=True)
class ServingConfig:
    """The SavedModel."""

    max_pixels: int = setting(
        MAX_PIXELS,
        OURS,
        "encoded images with more pixels are rejected by exports before decoding; 3 bytes each, 9 in progressive JPEGs",
        at_least=1,
        at_most=2**31 - 1,
    )
    license: str = setting("", OURS, "license of the weights, for the model card; empty: not stated")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-serializable dicts and lists, the inverse of `config_from_dict`."""
        return {"version": VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON file and apply overrides.

    Args:
        path: str or Path. The JSON file.
        overrides: sequence of str. Each `section.key=value`; the value is JSON, or a bare string.

    Returns:
        The Config.

    Raises:
        ConfigError: naming the file and key, what was expected, and the nearest valid key.
    """
    path = Path(path)
    try:
        tree = strict_json.read(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], 1, 0.4)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"No configuration at {path}.{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except strict_json.JsonError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object of sections, got {config_schema.show(tree)}")
    try:
        for override in overrides:
            config_schema.apply(Config, tree, override)
        return config_from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Build a Config from a dict as returned by `Config.to_dict`; missing keys get their defaults.

    Raises:
        ConfigError: as `load_config`.
    """
    tree = dict(tree)
    version = tree.pop("version", VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(f"version: expected a whole number from 1 to {VERSION}, got {config_schema.show(version)}")
    if version > VERSION:
        raise ConfigError(
            f"version: this configuration has version {config_schema.show(version)}; this release reads up to "
            f"{VERSION}. Upgrade retinanet_keras, or train with the release that wrote it."
        )
    config = config_schema.build(Config, tree)
    _check_together(config)
    return config


def _check_together(config: Config) -> None:
    """Check settings that depend on each other."""
    data, targets, train = config.data, config.targets, config.train
    if data.scale_jitter[0] > data.scale_jitter[1]:
        raise ConfigError(f"data.scale_jitter: expected the smaller factor first, got {list(data.scale_jitter)}")
    if data.shapes.size[0] > data.shapes.size[1]:
        raise ConfigError(f"data.shapes.size: expected the smaller fraction first, got {list(data.shapes.size)}")
    if config.anchors.levels == "last" and config.anchors.rounding != "none":
        raise ConfigError(
            f'anchors.rounding: expected "none" with anchors.levels "last", got "{config.anchors.rounding}"'
        )
    if "{split}" not in data.annotations:
        raise ConfigError(f"data.annotations: expected a name with {{split}} in it, got {data.annotations!r}")
    for key, text in (("data.annotations", data.annotations), ("data.images", data.images)):
        if any(part in text.replace("{split}", "") for part in "{}"):
            raise ConfigError(f"{key}: expected no other placeholder than {{split}}, got {text!r}")
    weights = config.model.weights
    if weights not in (None, "imagenet") and not weights.endswith(".weights.h5"):
        near = difflib.get_close_matches(weights, ["imagenet"], 1)
        hint = ' Did you mean "imagenet"?' if near else ""
        raise ConfigError(f'model.weights: expected "imagenet", null or a .weights.h5 file, got {weights!r}.{hint}')
    if targets.negative_iou > targets.positive_iou:
        raise ConfigError(
            f"targets.negative_iou: expected at most targets.positive_iou, {targets.positive_iou}, "
            f"got {targets.negative_iou}"
        )
    if config.loss.kind == "focal_star" and config.loss.gamma == 0:
        raise ConfigError("loss.gamma: expected a number above 0 with loss.kind focal_star, got 0")
    if config.mining.ratio and not config.mining.batch_size:
        raise ConfigError("mining.ratio: expected mining.batch_size above 0, which turns mining on; got 0")
    if config.detection.pad_multiple % 32:
        raise ConfigError(f"detection.pad_multiple: expected a multiple of 32, got {config.detection.pad_multiple}")
    strategy = config.strategy
    if strategy.replicas and strategy.kind != "mirrored":
        raise ConfigError(f'strategy.replicas: expected strategy.kind "mirrored", got "{strategy.kind}"')
    if list(train.drops) != sorted(set(train.drops)):
        raise ConfigError(f"train.drops: expected increasing steps, got {list(train.drops)}")
    model = config.model
    if model.weights == "imagenet" and (
        model.backbone in ("resnet18", "resnext101_32x8d") or model.norm != "frozen" or model.width != 64
    ):
        raise ConfigError(
            'model.weights: "imagenet" exists for resnet50, resnet101 and resnet152 with norm "frozen" and width 64; '
            f"got {model.backbone}, {model.norm}, {model.width}. "
            "For training from random weights set model.weights=null"
        )
