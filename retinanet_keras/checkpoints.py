"""Load released weights of other frameworks into a RetinaNet that gives the same detections.

Detectron's `.pkl` (the authors' own), Detectron2's `.pkl` and `.pth`, torchvision's `.pth` (both versions), and the
same names in an `.npz`. What weights can express goes into the weights: BGR order and the division of pixels, the order
of anchors in a cell, 80 of torchvision's 91 classes. The rest are settings of the model: the pixels' mean, the anchors'
rounding and offset, where a stage has its stride, the epsilon, P6's source, normalization in the subnets, thresholds
and clipping.

Boxes are continuous, as everywhere in this package: Detectron's x2, the last pixel of a box, is one less.
"""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from retinanet_keras import anchors, backbone
from retinanet_keras.errors import UserError
from retinanet_keras.model import RetinaNet
from retinanet_keras.weights import imagenet, layouts, reader

BACKBONES = {blocks: name for name, blocks in backbone.DEPTHS.items() if name not in ("resnet18", "resnext101_32x8d")}
PER_CELL = 9  # anchors of all three frameworks
Weights = Mapping[str, npt.NDArray]  # of a file, by name
COUNTER = ".num_batches_tracked"  # of PyTorch's batch normalization; not used in inference


def load(path: str | PathLike, categories: list[dict[str, Any]] | None = None) -> RetinaNet:
    """Load a released file into a RetinaNet that is built as the file's framework builds it.

    The model is for inference or further training; its backbone's batch normalization, stem and res2 are frozen.

    Args:
        path: str or path of the file.
        categories: list of dicts {"label", "id", "name"}, or None. None: COCO's for 80 classes, and for 91 classes of
            torchvision, of which the model has the 80 in use; else the labels themselves, "class 0" and so on.

    Raises:
        UserError: If the file cannot be read, has an unknown layout, or has entries that are unknown, missing or of
            another shape; the message lists them by name.
    """
    return _retinanet_of(path, reader.read(path), categories)


def _retinanet_of(path: str | PathLike, weights: Weights, categories: list[dict[str, Any]] | None) -> RetinaNet:
    layout = next((one for one in layouts.LAYOUTS if any(name.startswith(one.mark) for name in weights)), None)
    if layout is None:
        hint = (
            "It is a backbone alone: convert it, and name the result in model.weights."
            if _is_backbone(weights)
            else "Files of Detectron, Detectron2 and torchvision are known."
        )
        raise UserError(f"{path} holds no RetinaNet: {_some(weights)}. {hint}")
    source = _Source(path, layout, weights)
    blocks, depth = layouts.find_blocks(layout, weights), layouts.find_depth(layout, weights)
    names = {**layouts.backbone_names(layout, blocks), **layouts.head_names(layout, blocks, depth, weights)}
    kernel, bias = layout.suffixes
    final = names["class_final"][0]
    channels = source.side(final + bias, 0, PER_CELL * len(layouts.COCO_CATEGORIES), PER_CELL)
    classes = source.side(final + kernel, 0, channels, PER_CELL) // PER_CELL
    kept = list(layouts.COCO_CATEGORIES) if layout is layouts.TORCHVISION and classes == layouts.COCO_SLOTS else None
    if categories is None:
        coco = kept or classes == len(layouts.COCO_CATEGORIES)
        named = layouts.COCO_CATEGORIES if coco else {label: f"class {label}" for label in range(classes)}
        categories = [{"label": i, "id": id_, "name": name} for i, (id_, name) in enumerate(named.items())]
    width = source.side(names["stem"][0] + kernel, 0, 64)
    channels = source.side(names["lateral5"][0] + kernel, 0, 256)
    # Batch normalization that is scale and shift alone has no epsilon of its own.
    epsilon = source.epsilon if len(layout.norm) == 4 else backbone.EPSILON
    model = RetinaNet(
        len(kept) if kept else classes, source.backbone_name(blocks, names), width=width, fpn_channels=channels,
        head_depth=depth, norm="frozen", freeze_at=2, norm_epsilon=epsilon,
        stride_in="3x3" if layout is layouts.TORCHVISION else None,
        p6_source="p5" if source.side(names["p6"][0] + kernel, 1, 8 * channels) == channels else "c5",
        head_norm="group" if depth and names["class0"][1] else None, pixel_mean=source.pixels("pixel_mean"),
        categories=categories, **layout.settings,
    )  # fmt: skip
    _fill_backbone(model.backbone, source, names)
    _fill_heads(model, source, names, classes, kept)
    source.check_cell_anchors(model.anchors)
    source.finish()
    return model


def load_backbone(path: str | PathLike) -> tuple[keras.Model, tuple[float, float, float]]:
    """Load one of Detectron's ImageNet files into a ResNet.

    Detectron2's copies of them, with the statistics of batch normalization, are read, too.

    Returns:
        (a `backbone.resnet`, the pixel mean, RGB, that it expects).

    Raises:
        UserError: As for `load`.
    """
    return _backbone_of(path, reader.read(path))


def _backbone_of(path: str | PathLike, weights: Weights) -> tuple[keras.Model, tuple[float, float, float]]:
    if not _is_backbone(weights):
        raise UserError(f"{path} holds no backbone with Detectron's names: {_some(weights)}")
    source = _Source(path, layouts.imagenet(weights), weights)
    blocks = layouts.find_blocks(source.layout, weights)
    names = layouts.backbone_names(source.layout, blocks)
    kind = source.backbone_name(blocks, names)
    model = backbone.resnet(kind, width=source.side("conv1_w", 0, 64), norm="frozen")
    _fill_backbone(model, source, names)
    source.finish()
    return model, source.layout.pixel_mean


def convert(path: str | PathLike, out: str | PathLike) -> str:
    """Convert a released file to Keras's format; a file that is replaced stays until the new one is complete.

    Args:
        path: str or path of a file for `load` or `load_backbone`.
        out: str or path of the new file: .keras for a RetinaNet; .weights.h5 for a backbone, for `model.weights`.

    Returns:
        One line that says what was converted.
    """
    weights = reader.read(path)
    alone = _is_backbone(weights)
    suffix = ".weights.h5" if alone else ".keras"
    if not str(out).endswith(suffix):
        what = "a backbone" if alone else "a RetinaNet"
        raise UserError(f"{out}: {path} holds {what}, which is written to a file that ends in {suffix}")
    _make_folder_of(Path(out))
    if alone:
        model, mean = _backbone_of(path, weights)
        imagenet.save(model, out, mean)
        return f"a {model.name} trained on ImageNet, written to {out}"
    model = _retinanet_of(path, weights, None)
    model.save(out)  # type: ignore[call-arg, arg-type]  # mypy takes what functools.wraps gives for no method
    return f"a RetinaNet of {model.num_classes} classes on {model.backbone.name}, written to {out}"


def _make_folder_of(out: Path) -> None:
    """Create the folder of a file that will be written."""
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name the file to write in it")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{out} cannot be written: a file is in the way of its folder. Choose another place") from None


def _is_backbone(weights: Iterable[str]) -> bool:
    return "conv1_w" in weights and not any(name.startswith(layouts.DETECTRON.mark) for name in weights)


class _Source:
    """A file's entries, each of which must be used; what does not fit is collected and reported at the end."""

    def __init__(self, path: str | PathLike, layout: layouts.Layout, weights: Weights) -> None:
        self.path, self.layout, self.weights = path, layout, weights
        self.taken: set[str] = set()
        self.missing: list[str] = []
        self.misshaped: list[str] = []

    def take(self, name: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """An entry as float32, or zeros where it is missing or has another shape."""
        self.taken.add(name)
        value = self.weights.get(name)
        if value is None:
            self.missing.append(name)
        elif value.shape != tuple(shape):
            self.misshaped.append(f"{name} is {list(value.shape)}, expected {list(shape)}")
        else:
            return value.astype("float32")
        return np.zeros(shape, "float32")

    def side(self, name: str, axis: int, usual: int, multiple: int = 1) -> int:
        """The length of an entry's axis, from which a setting follows; the usual one where that cannot be."""
        shape = self.weights[name].shape if name in self.weights else ()
        return shape[axis] if len(shape) > axis and shape[axis] and shape[axis] % multiple == 0 else usual

    def backbone_name(self, blocks, names):
        """The name of the ResNet that has these blocks."""
        if blocks not in BACKBONES:
            known = ", ".join(f"{name} {list(counts)}" for counts, name in BACKBONES.items())
            raise UserError(
                f"{self.path}: {self.layout.name}'s backbone has {list(blocks)} blocks in res2 to res5; known: {known}"
            )
        conv = names["res2_0_conv2"][0] + self.layout.suffixes[0]
        grouped = self.side(conv, 1, 64) < self.side(conv, 0, 64)
        return "resnext101_32x8d" if grouped and blocks == backbone.DEPTHS["resnext101_32x8d"] else BACKBONES[blocks]

    @property
    def epsilon(self):
        """Of batch normalization."""
        # torchvision sets that of its first released weights, whose statistics are frozen, to 0.
        frozen = not any(name.endswith(COUNTER) for name in self.weights)
        return 0.0 if self.layout is layouts.TORCHVISION and frozen else self.layout.norm_epsilon

    def pixels(self, name):
        """The pixel mean or standard deviation, RGB; older files of Detectron2 have their own."""
        if name not in self.weights or self.layout is not layouts.DETECTRON2:
            return getattr(self.layout, name)
        return tuple(float(v) for v in self.take(name, (3, 1, 1))[::-1, 0, 0])

    def check_cell_anchors(self, config):
        """Older files of Detectron2 have their anchors: they must be those of its configuration."""
        for level, stride in enumerate(anchors.STRIDES):
            name = f"anchor_generator.cell_anchors.{level}"
            if self.layout is layouts.DETECTRON2 and name in self.weights:
                expected = anchors.cell_anchors(stride, config)
                if not np.allclose(self.take(name, expected.shape), expected, atol=0.01):
                    self.misshaped.append(f"{name} holds other anchors than Detectron2's configuration of RetinaNet")

    def finish(self) -> None:
        """Raise a UserError if anything does not fit."""
        beginnings = tuple(extra for extra in self.layout.extras if extra.endswith((".", "/")))
        counters = {name.removesuffix(".weight") + COUNTER for name in self.taken}
        known = self.taken | counters | set(self.layout.extras)
        unknown = [name for name in self.weights if name not in known and not name.startswith(beginnings)]
        problems = [
            f"\n  {what}: {', '.join(names)}"
            for what, names in (("missing", self.missing), ("unknown", unknown), ("of another shape", self.misshaped))
            if names
        ]
        if problems:
            raise UserError(
                f"{self.path} is laid out as {self.layout.name}'s, but not all of it fits.{''.join(problems)}"
            )


def _fill_backbone(model, source, names):
    """Kernels and batch normalization of every convolution of a `backbone.resnet`."""
    for part, (conv, norm) in names.items():
        if part != "stem" and not part.startswith("res"):
            continue
        layer = model.get_layer(part)
        kernel = _kernel(source, conv, layer.kernel.shape)
        if part == "stem":
            if source.layout.bgr:
                kernel = kernel[:, :, ::-1]
            ratio = np.float32(backbone.STD) / np.float32(source.pixels("pixel_std"))
            kernel = kernel * ratio[None, None, :, None]
        layer.set_weights([kernel])
        layer = model.get_layer(f"{part}_norm")
        moments = [source.take(norm + suffix, layer.gamma.shape) for suffix in source.layout.norm]
        if len(moments) == 2:  # scale and shift: no mean, and a divisor of 1
            ones = np.ones_like(moments[0])
            moments += [0 * ones, ones]
        moments[3] = moments[3] + np.float32(source.epsilon - layer.epsilon)
        layer.set_weights(moments)


def _fill_heads(model, source, names, classes, kept):
    """The pyramid and the subnets; kept: the file's classes that the model has, or None for all of them."""
    layers = {f"lateral{name[1]}": layer for name, layer in model.pyramid.laterals.items()}
    layers |= {f"output{name[1]}": layer for name, layer in model.pyramid.outputs_.items()}
    layers |= {"p6": model.pyramid.p6, "p7": model.pyramid.p7}
    norms = {}
    for name, subnet in (("class", model.class_subnet), ("box", model.box_subnet)):
        layers |= {f"{name}{i}": layer for i, layer in enumerate(subnet.tower)}
        norms |= {f"{name}{i}": layer for i, layer in enumerate(subnet.norms)}
    for part, layer in layers.items():
        conv, norm = names[part]
        values = [_kernel(source, conv, layer.kernel.shape)]
        if layer.use_bias:
            values.append(source.take(conv + source.layout.suffixes[1], layer.bias.shape))
        layer.set_weights(values)
        if norm:
            norms[part].set_weights(
                [source.take(norm + suffix, layer.kernel.shape[-1:]) for suffix in source.layout.norm[:2]]
            )
    for part, subnet, values in (("class_final", model.class_subnet, classes), ("box_final", model.box_subnet, 4)):
        layer, conv = subnet.final, names[part][0]
        kernel = _kernel(source, conv, (*layer.kernel.shape[:3], PER_CELL * values))
        bias = source.take(conv + source.layout.suffixes[1], (PER_CELL * values,))
        chosen = kept if kept and part == "class_final" else range(values)
        rows = np.array([cell * values + value for cell in source.layout.cell for value in chosen])
        layer.set_weights([kernel[..., rows], bias[rows]])


def _kernel(source, conv, shape):
    """A convolution's kernel: [out, in, height, width] there, [height, width, in, out] here."""
    height, width, inputs, outputs = shape
    return source.take(conv + source.layout.suffixes[0], (outputs, inputs, height, width)).transpose(2, 3, 1, 0)


def _some(weights):
    names = list(weights)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more entries" if len(names) > 3 else "")
